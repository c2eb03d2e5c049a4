"""How a win rate depends on the noise that two answers share, and on the number of samples.

    rlhf compare SFT DPO PPO --prompts FILE --samples_per_prompt 8 --output_dir OUT ...
    python -m benchmarks.statistics.win_rates OUT/samples.jsonl score/gold

For every two policies, and 1, 2, 4 and 8 samples: the share that the later one wins of the pairs
with shared noise (sample k against sample k), of the others, and of all. 95 % over prompts, in the
quickstart as many groups.
"""

import itertools
import json
import sys

import numpy as np

from rlhf.stats import jackknife_interval


def main(file: str, score: str) -> None:
    values: dict[str, list[float]] = {}
    with open(file, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        values.setdefault(row["policy"], []).append(row[score])
    samples = next(i for i, row in enumerate(rows) if row["prompt"] != rows[0]["prompt"])
    print(
        "| policies | samples | shared noise | independent noise (now) | all pairs (before) |",
        "|---|---:|---:|---:|---:|",
        sep="\n",
    )
    for (b, of_b), (a, of_a) in itertools.combinations(values.items(), 2):
        x, y = (np.reshape(v, (-1, samples)) for v in (of_a, of_b))
        wins = (x[:, :, None] > y[:, None, :]) + 0.5 * (x[:, :, None] == y[:, None, :])
        for k in (k for k in (1, 2, 4, 8) if k <= samples):
            own, same = wins[:, :k, :k], np.eye(k, dtype=bool)
            kinds = (same, ~same, np.ones_like(same))
            cells = [said(own[:, kind].mean(axis=1)) if kind.any() else "none" for kind in kinds]
            print(f"| {a} over {b} | {k} | {' | '.join(cells)} |")
        shared, other = (wins[:, kind].mean(axis=1) for kind in (same, ~same))
        print(
            f"| {a} over {b} | {samples} | shared less independent: {said(shared - other, None)} | | |"
        )


def said(means: np.ndarray, bounds=(0, 1)) -> str:
    mean, n = float(means.mean()), len(means)
    low, high, _ = jackknife_interval(mean, (mean * n - means) / (n - 1), bounds=bounds)
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main(*sys.argv[1:])
