"""How the program of a job is started: its command and its environment."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path

from rlhf.experiment.job import Job
from rlhf.experiment.processes import JOB, MARK, free_port

# launchers of one process, and the variables that they set for it
ONE_PROCESS = (["deepspeed", "--num_accelerators", "1"], ["deepspeed", "--num_gpus", "1"])
ONE_RANK = ("RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=1", "LOCAL_SIZE=1")


def shown_command(launcher: str, job: Job) -> list[str]:
    """Return the command as it can be typed."""
    if job.program == "rlhf":
        return job.command
    words = shlex.split(launcher)
    as_module = "--module" if Path(words[0]).name == "deepspeed" else "-m"
    return [*words, as_module, *job.command]


def full_command(launcher: str, job: Job) -> list[str]:
    """Return the command with this Python, and a port of its own, since several run at a time.

    One process on a CPU is started with the launcher's variables and without the launcher, which
    imports DeepSpeed twice to set them (4 CPU seconds).
    """
    if job.program == "rlhf":
        return [sys.executable, "-m", "rlhf.cli", *job.arguments]
    words = shlex.split(launcher)
    if words in ONE_PROCESS and not has_accelerator():
        return ["env", *ONE_RANK, sys.executable, "-m", *job.command]
    has_port = any(word.replace("-", "_").startswith("__master_port") for word in words)
    if Path(words[0]).name in ("deepspeed", "torchrun") and not has_port:
        launcher += f" --master_port {free_port()}"
    command = shown_command(launcher, job)
    if command[0] == "python":
        command[0] = sys.executable
    return command


def environment(
    folder: Path, job: Job, processes: int = 1, threads: int | None = None
) -> dict[str, str]:
    """Return the environment of a job's program, one of `processes` at a time, with `threads` on a
    CPU (default: its share of the cores where there are several).
    """
    result = {**os.environ, "PYTHONUNBUFFERED": "1", MARK: str(folder.resolve()), JOB: job.name}
    # meant for one run, and these are many
    result.pop("WANDB_RUN_ID", None)
    result["WANDB_NAME"] = job.name
    # the trials of an experiment stand together in W&B
    result.setdefault("WANDB_RUN_GROUP", folder.resolve().name)
    if not has_accelerator():
        # DeepSpeed finds this out too, with a warning each time
        result.setdefault("DS_ACCELERATOR", "cpu")
        if threads is None and processes > 1:
            threads = max(1, (os.cpu_count() or 1) // processes)
        if threads is not None:
            result.setdefault("OMP_NUM_THREADS", str(threads))
    result["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{result.get('PATH', '')}"
    return result


@functools.cache
def has_accelerator() -> bool:
    """Return whether torch finds an accelerator. A process of its own asks: this one holds no
    device while jobs run.
    """
    question = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    return subprocess.run([sys.executable, "-c", question], capture_output=True).returncode == 0
