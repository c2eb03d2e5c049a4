"""The pairs that a report card is made of: read as the reward model's run reads them, and scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from tqdm import tqdm

from rlhf.config import parse
from rlhf.data.records import Preference
from rlhf.errors import UserError
from rlhf.model.files import read_identity
from rlhf.options.offline import RewardRunConfig


@dataclass
class ScoredPairs:
    """N pairs with the raw scores (N,) and the lengths (N,) in tokens of both answers."""

    pairs: list[Preference]
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_lengths: np.ndarray
    rejected_lengths: np.ndarray

    def __post_init__(self):
        columns = ("chosen", "rejected", "chosen_lengths", "rejected_lengths")
        for name in columns:
            setattr(self, name, np.asarray(getattr(self, name), float))
        counts = {len(getattr(self, name)) for name in columns}
        if not self.pairs or counts != {len(self.pairs)}:
            raise ValueError(
                f"{len(self.pairs)} pairs, {len(self.chosen)} and {len(self.rejected)} scores: one of each per pair "
                "expected"
            )
        if not np.isfinite([self.chosen, self.rejected]).all():
            raise ValueError("a score is not finite")

    @classmethod
    def of_rows(
        cls, rows: Sequence[dict[str, Any]], chosen: Sequence[float], rejected: Sequence[float]
    ) -> Self:
        """Return rows of `encode` with the raw scores of their answers."""
        pairs, chosen_lengths, rejected_lengths = [], [], []
        for row in rows:
            pairs.append(row["record"])
            chosen_lengths.append(len(row["chosen_ids"]))
            rejected_lengths.append(len(row["rejected_ids"]))
        return cls(pairs, chosen, rejected, chosen_lengths, rejected_lengths)

    @property
    def gaps(self) -> np.ndarray:
        """Return (N,) raw score gaps, chosen - rejected."""
        return self.chosen - self.rejected

    @property
    def length_gaps(self) -> np.ndarray:
        """Return (N,) tokens that the chosen answer has more than the rejected one."""
        return self.chosen_lengths - self.rejected_lengths

    @property
    def groups(self) -> np.ndarray:
        return np.array([pair.group for pair in self.pairs])


def run_config(run: str | Path) -> RewardRunConfig | None:
    """Return the options that a reward model was trained with; None where its folder does not say.

    Raises UserError for a run of another program.
    """
    file = Path(run) / "config.yaml"
    if not file.is_file():
        return None
    program = read_identity(run).get("program")
    if program not in (None, "reward"):
        raise UserError(f"{run}: a run of launch/{program}.py, expected one of launch/reward.py")
    config = parse(RewardRunConfig, ["--config", str(file)])
    # a folder may have been moved since
    config.output_dir = str(run)
    return config


def pairs_of_run(
    config: RewardRunConfig, split: Literal["train", "validation", "test"]
) -> list[Preference]:
    """Return the pairs of one split as the run has read them, without those that have no winner; of
    a store, those that it froze.
    """
    from rlhf.data.load import load

    pairs = load(
        readable_sources(config),
        Preference,
        split=split,
        half=config.half,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        limit=config.limit,
        on_error=config.on_error,
        aggregate=config.aggregate,
    )
    return with_a_winner(pairs)


def with_a_winner(pairs: Sequence[Preference]) -> list[Preference]:
    """Return the pairs without those on which votes are split evenly: no answer of theirs is the
    right one.
    """
    return [pair for pair in pairs if pair.label_prob != 0.5]


def readable_sources(config: RewardRunConfig) -> list[str]:
    """Return the run's data files, each store replaced by what the run froze of it where that is
    still there.
    """
    from rlhf.data.sources import is_store, split_event

    sources = []
    for source in config.data:
        frozen = []
        if is_store(source):
            stem = Path(split_event(source)[0]).stem
            frozen = sorted(Path(config.output_dir, "data").glob(f"{stem}-*.jsonl"))
        sources += list(map(str, frozen)) or [source]
    return sources


def score_pairs(
    reward: Any,
    pairs: Sequence[Preference],
    max_prompt_length: int,
    max_response_length: int,
    *,
    batch_size: int = 32,
    what: str = "pairs",
) -> ScoredPairs:
    """Return the pairs that are not too long with their raw scores; the others are counted on
    stderr.

    reward: a loaded `RewardModel`. Raises UserError where no pair is left.
    """
    from reward.model import raw_scores
    from rlhf.data.encode import encode, kept

    if not pairs:
        raise UserError(f"no {what} to score")
    encoded = encode(pairs, reward.tokenizer, max_prompt_length, max_response_length)
    # chosen answers first, then the rejected ones, in one pass of the model
    rows = kept(encoded, what)
    ids = [row["prompt_ids"] + row["chosen_ids"] for row in rows]
    ids += [row["prompt_ids"] + row["rejected_ids"] for row in rows]
    with tqdm(total=len(ids), desc=f"scoring {what}", unit="answer", mininterval=5) as bar:
        scores = raw_scores(
            reward.model, ids, reward.tokenizer.pad_token_id, batch_size, bar.update
        )
    return ScoredPairs.of_rows(rows, scores[: len(rows)], scores[len(rows) :])
