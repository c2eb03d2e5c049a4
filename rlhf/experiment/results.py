"""The files of measured responses, and all that an experiment has measured so far, as the statistics
read it.

OUT/measures/NAME/step-N.jsonl, so that anyone can read what was measured again:

    {"step", "numbers", "budget"}                                          the first line
    {"prompt", "sample", "response", "length", "ended", "kl", "scores"}    one for each response
"""

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf.compare.results import Results, mean_of, measured_point
from rlhf.errors import UserError
from rlhf.experiment.config import BEST_OF_N, ExperimentConfig
from rlhf.experiment.cost import shared_cost
from rlhf.experiment.plan import INITIAL
from rlhf.experiment.state import load_state
from rlhf.files import dumps, write_atomic
from rlhf.jobs.job import Job
from rlhf.jobs.state import PlanState, read_json
from rlhf.stats.best_of_n import best_of_n_kl

# the responses of the initial policy
INITIAL_FILE = "step-000000.jsonl"


def measures_of(config: ExperimentConfig, trial: str) -> Path:
    return Path(config.output_dir) / "measures" / trial


def rows_to_write(rows: list, samples: int, *, with_ids: bool) -> Iterator[dict]:
    """Yield the rows of an evaluation, which come prompt by prompt, as they are written."""
    names = ["sample", "response", "length", "ended", "kl", "scores"]
    if with_ids:
        names.append("ids")
    for number, row in enumerate(rows):
        own = {name: getattr(row, name) for name in names}
        yield {"prompt": number // samples, **own}


def write_rows(file: Path, step: int, rows: Iterable[dict], numbers: dict, budget: dict) -> None:
    head = {"step": step, "numbers": numbers, "budget": budget}
    write_atomic(file, "".join(f"{dumps(row)}\n" for row in [head, *rows]))


def read_rows(file: Path) -> tuple[dict, list[dict]]:
    """Return header and rows of a file of measured responses."""
    # not splitlines, which also breaks at other separators inside a response
    lines = file.read_text(encoding="utf-8").split("\n")
    head, *rows = [json.loads(line) for line in lines if line]
    # a part of a score that does not apply is written as "NaN"
    for row in rows:
        row["scores"] = {name: float(value) for name, value in row["scores"].items()}
    return head, rows


def write_prompts(folder: Path, encoded: list[dict]) -> None:
    """Write what was measured on; the same for every trial."""
    prompts = []
    for row in encoded:
        record = row["record"]
        metadata = {**record.metadata, "group": record.group}
        if record.voice:
            metadata["voice"] = record.voice
        prompts.append(
            {
                "prompt": record.prompt,
                "group": record.group,
                "ids": row["prompt_ids"],
                "metadata": metadata,
            }
        )
    write_atomic(
        folder / "prompts.json", json.dumps({"prompts": prompts}, ensure_ascii=False) + "\n"
    )


def check_same_prompts(config: ExperimentConfig, folder: Path) -> None:
    """Raise UserError if a trial was measured on other prompts than the initial policy."""
    first = measures_of(config, INITIAL) / "prompts.json"
    # byte for byte: both files are written by the same code
    if first.read_text() != (folder / "prompts.json").read_text():
        raise UserError(
            f"{folder}: not the test prompts that the initial policy was measured on ({first}). A run was trained on "
            "some of them, or the data has changed since: start the experiment in another --output_dir"
        )


def summary(file: Path, judge: str | None) -> dict[str, float | None]:
    """Return judge and KL of one measured policy, for the live table."""
    _, rows = read_rows(file)
    end = {"judge": None, "kl": sum(row["kl"] for row in rows) / len(rows)}
    if judge is not None:
        end["judge"] = sum(row["scores"][judge] for row in rows) / len(rows)
    return end


def best_of(rows: list[dict], n: int, samples: int) -> Iterator[dict]:
    """Yield the response with the highest proxy of each block of n responses to a prompt.

    Each prompt has `samples` blocks, after the first `samples` responses, which are the initial
    policy's own. The sequence KL to the initial policy is `best_of_n_kl`, the same for every
    response.
    """

    def proxy(row: dict) -> float:
        return row["scores"]["proxy"]

    by_prompt: dict[int, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["prompt"], row["sample"])):
        by_prompt.setdefault(row["prompt"], []).append(row)
    kl = best_of_n_kl(n)
    for own in by_prompt.values():
        for number, block in enumerate(blocks(n, samples)):
            best = max((own[sample] for sample in block), key=proxy)
            yield {**best, "sample": number, "kl": kl}


def blocks(n: int, samples: int) -> list[range]:
    """Return the initial policy's samples among which each of the `samples` best of n is chosen."""
    return [range(samples + block * n, samples + (block + 1) * n) for block in range(samples)]


def read_results(config: ExperimentConfig) -> Results:
    """Return what is measured completely and was made with these options; the rest is named in
    meta["left_out"].

    Raises UserError if not even the initial policy is measured.
    """
    state = load_state(config)
    names = measured_trials(state)
    if INITIAL not in names:
        raise UserError(
            f"{config.output_dir}: nothing is measured yet; rlhf experiment run begins with the "
            "initial policy"
        )
    initial = read_json(measures_of(config, INITIAL) / "done.json")
    kinds: dict[str, str] = dict(initial["kinds"])
    for name in sorted(names):
        kinds |= read_json(measures_of(config, name) / "done.json")["kinds"]
    prompts = json.loads((measures_of(config, INITIAL) / "prompts.json").read_text())["prompts"]

    measured = []
    for about, file in policy_files(config, names, state.jobs):
        measured.append((about, *read_rows(file)))
    # parts of a score that do not apply everywhere have no mean that could be compared
    every_row = list(chain.from_iterable(own for *_, own in measured))
    for name in every_row[0]["scores"]:
        if finite(every_row, name):
            kinds.setdefault(name, "other")

    points = []
    for about, head, own in measured:
        # of equally many responses of each policy: the initial policy has a pool of them, and
        # distinct-n falls with more
        own = [row for row in own if row["sample"] < config.samples_per_prompt]
        known = [name for name in kinds if name in own[0]["scores"]]
        about["budget"] = head["budget"]
        points.append(measured_point(own, known, len(prompts), head["numbers"], **about))
    costs = []
    for seed in config.seeds:
        if f"seed-{seed}/{INITIAL}" in names:
            costs.append(shared_cost(config, seed))
    return Results(
        points=points,
        groups=[prompt["group"] for prompt in prompts],
        prompts=[prompt["prompt"] for prompt in prompts],
        score_kinds=kinds,
        judge=initial["judge"],
        methods={name: method_of(config, name) for name in config.methods},
        shared_budget=mean_cost(costs),
        meta=meta_of(config, state),
    )


def measured_trials(state: PlanState) -> set[str]:
    """Return the trials whose measurements are done, as they are planned now."""
    names = set()
    for job in state.jobs:
        if job.measures and job.name in state.done:
            names.add(job.measures.trial)
    return names


def policy_files(
    config: ExperimentConfig, names: set[str], jobs: list[Job]
) -> Iterable[tuple[dict[str, Any], Path]]:
    """Yield what each measured policy is, and its file."""
    sft = {"method": "sft", "swept": None, "step": 0, "last": True}
    yield {**sft, "seed": None}, measures_of(config, INITIAL) / INITIAL_FILE
    for seed in config.seeds:
        trial = f"seed-{seed}/{INITIAL}"
        # without its initial policy a seed's proxies have nothing to be compared with
        if trial not in names:
            continue
        own = measures_of(config, trial)
        yield {**sft, "seed": seed}, own / INITIAL_FILE
        for n in config.best_of_n_sizes:
            about = {"method": BEST_OF_N, "swept": float(n), "step": n, "last": True, "seed": seed}
            about |= {"noise": blocks(n, config.samples_per_prompt)}
            yield about, own / f"best-of-{n:06d}.jsonl"
    for job in jobs:
        # measured with other options, or not yet
        if job.kind != "trial" or job.name not in names:
            continue
        own = measures_of(config, job.name)
        steps = read_json(own / "done.json")["files"]
        for file in steps:
            step = int(file.removesuffix(".jsonl").rpartition("-")[2])
            about = {"method": job.method, "swept": float(job.swept), "seed": job.seed}
            yield about | {"last": file == steps[-1], "step": step}, own / file


def finite(rows: list[dict], name: str) -> bool:
    """Return whether every response has this score, as a finite number."""
    return all(math.isfinite(row["scores"].get(name, math.nan)) for row in rows)


def method_of(config: ExperimentConfig, name: str) -> dict[str, Any]:
    spec = config.method_specs[name]
    return {
        "program": spec.program or name,
        "swept": spec.swept_option,
        "swept_values": list(map(float, spec.values)),
        "baseline": spec.program is None,
        "options": spec.options,
    }


def mean_cost(costs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the mean over seeds of each counter of each part."""
    means = {}
    for part in sorted(set().union(*costs)):
        means[part] = mean_of(cost.get(part, {}) for cost in costs)
    return means


def meta_of(config: ExperimentConfig, state: PlanState) -> dict[str, Any]:
    """Return all that is needed to repeat the experiment, and which of its jobs are missing."""
    done, missing, changed = {}, [], []
    data, rows, stopped, versions = {}, {}, {}, {}
    for job in state.jobs:
        record = state.record(job.name)
        if job.name not in state.done:
            # a record of other options: its results are there and cannot be used
            if record and record.get("fingerprint") != state.fingerprints[job.name]:
                changed.append(job.name)
            else:
                missing.append(job.name)
            continue
        done[job.name] = record
        if job.run_folder:
            result = read_json(Path(job.run_folder) / "result.json")
            versions = versions or result.get("versions", {})
            # a pilot tells what a step costs, and nothing that is reported
            if job.kind != "pilot":
                data[job.name], rows[job.name] = result.get("data", {}), result.get("rows", {})
                if result.get("stopped"):
                    stopped[job.name] = result["stopped"]
    # one version of the code, unless it changed while the experiment ran
    code = {json.dumps(record.get("code"), sort_keys=True) for record in done.values()}
    return {
        "name": Path(config.output_dir).name,
        "config": asdict(config),
        "budget": config.budget,
        "lengths": state.lengths,
        "code": sorted(code),
        "versions": versions,
        "hardware": f"{platform.platform()}, {os.cpu_count()} CPU cores",
        "data": data,
        "rows": rows,
        "stopped": stopped,
        "seconds": {name: done[name].get("seconds") for name in sorted(done)},
        "finished": max((record["finished"] for record in done.values()), default=None),
        "missing": missing,
        "left_out": changed,
    }
