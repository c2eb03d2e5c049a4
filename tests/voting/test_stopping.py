import itertools
import math

import numpy as np
import pytest

from rlhf.voting.rates import FRACTIONS, GRID, confidence_sequence, follow


def sequence_in_loops(shares, alpha):
    """The same by the definition, one candidate and one share at a time."""
    kept = []
    for m in GRID:
        capitals, alive = dict.fromkeys(itertools.product(FRACTIONS, (1, -1)), 1.0), True
        for x in shares:
            for fraction, sign in capitals:
                odds = (m if sign > 0 else 1 - m) or 1e-6
                capitals[fraction, sign] *= 1 + sign * fraction * (x - m) / odds
            alive = alive and sum(capitals.values()) / len(capitals) < 1 / alpha
        if alive:
            kept.append(m)
    return max(0.0, kept[0] - 0.002), min(1.0, kept[-1] + 0.002)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_sequence_is_what_its_definition_says(alpha):
    shares = np.random.default_rng(3).choice([0.0, 0.5, 1.0], size=25, p=[0.2, 0.2, 0.6]).tolist()
    assert confidence_sequence(shares, alpha) == pytest.approx(sequence_in_loops(shares, alpha))


def test_the_error_is_kept_though_every_vote_is_looked_at():
    """Of collections without a difference at most 5 % ever end with one; a fixed interval errs in
    far more."""
    rng, wrong, naive, worlds = np.random.default_rng(0), 0, 0, 400
    for _ in range(worlds):
        shares = rng.choice([0.0, 0.5, 1.0], size=200)
        low, high = confidence_sequence(shares, 0.05)
        wrong += low > 0.5 or high < 0.5
        n = np.arange(1, 201)
        mean = np.cumsum(shares) / n
        sd = np.sqrt(np.maximum(np.cumsum(shares**2) / n - mean**2, 1e-9))
        naive += bool(np.any((np.abs(mean - 0.5) > 1.96 * sd / np.sqrt(n))[20:]))
    # 400 worlds: 5 % and three standard errors
    assert wrong / worlds <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / worlds)
    assert naive / worlds > 0.15


def test_a_difference_ends_the_collection_and_equality_does_too():
    rng = np.random.default_rng(1)
    ahead = follow(rng.choice([0.0, 1.0], size=150, p=[0.25, 0.75]).tolist())
    assert ahead.state == "one" and ahead.more is None
    behind = follow(rng.choice([0.0, 1.0], size=150, p=[0.75, 0.25]).tolist())
    assert behind.state == "other"
    alike = follow([0.5] * 200, margin=0.1)
    assert alike.state == "equal"


def test_an_open_collection_says_about_how_many_are_left():
    shares = np.random.default_rng(2).choice([0.0, 1.0], size=40, p=[0.4, 0.6]).tolist()
    found = follow(shares)
    assert found.state == "open" and 20 < found.more < 2000
    # nobody has voted yet
    assert follow([]).state == "open" and follow([]).more is None


def test_equal_answers_draw_the_interval_to_one_half():
    shares = [1.0] * 30
    alone, half = follow(shares), follow(shares, equal_share=0.5)
    assert half.low - 0.5 == pytest.approx((alone.low - 0.5) / 2)
    assert half.high == pytest.approx(0.75)
