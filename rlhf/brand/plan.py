"""The jobs of `rlhf brand run`: each a command that can be typed by hand.

OUT/prompts.jsonl      where templates make them
OUT/answers.db         answers of the base
OUT/pairs.jsonl        pairs by the voice; OUT/checked.jsonl as votes on some of them (OUT/check.db) leave them
OUT/METHOD/            the adapter
OUT/ab.db              answers of base and adapter to test prompts, and votes
OUT/measures.json      what was forgotten
OUT/report.md, OUT/verdict.json
OUT/export/FORM/       where it ships
OUT/check.people.json, OUT/ab.people.json      the state of the store (its event) at which people had judged enough
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.brand.config import BrandConfig, dpo_defaults
from rlhf.experiment.plan import flags, weights_of
from rlhf.jobs.job import Job
from rlhf.values import read_yaml

# options that several commands share
SPLITS = ("validation_fraction", "test_fraction")
LENGTHS = ("max_prompt_length", "max_response_length")
VERDICT_FILES = ("report.md", "verdict.json")


def plan(config: BrandConfig, events: dict[str, int], *, ships: bool = False) -> list[Job]:
    """Return the jobs in order, as far as they are known.

    events: by store ("check", "ab"), its event at which people had judged enough; without it the
    plan ends before what needs their votes. ships: the export follows.
    """
    jobs = prompt_jobs(config)
    # PPO samples its own answers while it trains
    if config.method == "dpo":
        jobs += pair_jobs(config, events)
        if config.check == "people" and "check" not in events:
            return jobs
    jobs += [train_job(config), *ab_jobs(config), measure_job(config)]
    if config.votes == "people" and "ab" not in events:
        return jobs
    jobs.append(verdict_job(config, events))
    if ships and config.export != "none":
        jobs.append(export_job(config))
    return jobs


def waits_for(config: BrandConfig, events: dict[str, int]) -> str | None:
    """Return the store, "check" or "ab", that people have to judge before the plan can go on."""
    if config.method == "dpo" and config.check == "people" and "check" not in events:
        return "check"
    return "ab" if config.votes == "people" and "ab" not in events else None


def prompt_jobs(config: BrandConfig) -> list[Job]:
    """Return the job that makes prompts; none where they are given."""
    if not config.templates:
        return []
    output = f"{config.output_dir}/prompts.jsonl"
    return [
        rlhf_job(
            "prompts",
            "prompts from templates",
            ["brand", "prompts"],
            {"templates": config.templates, "output": output, "seed": config.seed},
            outputs=[output],
        )
    ]


def pair_jobs(config: BrandConfig, events: dict[str, int]) -> list[Job]:
    """Return the jobs that make pairs, and have some of them checked."""
    out = config.output_dir
    store, output = f"{out}/answers.db", f"{out}/pairs.jsonl"
    answers = {
        "model_name_or_path": config.model_name_or_path,
        "data": prompts_of(config),
        "store": store,
        # the command wants two to compare; one is enough beside its rewriting
        "samples_per_prompt": max(2, config.samples_per_prompt),
        "temperature": [config.temperature],
        **sampling(config, config.n_prompts),
    }
    pairs = {
        "answers": store,
        "voice": config.voice,
        "judge": config.judge,
        "margin": config.margin,
        "rewrite": config.rewrite,
        "refusal_phrases": config.refusal_phrases,
        "output": output,
    }
    jobs = [
        store_job(config, "answers", "answers of the base", answers),
        rlhf_job(
            "pairs",
            "pairs by the voice",
            ["brand", "pairs"],
            pairs,
            needs=["answers"],
            reads=[config.voice],
            outputs=[output],
        ),
    ]
    return jobs if config.check == "none" else jobs + check_jobs(config, events)


def check_jobs(config: BrandConfig, events: dict[str, int]) -> list[Job]:
    """Return the jobs of the check: a store with some pairs, votes of simulated annotators where
    they are asked, the pairs as votes leave them.
    """
    out = config.output_dir
    store, output = f"{out}/check.db", f"{out}/checked.jsonl"
    options = {
        # the answers of the pairs themselves, not new ones of the base
        "model_name_or_path": f"{out}/pairs.jsonl",
        "data": [f"{out}/pairs.jsonl"],
        "store": store,
        **sampling(config, config.check_pairs),
    }
    jobs = [store_job(config, "check", "pairs to be checked", options, needs=["pairs"])]
    if config.check == "simulated":
        jobs.append(votes_job(config, "check-votes", store, ["check"]))
    elif "check" not in events:
        return jobs
    options = {
        "pairs": f"{out}/pairs.jsonl",
        "votes": at_event(store, events.get("check")),
        "output": output,
    }
    jobs.append(
        rlhf_job(
            "checked",
            "the pairs as votes leave them",
            ["brand", "checked"],
            options,
            needs=["pairs", jobs[-1].name],
            outputs=[output, f"{output}.check.json"],
        )
    )
    return jobs


def train_job(config: BrandConfig) -> Job:
    """Return the job that trains the adapter."""
    folder = run_folder(config)
    given = dict(config.train)
    file = given.pop("config", None)
    options: dict[str, Any] = {
        "model_name_or_path": config.model_name_or_path,
        "data": [training_file(config)] if config.method == "dpo" else prompts_of(config),
        "output_dir": folder,
        "seed": config.seed,
        # the A/B samples from the adapter anyway
        "eval_prompts": 0,
        "temperature": config.temperature,
        **options_of(config, (*SPLITS, *LENGTHS)),
    }
    options |= dtype_of(config)
    if config.method == "dpo":
        of_file = read_yaml(file) if file else {}
        options |= dpo_defaults({**of_file, **given})
    else:
        reward = {"voice": config.voice}
        if config.judge:
            reward["judge"] = config.judge
        options["reward"] = [reward]
    # the file's options first, so that those given here replace them
    arguments, reads = [], []
    if file:
        arguments, reads = ["--config", file], [file]
    arguments += flags(options | given)
    reads += weights_of(config.model_name_or_path)
    # DPO sees the voice and the prompts through the pairs, whose job reads them
    if config.method == "ppo":
        reads += [config.voice, *config.prompts]
    return Job(
        name=config.method,
        program=f"launch.{config.method}",
        arguments=arguments,
        kind="brand",
        description=f"the adapter, by {config.method.upper()}",
        needs=before_training(config),
        reads=reads,
        outputs=[f"{folder}/result.json", f"{folder}/adapter_model.safetensors"],
        owned=[folder],
        run_folder=folder,
    )


def ab_jobs(config: BrandConfig) -> list[Job]:
    """Return the jobs of the blind A/B: answers of both, and votes of simulated annotators where
    they are asked.
    """
    store = f"{config.output_dir}/ab.db"
    options = {
        # base first, as reports show them
        "runs": [config.model_name_or_path, run_folder(config)],
        "split": "test",
        "data": prompts_of(config),
        "store": store,
        "temperature": [config.temperature],
        **sampling(config, config.test_prompts),
    }
    jobs = [store_job(config, "ab", "answers of base and adapter", options, needs=[config.method])]
    if config.votes == "simulated":
        jobs.append(votes_job(config, "ab-votes", store, ["ab"]))
    return jobs


def measure_job(config: BrandConfig) -> Job:
    output = f"{config.output_dir}/measures.json"
    options = {
        "model_name_or_path": config.model_name_or_path,
        "run": run_folder(config),
        "texts": config.texts,
        "task": config.task,
        "output": output,
        "batch_size": config.batch_size,
        **dtype_of(config),
        **options_of(config, LENGTHS),
    }
    return rlhf_job(
        "measure",
        "what was forgotten",
        ["brand", "measure"],
        options,
        needs=[config.method],
        reads=[*config.texts, *config.task],
        outputs=[output],
    )


def verdict_job(config: BrandConfig, events: dict[str, int]) -> Job:
    out = config.output_dir
    options: dict[str, Any] = {
        "votes": at_event(f"{out}/ab.db", events.get("ab")),
        "model_name_or_path": config.model_name_or_path,
        "run": run_folder(config),
        "voice": config.voice,
        "judge": config.judge,
        "measures": f"{out}/measures.json",
        "gates": config.gates,
        "refusal_phrases": config.refusal_phrases,
        "output_dir": out,
        **options_of(config, SPLITS),
    }
    if config.method == "dpo":
        options["training"] = training_file(config)
    # votes of people come to the store without a job
    voted = "ab-votes" if config.votes == "simulated" else "ab"
    return rlhf_job(
        "verdict",
        "every gate",
        ["brand", "verdict"],
        options,
        needs=[voted, "measure"],
        reads=[config.voice],
        outputs=[f"{out}/{name}" for name in VERDICT_FILES],
    )


def export_job(config: BrandConfig) -> Job:
    folder = f"{config.output_dir}/export/{config.export}"
    job = rlhf_job(
        "export",
        "the adapter for other programs",
        ["export"],
        {"run": run_folder(config), "to": config.export, "out": folder},
        needs=["verdict"],
        outputs=[f"{folder}/export.json"],
    )
    # the command refuses a folder that exists
    job.owned, job.fresh = [folder], True
    return job


def rlhf_job(
    name: str,
    description: str,
    command: list[str],
    options: dict[str, Any],
    *,
    outputs: list[str],
    needs: list[str] | None = None,
    reads: list[str] | None = None,
) -> Job:
    """Return the job of a command of `rlhf`, which owns what it writes."""
    # what is not set is not said, so that commands read as one would type them
    given = {name: value for name, value in options.items() if value not in (None, [], {})}
    return Job(
        name=name,
        program="rlhf",
        arguments=[*command, *flags(given)],
        kind="brand",
        description=description,
        needs=needs or [],
        reads=reads or [],
        outputs=outputs,
        owned=outputs,
    )


def store_job(
    config: BrandConfig,
    name: str,
    description: str,
    options: dict[str, Any],
    needs: list[str] | None = None,
) -> Job:
    """Return the job that samples into a store."""
    # votes in another state of the store would be counted as of this one
    owned = [*store_files(options["store"]), people_file(config, name)]
    if not needs:
        needs = ["prompts"] if config.templates else []
    job = rlhf_job(
        name,
        description,
        ["collect", "sample"],
        options,
        needs=needs,
        reads=[*config.prompts, *weights_of(config.model_name_or_path)],
        outputs=[options["store"]],
    )
    job.kind, job.owned, job.fresh = "sample", owned, True
    return job


def votes_job(config: BrandConfig, name: str, store: str, needs: list[str]) -> Job:
    """Return the job in which simulated annotators vote by the voice."""
    options = {
        "store": store,
        "voice": config.voice,
        "votes_per_pair": config.votes_per_pair,
        "seed": config.seed,
    }
    job = rlhf_job(
        name,
        "simulated annotators choose the better answer",
        ["sandbox", "annotate"],
        options,
        needs=needs,
        reads=[config.voice],
        outputs=[store],
    )
    job.kind, job.owned = "annotate", store_files(store)
    return job


def before_training(config: BrandConfig) -> list[str]:
    """Return the jobs whose results the training reads."""
    if config.method == "dpo":
        return ["pairs" if config.check == "none" else "checked"]
    return ["prompts"] if config.templates else []


def sampling(config: BrandConfig, prompts: int | None) -> dict[str, Any]:
    """Return the options of `rlhf collect sample` that all its jobs share."""
    own = options_of(config, (*LENGTHS, *SPLITS, "batch_size", "seed"))
    return {"prompts": prompts, **own, **dtype_of(config)}


def options_of(config: BrandConfig, names: Iterable[str]) -> dict[str, Any]:
    """Return these options, which the commands call by the same names."""
    return {name: getattr(config, name) for name in names}


def dtype_of(config: BrandConfig) -> dict[str, str]:
    """Return the option dtype where it is set: commands without it keep the fingerprints they had."""
    return {} if config.dtype == "auto" else {"dtype": config.dtype}


def prompts_of(config: BrandConfig) -> list[str]:
    return config.prompts or [f"{config.output_dir}/prompts.jsonl"]


def run_folder(config: BrandConfig) -> str:
    """Return the folder of the adapter."""
    return f"{config.output_dir}/{config.method}"


def training_file(config: BrandConfig) -> str:
    """Return the pairs that are trained on."""
    name = "pairs" if config.check == "none" else "checked"
    return f"{config.output_dir}/{name}.jsonl"


def store_files(store: str) -> list[str]:
    # SQLite's own files beside it hold what is not yet in it
    return [store, f"{store}-wal", f"{store}-shm"]


def at_event(store: str, event: int | None) -> str:
    return store if event is None else f"{store}@{event}"


def people_file(config: BrandConfig, store: str) -> str:
    return f"{config.output_dir}/{store}.people.json"


def read_events(config: BrandConfig) -> dict[str, int]:
    """Return the event of each store at which people had judged enough, where they have."""
    events = {}
    for store in ("check", "ab"):
        file = Path(people_file(config, store))
        if file.is_file():
            events[store] = json.loads(file.read_text(encoding="utf-8"))["event"]
    return events
