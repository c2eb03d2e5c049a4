"""Measure sampling alone: this project's engine, or transformers' `generate` with the adapter
unmerged.

    python -m benchmarks.speed.generation JOB      # a Job with side engine or hf; prints measurements as JSON
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.clocks import Updates, matmul_rate, peak_memory
from benchmarks.speed.ours import trainer_of
from benchmarks.speed.shapes import PAD, Job


def prompts_of(trainer: Any) -> list[list[int]]:
    """Return the prompt of each response of the batch."""
    found = []
    for row in trainer.data.prompts:
        found += [row["prompt_ids"]] * trainer.config.samples_per_prompt
    return found


def by_engine(trainer: Any, step: int) -> list[int]:
    """Sample one response to each prompt as a rollout does; return their lengths."""
    from rlhf.ppo.rollout import sample_keys

    collector = trainer.collector
    settings = collector.settings
    count = trainer.config.samples_per_prompt
    with trainer.roles.use("policy"):
        completions = collector.generate(
            trainer.roles.trunk,
            prompts_of(trainer),
            sample_keys(trainer.data.prompts, count, settings.seed, step),
            settings.sampling,
            collector.stop_ids,
            PAD,
            settings.generation_batch_size,
        )
    return [len(ids) for ids in completions.response_ids]


def by_transformers(trainer: Any, step: int) -> list[int]:
    """Sample the same with `generate`, `generation_batch_size` rows at a time."""
    import torch

    torch.manual_seed(1000 * trainer.config.seed + step)
    count = trainer.config.generation_batch_size
    prompts, lengths = prompts_of(trainer), []
    for start in range(0, len(prompts), count):
        lengths += batch_by_transformers(trainer, prompts[start : start + count])
    return lengths


def batch_by_transformers(trainer: Any, prompts: list[list[int]]) -> list[int]:
    """Sample a batch: prompts padded on the left, and rows that ended stay in it."""
    import torch
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD, device=trainer.world.device)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt) :] = torch.tensor(prompt, device=ids.device)
    stops = trainer.collector.stop_ids
    config = GenerationConfig(
        max_new_tokens=trainer.config.max_response_length,
        do_sample=True,
        top_k=0,
        pad_token_id=PAD,
        eos_token_id=stops or None,
    )
    with trainer.roles.use("policy"), torch.no_grad():
        whole = trainer.roles.trunk.generate(
            input_ids=ids, attention_mask=(ids != PAD).long(), generation_config=config
        )
    responses = whole[:, longest:]
    if not stops:
        return [responses.shape[1]] * len(responses)
    is_stop = torch.isin(responses, torch.tensor(stops, device=ids.device))
    is_after = (is_stop.cumsum(-1) - is_stop.long()) > 0
    return (~is_after).sum(-1).tolist()


def measure(job: Job) -> dict[str, Any]:
    """Return the seconds of each round of sampling, the lengths, memory and the matrix rate."""
    import torch

    torch.set_num_threads(job.threads)
    rates = [matmul_rate()]
    updates = Updates()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(job, Path(folder))
    trainer.roles.eval()
    sample = by_engine if job.side == "engine" else by_transformers
    sample(trainer, 0)
    for number in range(1, job.updates + 1):
        updates.begin()
        lengths = sample(trainer, number)
        updates.end({}, lengths)
    memory = peak_memory()
    rates.append(matmul_rate())
    return asdict(updates) | {"memory": memory, "matmul_rates": rates}


if __name__ == "__main__":
    # what the program prints does not belong to the result
    result, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(measure(Job.from_json(sys.argv[1]))), file=result)
