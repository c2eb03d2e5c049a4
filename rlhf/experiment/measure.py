"""Measure the policies of one trial of an experiment on the test prompts, all by the same code.

Every method's policies get the same prompts, the same sampling noise, the same scorers and the same
estimator of KL.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.compare.runs import check_judges, load_policies, run_config, unseen
from rlhf.compare.text_metrics import encode_texts, perplexity, text_losses
from rlhf.config import option
from rlhf.data.load import load
from rlhf.data.records import Instruction, Prompt, Record, Samples, Scorer
from rlhf.data.split import first_by_hash
from rlhf.errors import UserError, did_you_mean
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.cost import cost_until
from rlhf.experiment.plan import INITIAL
from rlhf.experiment.results import (
    INITIAL_FILE,
    best_of,
    check_same_prompts,
    measures_of,
    read_rows,
    rows_to_write,
    summary,
    write_prompts,
    write_rows,
)
from rlhf.experiment.state import load_experiment, load_state
from rlhf.files import dumps, write_atomic
from rlhf.jobs.job import Measurement
from rlhf.runs.checkpoint import FOLDER
from rlhf.runs.tracking import read_metrics


@dataclass(kw_only=True)
class MeasureConfig:
    """Measure one trial of an experiment, or its initial policy; what `rlhf experiment run` calls."""

    experiment: str = option(help="the folder of the experiment")
    trial: str = option(
        help="a trial in it, such as seed-0/dpo-beta-0.1; foundation is the initial policy"
    )


def measure(asked: MeasureConfig, build_scorer: Callable[..., Scorer]) -> None:
    """Measure what is not measured yet and write done.json. `build_scorer(specs, tokenizer)` makes
    scorers.
    """
    from rlhf.startup import silence_libraries

    silence_libraries()
    config = load_experiment(asked.experiment)
    wanted = find_measurement(config, asked.trial)
    folder = measures_of(config, wanted.trial)
    folder.mkdir(parents=True, exist_ok=True)
    specs, kinds, judge = scores_of(config, wanted.seed)
    # the initial policy is sampled once: seeds differ in the reward model alone
    if wanted.kind == "seed":
        files = score_again(config, folder, specs, build_scorer)
    else:
        files = sample_policies(config, wanted, specs, build_scorer)
    # intervals pair the answers by prompt, so that another set would be compared row by row
    check_same_prompts(config, folder)

    # for the live table
    end = summary(files[-1], judge)
    result = {
        "finished": True,
        "trial": wanted.trial,
        "files": [file.name for file in files],
        "kinds": kinds,
        "judge": judge,
        "end": end,
    }
    write_atomic(folder / "done.json", dumps(result, indent=2) + "\n")
    print(f"{wanted.trial}: {len(files)} policies measured, the last: {end}")


def find_measurement(config: ExperimentConfig, trial: str) -> Measurement:
    """Return the measurement of this name in the plan. UserError if there is none."""
    planned = {}
    for job in load_state(config).jobs:
        if job.measures:
            planned[job.measures.trial] = job.measures
    if trial not in planned:
        raise UserError(
            f"{config.output_dir}: no trial '{trial}' is planned.{did_you_mean(trial, planned)} Trials: "
            f"{', '.join(planned)}"
        )
    return planned[trial]


def sample_policies(
    config: ExperimentConfig,
    wanted: Measurement,
    specs: list[dict],
    build_scorer: Callable[..., Scorer],
) -> list[Path]:
    """Sample from every policy of a trial (checkpoints and end), score, and write one file for
    each.
    """
    from tqdm import tqdm

    from rlhf.ranks.distributed import DistributedContext, own_device

    is_initial = wanted.kind == "initial"
    run_folder, folder = Path(config.output_dir) / wanted.trial, measures_of(config, wanted.trial)
    steps = {0: config.initial_policy} if is_initial else policies_of(run_folder)
    files = {step: folder / f"step-{step:06d}.jsonl" for step in steps}
    # a measuring that was cut off keeps the policies it has finished
    missing = [step for step in steps if not files[step].is_file()]
    if not missing:
        return list(files.values())

    # the initial policy is loaded first, as the reference of the KL
    paths = [config.initial_policy]
    if not is_initial:
        paths += [steps[step] for step in missing]
    records = test_prompts(config, paths)
    world = DistributedContext(device=own_device())
    policies = load_policies(
        paths, world.device, config.max_prompt_length, config.max_response_length, config.dtype
    )
    model, reference = policies[0]
    evaluation = make_evaluation(config, records, model, specs, build_scorer, is_initial=is_initial)
    write_prompts(folder, evaluation.prompts)
    texts = held_out_texts(config, evaluation.tokenizer)

    measured = policies if is_initial else policies[1:]
    total = len(missing) * len(evaluation.prompts) * evaluation.samples_per_prompt
    with tqdm(total=total, desc=f"measuring {wanted.trial}", unit="response", mininterval=5) as bar:
        for step, (own, context) in zip(missing, measured, strict=True):
            # the initial policy is a context of the same model, or a model of its own
            initial = reference if own is model else model
            rows = evaluation.run(own, context, initial, world, bar.update)
            numbers: dict[str, float] = {}
            for name, encoded in texts.items():
                pad_id = evaluation.tokenizer.pad_token_id
                losses = text_losses(
                    own, context, encoded, pad_id, world, batch_size=config.batch_size
                )
                numbers[f"perplexity/{name}"], numbers[f"perplexity_se/{name}"] = perplexity(losses)
            budget = {} if is_initial else cost_until(run_folder, step) | peak_memory(run_folder)
            # ids for what is to be scored again
            written = rows_to_write(rows, evaluation.samples_per_prompt, with_ids=is_initial)
            write_rows(files[step], step, written, numbers, budget)
    return list(files.values())


def test_prompts(config: ExperimentConfig, paths: list[str]) -> list[Prompt]:
    """Return the test prompts that none of these policies was trained on. UserError if a judge was
    learnt from.
    """
    # the initial policy itself has learnt from no scorer and no pairs
    if len(paths) > 1:
        check_judges(paths, **judges(config))
    return unseen(paths, load_test_split(config, config.prompts, Prompt), config.prompts)


def load_test_split(config: ExperimentConfig, data: list[str], kind: type[Record]) -> list[Any]:
    return load(
        data,
        kind,
        split="test",
        on_error=config.on_error,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
    )


def make_evaluation(
    config: ExperimentConfig,
    records: list[Prompt],
    model: Any,
    specs: list[dict],
    build_scorer: Callable[..., Scorer],
    *,
    is_initial: bool,
) -> Any:
    """Return the evaluation that all policies go through; the initial policy gives its whole pool
    of responses.
    """
    from rlhf.data.encode import encode_prompts
    from rlhf.engines.sampling import Sampling
    from rlhf.evaluate import Evaluation
    from rlhf.model.packing import head_is_plain
    from rlhf.model.tokenizer import load_tokenizer, stop_ids

    tokenizer = load_tokenizer(config.initial_policy)
    encoded = encode_prompts(records, tokenizer, config.max_prompt_length)
    # the best of n is chosen from what the initial policy gives beside its own responses
    samples = config.pool if is_initial else config.samples_per_prompt
    return Evaluation(
        prompts=first_by_hash(encoded, config.n_prompts),
        tokenizer=tokenizer,
        stop_ids=stop_ids(tokenizer, model),
        sampling=Sampling(config.max_response_length, config.temperature),
        scorer=build_scorer(specs, tokenizer) if specs else None,
        samples_per_prompt=samples,
        # of the noise alone: the same for all policies of all seeds
        seed=0,
        batch_size=config.batch_size,
        plain_head=head_is_plain(model),
    )


def held_out_texts(config: ExperimentConfig, tokenizer: Any) -> dict[str, list]:
    """Return the encoded texts of `perplexity` by name. UserError if one has no row that is short
    enough.
    """
    texts = {}
    for name, data in config.perplexity.items():
        records = load_test_split(config, data, Instruction)
        texts[name] = encode_texts(
            records, tokenizer, config.max_prompt_length, config.max_response_length
        )
        if not texts[name]:
            raise UserError(
                f"perplexity: '{name}' has no row in the test split that is short enough (split: test)"
            )
    return texts


def score_again(
    config: ExperimentConfig,
    folder: Path,
    specs: list[dict],
    build_scorer: Callable[..., Scorer],
) -> list[Path]:
    """Score the initial policy's responses by a seed's reward model too, and choose the best of n
    by it.
    """
    from rlhf.model.tokenizer import load_tokenizer

    source = measures_of(config, INITIAL)
    header, rows = read_rows(source / INITIAL_FILE)
    prompts = json.loads((source / "prompts.json").read_text())["prompts"]
    samples = Samples()
    for row in rows:
        prompt = prompts[row["prompt"]]
        about = {"ended": row["ended"], "prompt_ids": prompt["ids"], "response_ids": row["ids"]}
        samples.add(prompt["prompt"], row["response"], prompt["metadata"], **about)
    scores = build_scorer(specs, load_tokenizer(config.initial_policy))(samples)
    for number, row in enumerate(rows):
        # the seed's reward model is one more scorer of the same responses
        row["scores"] = {name: float(values[number]) for name, values in scores.breakdown.items()}

    write_atomic(folder / "prompts.json", (source / "prompts.json").read_text())
    files = [folder / INITIAL_FILE]
    own = [row for row in rows if row["sample"] < config.samples_per_prompt]
    write_rows(files[0], 0, own, header["numbers"], {})
    for n in config.best_of_n_sizes:
        files.append(folder / f"best-of-{n:06d}.jsonl")
        write_rows(files[-1], n, best_of(rows, n, config.samples_per_prompt), {}, {})
    return files


def scores_of(
    config: ExperimentConfig, seed: int | None
) -> tuple[list[dict], dict[str, str], str | None]:
    """Return the scorers of a measurement, what each is, and the one that decides. Without a seed
    there are no proxies.

    Raises UserError where two scorers have the same name.
    """
    found = judges(config)
    proxies = proxies_of(config, seed) if seed is not None else []
    groups = {
        "gold": found["gold"],
        "referee": found["referee"],
        "proxy": proxies,
        "other": config.others,
    }
    specs, kinds = [], {}
    for kind, group in groups.items():
        for number, spec in enumerate(group, 1):
            name = spec.get("name") or (kind if number == 1 else f"{kind}{number}")
            if name in kinds:
                raise UserError(f"two scorers are called '{name}': give one of them another 'name'")
            specs.append({**spec, "name": name})
            kinds[name] = kind
    judge = next((name for name in kinds if kinds[name] in ("gold", "referee")), None)
    return specs, kinds, judge


def proxies_of(config: ExperimentConfig, seed: int) -> list[dict]:
    """Return the scorers that methods learn from, each once: the seed's reward model first."""
    model = {"model": f"{config.output_dir}/seed-{seed}/reward"}
    proxies = [model] if config.reward else []
    for given in config.learnt_scorers():
        spec = {key: value for key, value in given.items() if key not in ("weight", "name")}
        # the placeholder is the reward model of this seed
        if spec.get("model") == "{reward}":
            spec = model
        if spec not in proxies:
            proxies.append(spec)
    return proxies


def judges(config: ExperimentConfig) -> dict[str, list[dict]]:
    """Return what decides: the gold score, a referee that was given, or the one that the experiment
    trains.
    """
    referee = config.referee
    if config.train_referee:
        referee = [{"model": f"{config.output_dir}/referee"}]
    return {"gold": config.gold, "referee": referee}


def policies_of(folder: Path) -> dict[int, str]:
    """Return the folder of every policy of a trial that is to be measured, by step, its end last.

    Only checkpoints at multiples of save_steps: a run that was interrupted has left one of another
    step, and its curve would have a point that the other seeds lack.
    """
    last = max((row["step"] for row in read_metrics(folder / "metrics.jsonl")), default=0)
    # the option as the run resolved it, whatever the plan says now
    every = run_config(folder)["save_steps"]
    found = {}
    for path in (folder / FOLDER).glob("*"):
        name = re.fullmatch(r"(?:step|checkpoint)-0*(\d+)", path.name)
        step = int(name[1]) if name and (path / "manifest.json").is_file() else last
        if step < last and step % every == 0:
            found[step] = str(path)
    return dict(sorted(found.items())) | {last: str(folder)}


def peak_memory(folder: Path) -> dict[str, float]:
    """Return the highest memory a run has used, GiB."""
    peaks = []
    for row in read_metrics(folder / "metrics.jsonl"):
        if "memory/peak" in row:
            peaks.append(row["memory/peak"])
    # not every machine tells it
    return {"memory_peak": max(peaks)} if peaks else {}
