"""`rlhf experiment measure OUT --trial NAME`: the policies of one trial on the test prompts, all by the same code.

Every method's policies meet the same prompts, the same sampling noise, the same scorers and the same estimator of KL.
What is measured is written response by response to OUT/measures/NAME/step-N.jsonl, so that anyone can read it again:

    {"step", "numbers", "budget"}                                          the first line
    {"prompt", "sample", "response", "length", "ended", "kl", "scores"}    one for each response
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf.compare.measure import CompareConfig, check_judges, load_policies, run_config, unseen
from rlhf.compare.text_metrics import encode_texts, perplexity, text_losses
from rlhf.config import UserError, option, parse
from rlhf.data.records import Instruction, Prompt, Samples, Scorer
from rlhf.data.split import first_by_hash
from rlhf.experiment.config import ExperimentConfig, sweep_of
from rlhf.experiment.cost import cost_until
from rlhf.files import dumps, write_atomic
from rlhf.runs.checkpoint import FOLDER
from rlhf.runs.tracking import read_metrics


@dataclass(kw_only=True)
class MeasureConfig:
    """Measure one trial of an experiment, or its foundation; what `rlhf experiment run` calls."""

    experiment: str = option(help="the folder of the experiment")
    trial: str = option(help="a trial in it, such as seed-0/dpo-beta-0.1, or foundation")


def load_experiment(folder: str | Path) -> ExperimentConfig:
    """The options that an experiment in this folder was run with. UserError if there is none."""
    file = Path(folder) / "experiment.yaml"
    if not file.is_file():
        raise UserError(
            f"{folder}: no experiment here (experiment.yaml is missing); make one with rlhf experiment run FILE"
        )
    config = parse(ExperimentConfig, ["--config", str(file)], "rlhf experiment run")
    if Path(config.output_dir).resolve() != Path(folder).resolve():
        raise UserError(
            f"{folder}: was made as {config.output_dir}, which is another place from here. Call from the directory in "
            "which the experiment was run"
        )
    return config


def measure(asked: MeasureConfig, build_scorer: Callable[..., Scorer]) -> None:
    """Measure what is not measured yet and write done.json. `build_scorer(specs, tokenizer)` makes scorers."""
    config = load_experiment(asked.experiment)
    seed = re.match(r"seed-(-?\d+)/", asked.trial)
    seed = int(seed[1]) if seed else None
    place = Path(config.output_dir) / "measures" / asked.trial
    place.mkdir(parents=True, exist_ok=True)
    specs, kinds, judge = scores_of(config, seed)
    if asked.trial.endswith("foundation") and seed is not None:
        points = score_again(config, place, specs, seed, build_scorer)
    else:
        points = sample_policies(config, place, specs, asked.trial, build_scorer)
    check_same_prompts(config, place)
    end = summary(points[-1], judge)
    about = {"finished": True, "trial": asked.trial, "files": [p.name for p in points], "kinds": kinds, "judge": judge}
    write_atomic(place / "done.json", dumps(about | {"end": end}, indent=2) + "\n")
    print(f"{asked.trial}: {len(points)} policies measured, the last: {end}")


def sample_policies(config: ExperimentConfig, place: Path, specs: list, trial: str, build_scorer) -> list[Path]:
    """Sample from every policy of a trial (checkpoints and end), score, and write one file for each."""
    import torch
    from tqdm import tqdm

    from rlhf.data.encode import encode_prompts
    from rlhf.data.load import load
    from rlhf.distributed import DistributedContext
    from rlhf.engines.hf import Sampling
    from rlhf.evaluate import Evaluation
    from rlhf.logprobs import head_is_plain
    from rlhf.models import silence_libraries
    from rlhf.tokenizer import load_tokenizer, stop_ids

    silence_libraries()
    is_foundation = trial == "foundation"
    folder = Path(config.output_dir) / trial
    steps = {0: config.foundation} if is_foundation else policies_of(folder)
    files = {step: place / f"step-{step:06d}.jsonl" for step in steps}
    wanted = [step for step in steps if not files[step].is_file()]
    if not wanted:
        return list(files.values())
    paths = [config.foundation, *(steps[step] for step in wanted if not is_foundation)]
    same = CompareConfig(runs=[paths[0], *(paths[1:] or paths)], prompts=config.prompts, **judges(config))
    if not is_foundation:
        check_judges(same)
    fractions = {"validation_fraction": config.validation_fraction, "test_fraction": config.test_fraction}
    records = unseen(same, load(config.prompts, Prompt, split="test", on_error=config.on_error, **fractions))
    tokenizer = load_tokenizer(config.foundation)
    world = DistributedContext(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    policies = load_policies(paths, world.device, config.max_prompt_length, config.max_response_length)
    model, context = policies[0]
    evaluation = Evaluation(
        prompts=first_by_hash(encode_prompts(records, tokenizer, config.max_prompt_length), config.n_prompts),
        tokenizer=tokenizer,
        stop_ids=stop_ids(tokenizer, model),
        sampling=Sampling(config.max_response_length, config.temperature),
        scorer=build_scorer(specs, tokenizer) if specs else None,
        samples_per_prompt=config.pool if is_foundation else config.samples_per_prompt,
        seed=0,  # of the noise alone: the same for all policies of all seeds
        batch_size=config.batch_size,
        plain_head=head_is_plain(model),
    )
    write_prompts(place, evaluation.prompts)
    texts = {
        name: encode_texts(
            load(data, Instruction, split="test", on_error=config.on_error, **fractions),
            *(tokenizer, config.max_prompt_length, config.max_response_length),
        )
        for name, data in config.perplexity.items()
    }
    for name, encoded in texts.items():
        if not encoded:
            raise UserError(f"perplexity: '{name}' has no row in the test split that is short enough (split: test)")
    total = len(wanted) * len(evaluation.prompts) * evaluation.samples_per_prompt
    with tqdm(total=total, desc=f"measuring {trial}", unit="response", mininterval=5) as bar:
        for step, (own, own_context) in zip(wanted, policies if is_foundation else policies[1:], strict=True):
            rows = evaluation.run(own, own_context, context if own is model else model, world, bar.update)
            numbers = {}
            for name, encoded in texts.items():
                losses = text_losses(
                    own, own_context, encoded, tokenizer.pad_token_id, world, batch_size=config.batch_size
                )
                found = perplexity(losses)
                numbers |= {f"perplexity/{name}": found.perplexity, f"perplexity_se/{name}": found.se}
            budget = {} if is_foundation else cost_until(folder, step) | peak(folder)
            write_rows(files[step], step, as_dicts(rows, evaluation.samples_per_prompt, is_foundation), numbers, budget)
    return list(files.values())


def score_again(config: ExperimentConfig, place: Path, specs: list, seed: int, build_scorer) -> list[Path]:
    """The foundation's responses scored by this seed's reward model too, and the best of n by it."""
    from rlhf.models import silence_libraries
    from rlhf.tokenizer import load_tokenizer

    silence_libraries()
    tokenizer = load_tokenizer(config.foundation)
    source = Path(config.output_dir) / "measures" / "foundation"
    header, rows = read_rows(source / "step-000000.jsonl")
    prompts = json.loads((source / "prompts.json").read_text())["prompts"]
    samples = Samples(
        prompts=[prompts[row["prompt"]]["prompt"] for row in rows],
        responses=[row["response"] for row in rows],
        prompt_ids=[prompts[row["prompt"]]["ids"] for row in rows],
        response_ids=[row["ids"] for row in rows],
        ended=[row["ended"] for row in rows],
        metadata=[prompts[row["prompt"]]["metadata"] for row in rows],
    )
    scores = build_scorer(specs, tokenizer)(samples)
    for i, row in enumerate(rows):
        row["scores"] = {name: float(values[i]) for name, values in scores.breakdown.items()}
    write_atomic(place / "prompts.json", (source / "prompts.json").read_text())
    files = [place / "step-000000.jsonl"]
    write_rows(files[0], 0, [row for row in rows if row["sample"] < config.samples_per_prompt], header["numbers"], {})
    best = config.methods.get("best_of_n")
    for n in map(int, sweep_of(best)[1]) if best else ():
        files.append(place / f"best-of-{n:06d}.jsonl")
        write_rows(files[-1], n, best_of(rows, n, config.samples_per_prompt), {}, {})
    return files


def best_of(rows: list[dict], n: int, samples: int) -> list[dict]:
    """Of each block of n responses to a prompt the one with the highest proxy; `samples` blocks for each prompt, after
    the first `samples` responses, which are the foundation's own.

    Its sequence KL to the foundation is log n - (n - 1)/n (an upper bound where scores tie, Beirami et al. 2024), the
    same for every response.
    """
    by_prompt: dict[int, list[dict]] = {}
    for row in sorted(rows, key=lambda r: (r["prompt"], r["sample"])):
        by_prompt.setdefault(row["prompt"], []).append(row)
    kl = math.log(n) - (n - 1) / n
    chosen = []
    for own in by_prompt.values():
        for block, candidates in enumerate(blocks(n, samples)):
            best = max((own[i] for i in candidates), key=lambda row: row["scores"]["proxy"])
            chosen.append({**best, "sample": block, "kl": kl})
    return chosen


def blocks(n: int, samples: int) -> list[range]:
    """The foundation's samples among which each of the `samples` best of n is chosen."""
    return [range(samples + block * n, samples + (block + 1) * n) for block in range(samples)]


def scores_of(config: ExperimentConfig, seed: int | None) -> tuple[list[dict], dict[str, str], str | None]:
    """Scorers of a measurement, what each is, and the one that decides. Without a seed there are no proxies."""
    proxies: list[dict] = []
    if seed is not None:
        model = {"model": f"{config.output_dir}/seed-{seed}/reward"}
        learnt = [model] if config.reward else []
        for name in config.trained:
            for spec in config.methods[name].get("options", {}).get("reward") or []:
                spec = {k: v for k, v in spec.items() if k not in ("weight", "name")}
                learnt.append(model if spec.get("model") == "{reward}" else spec)
        proxies = [spec for i, spec in enumerate(learnt) if spec not in learnt[:i]]
    specs, kinds = [], {}
    found = judges(config)
    groups = {"gold": found["gold"], "referee": found["referee"], "proxy": proxies, "other": config.others}
    for kind, group in groups.items():
        for number, spec in enumerate(group):
            name = spec.get("name") or f"{kind}{number + 1 if number else ''}"
            if name in kinds:
                raise UserError(f"two scorers are called '{name}': give one of them another 'name'")
            specs.append({**spec, "name": name})
            kinds[name] = kind
    return specs, kinds, next((n for n, k in kinds.items() if k in ("gold", "referee")), None)


def judges(config: ExperimentConfig) -> dict[str, list[dict]]:
    """What decides: the gold score, a referee that was given, or the one that the experiment trains."""
    made = [{"model": f"{config.output_dir}/referee"}] if config.train_referee else config.referee
    return {"gold": config.gold, "referee": made}


def policies_of(folder: Path) -> dict[int, str]:
    """step -> folder of every policy of a trial that is to be measured, its end last.

    Those at multiples of save_steps: a run that was interrupted has left a checkpoint of another step, and its curve
    would have a point that the other seeds lack.
    """
    last = max((row["step"] for row in read_metrics(folder / "metrics.jsonl")), default=0)
    every, found = run_config(folder)["save_steps"], {}
    for path in (folder / FOLDER).glob("*"):
        step = re.fullmatch(r"(?:step|checkpoint)-0*(\d+)", path.name)
        if step and (path / "manifest.json").is_file() and int(step[1]) < last and int(step[1]) % every == 0:
            found[int(step[1])] = str(path)
    return dict(sorted(found.items())) | {last: str(folder)}


def as_dicts(rows: list, samples: int, with_ids: bool) -> list[dict]:
    """Rows of an evaluation, which come prompt by prompt, as they are written; ids for what is to be scored again."""
    names = ("sample", "response", "length", "ended", "kl", "scores", *(["ids"] if with_ids else []))
    return [{"prompt": i // samples, **{name: getattr(row, name) for name in names}} for i, row in enumerate(rows)]


def write_rows(file: Path, step: int, rows: list[dict], numbers: dict, budget: dict) -> None:
    head = {"step": step, "numbers": numbers, "budget": budget}
    write_atomic(file, "".join(dumps(row) + "\n" for row in [head, *rows]))


def read_rows(file: Path) -> tuple[dict, list[dict]]:
    """(header, rows) of a file of measured responses."""
    head, *rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    for row in rows:  # a part of a score that does not apply is written as "NaN"
        row["scores"] = {name: float(value) for name, value in row["scores"].items()}
    return head, rows


def write_prompts(place: Path, encoded: list[dict]) -> None:
    """What was measured on; the same for every trial."""
    prompts = []
    for row in encoded:
        record = row["record"]
        metadata = {**record.metadata, "group": record.group, **({"voice": record.voice} if record.voice else {})}
        prompts.append({"prompt": record.prompt, "group": record.group, "ids": row["prompt_ids"], "metadata": metadata})
    write_atomic(place / "prompts.json", json.dumps({"prompts": prompts}, ensure_ascii=False) + "\n")


def check_same_prompts(config: ExperimentConfig, place: Path) -> None:
    """Raises UserError if a trial was measured on other prompts than the foundation."""
    first = Path(config.output_dir) / "measures" / "foundation" / "prompts.json"
    if first.read_text() != (place / "prompts.json").read_text():
        raise UserError(
            f"{place}: not the test prompts that the foundation was measured on ({first}). A run was trained on some "
            "of them, or the data has changed since: begin the experiment in another --output_dir"
        )


def peak(folder: Path) -> dict[str, float]:
    """The highest memory a run has used, GiB."""
    found = [row["memory/peak"] for row in read_metrics(folder / "metrics.jsonl") if "memory/peak" in row]
    return {"memory_peak": max(found)} if found else {}


def summary(file: Path, judge: str | None) -> dict[str, float | None]:
    """Judge and KL of one measured policy, for the live table."""
    _, rows = read_rows(file)
    mean = None if judge is None else sum(row["scores"][judge] for row in rows) / len(rows)
    return {"judge": mean, "kl": sum(row["kl"] for row in rows) / len(rows)}
