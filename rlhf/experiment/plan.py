"""From an experiment's options to its jobs: commands, what each needs, what each leaves, how it is recognised.

OUT/experiment.yaml             the resolved options
OUT/referee/                    where the experiment trains one
OUT/pilot/METHOD/               a few steps of each method, from which the matched lengths follow
OUT/seed-S/preferences.db       pairs, where they are sampled
OUT/seed-S/reward/              the reward model
OUT/seed-S/METHOD-STRENGTH/     one trial
OUT/measures/...                the responses of every policy with their measures
OUT/jobs/NAME.json, OUT/logs/   what is done, and what each program said
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import UserError, read_yaml
from rlhf.experiment.config import LENGTH, ExperimentConfig, sweep_of
from rlhf.files import model_files, scorer_files

PILOT_STEPS = {"dpo": 8, "ppo": 3}


@dataclass
class Job:
    """One program of the experiment."""

    name: str
    command: list[str]  # without what launches it
    needs: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)  # those of `needs` that only have to be there, whatever they are
    leaves: list[str] = field(default_factory=list)  # files that have to be there when it is done
    reads: list[str] = field(default_factory=list)  # files whose contents count
    folder: str | None = None  # where a training program writes its metrics
    steps: int | None = None  # how many it makes
    trial: tuple[str, float, int] | None = None  # method, strength, seed


def plan(config: ExperimentConfig, lengths: dict[str, int] | None) -> list[Job]:
    """The jobs in the order in which they are wanted. Trials follow once `lengths` (method -> steps) are known."""
    initial = measuring(config, "foundation", [])
    jobs = [] if config.train_referee else [initial]
    for seed in config.seeds:
        jobs += seed_jobs(config, seed)
        if seed == config.seeds[0] and config.train_referee:  # which may learn from this seed's pairs
            jobs.append(training(config, "referee", "reward", config.train_referee, seed + 1000, half="b"))
            jobs.append(initial)
        if seed == config.seeds[0] and config.matched:
            jobs += [pilot(config, name) for name in config.trained]
        if lengths is not None:
            jobs += [
                job
                for name in config.trained
                for swept in sweep_of(config.methods[name])[1]
                for job in trial(config, name, swept, seed, lengths[name])
            ]
        jobs.append(measuring(config, f"seed-{seed}/foundation", after_pairs(config, seed), seed))
    return jobs


def seed_jobs(config: ExperimentConfig, seed: int) -> list[Job]:
    """Pairs and reward model of one seed."""
    jobs, out = [], config.output_dir
    if "sample" in config.pairs:
        store = f"{out}/seed-{seed}/preferences.db"
        sample = ["rlhf", "collect", "sample", "--config", config.pairs["sample"]]
        sample += ["--model_name_or_path", config.foundation, "--data", ",".join(config.pairs["prompts"])]
        sample += ["--store", store, "--seed", str(seed), *flags(limits(config))]
        annotate = ["rlhf", "sandbox", "annotate", "--config", config.pairs["annotate"], "--store", store]
        reads = [config.pairs["sample"], *config.pairs["prompts"], *weights_of(config.foundation)]
        jobs.append(Job(f"seed-{seed}/sample", sample, leaves=[store], reads=reads))
        annotate += ["--seed", str(seed)]
        reads = [config.pairs["annotate"]]
        jobs.append(Job(f"seed-{seed}/annotate", annotate, [f"seed-{seed}/sample"], leaves=[store], reads=reads))
    if config.reward:
        jobs.append(training(config, f"seed-{seed}/reward", "reward", config.reward, seed))
    return jobs


def trial(config: ExperimentConfig, name: str, swept: float, seed: int, steps: int) -> list[Job]:
    """One run of a method, and its measuring."""
    method = config.methods[name]
    option = sweep_of(method)[0]
    every = method.get("eval_every") or math.ceil(steps / config.checkpoints)
    # an interrupted run leaves a checkpoint more, which must not push out one that is to be measured
    more = {option: swept, **length(method, steps), "save_steps": every, "save_total_limit": steps + 1}
    own = f"seed-{seed}/{name}-{option}-{swept:g}"
    run = training(config, own, method["program"], method, seed, more)
    run.steps, run.trial = steps, (name, swept, seed)
    return [run, measuring(config, own, [own, *after_pairs(config, seed)], seed)]


def pilot(config: ExperimentConfig, name: str) -> Job:
    """A few steps at the first strength, whose cost tells how many steps the budget allows."""
    method = config.methods[name]
    option, values = sweep_of(method)
    steps = PILOT_STEPS[method["program"]]
    more = {option: values[0], **length(method, steps), "save_steps": 0, "logging_steps": 1}
    return training(config, f"pilot/{name}", method["program"], method, config.seeds[0], more)


def training(
    config: ExperimentConfig,
    name: str,
    program: str,
    part: dict[str, Any],
    seed: int,
    more: dict[str, Any] | None = None,
    half: str | None = None,
) -> Job:
    """One of the four programs, with the options of its part of the experiment and those that are the same for all."""
    folder = f"{config.output_dir}/{name}"
    pairs_seed = config.seeds[0] if name == "referee" else seed
    reward = f"{config.output_dir}/seed-{seed}/reward"
    options: dict[str, Any] = {"model_name_or_path": config.foundation, "data": data_of(config, pairs_seed)}
    options |= {"output_dir": folder, "seed": seed, "half": half or ("a" if config.halves else "all"), **limits(config)}
    needs = after_pairs(config, pairs_seed, reward=False)
    if program != "reward":
        options |= {"eval_prompts": 0, "temperature": config.temperature}
    if program == "ppo":
        options |= {"reward": [{"model": "{reward}"}]} if config.reward else {}
        needs += [f"seed-{seed}/reward"] if config.reward else []
    options |= part.get("options", {}) | (more or {})
    command = [f"launch/{program}.py"]
    command += ["--config", part["config"]] if part.get("config") else []
    command += [word.replace("{reward}", reward) for word in flags(options)]
    given = [] if "sample" in config.pairs else config.pairs["data"]  # what a job makes counts as that job
    reads = [*([part["config"]] if part.get("config") else []), *given, *weights_of(config.foundation)]
    reads += [file for spec in part.get("options", {}).get("reward") or [] for file in files_of(spec)]
    return Job(name, command, needs, leaves=[f"{folder}/result.json"], reads=reads, folder=folder)


def measuring(config: ExperimentConfig, name: str, needs: list[str], seed: int | None = None) -> Job:
    """The measuring of a trial's policies, or of the foundation (and the best of n of its responses)."""
    command = ["rlhf", "experiment", "measure", config.output_dir, "--trial", name]
    # what decides how a policy is measured is not in the command but in experiment.yaml
    how = {n: getattr(config, n) for n in MEASURED_BY}
    own = [spec for n in config.trained for spec in config.methods[n].get("options", {}).get("reward") or []]
    if seed is not None and own:
        how["rewards"] = own
    if name == "foundation":
        how |= {"foundation": config.foundation, "pool": config.pool}
    elif name == f"seed-{seed}/foundation":
        how |= {"best_of_n": config.methods.get("best_of_n")}
    texts = [file for files in config.perplexity.values() for file in files]
    scorers = [*config.gold, *config.referee, *config.others, *(own if seed is not None else [])]
    reads = [*config.prompts, *texts, *(file for spec in scorers for file in files_of(spec))]
    referee = ["referee"] if config.train_referee else []
    first = ["measure/foundation"] if name != "foundation" else []
    return Job(
        f"measure/{name}",
        [*command, f"# {json.dumps(how, sort_keys=True)}"],
        [*needs, *referee, *first],
        after=first if name != f"seed-{seed}/foundation" else [],
        leaves=[f"{config.output_dir}/measures/{name}/done.json"],
        reads=[*reads, *(weights_of(config.foundation) if name == "foundation" else [])],
    )


def files_of(spec: dict[str, Any]) -> list[str]:
    """The files that a scorer's scores depend on."""
    return [str(path) for path in scorer_files(spec)]


def weights_of(initial: str) -> list[str]:
    """The files of a local foundation, whose contents decide whether a run starts from the same one."""
    return [str(path) for path in model_files(initial)]


MEASURED_BY = (
    *("prompts", "gold", "referee", "others", "perplexity", "n_prompts", "samples_per_prompt", "temperature"),
    *("max_prompt_length", "max_response_length", "validation_fraction", "test_fraction"),
)


def after_pairs(config: ExperimentConfig, seed: int, reward: bool = True) -> list[str]:
    """The jobs that make what the methods of this seed learn from."""
    made = [f"seed-{seed}/annotate"] if "sample" in config.pairs else []
    return made + ([f"seed-{seed}/reward"] if reward and config.reward else [])


def data_of(config: ExperimentConfig, seed: int) -> list[str]:
    return [f"{config.output_dir}/seed-{seed}/preferences.db"] if "sample" in config.pairs else config.pairs["data"]


def limits(config: ExperimentConfig) -> dict[str, Any]:
    """The options that are the same for every program, so that all see the same splits and lengths."""
    names = ("max_prompt_length", "max_response_length", "validation_fraction", "test_fraction", "on_error")
    return {name: getattr(config, name) for name in names}


def length(method: dict[str, Any], steps: int) -> dict[str, int]:
    """The option that makes a method take so many steps."""
    each = rollout_size(method) if method["program"] == "ppo" else 1
    return {LENGTH[method["program"]]: steps * each}


def rollout_size(method: dict[str, Any]) -> int:
    """Responses in a step of PPO, as the method's options or its file have it, else PPO's default."""
    from dataclasses import fields

    from rlhf.options.ppo import PPOConfig

    default = next(f.default for f in fields(PPOConfig) if f.name == "rollout_batch_size")
    given = read_yaml(method["config"]) if method.get("config") else {}
    return int(float((given | method.get("options", {})).get("rollout_batch_size", default)))


def given_length(method: dict[str, Any]) -> int:
    """Steps of a method whose budget is not matched: as its options or its file say. UserError if they do not."""
    name = LENGTH[method["program"]]
    given = (read_yaml(method["config"]) if method.get("config") else {}) | method.get("options", {})
    steps = int(float(given.get(name, -1))) // (rollout_size(method) if method["program"] == "ppo" else 1)
    if steps < 1:
        raise UserError(
            f"methods: how long '{method['program']}' trains is not known: give '{name}' in its options or file, or "
            "match a budget"
        )
    return steps


def flags(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line that rlhf.config.parse reads back as they were."""
    words = []
    for name, value in options.items():
        if value is None or isinstance(value, bool):
            value = str(value).lower()
        words += [f"--{name}", json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)]
    return words


def fingerprints(jobs: list[Job]) -> dict[str, str]:
    """name -> what the job is: its command, the contents of what it reads, and the jobs it stands on."""
    contents: dict[str, str] = {}
    result: dict[str, str] = {}
    for job in jobs:  # in order, so that what a job needs comes before it
        for file in job.reads:
            if file not in contents:
                contents[file] = sha256(file)
        record_dependency = [result[n] for n in job.needs if n not in job.after]
        about = [job.command, [contents[f] for f in job.reads], record_dependency]
        result[job.name] = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return result


def sha256(file: str) -> str:
    """Of a file's contents; of the name where it is none (a name on the Hub)."""
    if not Path(file).is_file():
        return f"name {file}"
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
