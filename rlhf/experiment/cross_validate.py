"""`rlhf reward cross-validate CONFIG`: a reward model for each fold of the groups, trained on the
others, which scores the pairs that it has not seen.

The folds are programs like any other: one that was cut off is started again and resumes, and what
is done is not done again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import option, parse, save_options
from rlhf.data.export import rows_of, write_rows
from rlhf.data.records import Preference
from rlhf.data.split import deal_folds
from rlhf.errors import EarlyExit, UserError
from rlhf.experiment.plan import flags
from rlhf.files import dumps, write_atomic
from rlhf.jobs.job import Job
from rlhf.jobs.runner import RunOptions, claim, failures, run_jobs, set_jobs
from rlhf.jobs.state import PlanState, read_json
from rlhf.jobs.steps import StepDisplay
from rlhf.options.offline import RewardRunConfig
from rlhf.stats import mean_over_groups
from rlhf.text import markdown_table, with_interval


@dataclass(kw_only=True)
class CrossValidateConfig:
    """Train a reward model without each fold of the groups, and score that fold's pairs with it."""

    reward_config: str = option(help="the YAML file of options for launch/reward.py")
    folds: int = option(5, "parts that the groups are dealt into, one model for each", low=2)
    options: dict = option({}, "further options of launch/reward.py, e.g. {learning_rate: 1e-3}")
    output_dir: str | None = option(None, "default: the config's output_dir with -folds at its end")
    launcher: str = option("deepspeed --num_accelerators 1", "what starts each program")
    processes: int = option(1, "folds trained at the same time", low=1)
    redo: bool = option(False, "remake what was made with other options; it is set aside")


def cross_validate(config: CrossValidateConfig, load_reward: Callable[[str], Any]) -> None:
    """Train what is not trained, score, and write scores.jsonl and cross_validation.{json,md}.

    `load_reward(folder)` returns a reward model: its tokenizer, scale and score_ids. Raises
    UserError on options that cannot work or do not fit what is there, EarlyExit when interrupted or
    when a program failed.
    """
    reward, folder = reward_options(config)
    pairs = read_pairs(reward, folder)
    fold_of = deal_folds([pair.group for pair in pairs], config.folds)
    state = PlanState(folder)
    how = RunOptions(
        launcher=config.launcher,
        processes=config.processes,
        stop_at_failure=True,
        changed="set aside" if config.redo else "refuse",
    )
    with claim(state) as signals:
        jobs = [write_fold(reward, folder, pairs, fold_of, fold) for fold in range(config.folds)]
        set_jobs(state, jobs, how)
        print(f"{len(state.done)} of {config.folds} folds are trained already", flush=True)
        run_jobs(state, how, StepDisplay(state), signals)
    if state.failed:
        raise EarlyExit(failures(state), 1)

    rows, results = [], []
    for fold, job in enumerate(state.jobs):
        held_out = [pair for pair in pairs if fold_of[pair.group] == fold]
        rows += fold_scores(reward, state, job, fold, held_out, load_reward)
        results.append(read_json(Path(job.outputs[0])))
    write_rows(rows, folder / "scores.jsonl")
    result = summarise(rows, results)
    write_atomic(folder / "cross_validation.json", dumps(result, indent=2) + "\n")
    page = page_of(result, folder.name)
    write_atomic(folder / "cross_validation.md", page)
    print(f"\n{page}\nscores of all pairs: {folder / 'scores.jsonl'}")


def reward_options(config: CrossValidateConfig) -> tuple[RewardRunConfig, Path]:
    """Return the options of the reward program, and the folder of the folds."""
    given = ["--config", config.reward_config, *flags(config.options)]
    reward = parse(RewardRunConfig, given, "launch/reward.py")
    folder = Path(config.output_dir or f"{reward.output_dir.rstrip('/')}-folds")
    return reward, folder


def read_pairs(reward: RewardRunConfig, folder: Path) -> list[Preference]:
    """Return the pairs that the reward program may read: all but those of test groups."""
    from rlhf.ranks.distributed import DistributedContext
    from rlhf.runs.rows import RunData

    data = RunData(replace(reward, output_dir=str(folder)), DistributedContext(), print)
    pairs = [pair for pair in data.load(Preference, None) if pair.split != "test"]
    if reward.ties == "drop":
        pairs = [pair for pair in pairs if pair.has_winner]
    return pairs


def write_fold(
    reward: RewardRunConfig,
    folder: Path,
    pairs: list[Preference],
    fold_of: dict[str, int],
    fold: int,
) -> Job:
    """Write data and options of one fold's program, and return its job.

    The fold's groups are the test split, which no program reads; the others keep their split, so
    that early stopping has validation pairs of its own.
    """
    name = f"fold-{fold}"
    data, file, output = folder / f"{name}.jsonl", folder / f"{name}.yaml", folder / name
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for pair in pairs:
        if fold_of[pair.group] == fold:
            pair = replace(pair, split="test")
        records.append(pair)
    write_rows(rows_of(records), data)
    # what chooses among rows has been done, and a fold that was cut off resumes
    given = {"data": [str(data)], "half": "all", "limit": None, "aggregate": "each"}
    given |= {"output_dir": str(output), "run_name": None}
    given |= {"overwrite_output_dir": False, "resume": "auto"}
    save_options(replace(reward, **given), file)
    return Job(
        name=name,
        program="launch.reward",
        arguments=["--config", str(file)],
        kind="reward",
        description=f"a reward model of the groups outside fold {fold}",
        reads=[str(file), str(data)],
        outputs=[str(output / "result.json")],
        owned=[str(output)],
        run_folder=str(output),
    )


def fold_scores(
    reward: RewardRunConfig,
    state: PlanState,
    job: Job,
    fold: int,
    pairs: list[Preference],
    load_reward: Callable[[str], Any],
) -> list[dict[str, Any]]:
    """Return the fold's pairs as rows with `fold`, `chosen_score` and `rejected_score` (raw), scored
    by its model; those that are too long are left out and counted.

    They are kept in fold-N-scores.json, under the fingerprint of the job that trained the model.
    """
    file = state.folder / f"{job.name}-scores.json"
    kept = read_json(file)
    if kept.get("fingerprint") == state.fingerprints[job.name]:
        return kept["rows"]

    from tqdm import tqdm

    from rlhf.data.encode import encode

    model = load_reward(job.run_folder)
    encoded, dropped = encode(
        pairs,
        model.tokenizer,
        reward.max_prompt_length,
        reward.max_response_length,
        reward.on_error,
    )
    ids = []
    for side in ("chosen_ids", "rejected_ids"):
        ids += [row["prompt_ids"] + row[side] for row in encoded]
    with tqdm(total=len(ids), desc=f"{job.name}: scores", unit="answer", mininterval=5) as bar:
        scores = model.score_ids(ids, 2 * reward.per_device_train_batch_size, bar.update)
    raw = [(score - model.bias) / model.scale for score in scores]
    if dropped:
        print(f"{job.name}: {dropped.total()} pairs are too long and not scored", flush=True)

    rows = []
    for i, row in enumerate(rows_of([row["record"] for row in encoded])):
        row |= {"fold": fold, "chosen_score": raw[i], "rejected_score": raw[len(encoded) + i]}
        rows.append(row)
    write_atomic(file, dumps({"fingerprint": state.fingerprints[job.name], "rows": rows}) + "\n")
    return rows


def summarise(
    rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Return accuracy and log-loss over all out-of-fold pairs with a winner, by fold, and the spread.

    Log-loss is that of P(chosen) = sigmoid(score gap) at the pairs' label_prob, nats. `spread` is
    the standard deviation over folds; `expected_spread` what it would be if folds differed by their
    pairs alone: the root of the mean of their squared standard errors. results: each fold's
    result.json.
    """
    columns: list[tuple[float, float, str, int]] = []
    for row in rows:
        p = row.get("label_prob", 1.0)
        # a tie has no side that could be right
        if p != 0.5:
            gap = row["chosen_score"] - row["rejected_score"]
            columns.append((gap, p, row["group"], row["fold"]))
    if not columns:
        raise UserError("no pair has a winner: there is nothing to measure")
    gaps, p, groups, folds = map(np.array, zip(*columns, strict=True))
    measures = {
        "accuracy": (gaps > 0) + 0.5 * (gaps == 0),
        "log_loss": p * np.logaddexp(0, -gaps) + (1 - p) * np.logaddexp(0, gaps),
    }

    summary: dict[str, Any] = {"pairs": len(gaps), "without_winner": len(rows) - len(gaps)}
    summary["groups"] = len(set(groups))
    by_fold: list[dict[str, Any]] = []
    for fold in sorted(set(folds.tolist())):
        result = results[fold] if fold < len(results) else {}
        mine = folds == fold
        entry = {"fold": fold, "pairs": int(mine.sum()), "groups": len(set(groups[mine]))}
        by_fold.append(entry | {"saved_step": result.get("saved_step")})
    for name, values in measures.items():
        bounds = (0.0, 1.0) if name == "accuracy" else None
        summary[name] = _mean(values, groups, bounds)
        means, errors = [], []
        for entry in by_fold:
            mine = folds == entry["fold"]
            found = _mean(values[mine], groups[mine], bounds)
            entry[name] = found["mean"]
            means.append(found["mean"])
            errors.append(found["se"])
        summary[name] |= {"spread": None, "expected_spread": None}
        # one fold has no spread; a fold of one group has no standard error
        if len(means) > 1:
            summary[name]["spread"] = float(np.std(means, ddof=1))
        if None not in errors:
            summary[name]["expected_spread"] = math.sqrt(float(np.mean(np.square(errors))))
    return summary | {"folds": by_fold}


def _mean(
    values: np.ndarray, groups: np.ndarray, bounds: tuple[float, float] | None
) -> dict[str, float | None]:
    found = mean_over_groups(values, groups, bounds=bounds)
    return {name: found[name] for name in ("mean", "low", "high", "se")}


def page_of(result: dict[str, Any], title: str) -> str:
    """Return the summary as Markdown."""
    rows = []
    for entry in result["folds"]:
        step = "-" if entry["saved_step"] is None else entry["saved_step"]
        cells = [f"{entry['accuracy']:.3f}", f"{entry['log_loss']:.4f}", step]
        rows.append((f"fold {entry['fold']}", entry["pairs"], entry["groups"], *cells))
    whole = ["**all folds**", result["pairs"], result["groups"]]
    spreads = ["spread between folds", "", ""]
    expected = ["expected by their pairs alone", "", ""]
    for name, digits in (("accuracy", 3), ("log_loss", 4)):
        part = result[name]
        whole.append(with_interval({**part, "estimate": part["mean"]}, f"{{:.{digits}f}}".format))
        spreads.append(_number(part["spread"], digits))
        expected.append(_number(part["expected_spread"], digits))
    rows += [(*whole, ""), (*spreads, ""), (*expected, "")]
    table = markdown_table(("", "pairs", "groups", "accuracy", "log-loss", "step"), rows)
    lines = [
        f"# Cross-validation: {title}",
        "",
        "Each pair is scored by the model that has not seen its group. Intervals are 95 % over groups with the models "
        "as they are; nothing estimates without bias how much k-fold means vary with the training data (Bengio and "
        "Grandvalet 2004).",
        "",
        *table,
        "",
    ]
    if result["without_winner"]:
        lines += [
            f"{result['without_winner']} pairs without a winner are scored and not counted.",
            "",
        ]
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
