"""The files of measured responses, and the best of n of the initial policy's.

OUT/measures/NAME/step-N.jsonl, so that anyone can read what was measured again:

    {"step", "numbers", "budget"}                                          the first line
    {"prompt", "sample", "response", "length", "ended", "kl", "scores"}    one for each response
"""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.compare.best_of_n import best_of_n_kl
from rlhf.errors import UserError
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.plan import INITIAL
from rlhf.files import dumps, write_atomic

# the responses of the initial policy
INITIAL_FILE = "step-000000.jsonl"


def measures_of(config: ExperimentConfig, trial: str) -> Path:
    return Path(config.output_dir) / "measures" / trial


def rows_to_write(rows: list, samples: int, *, with_ids: bool) -> list[dict]:
    """Return the rows of an evaluation, which come prompt by prompt, as they are written."""
    names = ["sample", "response", "length", "ended", "kl", "scores"]
    if with_ids:
        names.append("ids")
    written = []
    for number, row in enumerate(rows):
        own = {name: getattr(row, name) for name in names}
        written.append({"prompt": number // samples, **own})
    return written


def write_rows(file: Path, step: int, rows: list[dict], numbers: dict, budget: dict) -> None:
    head = {"step": step, "numbers": numbers, "budget": budget}
    write_atomic(file, "".join(f"{dumps(row)}\n" for row in [head, *rows]))


def read_rows(file: Path) -> tuple[dict, list[dict]]:
    """Return header and rows of a file of measured responses."""
    # not splitlines, which also breaks at other separators inside a response
    lines = file.read_text(encoding="utf-8").split("\n")
    head, *rows = [json.loads(line) for line in lines if line]
    # a part of a score that does not apply is written as "NaN"
    for row in rows:
        row["scores"] = {name: float(value) for name, value in row["scores"].items()}
    return head, rows


def write_prompts(folder: Path, encoded: list[dict]) -> None:
    """Write what was measured on; the same for every trial."""
    prompts = []
    for row in encoded:
        record = row["record"]
        metadata = {**record.metadata, "group": record.group}
        if record.voice:
            metadata["voice"] = record.voice
        prompts.append(
            {
                "prompt": record.prompt,
                "group": record.group,
                "ids": row["prompt_ids"],
                "metadata": metadata,
            }
        )
    write_atomic(
        folder / "prompts.json", json.dumps({"prompts": prompts}, ensure_ascii=False) + "\n"
    )


def check_same_prompts(config: ExperimentConfig, folder: Path) -> None:
    """Raise UserError if a trial was measured on other prompts than the initial policy."""
    first = measures_of(config, INITIAL) / "prompts.json"
    # byte for byte: both files are written by the same code
    if first.read_text() != (folder / "prompts.json").read_text():
        raise UserError(
            f"{folder}: not the test prompts that the initial policy was measured on ({first}). A run was trained on "
            "some of them, or the data has changed since: start the experiment in another --output_dir"
        )


def summary(file: Path, judge: str | None) -> dict[str, float | None]:
    """Return judge and KL of one measured policy, for the live table."""
    _, rows = read_rows(file)
    mean = None if judge is None else sum(row["scores"][judge] for row in rows) / len(rows)
    return {"judge": mean, "kl": sum(row["kl"] for row in rows) / len(rows)}


def best_of(rows: list[dict], n: int, samples: int) -> list[dict]:
    """Return the response with the highest proxy of each block of n responses to a prompt.

    Each prompt has `samples` blocks, after the first `samples` responses, which are the initial
    policy's own. The sequence KL to the initial policy is `best_of_n_kl`, the same for every
    response.
    """
    by_prompt: dict[int, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["prompt"], row["sample"])):
        by_prompt.setdefault(row["prompt"], []).append(row)
    kl = best_of_n_kl(n)
    chosen = []
    for own in by_prompt.values():
        for number, block in enumerate(blocks(n, samples)):
            best = max((own[sample] for sample in block), key=lambda row: row["scores"]["proxy"])
            chosen.append({**best, "sample": number, "kl": kl})
    return chosen


def blocks(n: int, samples: int) -> list[range]:
    """Return the initial policy's samples among which each of the `samples` best of n is chosen."""
    return [range(samples + block * n, samples + (block + 1) * n) for block in range(samples)]
