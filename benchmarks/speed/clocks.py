"""What a measuring process reads of itself: CPU seconds, memory, the rate of a matrix product."""

from __future__ import annotations

import re
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Updates:
    """Seconds of each update and of its phases; the warm-up is not among them."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    # phase -> CPU seconds of each update
    phases: dict[str, list[float]] = field(default_factory=dict)
    # tokens of each response of each update
    lengths: list[list[int]] = field(default_factory=list)

    def begin(self) -> None:
        self._began = time.process_time(), time.perf_counter()

    def end(self, phases: dict[str, float], lengths: list[int]) -> None:
        """Note the update that `begin` began."""
        self.cpu.append(time.process_time() - self._began[0])
        self.wall.append(time.perf_counter() - self._began[1])
        self.lengths.append(lengths)
        for name, seconds in phases.items():
            self.phases.setdefault(name, []).append(seconds)


def peak_memory() -> float:
    """Return the most memory that this process has had resident, GiB.

    Linux counts in ru_maxrss also what the parent held when it started this process, VmHWM does
    not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matmul_rate(size: int = 1536, repeats: int = 7) -> float:
    """Return the FLOPs that a large float32 matrix product makes in a CPU second (median)."""
    import torch

    a, b = torch.randn(2, size, size)
    seconds = []
    for _ in range(repeats + 1):
        began = time.process_time()
        a @ b
        seconds.append(time.process_time() - began)
    # the first one is a warm-up
    return 2 * size**3 / sorted(seconds[1:])[repeats // 2]
