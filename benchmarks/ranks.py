"""What many ranks change: combinations on two, one against two, and checkpoints that go on with others.

    python benchmarks/ranks.py FOLDER [--page benchmarks/results/2026-11-29-ranks.md]

Each part writes FOLDER/PART.json and is not run again where that file is. The page and the rows of
benchmarks/results/ranks.json are made from those files.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.result_rows import add_rows
from tests.launch import combinations
from tests.launch.combinations import PLAIN, ROWS, arguments, compare, plainest, start

RESULTS = Path(__file__).parent / "results"
COMMAND = "python benchmarks/ranks.py FOLDER"
# 52 rows make 6.5 steps of 8
EPOCH_ENDS = 8
MEANINGS = {
    "six steps": (6, ()),
    "past the end of an epoch": (EPOCH_ENDS, ()),
    "the same, with dataloader_drop_last": (
        EPOCH_ENDS,
        # three held-out rows would be dropped too
        ("--trl", "{dataloader_drop_last: true}", "--validation_fraction", 0),
    ),
}


def run_combinations(folder: Path) -> list[dict[str, Any]]:
    return combinations.run_table(folder, combinations.covering(2))


def run_meaning(folder: Path) -> list[dict[str, Any]]:
    """Run each program on one process and on two ranks, to the end of an epoch and beyond."""
    combinations.prepare(folder)
    cases = []
    for program in combinations.FACTORS["program"]:
        # PPO draws prompts without epochs' ends
        kept = list(MEANINGS)[:1] if program == "ppo" else MEANINGS
        cases += [(program, what) for what in kept]
    for zero, ranks, count in ((PLAIN, 1, 0), ("2", 2, 2)):
        jobs = []
        for program, what in cases:
            steps, more = MEANINGS[what]
            run, output = plainest(program, zero), folder / f"{ranks} {program} {what}"
            jobs.append((program, arguments(folder, output, run, ranks, *more, steps=steps)))
        start(folder, f"meaning {ranks}", jobs, count)
    return [
        {"program": program, "what": what}
        | compare(folder / f"2 {program} {what}", folder / f"1 {program} {what}")
        for program, what in cases
    ]


def run_resume(folder: Path) -> list[dict[str, Any]]:
    combinations.prepare(folder)
    combinations.run_begun(folder)
    return [row for ranks in (2, 1, 4) for row in combinations.run_resumed(folder, ranks)]


PARTS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "combinations": run_combinations,
    "meaning": run_meaning,
    "resume": run_resume,
}


def results_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each part, from its file or by running it."""
    found = {}
    for name, run in PARTS.items():
        file = folder / f"{name}.json"
        if not file.is_file():
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(run(place.resolve()), indent=1))
        found[name] = json.loads(file.read_text())
    return found


def table(columns: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; `columns` maps a row's names to headings."""
    lines = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    lines += [" | ".join(text_of(row[name]) for name in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def text_of(value: Any) -> str:
    """Return a cell: numbers with two digits, truth values as yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.2g}"
    return str(value)


APART = {
    "loss": "loss, relative",
    "largest": "weights, largest",
    "norm": "weights, of their norm",
    "gradient": "first gradient, relative",
    "tokens": "text that differs",
}
FACTORS = {name: name for name in combinations.FACTORS}


def page_of(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page as Markdown."""
    names = ("program", "zero", "weights", "ranks", "largest", "tokens")
    return PAGE.format(
        count=len(found["combinations"]),
        total=len(combinations.candidates()),
        rows=ROWS,
        command=COMMAND,
        combinations=table(FACTORS | APART | {"cpu": "CPU s a rank"}, found["combinations"]),
        meaning=table({"program": "program", "what": "run"} | APART, found["meaning"]),
        resume=table({name: APART.get(name, name) for name in names}, found["resume"]),
    )


PAGE = """# Many ranks, 2026-11-29

`{command}`: models of 2 layers and width 32, gloo ranks on two shared cores, {rows} rows a step on any
number of ranks. A run is held against its counterpart: the largest relative difference of a logged loss,
the largest difference of a weight, the norm of all differences over that of the weights, and the share of
characters of the last sampled responses that differ. CPU seconds are those of a rank after its imports.

## Combinations on two ranks, against one plain process

Every pair of values of two factors stands in one of {count} runs, of {total} that work. The counterpart has
whole batches and recomputes nothing. AdamW's first steps have the size of the learning rate, 1e-2 here,
whatever the gradient's: a gradient near 0 that is rounded to the other side moves a weight the other way.
In bfloat16 that changes what PPO samples after its first updates, so that later rollouts, losses and
weights are those of another run: the first gradient is what can be compared.

{combinations}

Refused at the start, with the reason and the nearest that works: PPO with `use_peft: false`; float64 under
a launcher but in PPO with ZeRO 1 and 2; 4 or 8 bits, and 8-bit AdamW, with ZeRO-3; `offload_optimizer` with
ZeRO 0; `offload_param` below ZeRO-3; on a CPU a whole reward model in bfloat16 with ZeRO 1 to 3.

## One process against two ranks

Same rows a step, order of data and sampling noise; ZeRO-2, float32, LoRA.

{meaning}

PPO's difference grows with its updates, eight a rollout here: the first is that of rounding. Where the rows
of an epoch are no multiple of a step's, several ranks fill the last step with rows from the beginning of
the epoch (accelerate's `even_batches`), and one process takes a smaller step. There alone the meaning
differs.

## A checkpoint of two ranks that goes on

After step 2, against the run that went on with two ranks.

{resume}
"""


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows for ranks.json."""
    combined = found["combinations"]
    exact = [row for row in combined if row["dtype"] == "float32"]
    rounded = [row for row in combined if row["dtype"] == "bfloat16"]
    same = [row for row in found["meaning"] if row["what"] == "six steps"]
    sampled = [row for row in same if row["program"] == "ppo"]
    given = [row for row in same if row["program"] != "ppo"]
    again = [row for row in found["resume"] if row["ranks"] == 2]
    others = [row for row in found["resume"] if row["ranks"] != 2]
    loss = "largest relative difference of a loss"
    weight = "largest difference of a weight"
    both = "six steps of one process and two ranks"
    begun = "a checkpoint of two ranks goes on with"
    values = [
        ("combinations", "combinations on two ranks with a result", len(combined), ">= 28"),
        ("combinations-float32", f"they and one process, {loss}", worst(exact, "loss"), "<= 1e-3"),
        (
            "combinations-bfloat16",
            "in bfloat16, largest relative difference of a first gradient norm",
            worst(rounded, "gradient"),
            "<= 0.2",
        ),
        ("same-loss", f"{both} (SFT, reward model, DPO), {loss}", worst(given, "loss"), "<= 1e-4"),
        ("same-weights", f"the same, {weight}", worst(given, "largest"), "<= 1e-4"),
        ("same-loss-ppo", f"{both}, PPO, {loss}", worst(sampled, "loss"), "<= 1e-4"),
        ("same-weights-ppo", f"the same, {weight}", worst(sampled, "largest"), "<= 1e-4"),
        ("same-text", f"{both}, share of text that differs", worst(same, "tokens"), "<= 0.01"),
        ("resume-2", f"{begun} two: {weight}", worst(again, "largest"), "== 0"),
        ("resume-1-4", f"{begun} one and four: {weight}", worst(others, "largest"), "<= 1e-5"),
    ]
    return [
        {"id": name, "what": what, "value": value, "bound": bound, "command": COMMAND}
        for name, what, value, bound in values
    ]


def worst(rows: list[dict[str, Any]], name: str) -> float:
    """Return the largest value among rows, without those that have none."""
    return max(row[name] for row in rows if not math.isnan(row[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path, default=RESULTS / "2026-11-29-ranks.md")
    given = parser.parse_args()
    found = results_of(given.folder)
    given.page.write_text(page_of(found))
    add_rows(RESULTS / "ranks.json", rows_of(found))


if __name__ == "__main__":
    main()
