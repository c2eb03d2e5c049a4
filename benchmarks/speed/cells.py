"""The cells of the benchmark: what is measured, and what it is called in bench.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.speed.run import (
    BEST,
    OWN_CRITIC,
    PEER,
    Cell,
    Side,
    against_peer,
    mean,
    measure,
    summary,
)
from benchmarks.speed.shapes import SHAPES, WORKLOADS, Workload

# place in bench.json, as a path of keys -> what belongs there
Found = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One cell: its place in bench.json and the function that measures it."""

    name: str
    rounds: int
    measure: Callable[[Path], Found]


def ppo_task(model: str, workload: str, rounds: int, threads: int = 1) -> Task:
    """Return the task that measures PPO on both sides."""
    name = f"ppo/{model}/{workload}" + (f"_{threads}_threads" if threads > 1 else "")
    sides = (PEER, BEST) if BEST.options == OWN_CRITIC.options else (PEER, OWN_CRITIC, BEST)
    cell = Cell(SHAPES[model], WORKLOADS[workload], sides, rounds, threads=threads)

    def run(models: Path) -> Found:
        numbers = summary(cell, list(measure(cell, models)))
        found: Found = {name: numbers[BEST.name] | {"trl": numbers[PEER.name]}}
        found[f"{name}_own_critic"] = numbers.get(OWN_CRITIC.name, numbers[BEST.name])
        if workload == "fixed" and threads == 1:
            found[f"ppo/{model}/memory_ratio"] = numbers[BEST.name]["memory_ratio"]
        return found

    return Task(name, rounds, run)


def generation_task(model: str, workload: str, rounds: int) -> Task:
    """Return the task that measures sampling beside transformers' `generate`."""
    name = f"generation/{model}/{workload}"
    sides = tuple(
        replace(BEST, name=side, module="benchmarks.speed.generation") for side in ("hf", "engine")
    )
    cell = Cell(SHAPES[model], WORKLOADS[workload], sides, rounds, updates=3)

    def run(models: Path) -> Found:
        rates: dict[str, list[float]] = {side.name: [] for side in sides}
        for side, result in measure(cell, models):
            tokens = sum(map(sum, result["lengths"]))
            rates[side.name].append(tokens / sum(result["cpu"]))
        ratios = [own / other for own, other in zip(rates["engine"], rates["hf"], strict=True)]
        return {
            name: {
                "ratio_median": round(statistics.median(ratios), 2),
                "spread": [round(min(ratios), 2), round(max(ratios), 2)],
                "tokens_per_cpu_second": {
                    side: round(statistics.median(numbers)) for side, numbers in rates.items()
                },
            }
        }

    return Task(name, rounds, run)


def memory_task(model: str) -> Task:
    """Return the task that measures the peak memory on a large model, by a small update.

    It is held against four whole models in float32, the critic trained whole by AdamW: seven
    numbers a weight with its gradients and moments, and not even an activation.
    """
    name, shape = f"memory/{model}", SHAPES[model]
    cell = Cell(shape, Workload(batch=4, response=16, epochs=1), (BEST,), rounds=1, warm_up=False)

    def run(models: Path) -> Found:
        [(_, result)] = measure(cell, models)
        four_models = 7 * 4 * shape.parameters / 2**30
        return {
            name: {
                "parameters": shape.parameters,
                "memory_gib": round(result["memory"], 2),
                "four_models_gib": round(four_models, 2),
                "memory_ratio": round(result["memory"] / four_models, 3),
            }
        }

    return Task(name, 1, run)


def offline_task(program: str, rounds: int) -> Task:
    """Return the task that measures SFT or DPO beside the installed TRL."""
    name = f"offline/4M/{program}"
    # a second DPO run finds the reference's log-probabilities of the first
    names = ("trl", "ours", "again") if program == "dpo" else ("trl", "ours")
    options = (("program", program),)
    sides = tuple(Side(side, "benchmarks.speed.offline", "adapter", options) for side in names)
    # 128 rows, prompts as in PPO, answers of 1 to 128 tokens
    cell = Cell(SHAPES["4M"], Workload(batch=128, response=128), sides, rounds)

    def run(models: Path) -> Found:
        results: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
        for side, result in measure(cell, models):
            results[side.name].append(result)
        seconds = {
            side: round(statistics.median(mean(result["cpu"]) for result in of_side), 2)
            for side, of_side in results.items()
        }
        found: Found = {}
        for side in names[1:]:
            ratios = against_peer(results[side], results["trl"])
            place = name if side == "ours" else f"{name}_{side}"
            own_seconds = {"ours": seconds[side], "trl": seconds["trl"]}
            found[place] = ratios | {"cpu_seconds": own_seconds}
        return found

    return Task(name, rounds, run)


# what is varied in the scaling table, one at a time; the first value is the table's base
SCALING: dict[str, list[int]] = {
    "response": [32, 64, 128, 256],
    "batch": [16, 32, 64, 128],
    "width": [128, 256, 512, 768],
    "vocabulary": [2048, 8192, 32_768, 131_072],
}


def scaling_task(axis: str) -> Task:
    """Return the task that measures the best configuration while one size grows."""

    def run(models: Path) -> Found:
        points = []
        for value in SCALING[axis]:
            shape, workload = SHAPES["4M"], Workload(batch=32)
            if axis in ("response", "batch"):
                workload = replace(workload, **{axis: value})
            else:
                shape = replace(shape, **{axis: value}, name=f"{axis}-{value}")
            cell = Cell(shape, workload, (BEST,), rounds=1)
            [(_, result)] = measure(cell, models)
            phases = {phase: mean(seconds) for phase, seconds in result["phases"].items()}
            points.append(
                {"value": value, "memory_gib": round(result["memory"], 3)}
                | {phase: round(seconds, 3) for phase, seconds in phases.items()}
                | {"total": round(mean(result["cpu"]), 3)}
            )
        return {f"scaling/{axis}": {"points": points, "exponents": exponents(points)}}

    return Task(f"scaling/{axis}", 1, run)


def exponents(points: list[dict[str, float]]) -> dict[str, float]:
    """Return phase -> a with seconds ~ value^a between the last two points; 1 is linear."""
    before, last = points[-2:]
    growth = math.log(last["value"] / before["value"])
    phases = [name for name in last if name not in ("value", "memory_gib")]
    return {name: round(math.log(last[name] / before[name]) / growth, 2) for name in phases}


def quick_tasks() -> list[Task]:
    """Return what `make bench` measures."""
    return [
        ppo_task("42M", "fixed", 1),
        ppo_task("4M", "fixed", 3),
        ppo_task("4M", "ragged", 3),
    ]


def full_tasks() -> list[Task]:
    """Return what `make bench-full` measures."""
    sampling = [(model, kind) for model in ("4M", "42M") for kind in WORKLOADS]
    return [
        ppo_task("4M", "fixed", 5),
        ppo_task("4M", "ragged", 5),
        ppo_task("42M", "fixed", 3),
        ppo_task("42M", "ragged", 3),
        ppo_task("4M", "fixed", 3, threads=2),
        ppo_task("42M", "fixed", 1, threads=2),
        *(generation_task(model, kind, 3) for model, kind in sampling),
        memory_task("0.6B"),
        *(offline_task(program, 3) for program in ("sft", "dpo")),
        *map(scaling_task, SCALING),
    ]
