"""Simulate the intervals of win rates by votes, and the rule that says when enough votes are in.

    python -m benchmarks.votes.coverage            # about 3 CPU minutes

A world: annotators differ in their leaning, prompts in how much better one policy's answer is, and
each prompt is judged by `overlap` annotators drawn at random, with ties. The true win rate is that of
new annotators on new prompts for the interval, and that of these annotators on new prompts for the
rule, as each promises.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np

from benchmarks.paths import RESULTS
from benchmarks.result_rows import add_rows
from rlhf.stats.crossed import MIN_SEEDS
from rlhf.voting.ballots import Ballots, Item
from rlhf.voting.rates import confidence_sequence, pair_rate

COMMAND = "python -m benchmarks.votes.coverage"
# half the width, in logits, of "equally good"
TIES = 0.3


@dataclass(frozen=True)
class World:
    """Prompts, annotators, votes a prompt, spread of annotators and of prompts in logits."""

    prompts: int
    annotators: int
    overlap: int
    leaning: float
    difference: float = 1.0
    mean: float = 0.3
    # shares of prompts that have votes already, and to which both policies gave the same answer
    voted: float = 1.0
    equal: float = 0.0

    def draw(self, rng: np.random.Generator) -> tuple[Ballots, float]:
        """Return votes, and the win rate of these annotators on all prompts."""
        leanings = self.leaning * rng.standard_normal(self.annotators)
        names = [f"p{i}" for i in range(self.annotators)]
        items = []
        for number in range(self.prompts):
            own = self.mean + self.difference * rng.standard_normal()
            is_equal, is_voted = rng.random() < self.equal, rng.random() < self.voted
            item = Item(f"g{number}", equal=is_equal, order=number)
            items.append(item)
            if is_equal or not is_voted:
                continue
            for voter in rng.choice(self.annotators, size=self.overlap, replace=False):
                item.shares[names[voter]] = _vote(own + leanings[voter], rng.random())
        ballots = Ballots(["a", "b"], names, {("a", "b"): items}, {}, 0)
        return ballots, float(np.mean(self.truth(leanings)))

    def truth(self, leanings: np.ndarray) -> np.ndarray:
        """Return the win rate of each annotator over all prompts, by Gauss-Hermite quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        logits = self.mean + self.difference * nodes[:, None] + np.atleast_1d(leanings)[None, :]
        expected = _chance(logits - TIES) + 0.5 * (
            1 - _chance(logits - TIES) - _chance(-logits - TIES)
        )
        voted = weights @ expected / weights.sum()
        return 0.5 * self.equal + (1 - self.equal) * voted

    def win_rate(self) -> float:
        """Return the win rate of all annotators on all prompts."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        return float(weights @ self.truth(self.leaning * nodes) / weights.sum())


def _chance(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _vote(logit: float, draw: float) -> float:
    first, second = _chance(logit - TIES), _chance(-logit - TIES)
    if draw < first:
        return 1.0
    return 0.0 if draw > 1 - second else 0.5


def coverage(world: World, worlds: int, seed: int) -> tuple[float, float]:
    """Return the share of intervals that hold the truth, and their mean width."""
    rng, held, widths = np.random.default_rng(seed), 0, []
    for _ in range(worlds):
        ballots, of_these = world.draw(rng)
        truth = world.win_rate() if world.annotators >= MIN_SEEDS else of_these
        found = pair_rate(ballots.items["a", "b"], 0.95)
        held += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    return held / worlds, float(np.mean(widths))


def false_ends(world: World, worlds: int, seed: int) -> tuple[float, float]:
    """Return how often the rule, and a 95 % interval read after every prompt, ever leave out the
    truth of these annotators."""
    rng, rule, naive = np.random.default_rng(seed), 0, 0
    for _ in range(worlds):
        ballots, of_these = world.draw(rng)
        shares = [np.mean(list(item.shares.values())) for item in ballots.items["a", "b"]]
        low, high = confidence_sequence(shares, 0.05)
        rule += not low <= of_these <= high
        n = np.arange(1, len(shares) + 1)
        mean = np.cumsum(shares) / n
        sd = np.sqrt(np.maximum(np.cumsum(np.square(shares)) / n - mean**2, 1e-9))
        outside = np.abs(mean - of_these) > 1.96 * sd / np.sqrt(n)
        # an interval of fewer than ten prompts nobody would read
        naive += bool(np.any(outside[10:]))
    return rule / worlds, naive / worlds


def designs() -> list[World]:
    """Return the worlds that coverage is simulated in."""
    found = []
    for annotators, overlap in ((2, 1), (3, 1), (3, 3), (5, 1), (5, 3), (10, 2)):
        for prompts, leaning in ((60, 0.0), (60, 0.8), (150, 0.4)):
            found.append(World(prompts, annotators, overlap, leaning))
    # collections that are half done, and policies that often agree
    for annotators, overlap in ((3, 1), (5, 1), (5, 3), (10, 2)):
        for voted, equal in ((0.5, 0.0), (1.0, 0.2), (0.5, 0.2)):
            found.append(World(150, annotators, overlap, 0.4, voted=voted, equal=equal))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worlds", type=int, default=1000)
    worlds = parser.parse_args().worlds

    header = ["prompts", "annotators", "votes a prompt", "spread", "voted on", "equal answers"]
    print(f"| {' | '.join([*header, 'coverage', 'width'])} |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    cells = []
    for world in designs():
        held, width = coverage(world, worlds, seed=len(cells))
        cells.append(held)
        votes = f"{world.prompts} | {world.annotators} | {world.overlap} | {world.leaning}"
        shares = f"{world.voted:.0%} | {world.equal:.0%}"
        print(f"| {votes} | {shares} | {held:.1%} | {width:.3f} |", flush=True)
    error = math.sqrt(0.05 * 0.95 / worlds)
    print(f"\n{worlds} worlds a cell: a coverage of 95 % is found as 95 +- {196 * error:.1f} %")

    print("\n| prompts | annotators | votes a prompt | the rule errs | a fixed interval errs |")
    print("|---:|---:|---:|---:|---:|")
    errors = []
    for prompts, annotators, overlap in ((60, 3, 1), (150, 5, 1), (300, 5, 3)):
        world = World(prompts, annotators, overlap, leaning=0.4, mean=0.0)
        rule, naive = false_ends(world, worlds, seed=prompts)
        errors.append(rule)
        print(f"| {prompts} | {annotators} | {overlap} | {rule:.1%} | {naive:.1%} |")

    rows = [
        ("votes-coverage-least", "least coverage of 95 % intervals of a win rate by votes", min(cells), ">= 0.93"),
        ("votes-stop-error", "most errors of the sequential stop, read after every prompt", max(errors), "<= 0.05"),
    ]  # fmt: skip
    names = ("id", "what", "value", "bound")
    add_rows(
        RESULTS / "votes.json",
        [dict(zip(names, row, strict=True), command=COMMAND) for row in rows],
    )


if __name__ == "__main__":
    main()
