"""Files of AlpacaEval: a model's outputs, and annotations of pairs.

outputs: [{"instruction", "output", "generator", "dataset", "datasplit"}]. annotations: [{"instruction",
"output_1", "generator_1", "output_2", "generator_2", "annotator", "preference", ...}], where
`preference` is 1 where output_1 wins, 2 where output_2 does, 1.5 for a tie, null for none, and output_1
is the reference's.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.data.records import prompt_group
from rlhf.data.sources import sound_rows
from rlhf.errors import UserError
from rlhf.files import dumps, json_safe
from rlhf.judge.pairs import JudgedPair
from rlhf.judge.prompts import conversation_text

# what a set of prompts is called that is none of theirs
DATASET = "rlhf"
# AlpacaEval's name -> the one in samples.jsonl
NAMES = {"instruction": "prompt", "output": "response", "generator": "policy"}


def write_outputs(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of samples.jsonl of one policy; keys that AlpacaEval does not know are kept."""
    outputs = []
    for row in rows:
        # keys of the row come last, so that its own data set wins
        own = {"dataset": DATASET, "datasplit": "eval", **row}
        named = {theirs: own.pop(ours) for theirs, ours in NAMES.items()}
        outputs.append({**named, "instruction": conversation_text(named["instruction"]), **own})
    _write(path, outputs)


def read_outputs(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the outputs in a file as rows of samples.jsonl. Raises UserError with the row that is
    none.
    """
    for number, row in enumerate(read_rows(path), 1):
        own = dict(row)
        # AlpacaFarm's instructions had a second part
        more = own.pop("input", "")
        own.setdefault("generator", Path(path).stem)
        try:
            named = {ours: own.pop(theirs) for theirs, ours in NAMES.items()}
        except KeyError as error:
            raise UserError(
                f"{path}, row {number}: {error} is missing, expected "
                '{"instruction", "output", "generator"}'
            ) from None
        if more:
            named["prompt"] = f"{named['prompt']}\n\n{more}"
        yield {**named, **own}


def write_annotations(path: Path, pairs: Sequence[JudgedPair], annotator: str) -> None:
    """Write judged pairs; policy b is the reference. `raw_completion` has the verdicts of both
    orders and the group.
    """
    rows = []
    for pair in pairs:
        both = {"p_ab": pair.p_ab, "p_ba": pair.p_ba, "group": pair.group}
        rows.append(
            {
                "instruction": conversation_text(pair.prompt),
                "output_1": pair.answer_b,
                "generator_1": pair.b,
                "dataset": DATASET,
                "output_2": pair.answer_a,
                "generator_2": pair.a,
                "datasplit": "eval",
                "annotator": annotator,
                "preference": None if math.isnan(pair.share) else 1 + pair.share,
                "price_per_example": None,
                "time_per_example": None,
                # without a verdict: null
                "raw_completion": json_safe(both, nan_as_null=True),
            }
        )
    _write(path, rows)


def read_annotations(path: str | Path) -> Iterator[JudgedPair]:
    """Yield the pairs of an annotations file. An annotation of AlpacaEval is of one order, drawn at
    random; it counts for both.
    """
    for number, row in enumerate(read_rows(path), 1):
        try:
            preference = row["preference"]
            # 0 is a tie in its first version
            share = {None: math.nan, 0: 0.5}.get(preference, (preference or 0) - 1.0)
            pair = JudgedPair(
                prompt=row["instruction"],
                group=prompt_group([{"role": "user", "content": row["instruction"]}]),
                a=row.get("generator_2") or "output_2",
                b=row.get("generator_1") or "output_1",
                answer_a=row["output_2"],
                answer_b=row["output_1"],
                p_ab=share,
                p_ba=1 - share,
            )
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}, row {number}: not an annotation, expected "
                '{"instruction", "output_1", "output_2", "preference"}'
            ) from None
        if not (math.isnan(share) or 0 <= share <= 1):
            raise UserError(f"{path}, row {number}: preference {preference!r}, expected 1 to 2")
        # both orders, where these annotations were written here
        raw = row.get("raw_completion")
        if isinstance(raw, dict) and "p_ab" in raw:
            pair.p_ab, pair.p_ba = (
                math.nan if raw[name] is None else raw[name] for name in ("p_ab", "p_ba")
            )
            pair.group = raw["group"]
        yield pair


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(rows, indent=2) + "\n", encoding="utf-8")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file of AlpacaEval. Raises UserError where it is none."""
    return [row for _, row in sound_rows(str(path))]
