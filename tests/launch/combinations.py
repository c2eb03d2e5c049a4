"""Combinations of program, ZeRO stage and options on tiny models: which there are, and how they are run.

    python -m tests.launch.combinations FOLDER [--strength 3]

Every pair of values of two factors (or every triple) stands in one of the runs at least. Each is held
against the same run in one plain process: same rows a step, same order of data, same sampling noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlhf.runs.tracking import read_metrics
from rlhf.startup import free_port
from tests.conftest import ROOT, make_model, make_tokenizer, random_adapter, random_reward
from tests.launch.conftest import flags_of, write_data

FACTORS: dict[str, list[Any]] = {
    "program": ["sft", "reward", "dpo", "ppo"],
    "zero": ["0", "1", "2", "3", "1 offload", "2 offload", "3 offload"],
    "weights": ["lora", "whole"],
    "accumulation": [1, 2],
    "checkpointing": [False, True],
    "dtype": ["float32", "bfloat16"],
}
ROWS, STEPS = 8, 3  # rows of a step over all ranks
# of PPO: what a rollout logs is a mean over its updates, and the first gradient is then that of the
# start; micro-batches of all rows are cut by `accumulation`, those of half would be whole
ONE_UPDATE = ("--num_ppo_epochs", 1, "--num_mini_batches", 1)
# program, ZeRO and weights of the runs that go on with another number of ranks
RESUMED = [
    ("sft", "1", "whole"),
    ("sft", "2", "lora"),
    ("sft", "3", "whole"),
    ("reward", "2", "lora"),
    ("dpo", "2 offload", "lora"),
    ("dpo", "3", "whole"),
    ("ppo", "0", "lora"),
    ("ppo", "2", "lora"),
    ("ppo", "3", "lora"),
    ("ppo", "3 offload", "lora"),
    ("ppo", "2", "whole"),
    ("ppo", "3", "whole"),
]
PLAIN = "plain"


def allowed(run: dict[str, Any]) -> bool:
    """Return whether a combination works: what does not is refused by `stages.check_zero`."""
    if run["weights"] != "whole" or run["dtype"] != "bfloat16":
        return True
    # a score head in float32 goes with ZeRO 0 alone, and copies in float32 with all but that
    refused = {"reward": run["zero"] != "0", "ppo": run["zero"] == "0"}
    return not refused.get(run["program"], False)


def candidates() -> list[dict[str, Any]]:
    """Return all combinations that work."""
    product = itertools.product(*FACTORS.values())
    return list(filter(allowed, (dict(zip(FACTORS, values, strict=True)) for values in product)))


def covering(strength: int = 2) -> list[dict[str, Any]]:
    """Return runs in which all values of any `strength` factors meet, where they may.

    Each run is the one with the most combinations that are new; of equals that with the rarest values, and
    then the first one in the order of the product.
    """
    possible = candidates()
    met = {id(run): set(combinations_of(run, strength)) for run in possible}
    left = set().union(*met.values())
    chosen: list[dict[str, Any]] = []
    uses: Counter = Counter()

    def worth(run: dict[str, Any]) -> tuple[int, int]:
        return len(met[id(run)] & left), -sum(uses[value] for value in run.items())

    while left:
        best = max(possible, key=worth)
        chosen.append(best)
        uses.update(best.items())
        left -= met[id(best)]
    return chosen


def combinations_of(run: dict[str, Any], strength: int) -> Iterable[tuple]:
    """Yield the values that meet in a run, `strength` factors at a time."""
    return itertools.combinations(run.items(), strength)


def whole_ppo() -> list[dict[str, Any]]:
    """Return PPO on whole weights in each dtype under each kind of ZeRO, the other factors by turns."""
    turns, runs = itertools.cycle([(1, False), (2, True), (1, True)]), []
    for zero, dtype in itertools.product(FACTORS["zero"], FACTORS["dtype"]):
        values = ("ppo", zero, "whole", *next(turns), dtype)
        runs.append(dict(zip(FACTORS, values, strict=True)))
    return list(filter(allowed, runs))


def prepare(folder: Path) -> None:
    """Write base, SFT adapter, reward model, data and DeepSpeed JSONs."""
    tokenizer = make_tokenizer()
    base = make_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    random_adapter(str(folder / "base"), folder / "sft", seed=1)
    random_reward(str(folder / "base"), folder / "reward", seed=2)
    write_data(folder)
    for zero in FACTORS["zero"]:
        settings = {"zero_optimization": zero_settings(zero)}
        json_file(folder, zero).write_text(json.dumps(settings))


def zero_settings(zero: str) -> dict[str, Any]:
    """Return the section `zero_optimization` for "2" or "2 offload"."""
    stage, *offload = zero.split()
    settings: dict[str, Any] = {"stage": int(stage)}
    if offload:
        settings["offload_optimizer"] = {"device": "cpu"}
    if stage == "3":
        # a tiny model would not be cut into parts at all
        settings["stage3_param_persistence_threshold"] = 0
        if offload:
            settings["offload_param"] = {"device": "cpu"}
    return settings


def json_file(folder: Path, zero: str) -> Path:
    return folder / f"zero{zero.replace(' ', '-')}.json"


def name_of(run: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "-") for value in run.values())


def plain_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return the run that one has to equal: in a plain process, whole batches, nothing recomputed."""
    return run | {"zero": PLAIN, "accumulation": 1, "checkpointing": False}


def plainest(program: str, zero: str, weights: str = "lora") -> dict[str, Any]:
    """Return a run with the other factors at their simplest."""
    rest = {"accumulation": 1, "checkpointing": False, "dtype": "float32"}
    return {"program": program, "zero": zero, "weights": weights} | rest


def arguments(
    folder: Path, output: Path, run: dict[str, Any], ranks: int, *more: Any, steps: int = STEPS
) -> list[str]:
    """Return the flags of a run on so many ranks; ROWS rows make a step on any number."""
    program, is_whole = run["program"], run["weights"] == "whole"
    start = folder / ("base" if program == "sft" or is_whole else "sft")
    data = folder / ("i.jsonl" if program == "sft" else "p.jsonl")
    given: dict[str, Any] = {
        "learning_rate": 1e-2,
        "dtype": run["dtype"],
        "gradient_checkpointing": run["checkpointing"],
        "per_device_train_batch_size": ROWS // ranks // run["accumulation"],
    }
    if run["zero"] != PLAIN:
        given["deepspeed"] = json_file(folder, run["zero"])
    if program == "ppo":
        given |= {"reward": f"[{{model: {folder}/reward}}]", "critic_trunk": "own"}
        given |= {"rollout_batch_size": ROWS, "total_episodes": ROWS * steps, "num_mini_batches": 2}
        if is_whole:
            # all of a whole model moves a policy farther
            given |= {"use_peft": False, "learning_rate": 1e-3}
    else:
        given |= {"max_steps": steps, "gradient_accumulation_steps": run["accumulation"]}
        given |= {"use_peft": not is_whole, "lora_r": 4}
    flags = [f"--{name}={value}" for name, value in given.items()]
    return [*flags_of(program, start, str(data), output), *flags, *map(str, more)]


def start(folder: Path, name: str, jobs: list[tuple[str, list[str]]], ranks: int) -> list[dict]:
    """Run programs one after the other in the same `ranks` ranks; 0: in one plain process.

    Returns what `many.py` has seen of each.
    """
    runs, seen = folder / f"{name}.json", folder / f"{name}.seen.json"
    runs.write_text(json.dumps([{"program": p, "arguments": flags} for p, flags in jobs]))
    command = [sys.executable]
    if ranks:
        launcher = str(Path(sys.executable).parent / "deepspeed")
        count = ["--num_accelerators", str(ranks), "--no_local_rank"]
        command = [launcher, *count, "--master_port", str(free_port())]
    command += [str(ROOT / "tests/launch/many.py"), str(runs), str(seen)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["RLHF_CACHE"] = str(folder / "cache")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    (folder / f"{name}.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(seen.read_text())


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    """Return all that a run has trained, its critic included, by file and name."""
    found = {}
    for file in sorted(output.glob("*.safetensors")) + sorted(output.glob("value/*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.relative_to(output)} {name}"] = tensor.double()
    return found


def compare(ours: Path, theirs: Path) -> dict[str, float]:
    """Return how far two results are apart.

    norm: the Euclidean norm of the difference of all weights, over that of the weights. largest: the
    largest difference of a weight. loss: the largest relative difference of a loss in the log. gradient:
    that of the first gradient norms. tokens: the share of characters of the last evaluation that differ.
    """
    one, other = weights_of(ours), weights_of(theirs)
    assert one.keys() == other.keys() and all(one[k].shape == other[k].shape for k in one)
    apart = math.sqrt(sum(float(((one[k] - other[k]) ** 2).sum()) for k in one))
    size = math.sqrt(sum(float((other[k] ** 2).sum()) for k in one))
    return {
        "norm": apart / size,
        "largest": max(float((one[k] - other[k]).abs().max()) for k in one),
        "loss": largest_difference(logged(ours, "loss/total"), logged(theirs, "loss/total")),
        "gradient": first_gradients(ours, theirs),
        "tokens": differing_tokens(ours, theirs),
    }


def logged(output: Path, name: str) -> list[float]:
    """Return the values of a metric in the order of steps."""
    rows = read_metrics(output / "metrics.jsonl")
    return [row[name] for row in rows if name in row]


def first_gradients(ours: Path, theirs: Path) -> float:
    """Return the largest relative difference of the gradient norms of a run's first step, before
    anything was learnt; PPO's by role. NaN where there are none, as under ZeRO 0.
    """
    apart = []
    for name in ("grad/norm", "grad/norm_policy", "grad/norm_value"):
        one, other = logged(ours, name)[:1], logged(theirs, name)[:1]
        if one and other:
            apart.append(largest_difference(one, other))
    return max(apart, default=math.nan)


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference; a run that was resumed has the last steps alone."""
    pairs = zip(reversed(ours), reversed(theirs), strict=False)
    return max(abs(one - other) / max(abs(other), 1e-3) for one, other in pairs)


def differing_tokens(ours: Path, theirs: Path) -> float:
    """Return the share of characters of the last samples that differ; NaN where none were drawn."""
    texts = []
    for output in (ours, theirs):
        file = output / "tables" / "samples.jsonl"
        rows = read_metrics(file) if file.is_file() else []
        last = max((row["step"] for row in rows), default=0)
        texts.append([row["response"] for row in rows if row["step"] == last])
    if not any(map(len, texts[0])):
        return math.nan
    pairs = [
        a != b
        for one, other in zip(*texts, strict=True)
        for a, b in itertools.zip_longest(one, other)
    ]
    return sum(pairs) / max(1, len(pairs))


def run_table(folder: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run combinations on two ranks and their plain counterparts; return what `compare` finds of each,
    with its CPU seconds a rank.
    """
    prepare(folder)
    plains = list({name_of(plain_of(run)): plain_of(run) for run in runs}.values())
    start(folder, PLAIN, [table_job(folder, run, 1) for run in plains], 0)
    jobs = [table_job(folder, run, 2) for run in runs]
    rows = []
    for run, seen in zip(runs, start(folder, "two", jobs, 2), strict=True):
        assert seen["code"] == 0, f"{name_of(run)}: {seen['said'][-3000:]}"
        apart = compare(folder / name_of(run), folder / name_of(plain_of(run)))
        rows.append(run | apart | {"cpu": seen["cpu"]})
    return rows


def table_job(folder: Path, run: dict[str, Any], ranks: int) -> tuple[str, list[str]]:
    """Return program and flags of a run of the table."""
    more = ONE_UPDATE if run["program"] == "ppo" else ()
    return run["program"], arguments(folder, folder / name_of(run), run, ranks, *more)


def run_one_and_two(
    folder: Path, cases: list[tuple[str, str, int, tuple[Any, ...]]]
) -> list[dict[str, Any]]:
    """Run cases (program, name, steps, further flags) in one plain process and on two ranks under
    ZeRO-2; return what `compare` finds of each.
    """
    prepare(folder)
    for zero, ranks, count in ((PLAIN, 1, 0), ("2", 2, 2)):
        jobs = []
        for program, what, steps, more in cases:
            run, output = plainest(program, zero), folder / f"{ranks} {program} {what}"
            jobs.append((program, arguments(folder, output, run, ranks, *more, steps=steps)))
        start(folder, f"meaning {ranks}", jobs, count)
    rows = []
    for program, what, *_ in cases:
        apart = compare(folder / f"2 {program} {what}", folder / f"1 {program} {what}")
        rows.append({"program": program, "what": what} | apart)
    return rows


def run_begun(folder: Path) -> None:
    """Run what is in RESUMED on two ranks, with a checkpoint after the second step."""
    jobs = []
    for case in RESUMED:
        run = plainest(*case)
        more = ("--save_steps", 2, "--save_total_limit", 9)
        jobs.append((case[0], arguments(folder, folder / name_of(run), run, 2, *more)))
    start(folder, "begun", jobs, 2)


def run_resumed(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Let those checkpoints go on with so many ranks; return how far each is from the run that went
    on with two.
    """
    jobs, pairs = [], []
    for case in RESUMED:
        run = plainest(*case)
        begun, output = folder / name_of(run), folder / f"on-{ranks}" / name_of(run)
        step = "step-000002" if run["program"] == "ppo" else "checkpoint-2"
        more = ("--resume", begun / "checkpoints" / step)
        if run["program"] == "ppo":
            # its rows of a step do not depend on it, and it may not change
            more += ("--per_device_train_batch_size", ROWS // 2)
        jobs.append((case[0], arguments(folder, output, run, ranks, *more)))
        pairs.append((output, begun))
    start(folder, f"on {ranks}", jobs, ranks)
    found = [compare(*pair) for pair in pairs]
    return [
        plainest(*case) | {"ranks": ranks} | apart
        for case, apart in zip(RESUMED, found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strength", type=int, default=2)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = run_table(given.folder.resolve(), covering(given.strength))
    (given.folder / "table.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
