"""Start measuring processes, in turn, and sum up what they found."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.paths import CACHE, ROOT
from benchmarks.speed import peer
from benchmarks.speed.required_flops import Critic, update_flops
from benchmarks.speed.shapes import Job, ModelShape, Workload

WRITING = threading.Lock()


@dataclass(frozen=True)
class Side:
    """What is measured: the module that measures, its options, and its design of the critic."""

    name: str
    module: str
    critic: Critic
    options: tuple[tuple[str, Any], ...] = ()
    micro_batch: int = 8
    rollout_batch: int = 64


# the order of a round; the peer's sizes are the fastest of those tried
OWN_CRITIC = Side("own_critic", "benchmarks.speed.ours", "adapter", (("critic_trunk", "own"),))
BEST = Side("best", "benchmarks.speed.ours", "reward", (("critic_trunk", "reward"),))
PEER = Side("trl", "benchmarks.speed.peer", "whole")


@dataclass(frozen=True)
class Cell:
    """A model and a workload, measured on both sides, A B A B, `rounds` times."""

    shape: ModelShape
    workload: Workload
    sides: tuple[Side, ...]
    rounds: int = 3
    warm_up: bool = True
    threads: int = 1
    # measured in each process, after the warm-up
    updates: int = 1


def environment(*folders: Path, threads: int) -> dict[str, str]:
    """Return the environment of a measuring process, which imports from these folders first."""
    paths = [*map(str, folders), str(ROOT)]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    return os.environ | settings


def run_module(module: str, *arguments: str, threads: int = 1, first: tuple[Path, ...] = ()) -> str:
    """Return the last line that a module prints. Raises RuntimeError with the end of its messages."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        env=environment(*first, threads=threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}:\n{done.stderr[-3000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def write_models(shape: ModelShape, folder: Path, rank: int) -> Path:
    """Return the folder of the shape's models, written in a process of its own.

    This process stays small: it never imports torch.
    """
    place = folder / shape.name
    # two cells of one shape may be measured side by side
    with WRITING:
        if not place.exists():
            run_module("speed.shapes", json.dumps(vars(shape)), str(place), str(rank))
    return place


def measure(cell: Cell, models: Path) -> Iterator[tuple[Side, dict[str, Any]]]:
    """Yield what each process found: the sides in turn, `rounds` times, each in a fresh process."""
    place = write_models(cell.shape, models, cell.workload.lora_rank)
    job = Job("", str(place), cell.shape, cell.workload, {})
    job = replace(job, updates=cell.updates, warm_up=cell.warm_up, threads=cell.threads)
    for number in range(cell.rounds):
        for side in cell.sides:
            own_job = replace(
                job,
                side=side.name,
                seed=number,
                options=dict(side.options),
                micro_batch=side.micro_batch,
                rollout_batch=side.rollout_batch,
            )
            first = (peer.fetch(CACHE),) if side.module == PEER.module else ()
            found = run_module(side.module, own_job.to_json(), threads=cell.threads, first=first)
            yield side, json.loads(found)


def summary(cell: Cell, found: list[tuple[Side, dict[str, Any]]]) -> dict[str, Any]:
    """Return side -> its numbers; those of our sides with the ratio to the peer's of their round."""
    by_side = {
        side.name: [result for other, result in found if other == side] for side in cell.sides
    }
    numbers = {side.name: side_summary(cell, side, by_side[side.name]) for side in cell.sides}
    if PEER.name in by_side:
        for side in cell.sides:
            if side is not PEER:
                numbers[side.name] |= against_peer(by_side[side.name], by_side[PEER.name])
    return numbers


def side_summary(cell: Cell, side: Side, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over a side's processes, and the share of the matrix rate that it reached."""
    phases = {
        name: round(statistics.median(mean(result["phases"][name]) for result in results), 3)
        for name in results[0]["phases"]
    }
    prompts = [len(ids) for ids in cell.workload.prompts(cell.shape.vocabulary)]
    required, shares = [], []
    for result in results:
        flops = mean(
            [
                sum(required_by(cell, side, prompts, lengths).values())
                for lengths in result["lengths"]
            ]
        )
        required.append(flops)
        shares.append(flops / mean(result["cpu"]) / mean(result["matmul_rates"]))
    episodes = cell.workload.batch
    batches = [lengths for result in results for lengths in result["lengths"]]
    return {
        "cpu_seconds": [round(mean(result["cpu"]), 2) for result in results],
        "wall_seconds": [round(mean(result["wall"]), 2) for result in results],
        "episodes_per_cpu_second": round(
            episodes / statistics.median(mean(result["cpu"]) for result in results), 3
        ),
        "phases": phases,
        "memory_gib": round(max(result["memory"] for result in results), 3),
        "required_tflop": round(statistics.median(required) / 1e12, 3),
        "matmul_gflops": round(
            statistics.median(mean(result["matmul_rates"]) for result in results) / 1e9, 1
        ),
        "machine_share": round(statistics.median(shares), 3),
        "mean_response": round(mean([mean(lengths) for lengths in batches]), 1),
        "options": dict(side.options),
        "critic": side.critic,
    }


def required_by(
    cell: Cell, side: Side, prompts: list[int], responses: list[int]
) -> dict[str, float]:
    """Return the FLOPs that an update of this side needs."""
    workload = cell.workload
    return update_flops(
        cell.shape, workload.lora_rank, workload.epochs, prompts, responses, side.critic
    )


def against_peer(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many times the peer's episodes per second, by round, and of its peak memory."""
    pairs = list(zip(ours, theirs, strict=True))
    cpu = [mean(peer["cpu"]) / mean(own["cpu"]) for own, peer in pairs]
    wall = [mean(peer["wall"]) / mean(own["wall"]) for own, peer in pairs]
    memory = max(result["memory"] for result in ours) / max(r["memory"] for r in theirs)
    return {
        "ratio_median": round(statistics.median(cpu), 3),
        "spread": [round(min(cpu), 3), round(max(cpu), 3)],
        "wall_ratio_median": round(statistics.median(wall), 3),
        "wall_spread": [round(min(wall), 3), round(max(wall), 3)],
        "memory_ratio": round(memory, 3),
    }


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
