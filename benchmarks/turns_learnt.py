"""Which share of a conversation's tokens SFT learns, from its last turn or from all: rows of results.

python benchmarks/turns_learnt.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import real_model  # noqa: E402
from benchmarks.result_rows import add_rows  # noqa: E402
from rlhf.data.encode import encode, kept  # noqa: E402
from rlhf.data.load import load  # noqa: E402
from rlhf.data.records import Instruction  # noqa: E402
from rlhf.data.turns import TurnRows, turn_rows  # noqa: E402
from rlhf.model.tokenizer import load_tokenizer  # noqa: E402

DATA = ROOT / "rlhf" / "brand_data" / "outdoor" / "dialogues.jsonl"
# as configs/real/sft.yaml
LENGTHS = (288, 80)


def share(rows: TurnRows) -> float:
    """Return learnt tokens over all tokens of the rows."""
    tokens = sum(len(row["labels"]) for row in rows.rows)
    left_out = sum(row["labels"].count(-100) for row in rows.rows)
    return 1 - left_out / tokens


def main() -> None:
    if not real_model.FILE.is_file():
        real_model.fetch()
    tokenizer = load_tokenizer(str(real_model.FILE))
    records = load([str(DATA)], Instruction, split="train")
    encoded = kept(encode(records, tokenizer, *LENGTHS), "rows")
    found = {}
    for train_on in ("last", "all"):
        rows = turn_rows(encoded, tokenizer, *LENGTHS, train_on)
        found[train_on] = share(rows)
        print(f"train_on {train_on}: {rows.learnt} turns, {found[train_on]:.1%} of the tokens")
    what = "share of the tokens of the brand's multi-turn dialogues that SFT learns"
    rows = [
        {
            "id": "turns-learnt-all",
            "what": f"{what}, train_on all (the last turn alone, as before: {found['last']:.3f})",
            "value": round(found["all"], 4),
            "bound": ">= 0.5",
            "command": "python benchmarks/turns_learnt.py",
        },
        {
            "id": "turns-learnt-ratio",
            "what": f"{what}: train_on all over the last turn alone",
            "value": round(found["all"] / found["last"], 3),
            "bound": ">= 2",
            "command": "python benchmarks/turns_learnt.py",
        },
    ]
    add_rows(ROOT / "benchmarks" / "results" / "real.json", rows)


if __name__ == "__main__":
    main()
