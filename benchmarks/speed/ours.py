"""Measure updates of this project's PPO in a process of its own.

python -m speed.ours JOB        # a Job as JSON; prints the measurements as JSON
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speed.clocks import Updates, matmul_rate, peak_memory
from speed.shapes import PAD, Job

# the phases of an update, by the metric that times them
PHASES = {
    "generate": "time/generate",
    "score": "time/score",
    "measure": "time/forward",
    "learn": "time/learn",
}


def trainer_of(job: Job) -> Any:
    """Return the trainer of the job's models, workload and options."""
    from rlhf.adapters import lora_config
    from rlhf.data.records import Prompt
    from rlhf.distributed import DistributedContext
    from rlhf.models import load_model
    from rlhf.options.ppo import PPOConfig
    from rlhf.ppo.rollout import role_scorer
    from rlhf.ppo.trainer import PPOTrainer, TrainingData
    from rlhf.roles import Roles

    models, workload = Path(job.models), job.workload
    values = {
        "model_name_or_path": str(models / "base"),
        "data": ["x"],
        "output_dir": "x",
        "reward": [{"model": str(models / "reward")}],
        "rollout_batch_size": workload.batch,
        "total_episodes": 1000 * workload.batch,
        "per_device_train_batch_size": job.micro_batch,
        "generation_batch_size": job.rollout_batch,
        "num_ppo_epochs": workload.epochs,
        "max_response_length": workload.response,
        "missing_eos_score": None,
        "lora_r": workload.lora_rank,
    }
    config = PPOConfig(**values | job.options)
    initial = load_model(config.model_name_or_path)
    roles = Roles(
        initial,
        lora_config(r=workload.lora_rank, alpha=2 * workload.lora_rank),
        str(models / "reward"),
        critic=config.critic_from if config.has_critic else None,
    )
    record = Prompt(prompt=[{"role": "user", "content": "x"}])
    prompts = workload.prompts(job.shape.vocabulary)
    data = TrainingData(
        [{"prompt_ids": ids, "record": record} for ids in prompts],
        initial.tokenizer,
        workload.stop_ids(job.shape.vocabulary),
    )
    scorer = role_scorer(roles, PAD, job.micro_batch)
    return PPOTrainer(config, roles, scorer, data, DistributedContext())


def measure(job: Job) -> dict[str, Any]:
    """Return the seconds of each update, their phases, the peak memory and the matrix rate."""
    import torch

    torch.set_num_threads(job.threads)
    # the rate changes with what else the machine does: read before and after
    rates = [matmul_rate()]
    trainer, updates = trainer_of(job), Updates()
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
    print(json.dumps(measure(Job.from_json(sys.argv[1]))))
