"""What runs have cost, and how long they may be so that all cost the same in the end."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.compare.runs import run_result
from rlhf.errors import UserError
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.plan import PILOT_STEPS, given_length
from rlhf.runs.tracking import read_metrics


def known_lengths(config: ExperimentConfig) -> dict[str, int] | None:
    """Return the steps of each method, or None where they follow from pilots that are not done."""
    if config.matched is None:
        return {name: given_length(config.method_specs[name]) for name in config.trained}
    try:
        return planned_lengths(config)
    # a pilot, the pairs or the reward model are not there yet
    except (KeyError, UserError):
        return None


def planned_lengths(config: ExperimentConfig) -> dict[str, int]:
    """Return as many steps of each method as its share of the budget pays for, by what its pilot
    has cost.

    A method pays for the sampled pairs and, if it learns from the reward model, for its training
    too; all by the first seed, so that the seeds are equally long. Raises UserError where too
    little is left for training.
    """
    counter, total = config.matched, config.budget["total"]
    lengths = {}
    for name in config.trained:
        shared = shared_cost(config, config.seeds[0], parts_of(config, name))
        spent = sum(part.get(counter, 0.0) for part in shared.values())
        pilot = Path(config.output_dir) / "pilot" / name
        # by the pilot, since FLOPs and time of a step depend on model, lengths and machine
        cost = pilot_cost(pilot, counter, PILOT_STEPS[config.method_specs[name].program])
        steps = cost.longest(total - spent)
        if steps < config.checkpoints:
            raise UserError(
                f"budget: of {total:g} {counter} {spent:g} go into pairs and reward model, and the rest pays for "
                f"{max(steps, 0)} steps of '{name}' ({cost.in_words()}), fewer than its {config.checkpoints} "
                "checkpoints. Raise 'total'"
            )
        lengths[name] = steps
    return lengths


def parts_of(config: ExperimentConfig, method: str) -> tuple[str, ...]:
    """Return the shared parts that a method pays for: the pairs, and the reward model where it
    learns from that.
    """
    learns_from_reward = config.method_specs[method].program != "dpo"
    return ("pairs", "reward") if learns_from_reward and config.reward else ("pairs",)


def shared_cost(
    config: ExperimentConfig, seed: int, parts: Sequence[str] = ("pairs", "reward")
) -> dict[str, dict]:
    """Return the counters of what a seed's methods share, by part; a part that was given costs
    nothing.
    """
    # given pairs and rewards cost nothing
    folder, costs = Path(config.output_dir) / f"seed-{seed}", {}
    if "pairs" in parts and "sample" in config.pairs:
        costs["pairs"] = store_cost(folder / "preferences.db")
    if "reward" in parts and config.reward:
        costs["reward"] = run_cost(folder / "reward")
    return costs


def store_cost(store: Path) -> dict[str, float]:
    """Return what sampling the responses of a preference store has cost, as `rlhf collect sample`
    recorded it.
    """
    from rlhf.data.store import Store

    # pairs that were given have cost this experiment nothing
    if not store.is_file():
        return {}
    with Store.open(store, readonly=True) as opened:
        return json.loads(opened.setting("budget", "{}"))


def run_cost(folder: Path) -> dict[str, float]:
    """Return the counters of a finished run."""
    return counters_of(run_result(folder).get("budget", {}))


def cost_until(folder: Path, step: int) -> dict[str, float]:
    """Return the counters of a run after `step` steps, interpolated between logged steps; empty
    where none are.
    """
    before: dict[str, float] = {}
    step_before = 0
    if not (folder / "metrics.jsonl").is_file():
        return before
    for row in read_metrics(folder / "metrics.jsonl"):
        cost = counters_of(row)
        # a row without counters, such as that of an evaluation
        if not cost:
            continue
        if row["step"] >= step:
            share = (step - step_before) / max(row["step"] - step_before, 1)
            return {
                name: (1 - share) * before.get(name, 0.0) + share * value
                for name, value in cost.items()
            }
        before, step_before = cost, row["step"]
    return before


@dataclass(frozen=True)
class RunCost:
    """What runs of a method cost in one counter, starting up left out.

    A step costs `step`, and the reference log-probabilities of a pair `pair`. The sizes are those of
    `ReferencePass.sizes`: pairs whose reference a run pays for, and the steps of a whole pass; 0 for
    methods without one.
    """

    step: float
    pair: float = 0.0
    held_out: int = 0
    training: int = 0
    per_step: int = 0
    steps: int = 0

    def pairs(self, steps: int) -> int:
        """Return how many pairs' reference a run of so many steps pays for."""
        met = self.training if steps >= self.steps else steps * self.per_step
        return self.held_out + met

    def longest(self, left: float) -> int:
        """Return the most steps n that `left` pays for: step n + pair pairs(n) <= left."""
        whole_pass = int((left - self.pair * self.pairs(self.steps)) // self.step)
        if whole_pass >= self.steps:
            return whole_pass
        each = self.step + self.pair * self.per_step
        return int((left - self.pair * self.held_out) // each)

    def in_words(self) -> str:
        words = f"{self.step:g} each"
        return f"{words}, and {self.pair:g} for the reference of a pair" if self.pair else words


def pilot_cost(folder: Path, counter: str, steps: int) -> RunCost:
    """Return what runs cost by a pilot of so many steps: a step from its first to its last, so that
    starting up does not count, and DPO's reference apart.

    Raises UserError where the pilot has fewer steps.
    """
    spent = [cost_until(folder, step) for step in (1, steps - 1, steps)]
    part = f"reference_{counter}"
    first, before, last = (cost.get(counter, 0.0) - cost.get(part, 0.0) for cost in spent)
    # a pilot that was ended early never got to its last step
    if not first < before < last:
        raise UserError(
            f"{folder}: does not tell what {steps} steps cost in {counter}. Look at its log and metrics.jsonl: a pilot "
            "that a guard has stopped needs gentler options"
        )
    each = (last - first) / (steps - 1)
    # none where there is no reference pass, or by an earlier version, which counts it in each step
    sizes = run_result(folder).get("reference_pass")
    if not sizes:
        return RunCost(each)
    cost = RunCost(each, **sizes)
    return replace(cost, pair=spent[-1].get(part, 0.0) / cost.pairs(steps))


def counters_of(row: dict[str, Any]) -> dict[str, float]:
    """Return the counters among metrics, without their prefix: budget/flops -> flops."""
    prefix = "budget/"
    return {
        name.removeprefix(prefix): float(value)
        for name, value in row.items()
        if name.startswith(prefix)
    }
