"""Results of the speed benchmark: bench.json, and a dated page with its tables."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.paths import ROOT
from benchmarks.speed import peer
from benchmarks.speed.cells import Task
from rlhf.files import write_atomic

# what the numbers depend on
CODE = ("rlhf", "reward", "benchmarks/speed")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")


@dataclass
class Results:
    """What bench.json holds, and how a cell is added to it."""

    folder: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Return the results in `folder`, empty where there are none."""
        file = folder / "bench.json"
        content = json.loads(file.read_text()) if file.is_file() else {}
        return cls(folder, content)

    def at(self, place: str) -> Any:
        """Return what stands at this path of keys, or None."""
        here: Any = self.content
        for key in place.split("/"):
            here = here.get(key) if isinstance(here, dict) else None
        return here

    def has(self, task: Task) -> bool:
        """Return whether the cell was measured on the code that is here, as often as asked."""
        entry = self.at(task.name) or {}
        return entry.get("commit") == commit() and entry.get("rounds", 0) >= task.rounds

    def add(self, task: Task, found: dict[str, Any]) -> None:
        """Put what was found in its places and write bench.json."""
        for place, entry in found.items():
            *parents, last = place.split("/")
            here = self.content
            for key in parents:
                here = here.setdefault(key, {})
            if isinstance(entry, dict):
                entry = entry | {"rounds": task.rounds, "commit": commit()}
            here[last] = entry
        self.content |= {
            "machine": machine(),
            "versions": versions(),
            "command": " ".join(["python -m benchmarks.speed.bench", *sys.argv[1:]]),
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "bench.json", json.dumps(self.content, indent=2) + "\n")

    def line(self, task: Task) -> str:
        """Return a cell's result in a few words."""
        entry = self.at(task.name)
        if "ratio_median" not in entry:
            return "measured"
        return f"{entry['ratio_median']} times ({entry['spread'][0]} to {entry['spread'][1]})"

    def write_page(self) -> Path:
        """Write the tables of everything in bench.json to today's page; return its path."""
        page = self.folder / f"{datetime.date.today().isoformat()}-speed.md"
        page.write_text("\n".join(self.page_lines()) + "\n")
        return page

    def page_lines(self) -> Iterator[str]:
        """Yield the lines of the page."""
        content = self.content
        yield f"# Speed and memory of PPO beside TRL {peer.VERSION}, {content['date']}"
        yield ""
        machine, versions = content["machine"], content["versions"]
        yield f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB."
        yield f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}."
        yield f"Command: `{content['command']}`, commit {content['commit']}."
        if "note" in machine:
            yield f"{machine['note']}."
        yield ""
        yield "What is measured, and how, is said in `benchmarks/speed/bench.py`. `own critic` has a"
        yield "critic adapter of its own; `best` fits the critic to the reward model's states."
        yield "Seconds are CPU seconds of one update on one thread, medians over processes. The"
        yield "ratio is the peer's seconds over ours, by round, with smallest and largest. `share` is"
        yield "the FLOPs that the mathematics needs, per CPU second, over the rate of a large matrix"
        yield "product in the same process. Rounds have seeds of their own; the luck of lengths in a"
        yield "ragged workload moves our seconds by about 3 % a round."
        yield ""
        if "ppo" in content:
            yield from self.ppo_tables()
        if "generation" in content:
            yield from self.generation_table()
        for model, entry in content.get("memory", {}).items():
            yield (
                f"On {model} ({entry['parameters'] / 1e6:.0f} million weights, float32, 4 episodes) the "
                f"peak is {entry['memory_gib']:.2f} GiB, {entry['memory_ratio']:.2f} of what four whole "
                f"models take with the critic's AdamW ({entry['four_models_gib']:.1f} GiB, no activations)."
            )
            yield ""
        if "offline" in content:
            yield from self.offline_table()
        if "scaling" in content:
            yield from self.scaling_tables()

    def ppo_rows(self) -> Iterator[tuple[str, str, str, dict[str, Any], dict[str, Any]]]:
        """Yield model, workload, configuration, our numbers and the peer's."""
        for model, cells in self.content["ppo"].items():
            for name, entry in cells.items():
                if not isinstance(entry, dict) or name.endswith("_own_critic"):
                    continue
                own = cells[f"{name}_own_critic"]
                workload = name.replace("_", ", ", 1).replace("_", " ")
                if own["options"] != entry["options"]:
                    yield model, workload, "own critic", own, entry["trl"]
                yield model, workload, "best", entry, entry["trl"]

    def ppo_tables(self) -> Iterator[str]:
        """Yield the ratios, and where the seconds went."""
        yield "## Episodes per second and peak memory"
        yield ""
        yield (
            "| model | workload | configuration | seconds | TRL | ratio | wall clock | "
            "memory, GiB | TRL | ratio | share | TRL |"
        )
        yield "| --- | --- | --- " + "| ---: " * 9 + "|"
        for model, workload, configuration, own, other in self.ppo_rows():
            seconds, peer_seconds = median_text(own), median_text(other)
            ratio = f"{own['ratio_median']:.2f} ({own['spread'][0]:.2f} to {own['spread'][1]:.2f})"
            # on one thread the CPU seconds say the same without the noise of other programs
            wall = f"{own['wall_ratio_median']:.2f}" if "threads" in workload else "–"
            memory = f"{own['memory_gib']:.2f} | {other['memory_gib']:.2f}"
            yield (
                f"| {model} | {workload} | {configuration} | {seconds} | {peer_seconds} | {ratio} | "
                f"{wall} | {memory} | {own['memory_ratio']:.2f} | "
                f"{own['machine_share']:.0%} | {other['machine_share']:.0%} |"
            )
        yield ""
        yield "## Where the seconds of an update went"
        yield ""
        yield "| model | workload | configuration | generate | score | measure | learn | needs, TFLOP |"
        yield "| --- | --- | --- " + "| ---: " * 5 + "|"
        for model, workload, configuration, own, other in self.ppo_rows():
            yield phase_row(model, workload, configuration, own)
            if configuration == "best":
                yield phase_row(model, workload, "TRL", other)
        yield ""

    def generation_table(self) -> Iterator[str]:
        """Yield tokens per second beside transformers' `generate`."""
        yield "## Sampling, response tokens per CPU second"
        yield ""
        yield "| model | workload | engine | `generate`, adapter unmerged | ratio |"
        yield "| --- | --- | ---: | ---: | ---: |"
        for model, cells in self.content["generation"].items():
            for workload, entry in cells.items():
                rates = entry["tokens_per_cpu_second"]
                low, high = entry["spread"]
                yield (
                    f"| {model} | {workload} | {rates['engine']} | {rates['hf']} | "
                    f"{entry['ratio_median']:.2f} ({low:.2f} to {high:.2f}) |"
                )
        yield ""

    def offline_table(self) -> Iterator[str]:
        """Yield the programs that train on given rows beside the installed TRL."""
        yield "## SFT and DPO beside the installed TRL, CPU seconds of the whole program"
        yield ""
        yield "| model | program | seconds | TRL | ratio | memory |"
        yield "| --- | --- | ---: | ---: | ---: | ---: |"
        for model, cells in self.content["offline"].items():
            for program, entry in cells.items():
                seconds, (low, high) = entry["cpu_seconds"], entry["spread"]
                yield (
                    f"| {model} | {program} | {seconds['ours']:.1f} | {seconds['trl']:.1f} | "
                    f"{entry['ratio_median']:.2f} ({low:.2f} to {high:.2f}) | "
                    f"{entry['memory_ratio']:.2f} |"
                )
        yield ""

    def scaling_tables(self) -> Iterator[str]:
        """Yield the cost against each size, with what grows faster than linearly."""
        yield "## What an update costs as one size grows"
        yield ""
        yield "4M model, batch 32, one size varied at a time; the best configuration."
        yield ""
        yield "| size | value | generate | score | measure | learn | total | memory, GiB |"
        yield "| --- " + "| ---: " * 7 + "|"
        for axis, entry in self.content["scaling"].items():
            for point in entry["points"]:
                names = ("generate", "score", "measure", "learn", "total", "memory_gib")
                cells = " | ".join(f"{point[name]:.2f}" for name in names)
                yield f"| {axis} | {point['value']} | {cells} |"
        yield ""
        yield "Exponents between the last two values (1 is linear):"
        yield ""
        for axis, entry in self.content["scaling"].items():
            growth = ", ".join(f"{name} {a}" for name, a in entry["exponents"].items())
            faster = [name for name, a in entry["exponents"].items() if a > 1.1]
            said = f"faster than linearly: {', '.join(faster)}" if faster else "nothing faster"
            yield f"- {axis}: {growth}; {said}."
        yield ""


def median_text(numbers: dict[str, Any]) -> str:
    """Return the middle one of the processes' CPU seconds."""
    seconds = sorted(numbers["cpu_seconds"])
    return f"{seconds[len(seconds) // 2]:.1f}"


def phase_row(model: str, workload: str, configuration: str, numbers: dict[str, Any]) -> str:
    """Return the row of one side; the peer scores and measures in one loop."""
    phases = numbers["phases"]
    together = phases.get("score and measure")
    score = f"{phases['score']:.1f}" if together is None else "with measure"
    measured = f"{phases['measure']:.1f}" if together is None else f"{together:.1f}"
    return (
        f"| {model} | {workload} | {configuration} | {phases['generate']:.1f} | {score} | "
        f"{measured} | {phases['learn']:.1f} | {numbers['required_tflop']} |"
    )


def commit() -> str:
    """Return the last commit that changed the code that is measured, with a plus where the code
    has changed since.
    """
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    found = subprocess.run(["git", "log", "-1", "--format=%h", "--", *CODE], **run).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "--", *CODE], **run).stdout.strip()
    return (found or "unknown") + ("+" if changed else "")


def machine() -> dict[str, Any]:
    """Return what this machine is."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": named[1] if named else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | found | {"peer: trl": peer.VERSION}
