"""CPU seconds of what has to stay quick: statistics, the store, agreement, Markdown of strangers.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.timings

Prints a Markdown table: the least and the most of five runs each. No test asserts a time.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from rlhf.collect.safe_markdown import render
from rlhf.data.agreement import agreement_summary
from rlhf.data.store import Store
from rlhf.data.votes import Vote
from rlhf.stats.crossed import crossed_statistic

RUNS = 5


def blocks() -> None:
    crossed_statistic(lambda seeds, groups: float(seeds.sum() * groups.sum()), 10, 300)


def store() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.open(Path(folder) / "votes.db", create=True) as opened,
    ):
        with opened.transaction():
            ann = opened.add_annotator("ann")
            for i in range(2000):
                prompt = opened.add_prompt([{"role": "user", "content": f"p{i}"}])
                a, b = (opened.add_response(prompt, f"{side}{i}") for side in "ab")
                opened.vote(opened.add_comparison(a, b), ann, "a")
        opened.at().preferences()


def agreement() -> None:
    rng = np.random.default_rng(0)
    choices = rng.choice(["a", "b", "tie"], size=(2000, 5)).tolist()
    votes = [
        Vote(0, pair, f"p{i}", choice)
        for pair, row in enumerate(choices)
        for i, choice in enumerate(row)
    ]
    agreement_summary(votes)


def hostile() -> None:
    for text in (
        "[" * 19_000,
        "*a " * 6_000,
        "> " * 9_000,
        "`a" * 9_000,
        "[a](" * 4_500,
        "x" * 2_000_000,
    ):
        render.__wrapped__(text)  # without its cache


CASES = {
    "crossed statistic, 10 seeds, 300 groups": blocks,
    "2,000 pairs and votes written and read": store,
    "agreement of 10,000 votes": agreement,
    "six hostile texts as Markdown": hostile,
}


def main() -> None:
    print("| what | CPU seconds, least | most |\n|---|---:|---:|")
    for name, run in CASES.items():
        seconds = []
        for _ in range(RUNS):
            began = time.process_time()
            run()
            seconds.append(time.process_time() - began)
        print(f"| {name} | {min(seconds):.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    main()
