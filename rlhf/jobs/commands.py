"""The programs of jobs: how each is started, which are running (found by a mark in their
environment), and how they are ended with care.
"""

import contextlib
import functools
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil

from rlhf.jobs.job import Job
from rlhf.startup import free_port

# launchers of one process, and the variables that they set for it
ONE_PROCESS = (["deepspeed", "--num_accelerators", "1"], ["deepspeed", "--num_gpus", "1"])
ONE_RANK = ("RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=1", "LOCAL_WORLD_SIZE=1")
# in the environment of every program that an experiment has started: its folder
MARK = "RLHF_EXPERIMENT"
# which of its jobs
JOB = "RLHF_EXPERIMENT_JOB"
# seconds that programs get to save and end
PATIENCE = 120.0


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
    # launchers read --master_port and --master-port
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


def programs_of(folder: Path, job: str | None = None) -> list[psutil.Process]:
    """Return the processes that an experiment in this folder has started, for one of its jobs or
    for any.
    """
    wanted = {MARK: str(folder.resolve())}
    if job:
        wanted[JOB] = job
    found = []
    for process in psutil.process_iter():
        # by a mark in the environment: process ids are reused, and a launcher's children are not
        # ours
        is_marked = wanted.items() <= environment_of(process).items()
        if is_marked and process.pid != os.getpid():
            found.append(process)
    return found


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Return the environment of a process; empty where it has ended or is another user's."""
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def end_programs(folder: Path, job: str | None = None) -> None:
    """Send SIGTERM to the programs, on which they save and end; SIGKILL to what is left after
    PATIENCE.
    """
    asked: set[psutil.Process] = set()
    deadline = time.monotonic() + PATIENCE
    # looked at again and again, since a launcher may be about to launch
    while (found := programs_of(folder, job)) and time.monotonic() < deadline + PATIENCE:
        is_late = time.monotonic() > deadline
        for process in found if is_late else topmost_programs(found):
            with contextlib.suppress(psutil.Error):
                if is_late:
                    process.kill()
                elif process not in asked:
                    process.terminate()
                    asked.add(process)
        time.sleep(0.1)


def topmost_programs(found: list[psutil.Process]) -> list[psutil.Process]:
    """Return the topmost process of each program.

    A launcher (deepspeed, torchrun) ends its programs when it is asked to end, and the end of a
    helper is its program's failure.
    """
    launchers, topmost = [], []
    for process in found:
        with contextlib.suppress(psutil.Error):
            children = process.children(recursive=True)
            if not is_rank(process) and any(map(is_rank, children)):
                launchers.append(process)
            else:
                topmost.append(process)
    # a data loader or compiler ends with its program
    helped = [process for process in found if process not in launchers]
    return [process for process in topmost if parent_of(process) not in helped]


def is_rank(process: psutil.Process) -> bool:
    """Return whether a launcher has started this process as one of the ranks of a run."""
    return "LOCAL_RANK" in environment_of(process)


def parent_of(process: psutil.Process) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        return process.parent()
    return None
