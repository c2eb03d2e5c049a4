"""The expected score of the best of n, against all subsets, and its KL."""

import itertools
import math

import numpy as np
import pytest

from rlhf.stats.best_of_n import best_of_n_kl, best_of_n_means, best_of_n_weights


def test_the_kl_of_the_best_of_n_by_hand():
    # log 1 - 0 = 0;  log 2 - 1/2;  log 4 - 3/4
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(0.193147180559945, abs=1e-12)
    assert best_of_n_kl(4) == pytest.approx(1.386294361119891 - 0.75, abs=1e-12)


def test_the_weights_of_four_responses_by_hand():
    # of the 6 pairs of ranks 1 to 4 rank 2 is the best of one, 3 of two, 4 of three
    assert best_of_n_weights(4, 2) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    # of the 4 triples rank 3 is the best of one
    assert best_of_n_weights(4, 3) == pytest.approx([0, 0, 1 / 4, 3 / 4])
    assert best_of_n_weights(4, 1) == pytest.approx([1 / 4] * 4)
    assert best_of_n_weights(4, 4) == pytest.approx([0, 0, 0, 1])


def test_weights_of_many_responses_add_up_to_one():
    for n in (1, 7, 1000, 4096):
        weights = best_of_n_weights(4096, n)
        assert math.fsum(weights) == pytest.approx(1, abs=1e-9) and np.all(weights >= 0)


@pytest.mark.parametrize("n", [0, 5])
def test_a_size_beyond_the_responses_is_refused(n):
    with pytest.raises(ValueError, match=f"best of {n} of 4"):
        best_of_n_weights(4, n)


def over_subsets(proxy, values, n):
    """The slow way: the mean over all subsets; responses that tie share the first place."""
    found = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        best = [values[i] for i in subset if proxy[i] == top]
        found.append(sum(best) / len(best))
    return sum(found) / len(found)


def test_the_mean_is_that_over_all_subsets():
    rng = np.random.default_rng(0)
    proxy, values = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    found = best_of_n_means(proxy, values, range(1, 8))
    for row, n in itertools.product(range(3), range(1, 8)):
        assert found[row, n - 1] == pytest.approx(over_subsets(proxy[row], values[row], n))


def test_responses_that_tie_share_their_place():
    proxy, values = [2.0, 1.0, 2.0, 0.0, 2.0, 1.0], [5.0, 1.0, 8.0, 3.0, 2.0, 4.0]
    found = best_of_n_means([proxy], [values], range(1, 7))[0]
    # the best of all 6 is any of the three with 2.0
    assert found[5] == pytest.approx((5 + 8 + 2) / 3)
    # and no order of the responses matters
    again = best_of_n_means([proxy[::-1]], [values[::-1]], range(1, 7))[0]
    assert found == pytest.approx(again)
    for n in range(1, 7):
        assert found[n - 1] == pytest.approx(over_subsets(proxy, values, n))
