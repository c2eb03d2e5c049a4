"""Parse what scripts over several seeds are given, start programs of the project in processes of their
own, and sum up what the seeds have measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.paths import ROOT
from rlhf.http_server import listen
from rlhf.jobs.runner import children_cpu_seconds
from rlhf.jobs.state import read_json
from rlhf.sandbox import CONFIGS
from rlhf.stats import jackknife_interval


def folder_and_seeds(description: str) -> tuple[Path, int]:
    """Parse the command line FOLDER [--seeds 5]; return the folder, absolute and made, and the count
    of seeds. --help says the description's first line.
    """
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of the runs; made, or resumed from")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder, arguments.seeds


def run(module: str, *words: str) -> None:
    """Run a module such as launch.sft in this folder, on one thread, and print its CPU seconds.

    Raises CalledProcessError where it fails.
    """
    print(f"$ python -m {module}", *words, flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = children_cpu_seconds()
    subprocess.run([sys.executable, "-m", module, *words], check=True, env=environment)
    print(f"CPU seconds: {children_cpu_seconds() - before:.0f}", flush=True)


def rlhf(*words: str) -> None:
    """Run a command of `rlhf`."""
    run("rlhf.cli", *words)


def fast_dtype() -> str:
    """Return the faster of both dtypes that programs compute in here: float32 on a CPU that does not
    multiply bfloat16.
    """
    # torch takes seconds to import
    from rlhf.ranks import distributed

    return "bfloat16" if distributed.multiplies_bfloat16(distributed.own_device()) else "float32"


def finished(run_folder: str | Path) -> bool:
    """Return whether a run has ended; one that was cut off starts again."""
    return bool(read_json(Path(run_folder) / "result.json").get("finished"))


def make_sandbox(folder: Path) -> None:
    """Make the sandbox and its SFT policy, `folder`/world and `folder`/sft, where they are missing."""
    world, sft = folder / "world", folder / "sft"
    if not (world / "world.json").is_file():
        rlhf("sandbox", "build", "--config", f"{CONFIGS}/sandbox.yaml", "--output_dir", str(world))
    if not finished(sft):
        options = ["--config", f"{CONFIGS}/sft.yaml", "--eval_prompts", "0"]
        options += [
            "--model_name_or_path",
            f"{world}/base",
            "--data",
            f"{world}/instructions.jsonl",
        ]
        run("launch.sft", *options, "--output_dir", str(sft))


def paired(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean over seeds, its 95 % t interval (None with a single seed) and the values."""
    total, count = sum(values), len(values)
    found = {"mean": total / count, "low": None, "high": None, "values": list(values)}
    if count > 1:
        without = np.array([(total - value) / (count - 1) for value in values])
        found["low"], found["high"], _ = jackknife_interval(total / count, without)
    return found


@contextlib.contextmanager
def serving(runs: Sequence[str]) -> Iterator[tuple[Any, int]]:
    """Serve runs on a free port; yield OpenAI's own client for it, and the number of the process."""
    import openai

    with listen("127.0.0.1", 0) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "rlhf.cli", "serve", *runs, "--port", port]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        # the line comes once it listens
        print(process.stdout.readline().strip(), flush=True)
        address = f"http://127.0.0.1:{port}/v1"
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=3600)
        yield client, process.pid
    finally:
        process.terminate()
        print("exit code", process.wait(60))
