"""How fast do sampling, learning and a whole update of PPO run on one GPU, and in how much memory?

    python -m benchmarks.speed.bench_gpu                          # on GPU 0, at most 8 minutes
    python -m benchmarks.speed.bench_gpu --device cpu --tiny      # the whole program on tiny shapes

Models have the shapes of Qwen3-0.6B and Qwen3-1.7B and random weights in bfloat16; LoRA of rank 16
on all linear layers.

    generation   256 tokens after prompts of 256, 64 and 256 rows together: tokens/s beside
                 transformers' `generate` with the adapter unmerged, and beside the bandwidth limit,
                 the bytes of weights, keys and values that each step has to read over the measured
                 rate of a copy
    learn        forward pass, backward pass and optimizer step of the policy on one micro-batch of
                 16k and 64k tokens, in rows of 1,024, half of them the response's. FLOPs are those
                 that the mathematics needs, over the measured rate of a large product and over the
                 nominal one (MFU). "As 6N" counts them as for a model that is trained whole
    update       a rollout of 256 episodes and four epochs on it, by phase, with a critic adapter of
                 its own and with a critic on the reward model's hidden states

Each cell is written to RESULTS/gpu.json as it ends, and one that was measured at this commit on this
GPU is kept, unless with --again. Cells that would begin too late for --minutes are named and
skipped; the next call measures them. RESULTS/DATE-gpu.md has the tables.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paths import CACHE, RESULTS
from rlhf.files import write_atomic
from rlhf.program import program


@dataclass(frozen=True)
class Cell:
    """One measurement: its name, the seconds it may take on a fast GPU, and how it is made."""

    name: str
    seconds: float
    measure: Callable[[dict[str, Any]], dict[str, Any]]


@dataclass
class Results:
    """What gpu.json holds."""

    folder: Path
    content: dict[str, Any] = field(default_factory=lambda: {"cells": {}})

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Return the results in `folder`, empty where there are none."""
        file = folder / "gpu.json"
        return cls(folder, json.loads(file.read_text())) if file.is_file() else cls(folder)

    def begin(self, about: dict[str, Any]) -> None:
        """Keep only what was measured on a device of this name."""
        if self.content.get("device", {}).get("name") != about["name"]:
            self.content = {"cells": {}}
        self.content["device"] = about

    def has(self, name: str) -> bool:
        """Return whether the cell was measured at this commit."""
        from benchmarks.speed.results import commit

        cell = self.content["cells"].get(name, {})
        return cell.get("commit") == commit() and "error" not in cell

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Put a cell in its place and write gpu.json."""
        from benchmarks.speed.results import commit, versions

        self.content["cells"][name] = found | {"commit": commit()}
        self.content |= {"versions": versions(), "date": datetime.date.today().isoformat()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "gpu.json", json.dumps(self.content, indent=2) + "\n")


def cells_of(device: Any, tiny: bool) -> list[Cell]:
    """Return what is measured, what says most first."""
    from functools import partial

    from benchmarks.speed import gpu, gpu_shapes

    shapes = [gpu_shapes.TINY_SHAPE] if tiny else gpu_shapes.SHAPES
    sizes = sizes_of(tiny)

    def cell(name: str, seconds: float, measure: Callable, *what: Any, learns: bool) -> Cell:
        def run(about: dict[str, Any]) -> dict[str, Any]:
            call = partial(measure, *what, device, sizes, about)
            if learns:
                return gpu.where_it_fits(device, call)
            with gpu.clean_memory(device):
                return call()

        return Cell(name, seconds, run)

    cells = []
    for shape in shapes:
        for rows in sizes.batches:
            name = f"generation/{shape.name}/{rows}"
            cells.append(cell(name, 45, gpu.generation_cell, shape, rows, learns=False))
        for tokens in sizes.micro_batches:
            name = f"learn/{shape.name}/{tokens}"
            cells.append(cell(name, 30, gpu.learning_cell, shape, tokens, learns=True))
        for critic in ("reward", "adapter"):
            name = f"update/{shape.name}/{critic}"
            cells.append(cell(name, 45, gpu.update_cell, shape, critic, learns=True))
    return cells


def sizes_of(tiny: bool) -> Any:
    """Return how much each cell computes."""
    from benchmarks.speed import gpu_shapes

    return gpu_shapes.TINY_SIZES if tiny else gpu_shapes.SIZES


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--minutes", type=float, default=8, help="no cell begins that ends later")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results")
    options = parser.parse_args(argv)
    began = time.monotonic()

    device = find_device(options.device, options.tiny)
    from benchmarks.speed import gpu
    from rlhf.startup import silence_libraries

    silence_libraries()
    # what a trial on tiny shapes finds is no result
    usual = CACHE / "tiny" if options.tiny else RESULTS
    results = Results.load(options.results or usual)
    about = gpu.measure_device(device, sizes_of(options.tiny))
    results.begin(about)
    print(device_line(about), flush=True)

    skipped = []
    for cell in cells_of(device, options.tiny):
        if options.only not in cell.name:
            continue
        if results.has(cell.name) and not options.again:
            print(f"{cell.name}: measured before", flush=True)
            continue
        if time.monotonic() - began + cell.seconds > 60 * options.minutes:
            skipped.append(cell.name)
            continue
        print(f"{cell.name} ...", flush=True)
        results.add(cell.name, measured(cell, about))
        print(f"{cell.name}: {line(results.content['cells'][cell.name])}", flush=True)

    if results.content["cells"]:
        print(write_page(results), flush=True)
    if skipped:
        names = ", ".join(skipped)
        print(
            f"not measured in {options.minutes:g} minutes: {names}. The same command measures them"
        )


def find_device(kind: str, tiny: bool) -> Any:
    """Return the device. Raises UserError where there is none of this kind, or it is no use."""
    import torch

    from rlhf.errors import UserError

    if kind == "cpu" and not tiny:
        raise UserError("on a CPU the real shapes take hours: --device cpu --tiny")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device: this benchmark needs one GPU. To try the program without: "
            "python -m benchmarks.speed.bench_gpu --device cpu --tiny"
        )
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def measured(cell: Cell, about: dict[str, Any]) -> dict[str, Any]:
    """Return what a cell finds, or the error that ended it: the other cells may still tell."""
    began = time.monotonic()
    try:
        found = cell.measure(about)
    except Exception as error:
        first = str(error).partition("\n")[0]
        found = {"error": f"{type(error).__name__}: {first}"}
    return found | {"took_seconds": round(time.monotonic() - began, 1)}


def device_line(about: dict[str, Any]) -> str:
    nominal = about["nominal_flops"]
    of_maker = "no nominal rate known" if nominal is None else f"nominal {nominal / 1e12:.0f}"
    return (
        f"{about['name']}: bfloat16 products {about['matmul_flops'] / 1e12:.4g} TFLOP/s ({of_maker}), "
        f"copies {about['copy_bytes'] / 1e9:.4g} GB/s"
    )


def line(cell: dict[str, Any]) -> str:
    """Return a cell's result in a few words."""
    names = ("error", "engine_tokens_per_second", "tokens_per_second", "episodes_per_second")
    name = next(name for name in names if name in cell)
    return f"{name} {cell[name]}"


# The page

GENERATION = """
## Sampling

| model | rows | tokens/s | ms a step | share of the bandwidth limit | `generate`, tokens/s | ratio | GiB |
|---|---:|---:|---:|---:|---:|---:|---:|"""
LEARNING = """
## Learning

prime-rl's 0.6B with LoRA on one H100 reports an MFU of 10.9 % at micro-batches of 16k tokens and
25.2 % at 64k; how it counts FLOPs is not said there. The aims here are 25 % and 35 %.

| model | tokens | recomputed | tokens/s | MFU | share of the measured rate | MFU as 6N | GiB |
|---|---:|---|---:|---:|---:|---:|---:|"""
UPDATES = """
## One update of PPO, seconds

| model | critic | recomputed | generate | score | measure | learn | all | episodes/s | MFU of learning | GiB |
|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"""


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def generation_row(model: str, cell: dict[str, Any]) -> str:
    return (
        f"| {model} | {cell['rows']} | {cell['engine_tokens_per_second']:.0f} | {cell['step_ms']} | "
        f"{percent(cell['bandwidth_share'])} | {cell['generate_tokens_per_second']:.0f} | "
        f"{cell['ratio']} | {cell['memory_gib']} |"
    )


def learning_row(model: str, cell: dict[str, Any]) -> str:
    recomputed = "yes" if cell["checkpointing"] else "no"
    return (
        f"| {model} | {cell['tokens']} | {recomputed} | {cell['tokens_per_second']} | "
        f"{percent(cell['mfu'])} | {percent(cell['matmul_share'])} | {percent(cell['whole_mfu'])} | "
        f"{cell['memory_gib']} |"
    )


def update_row(model: str, critic: str, cell: dict[str, Any]) -> str:
    design = "of its own" if critic == "adapter" else "on the reward model's states"
    recomputed = "yes" if cell["checkpointing"] else "no"
    phases = " | ".join(f"{seconds:.2f}" for seconds in cell["seconds"].values())
    return (
        f"| {model} | {design} | {recomputed} | {phases} | {cell['episodes_per_second']} | "
        f"{percent(cell['learn_mfu'])} | {cell['memory_gib']} |"
    )


def page_lines(content: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield f"# Speed and memory on one GPU, {content['date']}"
    yield ""
    yield device_line(content["device"]) + "."
    yield f"Versions: {', '.join(f'{name} {number}' for name, number in content['versions'].items())}."
    yield "Command: `make bench-gpu`; what is measured is said in `benchmarks/speed/bench_gpu.py`."
    rows: dict[str, list[str]] = {"generation": [], "learn": [], "update": []}
    errors = []
    for name, cell in content["cells"].items():
        kind, model, last = name.split("/")
        if "error" in cell:
            errors.append(f"- {name}: {cell['error']}")
        elif kind == "generation":
            rows[kind].append(generation_row(model, cell))
        elif kind == "learn":
            rows[kind].append(learning_row(model, cell))
        else:
            rows[kind].append(update_row(model, last, cell))
    for head, kind in ((GENERATION, "generation"), (LEARNING, "learn"), (UPDATES, "update")):
        if rows[kind]:
            yield head
            yield from rows[kind]
    if errors:
        yield "\n## What failed\n"
        yield from errors


def write_page(results: Results) -> Path:
    """Write the tables of everything in gpu.json to today's page; return its path."""
    page = results.folder / f"{datetime.date.today().isoformat()}-gpu.md"
    page.write_text("\n".join(page_lines(results.content)) + "\n")
    return page


if __name__ == "__main__":
    main()
