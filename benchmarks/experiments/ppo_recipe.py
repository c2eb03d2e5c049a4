"""The table of PPO runs with several seeds: gold score, proxy and KL before and after, and their
spread over seeds.

python -m benchmarks.experiments.ppo_recipe runs/recipe/seed-*
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from rlhf.runs.tracking import read_metrics
from rlhf.stats import student_quantile

COLUMNS = (
    "eval/score/gold",
    "eval/score/reward",
    "eval/kl/sequence",
    "eval/response/length",
    "eval/response/ended",
)


def main() -> None:
    folders = [Path(p) for p in sys.argv[1:]]
    rows = {}
    print(
        "| run | steps | gold | over SFT | proxy | KL to SFT, nats | length | ended | guard events |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for folder in folders:
        looked = [
            row for row in read_metrics(folder / "metrics.jsonl") if "eval/kl/sequence" in row
        ]
        result = json.loads((folder / "result.json").read_text())
        first, last = looked[0], looked[-1]
        values = [last[name] for name in COLUMNS]
        rows[folder.name] = [values[0], values[0] - first["eval/score/gold"], *values[1:]]
        events = ", ".join(f"{e['guard']}: {e['action']}" for e in result["guards"]) or "none"
        numbers = " | ".join(f"{v:.3f}" for v in rows[folder.name])
        print(f"| {folder.name} | {last['step']} | {numbers} | {events} |")
    n = len(rows)
    if n > 1:
        means = [sum(column) / n for column in zip(*rows.values(), strict=True)]
        deviations = [
            math.sqrt(sum((v - m) ** 2 for v in column) / (n - 1))
            for column, m in zip(zip(*rows.values(), strict=True), means, strict=True)
        ]
        t = student_quantile(0.975, n - 1)
        for name, numbers in (
            ("mean", means),
            ("standard deviation", deviations),
            (
                "half-width of the 95 % interval of the mean",
                [t * d / math.sqrt(n) for d in deviations],
            ),
        ):
            print(f"| {name} | | {' | '.join(f'{v:.3f}' for v in numbers)} | |")


if __name__ == "__main__":
    main()
