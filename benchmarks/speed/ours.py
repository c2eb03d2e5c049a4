"""Measure updates of this project's PPO in a process of its own.

python -m benchmarks.speed.ours JOB        # a Job as JSON; prints the measurements as JSON
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.clocks import Updates, matmul_rate, peak_memory
from benchmarks.speed.shapes import Job

# the phases of an update, by the metric that times them
PHASES = {
    "generate": "time/generate",
    "score": "time/score",
    "measure": "time/forward",
    "learn": "time/learn",
}


class Made(Exception):
    """Carries the trainer out of the program that has made it."""

    def __init__(self, trainer: Any):
        super().__init__()
        self.trainer = trainer


def trainer_of(job: Job, folder: Path) -> Any:
    """Return the trainer that launch/ppo.py makes of the job's models, workload and options.

    `folder` is where it writes. The stop ids are the workload's.
    """
    import rlhf.model.tokenizer
    import rlhf.ppo.loop
    from launch import ppo

    models, workload = Path(job.models), job.workload
    prompts = workload.prompts(job.shape.vocabulary)
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = {
        "model_name_or_path": models / "base",
        "reward": f"[{{model: {models / 'reward'}}}]",
        "data": data,
        "output_dir": folder / "run",
        "validation_fraction": 0,
        "test_fraction": 0,
        "eval_prompts": 0,
        "rollout_batch_size": workload.batch,
        "samples_per_prompt": workload.samples_per_prompt,
        "total_episodes": 1000 * workload.batch,
        "num_ppo_epochs": workload.epochs,
        "max_response_length": workload.response,
        "missing_eos_score": "none",
        "seed": job.seed,
        "lora_r": workload.lora_rank,
        "lora_alpha": 2 * workload.lora_rank,
    } | job.options

    def made(run: Any, trainer: Any, *others: Any) -> None:
        raise Made(trainer)

    rlhf.model.tokenizer.stop_ids = lambda *_: workload.stop_ids(job.shape.vocabulary)
    rlhf.ppo.loop.TrainingLoop = made
    try:
        ppo.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    except Made as found:
        trainer = found.trainer
    read = [row["prompt_ids"] for row in trainer.data.prompts]
    if sorted(read) != sorted(prompts):
        raise SystemExit("the program has read other prompts than those of the workload")
    return trainer


def measure(job: Job) -> dict[str, Any]:
    """Return the seconds of each update, their phases, the peak memory and the matrix rate."""
    import torch

    torch.set_num_threads(job.threads)
    # the rate changes with what else the machine does: read before and after
    rates, updates = [matmul_rate()], Updates()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(job, Path(folder))
    # the trainer times its phases by this clock; on one thread they are to be CPU seconds
    if job.threads == 1:
        time.monotonic = time.process_time

    if job.warm_up:
        trainer.config.num_ppo_epochs = 1
        trainer.step(0)
        trainer.config.num_ppo_epochs = job.workload.epochs
    for number in range(1, job.updates + 1):
        updates.begin()
        metrics, rollout = trainer.step(number)
        phases = {name: metrics[metric] for name, metric in PHASES.items()}
        updates.end(phases, rollout.mask.sum(-1).tolist())
        if metrics["ppo/updates"] != job.workload.epochs:
            raise SystemExit(f"a guard stopped learning: {metrics}")
    memory = peak_memory()
    rates.append(matmul_rate())
    return asdict(updates) | {"memory": memory, "matmul_rates": rates}


if __name__ == "__main__":
    # what the program prints does not belong to the result
    result, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(measure(Job.from_json(sys.argv[1]))), file=result)
