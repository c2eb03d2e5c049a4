"""CPU seconds and wall clock of the quickstart, job by job.

    python -m benchmarks.speed.quickstart_cost             # once, into a folder of its own
    python -m benchmarks.speed.quickstart_cost --beside    # once more beside a busy loop on one core

CPU seconds are in user and system mode, of a job's program and all that it starts; they hardly
depend on what else the machine does, as wall clock does. Result: benchmarks/results/DATE-
quickstart-cost.md. It says how many threads a program took, and which machine this was.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paths import RESULTS
from rlhf.jobs.runner import children_cpu_seconds
from rlhf.jobs.state import code_version
from rlhf.text import markdown_table

COMMAND = [sys.executable, "-m", "rlhf.cli", "sandbox", "quickstart"]
BUSY = [sys.executable, "-c", "while True: pass"]


@dataclass(frozen=True)
class Cost:
    """What one run cost: (CPU seconds, seconds) of each job, in order, and of the whole."""

    jobs: dict[str, tuple[float, float]]
    total: tuple[float, float]


@contextlib.contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """Keep one core busy with a program that has nothing to do with the run."""
    process = subprocess.Popen(BUSY) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def measure(command: list[str], folder: Path, beside: bool = False) -> Cost:
    """Run the quickstart's command in a folder, and read what its jobs have recorded.

    The total is that of all processes, the runner's own included. Raises CalledProcessError where
    the command fails.
    """
    options = ["--run", str(folder / "run"), "--world", str(folder / "world")]
    with busy_core(beside):
        before, began = children_cpu_seconds(), time.monotonic()
        # a cache of its own: what an earlier run has left there would make DPO cheaper
        own = os.environ | {"RLHF_CACHE": str(folder / "cache")}
        subprocess.run([*command, *options], check=True, env=own)
        # the busy loop is not among the children that have ended by now
        total = (children_cpu_seconds() - before, time.monotonic() - began)
    return Cost(read_jobs(folder / "run"), total)


def read_jobs(run: Path) -> dict[str, tuple[float, float]]:
    """Return name -> (CPU seconds, seconds) of a run's jobs, in the order in which they ended."""
    ended = []
    for file in (run / "jobs").glob("*.json"):
        record = json.loads(file.read_text())
        cost = (record["cpu_seconds"], record["seconds"])
        ended.append((record["finished"], file.stem, cost))
    return {name: cost for _, name, cost in sorted(ended)}


def table(costs: dict[str, Cost]) -> str:
    """Return the costs as a Markdown table: a row for each job, two columns for each kind of run."""
    head = ["job"]
    for kind in costs:
        head += [f"CPU s, {kind}", f"seconds, {kind}"]
    first = next(iter(costs.values()))
    rows = []
    for name in first.jobs:
        numbers = [number for cost in costs.values() for number in cost.jobs[name]]
        rows.append([name, *(f"{number:.1f}" for number in numbers)])
    totals = [number for cost in costs.values() for number in cost.total]
    rows.append(["all processes", *(f"{number:.0f}" for number in totals)])
    return "\n".join(markdown_table(head, rows, right=range(1, len(head))))


def page(costs: dict[str, Cost], date: str) -> str:
    """Return the whole result as Markdown."""
    commit = code_version()["commit"] or "no commit"
    threads = os.environ.get("OMP_NUM_THREADS", "not set: 1 by the quickstart")
    lines = [
        f"# What the quickstart costs, {date}",
        "",
        "    python -m benchmarks.speed.quickstart_cost" + (" --beside" if len(costs) > 1 else ""),
        "",
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, commit "
        f"{commit}. OMP_NUM_THREADS: {threads}. The world is made, too.",
        "",
        table(costs),
    ]
    kinds = list(costs.values())
    if len(kinds) > 1:
        ratio = kinds[1].total[0] / kinds[0].total[0]
        lines += ["", f"Beside a busy loop on one core: {ratio:.2f} times the CPU seconds."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None, command: list[str] = COMMAND) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", action="store_true", help="also beside a busy loop on one core")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the page goes")
    options = parser.parse_args(argv)

    costs = {}
    for kind in ("alone", "beside a busy core")[: 1 + options.beside]:
        folder = Path(tempfile.mkdtemp(prefix="quickstart-"))
        costs[kind] = measure(command, folder, beside=kind != "alone")
        shutil.rmtree(folder)
    date = datetime.date.today().isoformat()
    file = options.results / f"{date}-quickstart-cost.md"
    file.write_text(page(costs, date))
    print(file.read_text())


if __name__ == "__main__":
    main()
