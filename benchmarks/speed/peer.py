"""Measure updates of TRL 1.12's PPO, the last that TRL shipped, in a process of its own.

    PYTHONPATH=...: python -m benchmarks.speed.peer JOB        # a Job as JSON; prints the measurements as JSON

TRL knows one stop token. A set of them is given to it where it reads that one: `generate` takes a
list of ids, and the function that truncates responses is replaced by one that looks for any of
them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.clocks import Updates, matmul_rate, peak_memory
from benchmarks.speed.shapes import PAD, Job

VERSION = "1.12.0"


def fetch(cache: Path) -> Path:
    """Return the folder of the peer's package, downloading it where it is not there yet."""
    folder = cache / f"trl-{VERSION}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*command, f"trl=={VERSION}", "--dest", place], check=False)
        if done.returncode:
            raise SystemExit(f"pip could not download trl=={VERSION}: unpack its wheel in {folder}")
        wheel = next(Path(place).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(place) / "package")
        # whole or not at all
        os.replace(Path(place) / "package", folder)
    return folder


class Watch:
    """Notes each update as TRL's callbacks and patched functions see it."""

    def __init__(self, job: Job):
        self.job, self.updates = job, Updates()
        self.seconds = {"generate": 0.0, "score and measure": 0.0}
        self.lengths: list[int] = []
        self.rollout_ended = 0.0
        self.is_warm = not job.warm_up

    def timed(self, function: Any) -> Any:
        """Return `function` with its CPU seconds added to "generate"."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            result = function(*args, **kwargs)
            self.seconds["generate"] += time.process_time() - began
            return result

        return call

    def ends_rollout(self, function: Any) -> Any:
        """Return `function`, which is the last one called before learning, noting the time."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.rollout_ended = time.process_time()
            return result

        return call

    def truncation(self, stop_ids: list[int]) -> Any:
        """Return TRL's truncate_response for a set of stop ids; it notes the lengths."""
        import torch

        stops = torch.tensor(stop_ids)

        def truncate_response(stop_token_id: int, pad_token_id: int, responses: Any) -> Any:
            is_stop = torch.isin(responses, stops)
            is_after = (is_stop.cumsum(-1) - is_stop.long()) > 0
            self.lengths += (~is_after).sum(-1).tolist()
            return responses.masked_fill(is_after, pad_token_id)

        return truncate_response

    def callback(self) -> Any:
        """Return the trainer callback that begins and ends updates."""
        from transformers import TrainerCallback

        watch = self

        class Callback(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                # its statistics have been laid out for all epochs by now
                args.num_ppo_epochs = watch.job.workload.epochs if watch.is_warm else 1
                watch.begin()

            def on_step_end(self, args, state, control, **kwargs):
                if watch.is_warm:
                    watch.end()
                watch.is_warm = True
                args.num_ppo_epochs = watch.job.workload.epochs
                watch.begin()

        return Callback()

    def begin(self) -> None:
        self.seconds["generate"], self.lengths[:] = 0.0, []
        self.began = time.process_time()
        self.updates.begin()

    def end(self) -> None:
        generated = self.seconds["generate"]
        phases = {
            "generate": generated,
            "score and measure": self.rollout_ended - self.began - generated,
            "learn": time.process_time() - self.rollout_ended,
        }
        lengths = list(self.lengths) or [self.job.workload.response] * self.job.workload.batch
        self.updates.end(phases, lengths)


def trainer_of(job: Job, watch: Watch, folder: str) -> Any:
    """Return TRL's trainer: LoRA on the policy, a whole critic, a reward model of the same shape."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    workload, base = job.workload, str(Path(job.models) / "base")
    stop_ids = workload.stop_ids(job.shape.vocabulary)
    args = PPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        seed=job.seed,
        disable_tqdm=True,
        save_strategy="no",
        num_sample_generations=0,
        learning_rate=1e-5,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=workload.batch // job.micro_batch,
        local_rollout_forward_batch_size=job.rollout_batch,
        total_episodes=workload.batch * (job.updates + job.warm_up),
        num_ppo_epochs=workload.epochs,
        response_length=workload.response,
        temperature=1.0,
        stop_token_id=stop_ids[0] if stop_ids else None,
    )
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(base, dtype="float32", num_labels=1)
        for _ in range(2)
    )
    trainer = PPOTrainer(
        args,
        tokenizer,
        policy,
        None,
        reward,
        Dataset.from_dict({"input_ids": workload.prompts(job.shape.vocabulary)}),
        value,
        callbacks=[watch.callback()],
        peft_config=LoraConfig(
            r=workload.lora_rank,
            lora_alpha=2 * workload.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    policy.generation_config.pad_token_id = PAD
    # nothing ends a response without stop ids
    policy.generation_config.eos_token_id = stop_ids or None
    if stop_ids:
        ppo_trainer.truncate_response = watch.truncation(stop_ids)
    ppo_trainer.batch_generation = watch.timed(ppo_trainer.batch_generation)
    # advantages are whitened just before learning
    ppo_trainer.masked_whiten = watch.ends_rollout(ppo_trainer.masked_whiten)
    return trainer


def measure(job: Job) -> dict[str, Any]:
    """Return the seconds of each update, their phases, the peak memory and the matrix rate."""
    import torch

    torch.set_num_threads(job.threads)
    rates, watch = [matmul_rate()], Watch(job)
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(job, watch, folder).train()
    memory = peak_memory()
    rates.append(matmul_rate())
    return asdict(watch.updates) | {"memory": memory, "matmul_rates": rates}


if __name__ == "__main__":
    # what TRL prints does not belong to the result
    result, sys.stdout = sys.stdout, sys.stderr
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    print(json.dumps(measure(Job.from_json(sys.argv[1]))), file=result)
