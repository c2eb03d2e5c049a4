"""Measure SFT or DPO: this project's program, or TRL's trainer as it is installed here.

    python -m benchmarks.speed.offline JOB     # a Job with side ours, again or trl, options {"program": "sft"|"dpo"}

Both read the same file of conversations with the same template, and train the same adapter with
the same batches' size, in float32 and without gradient checkpointing, once over `batch` rows. The
seconds are those of the whole program but for its imports, which a short run before has made.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.clocks import Updates, matmul_rate, peak_memory
from benchmarks.speed.shapes import FIRST_WORD, Job

# rows of a batch of training
ROWS_AT_ONCE = 8
# our side's second DPO run on the same pairs, with another beta
AGAIN, BETA = "again", 0.2


def rows_of(job: Job, count: int) -> list[dict[str, Any]]:
    """Return `count` conversations: prompts of the workload, answers of all lengths up to its response's."""
    workload, draw = job.workload, random.Random(count)

    def words(count: int) -> str:
        ids = (draw.randrange(FIRST_WORD, job.shape.vocabulary) for _ in range(count))
        return " ".join(f"w{i}" for i in ids)

    def said(role: str, count: int) -> list[dict[str, str]]:
        return [{"role": role, "content": words(count)}]

    rows = []
    for _ in range(count):
        prompt = said("user", draw.randint(workload.shortest_prompt, workload.longest_prompt))
        answers = [said("assistant", draw.randint(1, workload.response)) for _ in range(2)]
        if job.options["program"] == "sft":
            rows.append({"prompt": prompt, "completion": answers[0]})
        else:
            rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return rows


def run_ours(job: Job, data: Path, folder: Path, more: dict[str, Any]) -> None:
    """Run the program of this project on the file."""
    from launch import dpo, sft

    program = {"sft": sft, "dpo": dpo}[job.options["program"]]
    options = {
        "model_name_or_path": str(Path(job.models) / "base"),
        "data": str(data),
        "output_dir": str(folder / "ours"),
        "validation_fraction": 0,
        "test_fraction": 0,
        "eval_prompts": 0,
        "lora_r": job.workload.lora_rank,
        "per_device_train_batch_size": ROWS_AT_ONCE,
    } | more
    program.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


def run_trl(job: Job, data: Path, folder: Path) -> None:
    """Run TRL's trainer on the same rows."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    base = str(Path(job.models) / "base")
    trainers = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}
    config, trainer = trainers[job.options["program"]]
    args = config(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=ROWS_AT_ONCE,
        num_train_epochs=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rank = job.workload.lora_rank
    trainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    ).train()


def measure(job: Job) -> dict[str, Any]:
    """Return CPU seconds and wall clock of the whole program, memory and matrix rate."""
    import torch

    torch.set_num_threads(job.threads)
    rates, updates = [matmul_rate()], Updates()
    # the first run imports what is needed; each is timed, and the last one counts
    runs = {"warm-up": ROWS_AT_ONCE, "first": job.workload.batch}
    if job.side == AGAIN:
        runs["again"] = job.workload.batch
    with tempfile.TemporaryDirectory() as place:
        # the reference's log-probabilities, kept from the first run to the next
        os.environ["RLHF_CACHE"] = f"{place}/cache"
        for name, rows in runs.items():
            folder = Path(place) / name
            folder.mkdir()
            data = folder / "data.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(job, rows)))
            updates = Updates()
            updates.begin()
            if job.side == "trl":
                run_trl(job, data, folder)
            else:
                run_ours(job, data, folder, {"beta": BETA} if name == "again" else {})
            updates.end({}, [])
    memory = peak_memory()
    rates.append(matmul_rate())
    return asdict(updates) | {"memory": memory, "matmul_rates": rates}


if __name__ == "__main__":
    result, sys.stdout = sys.stdout, sys.stderr
    found = measure(Job.from_json(sys.argv[1]))
    print(json.dumps(found), file=result)
