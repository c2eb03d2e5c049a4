"""How much of the training data SFT learns, said before it starts."""

from typing import Any

import numpy as np
from datasets import Dataset
from trl import SFTConfig

from rlhf.data.turns import TurnRows
from rlhf.errors import UserError
from rlhf.runs.rows import WARN_ABOVE
from rlhf.runs.run import Run
from rlhf.text import reasons_of


def report_learnt(run: Run, turns: TurnRows, dataset: Dataset, args: SFTConfig) -> dict[str, Any]:
    """Log how much is learnt of the training data, and return it for result.json.

    `dataset`: TRL's with "labels", after it has cut off rows and packed them; `args`: its options.
    Raises UserError if nothing is left to learn.
    """
    read = run.data.assistant_turns
    left_out = dict(turns.left_out)
    in_no_row = read - turns.learnt - turns.left_out.total()
    if in_no_row:
        left_out["in the part of a conversation that is too long"] = in_no_row
    tokens, learnt = count_labels(dataset)
    if not learnt:
        raise UserError("no token is left to learn: raise max_length under 'trl'")

    share = learnt / tokens
    run.log(f"{turns.learnt} of {read} assistant turns are learnt, {share:.1%} of {tokens} tokens")
    if left_out:
        run.log(f"{sum(left_out.values())} turns are not learnt ({reasons_of(left_out)})")
    if turns.apart:
        run.log(
            f"{turns.apart} turns are in rows of their own, since the chat template shows them otherwise "
            "later in the conversation: more tokens, the same targets"
        )
    # what TRL has cut off: tokens with a label, and rows that keep none of theirs
    wanted = emptied = 0
    for row in turns.rows:
        labels, kept = row["labels"], row["labels"][: args.max_length]
        wanted += len(labels) - labels.count(-100)
        emptied += kept.count(-100) == len(kept)
    if learnt < wanted:
        run.log(
            f"WARNING: trl: max_length {args.max_length} cuts off {wanted - learnt} of {wanted} tokens that would be "
            f"learnt, and leaves {emptied} of {len(turns.rows)} rows with none"
        )
    if turns.repeated > WARN_ABOVE * len(turns.rows):
        run.log(
            f"WARNING: {turns.repeated} of {len(turns.rows)} rows are the beginning of another one, and their turns "
            "are learnt in both. To learn each once: --train_on last"
        )
    return {
        "turns_read": read,
        "turns": turns.learnt,
        "turns_in_own_rows": turns.apart,
        "left_out": left_out,
        "tokens": tokens,
        "tokens_learnt": learnt,
        "share": share,
    }


def count_labels(dataset: Dataset) -> tuple[int, int]:
    """Return the tokens of a data set, and those with a label."""
    tokens = learnt = 0
    for batch in dataset.with_format("numpy", columns=["labels"]).iter(1000):
        labels = np.concatenate(list(batch["labels"]))
        tokens += labels.size
        learnt += int((labels != -100).sum())
    return tokens, learnt
