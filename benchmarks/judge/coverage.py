"""Do corrected win rates hold the truth? Simulated votes and judges with known errors.

    python -m benchmarks.judge.coverage [REPEATS]

Each prompt is a group with a win probability of its own (Beta, mean = the true win rate), with pairs that
people call win, loss or tie; the judge sees the same pairs and errs. Votes are kept for a random part of
the prompts, at most half. Written: coverage of nominal 95 % intervals and mean widths.
"""

import itertools
import sys

import numpy as np

from rlhf.judge.correct import prediction_powered
from rlhf.stats import student_quantile

WIN_RATES = (0.5, 0.6, 0.75, 0.9)
# P(judge says A | people say A), P(judge says A | people say B); a tie of people: the mean of both
JUDGES = {
    "a coin": (0.5, 0.5),
    "right in 70 %": (0.7, 0.3),
    "right in 85 %": (0.85, 0.15),
    "likes A": (0.95, 0.4),
    "contrary": (0.35, 0.65),
}
SIZES = ((60, 0.25), (60, 0.5), (150, 0.25), (150, 0.5), (400, 0.25), (400, 0.5))
PAIRS, TIES, SPREAD = 2, 0.15, 4.0


def simulate(rng, win_rate, judge, groups, labelled, repeats):
    """Return (repeats,) estimates, standard errors, and the same of people's votes alone; and of the
    judge alone.
    """
    hit, false = judge
    p = rng.beta(SPREAD * win_rate, SPREAD * (1 - win_rate), (repeats, groups, 1))
    wins = (rng.random((repeats, groups, PAIRS)) < p).astype(float)
    ties = rng.random(wins.shape) < TIES
    y = np.where(ties, 0.5, wins)
    f = (rng.random(wins.shape) < false + (hit - false) * y).astype(float)
    y, f = y.mean(axis=2), f.mean(axis=2)
    n = round(labelled * groups)
    # prompts are exchangeable, so the first n are a random part
    theta, se, _ = prediction_powered(y[:, :n], f[:, :n], f[:, :n], f[:, n:])
    alone, alone_se = y[:, :n].mean(axis=1), y[:, :n].std(axis=1, ddof=1) / np.sqrt(n)
    judged, judged_se = f.mean(axis=1), f.std(axis=1, ddof=1) / np.sqrt(groups)
    return (theta, se, n), (alone, alone_se, n), (judged, judged_se, groups)


def truth(win_rate):
    return (1 - TIES) * win_rate + TIES / 2


def intervals(estimate, se, n, level=0.95):
    """Return (low, high) as rlhf.stats.bounded_interval gives them, for arrays."""
    p = np.clip(estimate, 0, 1)
    flat = (se <= 1e-12) | (p <= 0) | (p >= 1)
    size = np.where(flat, n, p * (1 - p) / np.where(flat, 1.0, se) ** 2)
    share = student_quantile(0.5 + level / 2, n - 1) ** 2 / size
    middle = (p + share / 2) / (1 + share)
    half = np.sqrt(share * p * (1 - p) + share**2 / 4) / (1 + share)
    return middle - half, middle + half


def main(repeats: int) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for (name, judge), win_rate, (groups, labelled) in itertools.product(
        JUDGES.items(), WIN_RATES, SIZES
    ):
        row = {"judge": name, "win rate": win_rate, "groups": groups, "labelled": labelled}
        for kind, found in zip(
            ("corrected", "people", "judge alone"),
            simulate(rng, win_rate, judge, groups, labelled, repeats),
            strict=True,
        ):
            low, high = intervals(*found)
            row[kind] = float(np.mean((low <= truth(win_rate)) & (truth(win_rate) <= high)))
            row[f"{kind} width"] = float(np.mean(high - low))
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    print("| judge | prompts | with votes | corrected | people alone | judge alone | width |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, (groups, labelled) in itertools.product(JUDGES, SIZES):
        own = [
            r for r in rows
            if (r["judge"], r["groups"], r["labelled"]) == (name, groups, labelled)
        ]  # fmt: skip
        corrected = [r["corrected"] for r in own]
        ratio = np.mean([r["corrected width"] / r["people width"] for r in own])
        print(
            f"| {name} | {groups} | {labelled:.0%} | {min(corrected):.1%} to {max(corrected):.1%} "
            f"| {min(r['people'] for r in own):.1%} to {max(r['people'] for r in own):.1%} "
            f"| {min(r['judge alone'] for r in own):.1%} to {max(r['judge alone'] for r in own):.1%} "
            f"| {ratio:.2f} |"
        )
    values = [r["corrected"] for r in rows]
    inside = np.mean([(v >= 0.93) & (v <= 0.97) for v in values])
    print(
        f"\n{len(rows)} settings: coverage {min(values):.1%} to {max(values):.1%}, {inside:.0%} within 93-97 %"
    )


if __name__ == "__main__":
    show(main(int(sys.argv[1]) if len(sys.argv) > 1 else 4000))
