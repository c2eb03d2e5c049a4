"""The processes that an experiment has started: found by a mark in their environment, and ended with care."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

MARK = "RLHF_EXPERIMENT"  # in the environment of every program that an experiment has started: its folder
JOB = "RLHF_EXPERIMENT_JOB"  # which of its jobs
PATIENCE = 120.0  # seconds that programs get to save and end


def programs_of(folder: Path, job: str | None = None) -> list[Any]:
    """Return the processes (psutil) that an experiment in this folder has started, for one of its jobs or for any."""
    import psutil

    own, found = str(folder.resolve()), []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        is_ours = environment.get(MARK) == own and job in (None, environment.get(JOB))
        if is_ours and process.pid != os.getpid():
            found.append(process)
    return found


def end_programs(folder: Path, job: str | None = None) -> None:
    """Send SIGTERM to the programs, on which they save and end; SIGKILL to what is left after PATIENCE."""
    import psutil

    asked: set[Any] = set()
    deadline = time.monotonic() + PATIENCE
    # looked at again and again, since a launcher may be about to launch
    while (found := programs_of(folder, job)) and time.monotonic() < deadline + PATIENCE:
        is_late = time.monotonic() > deadline
        for process in found if is_late else topmost_programs(found):
            try:
                if is_late:
                    process.kill()
                elif process not in asked:
                    process.send_signal(signal.SIGTERM)
                    asked.add(process)
            except psutil.Error:
                continue
        time.sleep(0.1)


def topmost_programs(found: list[Any]) -> list[Any]:
    """Return the topmost process of each program.

    A launcher ends its programs when it is asked to end, and a helper that ends is its program's failure.
    """
    import psutil

    launchers = [process for process in found if is_launcher(process)]
    topmost = []
    for process in found:
        try:
            parent = process.parent()
        except psutil.Error:
            continue
        is_helper = parent in found and parent not in launchers
        if process not in launchers and not is_helper:
            topmost.append(process)
    return topmost


def is_launcher(process: Any) -> bool:
    """Return whether this is a launcher (deepspeed, torchrun) with a program of its own still there."""
    import psutil

    try:
        return not is_rank(process) and any(map(is_rank, process.children(recursive=True)))
    except psutil.Error:
        return False


def is_rank(process: Any) -> bool:
    import psutil

    try:
        return "LOCAL_RANK" in process.environ()
    except psutil.Error:
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
