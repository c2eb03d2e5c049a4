"""What many ranks change: combinations on two, one against two, and checkpoints that go on with others.

    python -m benchmarks.ranks.combinations FOLDER [--page benchmarks/results/2026-11-29-ranks.md]

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

from benchmarks.paths import RESULTS
from benchmarks.result_rows import add_rows
from tests.launch import combinations
from tests.launch.combinations import ROWS

COMMAND = "python -m benchmarks.ranks.combinations FOLDER"
ONE, SIX, EXACT = "one step", "six steps", "six steps, float64"
# 52 rows make 6.5 steps of 8
EPOCH_ENDS = 8
MEANINGS: dict[str, tuple[int, tuple]] = {
    SIX: (6, ()),
    "past the end of an epoch": (EPOCH_ENDS, ()),
    "the same, with dataloader_drop_last": (
        EPOCH_ENDS,
        # three held-out rows would be dropped too
        ("--trl", "{dataloader_drop_last: true}", "--validation_fraction", 0),
    ),
}
# it draws prompts without epochs' ends
PPO_MEANINGS: dict[str, tuple[int, tuple]] = {
    ONE: (1, ()),
    SIX: (6, ()),
    EXACT: (6, ("--dtype", "float64")),
}


def run_combinations(folder: Path) -> list[dict[str, Any]]:
    return combinations.run_table(folder, combinations.covering(2))


def run_whole_ppo(folder: Path) -> list[dict[str, Any]]:
    return combinations.run_table(folder, combinations.whole_ppo())


def run_meaning(folder: Path) -> list[dict[str, Any]]:
    """Run each program on one process and on two ranks, to the end of an epoch and beyond."""
    cases = []
    for program in combinations.FACTORS["program"]:
        meanings = PPO_MEANINGS if program == "ppo" else MEANINGS
        cases += [(program, what, *given) for what, given in meanings.items()]
    return combinations.run_one_and_two(folder, cases)


def run_resume(folder: Path) -> list[dict[str, Any]]:
    combinations.prepare(folder)
    combinations.run_begun(folder)
    rows = []
    for ranks in (2, 1, 4):
        rows += combinations.run_resumed(folder, ranks)
    return rows


PARTS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "combinations": run_combinations,
    "whole ppo": run_whole_ppo,
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
        whole_ppo=table(FACTORS | APART | {"cpu": "CPU s a rank"}, found["whole ppo"]),
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
PPO makes one update a rollout here. In bfloat16 a response depends on the batch that it is sampled in, so
that PPO's are drawn from noise alone there; and ZeRO-3, under which adapters are not fused into the products of
the base, rounds otherwise.

{combinations}

PPO on whole weights, policy and critic, in each dtype under each kind of ZeRO, with a learning rate of 1e-3:

{whole_ppo}

Refused at the start, with the reason and the nearest that works: PPO on whole weights in bfloat16 with ZeRO
0; float64 under a launcher but in PPO with ZeRO 1 and 2; 4 or 8 bits, and 8-bit AdamW, with ZeRO-3;
`offload_optimizer` with ZeRO 0; `offload_param` below ZeRO-3; on a CPU a whole reward model in bfloat16 with
ZeRO 1 to 3.

## One process against two ranks

Same rows a step, order of data and sampling noise; ZeRO-2, LoRA, float32 where nothing else is said.

{meaning}

PPO's difference is rounding that grows in its updates, eight a rollout here: six steps in float64 are the
same run. Where the rows of an epoch are no multiple of a step's, several ranks fill the last step with rows
from the beginning of the epoch (accelerate's `even_batches`), and one process takes a smaller step. There
alone the meaning differs.

## A checkpoint of two ranks that goes on

After step 2, against the run that went on with two ranks.

{resume}
"""


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows for ranks.json."""
    combined = found["combinations"]
    exact = [row for row in combined if row["dtype"] == "float32"]
    rounded = [row for row in combined if row["dtype"] == "bfloat16"]
    whole = found["whole ppo"]
    given = [row for row in found["meaning"] if row["what"] == SIX and row["program"] != "ppo"]
    sampled = {row["what"]: row for row in found["meaning"] if row["program"] == "ppo"}
    again = [row for row in found["resume"] if row["ranks"] == 2]
    others = [row for row in found["resume"] if row["ranks"] != 2]
    loss = "largest relative difference of a loss"
    weight = "largest difference of a weight"
    both = "six steps of one process and two ranks"
    one = "one step (8 updates) of one process and two ranks, PPO"
    begun = "a checkpoint of two ranks goes on with"
    values = [
        ("combinations", "combinations on two ranks with a result", len(combined), ">= 28"),
        ("combinations-float32", f"they and one process, {loss}", worst(exact, "loss"), "<= 1e-3"),
        (
            "combinations-bfloat16",
            "in bfloat16, PPO on responses drawn from noise alone, largest relative difference of a "
            "first gradient norm",
            worst(rounded, "gradient"),
            "<= 0.05",
        ),
        ("whole-ppo", "PPO on whole weights on two ranks: combinations", len(whole), ">= 13"),
        (
            "whole-ppo-float32",
            "they and one process, norm of the differences of weights over that of the weights",
            worst([row for row in whole if row["dtype"] == "float32"], "norm"),
            "<= 1e-5",
        ),
        (
            "whole-ppo-bfloat16",
            "in bfloat16, the same; a run moves them by 0.005",
            worst([row for row in whole if row["dtype"] == "bfloat16"], "norm"),
            "<= 0.002",
        ),
        ("same-loss", f"{both} (SFT, reward model, DPO), {loss}", worst(given, "loss"), "<= 1e-4"),
        ("same-weights", f"the same, {weight}", worst(given, "largest"), "<= 1e-4"),
        ("same-loss-ppo-step", f"{one}, {loss}", sampled[ONE]["loss"], "<= 1e-4"),
        ("same-weights-ppo-step", f"the same, {weight}", sampled[ONE]["largest"], "<= 1e-4"),
        ("same-loss-ppo", f"{both}, PPO, {loss}", sampled[SIX]["loss"], "<= 1e-4"),
        ("same-weights-ppo", f"the same, {weight}", sampled[SIX]["largest"], "<= 1e-4"),
        (
            "same-loss-ppo-float64",
            f"{both}, PPO, float64, {loss}",
            sampled[EXACT]["loss"],
            "<= 1e-10",
        ),
        ("same-weights-ppo-float64", f"the same, {weight}", sampled[EXACT]["largest"], "<= 1e-10"),
        (
            "same-text",
            f"{both}, share of text that differs",
            worst([*given, sampled[SIX]], "tokens"),
            "<= 0.01",
        ),
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
