"""From an experiment's options to its jobs: commands, what each needs, what each leaves.

OUT/experiment.yaml             the resolved options
OUT/referee/                    where the experiment trains one
OUT/pilot/METHOD/               a few steps of each method, from which the matched lengths follow
OUT/seed-S/preferences.db       pairs, where they are sampled
OUT/seed-S/reward/              the reward model
OUT/seed-S/METHOD-OPTION-VALUE/ one trial
OUT/measures/...                the responses of every policy with their measures
OUT/jobs/NAME.json, OUT/logs/   what is done, and the output of each program
"""

import json
import math
from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

from rlhf.errors import UserError
from rlhf.experiment.config import BEST_OF_N, LENGTH_OPTION, ExperimentConfig, Method, Part
from rlhf.files import model_files, scorer_files
from rlhf.jobs.job import Job, Measurement
from rlhf.values import read_yaml

# the folder of the initial policy's measurements
INITIAL = "foundation"
PILOT_STEPS = {"dpo": 8, "ppo": 3}
# added to the first seed, so that the referee shares no noise with a reward model
REFEREE_SEED = 1000

# options of the experiment that decide what is measured and are in no command
MEASURED_BY = (
    "prompts",
    "gold",
    "referee",
    "others",
    "perplexity",
    "n_prompts",
    "samples_per_prompt",
    "temperature",
    "max_prompt_length",
    "max_response_length",
    "validation_fraction",
    "test_fraction",
)
# with the dtype, the same for every program, so that all see the same splits and lengths
LIMITS = (
    "max_prompt_length",
    "max_response_length",
    "validation_fraction",
    "test_fraction",
    "on_error",
)


def plan(config: ExperimentConfig, lengths: dict[str, int] | None) -> list[Job]:
    """Return the jobs in the order in which they are wanted; trials once `lengths` (method ->
    steps) are known.
    """
    initial = measuring(config, INITIAL, "initial", [])
    jobs = [] if config.train_referee else [initial]
    for seed in config.seeds:
        jobs += seed_jobs(config, seed)
        # pilots and the referee use what the first seed makes, so they come right after it
        if seed == config.seeds[0]:
            # it may learn from this seed's pairs
            if config.train_referee:
                jobs += [referee(config, seed), initial]
            if config.matched:
                jobs += [pilot(config, name) for name in config.trained]
        if lengths is not None:
            for name in config.trained:
                for swept in config.method_specs[name].values:
                    jobs += trial(config, name, swept, seed, lengths[name])
        jobs.append(
            measuring(config, f"seed-{seed}/{INITIAL}", "seed", made_before(config, seed), seed)
        )
    return jobs


def seed_jobs(config: ExperimentConfig, seed: int) -> list[Job]:
    """Return the jobs that make pairs and reward model of one seed."""
    jobs = sampling(config, seed) if "sample" in config.pairs else []
    if config.reward:
        part = Part.model_validate(config.reward)
        jobs.append(training(config, f"seed-{seed}/reward", "reward", "reward", part, seed))
    return jobs


def sampling(config: ExperimentConfig, seed: int) -> list[Job]:
    """Return the jobs that sample pairs and let simulated annotators vote on them."""
    store = f"{config.output_dir}/seed-{seed}/preferences.db"
    # votes are in the store of the samples, so both are remade together
    shared = {"outputs": [store], "owned": [store, f"{store}-wal", f"{store}-shm"], "seed": seed}
    options = {
        "config": config.pairs["sample"],
        "model_name_or_path": config.initial_policy,
        "data": ",".join(config.pairs["prompts"]),
        "store": store,
        "seed": seed,
        **limits(config),
    }
    sample = Job(
        name=f"seed-{seed}/sample",
        program="rlhf",
        arguments=["collect", "sample", *flags(options)],
        kind="sample",
        reads=[
            config.pairs["sample"],
            *config.pairs["prompts"],
            *weights_of(config.initial_policy),
        ],
        # the cost of sampling would be added to that in the store
        fresh=True,
        **shared,
    )
    options = {"config": config.pairs["annotate"], "store": store, "seed": seed}
    annotate = Job(
        name=f"seed-{seed}/annotate",
        program="rlhf",
        arguments=["sandbox", "annotate", *flags(options)],
        kind="annotate",
        needs=[sample.name],
        reads=[config.pairs["annotate"]],
        **shared,
    )
    return [sample, annotate]


def referee(config: ExperimentConfig, first_seed: int) -> Job:
    """Return the job that trains the referee, on the half of the groups that no method sees."""
    part = Part.model_validate(config.train_referee)
    return training(config, "referee", "referee", "reward", part, first_seed + REFEREE_SEED)


def pilot(config: ExperimentConfig, name: str) -> Job:
    """Return the job of a few steps at the first swept value, whose cost tells how many the budget
    allows.
    """
    method = config.method_specs[name]
    steps = PILOT_STEPS[method.program]
    more = {
        method.swept_option: method.values[0],
        **length_options(method, steps),
        "save_steps": 0,
        "logging_steps": 1,
    }
    job = training(config, f"pilot/{name}", "pilot", method.program, method, config.seeds[0], more)
    job.method = name
    return job


def trial(config: ExperimentConfig, name: str, swept: float, seed: int, steps: int) -> list[Job]:
    """Return one run of a method, and its measuring."""
    method = config.method_specs[name]
    every = method.eval_every or math.ceil(steps / config.checkpoints)
    more = {
        method.swept_option: swept,
        **length_options(method, steps),
        "save_steps": every,
        # an interrupted run leaves one checkpoint more, which must not push out one that is to be
        # measured
        "save_total_limit": steps + 1,
    }
    own = f"seed-{seed}/{name}-{method.swept_option}-{swept:g}"
    job = training(config, own, "trial", method.program, method, seed, more)
    job.method, job.swept, job.steps = name, swept, steps
    return [job, measuring(config, own, "trial", [own, *made_before(config, seed)], seed)]


def training(
    config: ExperimentConfig,
    name: str,
    kind: Literal["reward", "referee", "pilot", "trial"],
    program: str,
    part: Part,
    seed: int,
    more: dict[str, Any] | None = None,
) -> Job:
    """Return the job of a training program, with the options of its part and those that are the
    same for all.
    """
    folder = f"{config.output_dir}/{name}"
    # the referee's own seed has no pairs
    pairs_seed = config.seeds[0] if kind == "referee" else seed
    needs = made_before(config, pairs_seed, with_reward=program == "ppo")
    # without a referee nobody needs the other half
    half = "all"
    if config.train_referee:
        half = "b" if kind == "referee" else "a"

    store = f"{config.output_dir}/seed-{pairs_seed}/preferences.db"
    options: dict[str, Any] = {
        "model_name_or_path": config.initial_policy,
        "data": config.pairs.get("data") or [store],
        "output_dir": folder,
        "seed": seed,
        "half": half,
        **limits(config),
    }
    # the reward model samples nothing
    if program != "reward":
        options |= {"eval_prompts": 0, "temperature": config.temperature}
    if program == "ppo" and config.reward:
        options["reward"] = [{"model": "{reward}"}]
    options |= part.options | (more or {})
    arguments = ["--config", part.config] if part.config else []
    reward = f"{config.output_dir}/seed-{seed}/reward"
    arguments += [word.replace("{reward}", reward) for word in flags(options)]

    reads = [part.config] if part.config else []
    # pairs that a job makes count as that job
    reads += config.pairs.get("data", [])
    reads += weights_of(config.initial_policy)
    reads += files_of(part.options.get("reward") or [])
    return Job(
        name=name,
        program=f"launch.{program}",
        arguments=arguments,
        kind=kind,
        needs=needs,
        reads=reads,
        outputs=[f"{folder}/result.json"],
        owned=[folder],
        run_folder=folder,
        seed=seed,
    )


def measuring(
    config: ExperimentConfig,
    name: str,
    kind: Literal["initial", "seed", "trial"],
    needs: list[str],
    seed: int | None = None,
) -> Job:
    """Return the job that measures a trial's policies, or the initial policy (and the best of n of
    its responses).
    """
    # what decides the measurement is in no command, so it goes into the fingerprint
    settings = {option: getattr(config, option) for option in MEASURED_BY}
    learnt = config.learnt_scorers() if seed is not None else []
    # left out where there is none, as in fingerprints of earlier versions
    if config.dtype != "auto":
        settings["dtype"] = config.dtype
    if learnt:
        settings["rewards"] = learnt
    if kind == "initial":
        settings |= {"initial_policy": config.initial_policy, "pool": config.pool}
    elif kind == "seed":
        settings[BEST_OF_N] = config.methods.get(BEST_OF_N)

    reads = [*config.prompts, *chain.from_iterable(config.perplexity.values())]
    reads += files_of([*config.gold, *config.referee, *config.others, *learnt])
    if kind == "initial":
        reads += weights_of(config.initial_policy)
    # the initial policy's measurements have to be there for a trial's, whatever they are; a seed's
    # are made from them
    first = [] if kind == "initial" else [f"measure/{INITIAL}"]
    # the judge is there before anything is scored by it
    made = ["referee"] if config.train_referee else []
    folder = f"{config.output_dir}/measures/{name}"
    return Job(
        name=f"measure/{name}",
        program="rlhf",
        arguments=["experiment", "measure", config.output_dir, "--trial", name],
        kind="measure",
        needs=[*needs, *made, *first],
        after=first if kind == "trial" else [],
        reads=reads,
        outputs=[f"{folder}/done.json"],
        owned=[folder],
        seed=seed,
        measures=Measurement(name, kind, seed, settings),
    )


def files_of(scorers: list[dict[str, Any]]) -> list[str]:
    """Return the files that the scorers' scores depend on."""
    return list(map(str, chain.from_iterable(map(scorer_files, scorers))))


def weights_of(initial: str) -> list[str]:
    """Return the files of a local initial policy, whose contents decide whether a run starts from
    the same one.
    """
    return list(map(str, model_files(initial)))


def made_before(config: ExperimentConfig, seed: int, *, with_reward: bool = True) -> list[str]:
    """Return the jobs that make what the methods of this seed learn from."""
    made = [f"seed-{seed}/annotate"] if "sample" in config.pairs else []
    if with_reward and config.reward:
        made.append(f"seed-{seed}/reward")
    return made


def limits(config: ExperimentConfig) -> dict[str, Any]:
    """Return the options of LIMITS as the experiment has them, and its dtype where it is set."""
    options = {name: getattr(config, name) for name in LIMITS}
    # left out where each config decides, as in commands of earlier versions
    return options if config.dtype == "auto" else options | {"dtype": config.dtype}


def length_options(method: Method, steps: int) -> dict[str, int]:
    """Return the option that makes a method take this many steps."""
    return {LENGTH_OPTION[method.program]: steps * episodes_per_step(method)}


def episodes_per_step(method: Method) -> int:
    """Return the responses in a step of PPO, as the method's options or file have it, else PPO's
    default; 1 for DPO.
    """
    from rlhf.options.ppo import PPOConfig

    # a step of DPO is an optimizer step, and its length is given in those
    if method.program != "ppo":
        return 1
    size = given_options(method).get("rollout_batch_size", PPOConfig.rollout_batch_size)
    return int(float(size))


def given_length(method: Method) -> int:
    """Return the steps of a method whose budget is not matched. UserError if its options and file
    do not say.
    """
    name = LENGTH_OPTION[method.program]
    steps = int(float(given_options(method).get(name, -1))) // episodes_per_step(method)
    if steps < 1:
        raise UserError(
            f"methods: how long '{method.program}' trains is not known: give '{name}' in its options or file, or "
            "match a budget"
        )
    return steps


def given_options(part: Part) -> dict[str, Any]:
    """Return the options of a part: those of its file, replaced where it has its own."""
    of_file = read_yaml(part.config) if part.config else {}
    return of_file | part.options


def flags(options: dict[str, Any]) -> Iterator[str]:
    """Yield options as words of a command line that rlhf.config.parse reads back as they were."""
    for name, value in options.items():
        if isinstance(value, (dict, list)):
            text = json.dumps(value, ensure_ascii=False)
        # as YAML writes them
        elif value is None or isinstance(value, bool):
            text = str(value).lower()
        else:
            text = str(value)
        yield from [f"--{name}", text]
