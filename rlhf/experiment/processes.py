"""The processes that an experiment has started: found by a mark in their environment, and ended
with care.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import psutil

# in the environment of every program that an experiment has started: its folder
MARK = "RLHF_EXPERIMENT"
# which of its jobs
JOB = "RLHF_EXPERIMENT_JOB"
# seconds that programs get to save and end
PATIENCE = 120.0


def programs_of(folder: Path, job: str | None = None) -> list[psutil.Process]:
    """Return the processes that an experiment in this folder has started, for one of its jobs or
    for any.
    """
    wanted = {MARK: str(folder.resolve())} | ({JOB: job} if job else {})
    # by a mark in the environment: process ids are reused, and a launcher's children are not ours
    others = (process for process in psutil.process_iter() if process.pid != os.getpid())
    return [process for process in others if wanted.items() <= environment_of(process).items()]


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
            is_launcher = not is_rank(process) and any(map(is_rank, children))
            (launchers if is_launcher else topmost).append(process)
    # a data loader or compiler ends with its program
    helped = [process for process in found if process not in launchers]
    return [process for process in topmost if parent_of(process) not in helped]


def is_rank(process: psutil.Process) -> bool:
    return "LOCAL_RANK" in environment_of(process)


def parent_of(process: psutil.Process) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        return process.parent()
    return None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
