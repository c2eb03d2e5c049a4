"""How much memory do k reward models on one base take, in scoring and in PPO?

    python -m benchmarks.memory.ensembles        # 42M: five processes, about ten minutes of one core

Each measurement is a fresh process: the most memory that it has had resident, from its start. The
model and the rollout are those of the speed benchmark (speed/shapes.py). Rows go to benchmarks/results/reward.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.paths import RESULTS
from benchmarks.result_rows import add_rows, row_of
from benchmarks.speed.clocks import peak_memory
from benchmarks.speed.run import environment
from benchmarks.speed.shapes import SHAPES, WORKLOADS, Job, write_models

MEMBERS = 4
BOUND = 1.1
COMMAND = "python -m benchmarks.memory.ensembles"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="42M", choices=SHAPES)
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "COUNT", "FOLDER"))
    options = parser.parse_args()
    if options.measure:
        what, count, folder = options.measure
        MEASURES[what](options.shape, int(count), Path(folder))
        return

    with tempfile.TemporaryDirectory() as folder:
        write_models(SHAPES[options.shape], Path(folder), WORKLOADS["fixed"].lora_rank)
        for number in range(1, MEMBERS):
            shutil.copytree(f"{folder}/reward", f"{folder}/reward-{number}")
        found = {}
        for what, counts in (("loading", [0]), ("scoring", [1, MEMBERS]), ("ppo", [1, MEMBERS])):
            for count in counts:
                found[f"{what} {count}"] = in_process(options.shape, what, count, folder)
    print(json.dumps(found, indent=2))
    if options.shape == "42M":
        write_rows(found)


def in_process(shape: str, what: str, count: int, folder: str) -> float:
    """Return the peak memory, GiB, of a process that measures."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.memory.ensembles",
        "--shape",
        shape,
    ]
    done = subprocess.run(
        [*command, "--measure", what, str(count), folder],
        env=environment(threads=1),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{what} with {count}: {done.stderr[-2000:]}")
    memory = float(done.stdout.splitlines()[-1])
    print(f"{what}, {count} reward models: {memory:.3f} GiB", flush=True)
    return memory


def folders_of(folder: Path, count: int) -> list[str]:
    return [str(folder / "reward"), *(str(folder / f"reward-{i}") for i in range(1, count))]


def measure_scoring(shape: str, count: int, folder: Path) -> None:
    """Score the responses of a rollout by `count` reward models."""
    import torch

    from reward.loaded import RewardModels, reward_scorer
    from rlhf.data.records import Samples
    from rlhf.model.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(str(folder / "base"))
    workload = WORKLOADS["fixed"]
    prompts = workload.prompts(SHAPES[shape].vocabulary)
    responses = [prompt[: workload.response] for prompt in reversed(prompts)]
    columns = ([[]] * len(prompts), [""] * len(prompts), prompts, responses)
    samples = Samples(*columns, [True] * len(prompts), [{}] * len(prompts))
    models = RewardModels()
    scorers = []
    for path in folders_of(folder, count):
        scorers.append(reward_scorer(path, tokenizer=tokenizer, device="cpu", models=models))
    for score in scorers:
        score(samples)
    print(peak_memory())


def measure_loading(shape: str, count: int, folder: Path) -> None:
    """Import what scoring imports, and load nothing."""
    importlib.import_module("reward.model")
    print(peak_memory())


def measure_ppo(shape: str, count: int, folder: Path) -> None:
    """Make one step of PPO against `count` reward models."""
    import torch

    from benchmarks.speed.ours import trainer_of

    torch.set_num_threads(1)
    names = ", ".join(folders_of(folder, count))
    reward = f"[{{model: {names}}}]" if count == 1 else f"[{{ensemble: [{names}]}}]"
    workload = replace(WORKLOADS["fixed"], epochs=1)
    job = Job("ours", str(folder), SHAPES[shape], workload, {"reward": reward})
    with tempfile.TemporaryDirectory() as output:
        # the program prints
        result, sys.stdout = sys.stdout, sys.stderr
        trainer = trainer_of(job, Path(output))
        trainer.step(0)
    print(peak_memory(), file=result)


MEASURES = {
    "loading": measure_loading,
    "scoring": measure_scoring,
    "ppo": measure_ppo,
}


def write_rows(found: dict[str, float]) -> None:
    rows = []
    for what in ("scoring", "ppo"):
        ratio = found[f"{what} {MEMBERS}"] / found[f"{what} 1"]
        text = (
            f"peak memory of {what} with {MEMBERS} reward models on one base, "
            "as a multiple of that with one (42M)"
        )
        rows.append(row_of(f"ensemble/memory/{what}", text, ratio, f"<= {BOUND}", COMMAND))
    add_rows(RESULTS / "reward.json", rows)


if __name__ == "__main__":
    main()
