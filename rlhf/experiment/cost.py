"""What runs have cost, and how long they may be so that all cost the same in the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.config import UserError
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.plan import PILOT_STEPS
from rlhf.runs.tracking import read_metrics


def planned_lengths(config: ExperimentConfig) -> dict[str, int]:
    """method -> steps: as many as its share of the budget pays for, by the pilot's cost of a step.

    A method pays for the sampled pairs and, if it learns from the reward model, for its training too; all by the first
    seed, so that the seeds are equally long. Raises UserError where nothing is left for training.
    """
    counter, total = config.matched, config.budget["total"]
    result = {}
    for name in config.trained:
        shared = shared_cost(config, config.seeds[0], parts_of(config, name))
        spent = sum(part.get(counter, 0.0) for part in shared.values())
        each = step_cost(
            Path(config.output_dir) / "pilot" / name, counter, PILOT_STEPS[config.methods[name]["program"]]
        )
        steps = int((total - spent) // each)
        if steps < config.checkpoints:
            raise UserError(
                f"budget: of {total:g} {counter} {spent:g} go into pairs and reward model, and the rest pays for "
                f"{max(steps, 0)} steps of '{name}' ({each:g} each), fewer than its {config.checkpoints} checkpoints. "
                "Raise 'total'"
            )
        result[name] = steps
    return result


def parts_of(config: ExperimentConfig, method: str) -> tuple[str, ...]:
    """The shared parts that a method pays for: everyone learns from the pairs, through the reward model or directly."""
    spec = config.methods.get(method, {})
    by_reward = method == "best_of_n" or spec.get("program") == "ppo"
    return ("pairs", "reward") if by_reward and config.reward else ("pairs",)


def shared_cost(config: ExperimentConfig, seed: int, parts: Sequence[str] = ("pairs", "reward")) -> dict[str, dict]:
    """part -> counters of what a seed's methods share; a part that was given, not made here, costs nothing."""
    folder, costs = Path(config.output_dir) / f"seed-{seed}", {}
    if "pairs" in parts and "sample" in config.pairs:
        costs["pairs"] = store_cost(folder / "preferences.db")
    if "reward" in parts and config.reward:
        costs["reward"] = run_cost(folder / "reward")
    return costs


def store_cost(store: Path) -> dict[str, float]:
    """What sampling the responses of a preference store has cost, as `rlhf collect sample` wrote down."""
    from rlhf.data.store import Store

    if not store.is_file():
        return {}
    with Store.open(store, readonly=True) as opened:
        return json.loads(opened.setting("budget", "{}"))


def run_cost(folder: Path) -> dict[str, float]:
    """The counters of a finished run."""
    file = folder / "result.json"
    result = json.loads(file.read_text()) if file.is_file() else {}
    return bare(result.get("budget", {}))


def cost_until(folder: Path, step: int) -> dict[str, float]:
    """The counters of a run after `step` steps, between the logged steps in proportion; empty where none are logged."""
    before: dict[str, float] = {}
    at = 0
    if not (folder / "metrics.jsonl").is_file():
        return before
    for row in read_metrics(folder / "metrics.jsonl"):
        cost = bare({name: value for name, value in row.items() if name.startswith("budget/")})
        if not cost:
            continue
        if row["step"] >= step:
            share = (step - at) / max(row["step"] - at, 1)
            return {n: before.get(n, 0.0) + share * (value - before.get(n, 0.0)) for n, value in cost.items()}
        before, at = cost, row["step"]
    return before


def step_cost(folder: Path, counter: str, steps: int) -> float:
    """What one step costs: from the first to the last of a pilot, so that starting up does not count.

    Raises UserError where the pilot has not come so far.
    """
    first, before, last = (cost_until(folder, step).get(counter, 0.0) for step in (1, steps - 1, steps))
    if not first < before < last:
        raise UserError(
            f"{folder}: does not tell what {steps} steps cost in {counter}. Look at its log and metrics.jsonl: a pilot "
            "that a guard has stopped needs gentler options"
        )
    return (last - first) / (steps - 1)


def bare(budget: dict[str, Any]) -> dict[str, float]:
    """budget/flops -> flops."""
    return {name.removeprefix("budget/"): float(value) for name, value in budget.items()}
