"""Accuracy of the reward models of benchmarks/real/data_sets.sh on the test split, beside the
yardsticks.

RLHF_DATA=FOLDER python -m benchmarks.real.data_sets polite|voice RUNS
"""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import softplus

from reward.model import load_reward
from rlhf.data.encode import encode
from rlhf.data.load import load
from rlhf.data.records import Preference
from rlhf.stats.crossed import crossed_mean, share

PAIRS = {"polite": "pref_rasbt_polite.jsonl", "voice": "pref_voice_professional_over_witty.jsonl"}
YARDSTICK = {
    "polite": "0.92 (plain Bradley-Terry)",
    "voice": "0.61 (plain Bradley-Terry), 0.83 (bag of words)",
}


BAGS = {"words": r"\w+", "words, marks": r"\w+|[^\w\s]"}


def bag_of_words(
    train: list[Preference],
    test: list[Preference],
    pattern: str = BAGS["words"],
    penalty: float = 1.0,
) -> list[float]:
    """Score gaps of the test pairs by logistic regression on the difference of the answers' word
    counts.

    pattern: what counts as a word.
    """
    words = [
        [Counter(re.findall(pattern, text.lower())) for text in (r.chosen, r.rejected)]
        for r in train + test
    ]
    index = {
        w: i
        for i, w in enumerate(
            sorted({w for sides in words[: len(train)] for c in sides for w in c})
        )
    }
    gaps = torch.zeros(len(words), len(index), dtype=torch.float64)
    for row, (chosen, rejected) in enumerate(words):
        for sign, counts in ((1, chosen), (-1, rejected)):
            for word, count in counts.items():
                if word in index:
                    gaps[row, index[word]] += sign * count
    weights = torch.zeros(len(index), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = softplus(-gaps[: len(train)] @ weights).sum() + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (gaps[len(train) :] @ weights.detach()).tolist()


def model_gaps(path: Path, test: list[Preference]) -> list[float]:
    reward = load_reward(str(path))
    rows, _ = encode(test, reward.tokenizer, 256, 256)
    scores = [
        reward.score_ids([row["prompt_ids"] + row[side] for row in rows])
        for side in ("chosen_ids", "rejected_ids")
    ]
    return [chosen - rejected for chosen, rejected in zip(*scores, strict=True)]


def main(name: str, runs: Path) -> None:
    def read(split: str, validation_fraction: float) -> list[Preference]:
        data, fractions = [f"{os.environ['RLHF_DATA']}/{PAIRS[name]}"], {"test_fraction": 0.15}
        return load(
            data,
            Preference,
            split=split,
            validation_fraction=validation_fraction,
            on_error="skip",
            **fractions,
        )

    test = read("test", 0.0)
    measured = {
        f"bag of {bag}": bag_of_words(read("train", 0.0), test, pattern)
        for bag, pattern in BAGS.items()
    }
    for run in ("yardstick", "reward", "referee"):
        measured[run] = model_gaps(runs / run, test)
    print(f"Accuracy on the {len(test)} test pairs, 95 % over groups; published: {YARDSTICK[name]}")
    table = {}
    for label, gaps in measured.items():
        right: dict[str, list[float]] = {}
        for pair, gap in zip(test, gaps, strict=True):
            right.setdefault(pair.group, []).append((gap > 0) + 0.5 * (gap == 0))
        means = np.array([np.mean(values) for values in right.values()])
        found = share(crossed_mean(means[None]), 0.95)
        table[label] = {
            "accuracy": found.estimate,
            "low": found.low,
            "high": found.high,
            "n": found.groups,
        }
        print(
            f"  {label:<20}{found.estimate:.3f}   {found.low:.3f} to {found.high:.3f}   n = {found.groups}"
        )
    (runs / "accuracy.json").write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
