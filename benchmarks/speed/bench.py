"""How fast is PPO here, beside the last PPO that TRL shipped, and how much memory does it take?

    python -m benchmarks.speed.bench              # 4M fixed and ragged, 42M once: at most 20 minutes
    python -m benchmarks.speed.bench --full       # everything; resumes where it was stopped

Both sides: a Llama with random weights, float32, prompts of 32-64 tokens, responses of at most 64,
64 episodes and 4 epochs an update, LoRA of rank 16 on all linear layers. The peer's critic is a
whole model, its reward model too. In a ragged workload a set of stop ids ends responses after 40 %
of the maximum on average. Each measurement is a fresh process; sides take turns. Seconds are those
of the CPU (`time.process_time`), on one thread unless said otherwise.

Results: benchmarks/results/bench.json, written after each cell, and DATE-speed.md beside it. Cells
that were measured at this commit are kept, unless with --again. The peer (TRL 1.12) is downloaded
with pip into benchmarks/.cache.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.paths import CACHE, RESULTS
from benchmarks.speed import peer
from benchmarks.speed.cells import Task, full_tasks, quick_tasks
from benchmarks.speed.results import Results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all cells, with the scaling table")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="cells measured side by side")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)

    tasks = full_tasks() if options.full else quick_tasks()
    results = Results.load(options.results)
    wanted = [
        task
        for task in tasks
        if options.only in task.name and (options.again or not results.has(task))
    ]
    print(f"{len(wanted)} of {len(tasks)} cells to measure", flush=True)

    # before the first cell, so that a network that fails costs nothing
    if wanted:
        peer.fetch(CACHE)
    with tempfile.TemporaryDirectory() as models, ThreadPoolExecutor(options.jobs) as pool:
        lock = threading.Lock()
        futures = [pool.submit(measure, task, Path(models), results, lock) for task in wanted]
        for future in futures:
            future.result()
    print(results.write_page())


def measure(task: Task, models: Path, results: Results, lock: threading.Lock) -> None:
    """Measure a cell and write what was found."""
    print(f"{task.name} ...", flush=True)
    found = task.measure(models)
    with lock:
        results.add(task, found)
        print(f"{task.name}: {results.line(task)}", flush=True)


if __name__ == "__main__":
    main()
