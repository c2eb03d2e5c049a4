"""Which share of a conversation's tokens SFT learns, from its last turn or from all: rows of results.

python -m benchmarks.real.turns_learnt
"""

from __future__ import annotations

from benchmarks.paths import RESULTS, ROOT
from benchmarks.real.model import model_file
from benchmarks.result_rows import add_rows, row_of
from rlhf.data.encode import encode, kept
from rlhf.data.load import load
from rlhf.data.records import Instruction
from rlhf.data.turns import TurnRows, turn_rows
from rlhf.model.tokenizer import load_tokenizer

DATA = ROOT / "rlhf" / "brand_data" / "outdoor" / "dialogues.jsonl"
COMMAND = "python -m benchmarks.real.turns_learnt"
# as configs/real/sft.yaml
LENGTHS = (288, 80)


def share(rows: TurnRows) -> float:
    """Return learnt tokens over all tokens of the rows."""
    tokens = sum(len(row["labels"]) for row in rows.rows)
    left_out = sum(row["labels"].count(-100) for row in rows.rows)
    return 1 - left_out / tokens


def main() -> None:
    tokenizer = load_tokenizer(model_file())
    records = load([str(DATA)], Instruction, split="train")
    encoded = kept(encode(records, tokenizer, *LENGTHS), "rows")
    found = {}
    for train_on in ("last", "all"):
        rows = turn_rows(encoded, tokenizer, *LENGTHS, train_on)
        found[train_on] = share(rows)
        print(f"train_on {train_on}: {rows.learnt} turns, {found[train_on]:.1%} of the tokens")
    what = "share of the tokens of the brand's multi-turn dialogues that SFT learns"
    of_all = f"{what}, train_on all (the last turn alone, as before: {found['last']:.3f})"
    ratio = f"{what}: train_on all over the last turn alone"
    rows = [
        row_of("turns-learnt-all", of_all, found["all"], ">= 0.5", COMMAND),
        row_of("turns-learnt-ratio", ratio, found["all"] / found["last"], ">= 2", COMMAND),
    ]
    add_rows(RESULTS / "real.json", rows)


if __name__ == "__main__":
    main()
