"""RewardBench 2 (Malik et al. 2025, arXiv 2506.01937): best of four, and ties.

A row has an `id`, a `prompt`, lists of `chosen` and `rejected` answers, and its `subset`:

    {"id": "17", "prompt": "...", "chosen": ["..."], "rejected": ["...", "...", "..."], "subset": "Math"}
    {"id": "tied:3", "prompt": "Name a colour.", "chosen": ["red", "blue"], "rejected": ["seven"], "subset": "Ties"}

Scores are those of the benchmark's own program (github.com/allenai/reward-bench, rewardbench/utils.py).
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from reward.cards.accuracy import accuracy_with_interval
from rlhf.errors import UserError
from rlhf.stats import jackknife_interval

TIES = "ties"


@dataclass
class Row:
    """One prompt with its answers; the first `correct` of them are right. `scores` are theirs."""

    id: str
    subset: str
    prompt: str
    answers: list[str]
    correct: int
    scores: list[float]


def read_rows(source: str) -> list[Row]:
    """Return the rows of a file or Hub data set ("allenai/reward-bench-2@test"). Raises UserError
    with the place of one that is no such row.
    """
    from rlhf.data.sources import sound_rows

    found = list(itertools.starmap(_row, sound_rows(source)))
    if not found:
        raise UserError(f"{source}: no row to read")
    return found


def _row(place: str, columns: dict[str, Any]) -> Row:
    texts, lists = ("prompt", "subset"), ("chosen", "rejected")
    for name in texts:
        if not isinstance(columns.get(name), str):
            raise UserError(f"{place}: column '{name}' is no text; expected a row of RewardBench 2")
    for name in lists:
        answers = columns.get(name)
        is_list = isinstance(answers, list) and all(isinstance(text, str) for text in answers)
        if not is_list or not answers:
            raise UserError(
                f"{place}: column '{name}' is no list of answers; expected a row of RewardBench 2"
            )
    row_id = str(columns.get("id", place))
    if columns["subset"].casefold() == TIES and not row_id.startswith(("ref:", "tied:")):
        raise UserError(
            f"{place}: id {row_id!r} of a row of Ties; expected 'ref:NUMBER' or 'tied:NUMBER'"
        )
    answers = columns["chosen"] + columns["rejected"]
    return Row(row_id, columns["subset"], columns["prompt"], answers, len(columns["chosen"]), [])


def benchmark(
    reward: Any, source: str, max_prompt_length: int, max_response_length: int, batch_size: int = 32
) -> dict[str, Any]:
    """Score the rows of `source` with a loaded reward model; returns `summary`, with "source" and
    "left_out".

    Rows with a prompt or an answer beyond the lengths are left out and counted. Raises UserError
    where none is left.
    """
    from reward.model import raw_scores
    from rlhf.data.encode import encode_prompt, encode_response

    kept, ids = [], []
    rows = read_rows(source)
    for row in rows:
        prompt = encode_prompt(reward.tokenizer, [{"role": "user", "content": row.prompt}])
        answers = [encode_response(reward.tokenizer, answer) for answer in row.answers]
        # a row is asked whole or not at all
        if len(prompt) > max_prompt_length or max(map(len, answers)) > max_response_length:
            continue
        kept.append(row)
        ids += [prompt + answer for answer in answers]
    if not kept:
        raise UserError(
            f"{source}: all {len(rows)} rows are too long; raise --max_prompt_length and --max_response_length"
        )
    with tqdm(total=len(ids), desc="scoring RewardBench 2", unit="answer", mininterval=5) as bar:
        scores = iter(
            raw_scores(reward.model, ids, reward.tokenizer.pad_token_id, batch_size, bar.update)
        )
    for row in kept:
        row.scores = list(itertools.islice(scores, len(row.answers)))
    return summary(kept) | {"source": source, "left_out": len(rows) - len(kept)}


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return {"score": the mean over subsets, "subsets": {name: {"score", "low", "high",
    "prompts"}}} of scored rows.
    """
    # subsets count equally, whatever their size
    by_subset: dict[str, list[Row]] = {}
    for row in rows:
        by_subset.setdefault(row.subset, []).append(row)
    subsets = {}
    for name, own in sorted(by_subset.items()):
        if name.casefold() == TIES:
            subsets[name] = ties(own)
            continue
        right = np.array(list(map(best_is_right, own)))
        part = accuracy_with_interval(right, [row.id for row in own])
        subsets[name] = {
            "score": part["accuracy"],
            "low": part["low"],
            "high": part["high"],
            "prompts": len(own),
        }
    score = float(np.mean([part["score"] for part in subsets.values()]))
    return {"score": score, "subsets": subsets}


def best_is_right(row: Row) -> float:
    """Return 1 where the highest score is a right answer's, 0 where not, the share of the right
    ones where several answers share it.
    """
    scores = np.array(row.scores)
    best = scores == scores.max()
    return float(best[: row.correct].sum() / best.sum())


def ties(rows: list[Row]) -> dict[str, Any]:
    """Return the score of the Ties subset and its interval over questions, as a dict like those of
    `summary`.

    Each question is asked twice: with one right answer (`ref:`) and with several (`tied:`).
    """
    asked: dict[str, dict[str, Row]] = {}
    for row in rows:
        kind, _, question = row.id.partition(":")
        asked.setdefault(question, {})[kind] = row
    questions = list(asked.values())
    estimate = ties_score(questions)
    # the score is no mean: it is taken again without each question
    without = []
    for place in range(len(questions)):
        without.append(ties_score(questions[:place] + questions[place + 1 :]))
    low, high, _ = jackknife_interval(estimate, np.array(without))
    if not math.isfinite(low):
        low = high = None
    return {"score": estimate, "low": low, "high": high, "prompts": len(rows)}


def ties_score(questions: list[dict[str, Row]]) -> float:
    """Return RewardBench 2's score of questions {"ref": row, "tied": row}, either of which may be
    missing.

        0.3 P(tied right) + 0.3 P(ref right) + 0.2 P(m_tied > d) + 0.2 P(min(m_ref, m_tied) > d)
            + 0.01 mean tanh(min(m_ref, m_tied) / d - 1)

    m is the worst right answer's score less the best wrong one's (a row is right where m > 0), d
    the spread of the right answers of the tied row. The last three are over questions with both
    rows; tanh counts 0 where 0 / 0.
    """
    score = 0.0
    # either kind alone counts by its own part
    for kind in ("tied", "ref"):
        right = [margin(asked[kind]) > 0 for asked in questions if kind in asked]
        score += 0.3 * float(np.mean(right)) if right else 0.0
    # a question whose long answers were left out has one row
    both = [asked for asked in questions if len(asked) == 2]
    if not both:
        return score
    tied, refs, spreads = [], [], []
    for asked in both:
        tied.append(margin(asked["tied"]))
        refs.append(margin(asked["ref"]))
        spreads.append(right_spread(asked["tied"]))
    tied, spread = np.array(tied), np.array(spreads)
    least = np.minimum(refs, tied)
    with np.errstate(divide="ignore", invalid="ignore"):
        close = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    score += 0.2 * float(np.mean(tied > spread)) + 0.2 * float(np.mean(least > spread))
    return score + 0.01 * float(np.mean(close))


def margin(row: Row) -> float:
    """Return the worst right answer's score less the best wrong one's."""
    return min(row.scores[: row.correct]) - max(row.scores[row.correct :])


def right_spread(row: Row) -> float:
    """Return by how much the scores of the right answers differ."""
    right = row.scores[: row.correct]
    return max(right) - min(right)
