import math

import numpy as np
import pytest

from rlhf.errors import UserError
from rlhf.stats import group_means
from rlhf.stats.crossed import (
    LEAST_P,
    Variances,
    block_weights,
    crossed_mean,
    crossed_statistic,
    half_width,
    holm,
    mean_over_seeds,
    outlying,
    p_value,
)

BY_HAND = np.array([[1.0, 2.0, 6.0], [2.0, 6.0, 7.0], [6.0, 7.0, 8.0]])


def example(seeds=4, groups=37):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(seeds, 1))
        + rng.normal(size=(1, groups))
        + rng.normal(size=(seeds, groups))
    )


def weighted(values):
    return lambda s, g: float(s @ values @ g / s.sum() / g.sum())


def test_three_seeds_and_three_groups_by_hand():
    # Seed means 3, 5, 7; group means 3, 5, 7; mean 5.  MS_seeds = MS_groups = 3 (4 + 0 + 4) / 2 = 12.
    # Residuals y - row - column + 5: 0 -1 1 / -1 1 0 / 1 0 -1, squares 6, MS_error = 6 / 4 = 1.5.
    # V = (12 + 12 - 1.5) / 9 = 2.5.  half^2 = t^2 12/9 + t^2 (12 - 1.5)/9 = t^2 2.5, both of 2 degrees of freedom
    found = crossed_mean(BY_HAND)
    assert found.estimate == pytest.approx(5.0, abs=1e-12)
    assert found.se == pytest.approx(math.sqrt(2.5), abs=1e-12)
    assert (found.se_seeds**2, found.se_groups**2, found.se_error**2) == pytest.approx(
        (12 / 9, 12 / 9, 1.5 / 9)
    )
    assert (found.seeds, found.groups) == (3, 3)
    # Two degrees of freedom have t in closed form, (2p - 1) sqrt(2 / (4 p (1 - p))): 4.302653 at
    # .975
    assert found.high - found.estimate == pytest.approx(4.302653 * math.sqrt(2.5), abs=1e-5)
    assert found.high - found.estimate == pytest.approx(found.estimate - found.low, abs=1e-12)
    # and p by its closed form too: T = 5 / sqrt(2.5), p = 1 - T / sqrt(2 + T^2) = 1 - sqrt(10 / 12)
    assert found.p == pytest.approx(1 - math.sqrt(10 / 12), abs=1e-9)
    twice = crossed_mean(BY_HAND, variance_factor=2.0)
    assert (twice.se, twice.high - 5.0) == pytest.approx(
        (math.sqrt(5.0), 4.302653 * math.sqrt(5.0)), abs=1e-5
    )


def test_p_and_interval_say_the_same():
    # The null at the interval's end has p = 1 - level; p is two-sided
    values = example()
    for level in (0.8, 0.95):
        e = crossed_mean(values, level=level)
        for end in (e.low, e.high):
            assert crossed_mean(values, null=end, level=level).p == pytest.approx(
                1 - level, abs=1e-9
            )
    assert crossed_mean(values, null=e.estimate).p == pytest.approx(1.0, abs=1e-12)


def test_no_component_is_below_zero():
    # Rows with the same means: MS_seeds = 0 < MS_error, so V is MS_groups / (S G) alone, not less.
    # Rows 0 3 6 / 1 2 6 / 2 4 3: means 3; columns 1, 3, 5, MS_groups = 3 (4 + 0 + 4) / 2 = 12
    found = crossed_mean(np.array([[0.0, 3.0, 6.0], [1.0, 2.0, 6.0], [2.0, 4.0, 3.0]]))
    assert found.se == pytest.approx(math.sqrt(12 / 9), abs=1e-12)
    # and the interval is not narrower than with the seeds fixed: t of 2 degrees of freedom
    assert found.high - found.estimate == pytest.approx(4.302653 * math.sqrt(12 / 9), abs=1e-5)


def test_each_part_of_the_interval_has_its_own_student_quantile():
    # two-sided 5 %: 2.776445 at 4, 1.971957 at 199 degrees of freedom
    assert half_width(Variances(4.0, 0.0, 0.0), 5, 200, 0.05) == pytest.approx(
        2.776445 * 2, abs=1e-5
    )
    assert half_width(Variances(0.0, 4.0, 0.0), 5, 200, 0.05) == pytest.approx(
        1.971957 * 2, abs=1e-5
    )
    # seeds 4 x 2.776445^2 = 30.8346, groups (3 - 1) x 1.971957^2 = 7.77723: the error is in the
    # seeds' mean square
    assert half_width(Variances(4.0, 3.0, 1.0), 5, 200, 0.05) == pytest.approx(
        math.sqrt(38.6118), abs=1e-4
    )
    # not below that of fixed seeds, 3 x 1.971957^2
    assert half_width(Variances(0.1, 3.0, 1.0), 5, 200, 0.05) == pytest.approx(
        1.971957 * math.sqrt(3), abs=1e-5
    )
    # fixed
    assert half_width(Variances(9.0, 4.0, 0.0), 2, 200, 0.05) == pytest.approx(
        1.971957 * 2, abs=1e-5
    )


def test_p_is_the_level_at_which_the_interval_ends():
    v = Variances(1.0, 2.0, 0.5)
    for alpha in (0.9, 0.05, 1e-3, 1e-9):
        assert p_value(half_width(v, 3, 40, alpha), v, 3, 40) == pytest.approx(alpha, rel=1e-6)
    assert p_value(0.0, v, 3, 40) == 1.0 and p_value(1e12, v, 3, 40) == LEAST_P


def null_shares(seeds, groups, error, ratio, count):
    """How often p is below each level over the level, of normal effects around 0: seeds add `ratio`
    times what prompts (1) and error do.
    """
    rng, rest = np.random.default_rng([seeds, groups]), 1 / groups + error / (seeds * groups)
    of_seeds, of_groups, of_error = (
        rng.chisquare(df, count) / df / (seeds * groups)
        for df in (seeds - 1, groups - 1, (seeds - 1) * (groups - 1))
    )
    of_seeds *= error + groups * seeds * ratio * rest
    of_groups *= error + seeds
    of_error *= error
    mean = rng.normal(size=count) * math.sqrt(rest * (1 + ratio))
    found = []
    for alpha in (0.005, 0.05 / 36):
        ends = half_width(Variances(of_seeds, of_groups, of_error), seeds, groups, alpha)
        found.append(float(np.mean(np.abs(mean) > ends)) / alpha)
    return found


@pytest.mark.parametrize(
    ("seeds", "error", "ratio"), [(3, 10.0, 10.0), (3, 1.0, 3.0), (5, 10.0, 3.0)]
)
def test_small_p_are_not_more_frequent_than_they_say(seeds, error, ratio):
    # with Satterthwaite's degrees of freedom p < 0.005 came 4.8, 3.7 and 2.4 times, p < 0.05/36 13, 8 and 4 times too
    # often.  Of 200,000 at 0.05/36 the standard error is 0.06 of it.
    assert max(null_shares(seeds, 100, error, ratio, 200_000)) < 1 + 2.5 * 0.06


def test_a_value_far_from_the_others_by_hand():
    # others 0, 1, 2: mean 1, sd 1; t = (5 - 1) / (1 sqrt(4/3)) = 2 sqrt(3), 2 degrees of freedom:
    # p = 1 - t / sqrt(2 + t^2) = 1 - sqrt(12 / 14)
    assert outlying([0.0, 5.0, 1.0, 2.0])[1] == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-9)
    assert outlying([1.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]
    assert outlying([1.0, 1.0, 1.0, 0.5])[3] == 0.0
    assert min(outlying([0.5, 0.52, 0.0])) > 0.01  # of three none stands out


def test_two_seeds_speak_of_these_models():
    # Group means 2, 4, 9 of two seeds that differ by 10: se sqrt(13 / 3), 2 degrees of freedom, t =
    # 4.302653
    values = np.array([[-3.0, -1.0, 4.0], [7.0, 9.0, 14.0]])
    found = crossed_mean(values)
    assert (found.estimate, found.se) == pytest.approx((5.0, math.sqrt(13 / 3)), abs=1e-9)
    assert found.high == pytest.approx(5.0 + 4.302653 * math.sqrt(13 / 3), abs=1e-5)
    by_statistic = crossed_statistic(weighted(values), 2, 3)
    assert (by_statistic.low, by_statistic.high) == pytest.approx((found.low, found.high), abs=1e-9)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_the_jackknife_of_a_mean_is_the_closed_form(seeds):
    values = example(seeds)
    found, expected = (
        crossed_statistic(weighted(values), seeds, 37, blocks=37),
        crossed_mean(values),
    )
    for field in ("estimate", "low", "high", "se", "p", "se_seeds", "se_groups", "se_error"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), abs=1e-9), field
    weights = block_weights(37, 37)
    # (1 + B, seeds)
    own = np.array([[float(w @ row / w.sum()) for row in values] for w in weights])
    assert mean_over_seeds(own, weights).to_dict() == pytest.approx(expected.to_dict(), abs=1e-9)


def test_blocks_of_unequal_size_are_right_on_average():
    # 37 groups in 10 blocks of 3 or 4, nothing but groups: V = 1 / 37 on average, whatever the
    # blocks
    rng = np.random.default_rng(1)
    squared = [
        crossed_statistic(weighted(rng.normal(size=(1, 37))), 1, 37, blocks=10).se ** 2
        for _ in range(2000)
    ]
    assert np.mean(squared) * 37 == pytest.approx(1.0, abs=3 * math.sqrt(2 / 9 / 2000))


def test_blocks_of_groups_that_are_named_by_their_kind_are_right_on_average():
    # 200 groups of five kinds, sorted by kind as names would: variance 1.125 of the kind + .25 =
    # 1.375, V = 1.375 / 200
    rng, kinds, squared = np.random.default_rng(3), np.array([-1.5, -0.75, 0.0, 0.75, 1.5]), []
    for _ in range(400):
        values = np.sort(rng.choice(kinds, 200))[None, :] + 0.5 * rng.normal(size=(1, 200))
        squared.append(crossed_statistic(weighted(values), 1, 200).se ** 2)
    assert np.mean(squared) * 200 == pytest.approx(1.375, abs=3 * 1.375 * math.sqrt(2 / 49 / 400))


def test_blocks_for_the_seeds_own_statistic_and_for_the_whole_agree():
    values = example(4)
    weights = block_weights(37, 8)
    own = np.array([[float(w @ row / w.sum()) for row in values] for w in weights])
    whole = crossed_statistic(weighted(values), 4, 37, blocks=8)
    assert mean_over_seeds(own, weights).to_dict() == pytest.approx(whole.to_dict(), abs=1e-9)


def test_a_ratio_is_refitted_in_each_resample():
    # Ratio of two means r = y / x.  Linearised (delta method): the mean of (y - r x) / mean(x), so its crossed interval
    # is nearly the ratio's; with x held at its mean, what x and y share would stay in the standard error
    rng = np.random.default_rng(2)
    x = 10 + rng.normal(size=(5, 1)) + rng.normal(size=(1, 200)) * 3 + rng.normal(size=(5, 200))
    y = 0.5 * x + rng.normal(size=(5, 200)) + 0.3 * rng.normal(size=(5, 1))
    found = crossed_statistic(lambda s, g: float((s @ y @ g) / (s @ x @ g)), 5, 200)
    delta = crossed_mean((y - found.estimate * x) / x.mean())
    assert found.se == pytest.approx(delta.se, rel=0.15)
    assert found.se < 0.6 * crossed_mean(y / x.mean()).se


def worlds(count, seeds, groups, seed_part, prompt_part, noise, rng):
    """`count` experiments with mean 0; the parts are what seeds and prompts add to the variance of
    the mean.
    """
    for _ in range(count):
        a = rng.normal(size=(seeds, 1)) * math.sqrt(seed_part * seeds)
        b = rng.normal(size=(1, groups)) * math.sqrt(prompt_part * groups)
        yield a + b + noise * rng.normal(size=(seeds, groups))


@pytest.mark.parametrize(("seeds", "groups"), [(3, 40), (5, 100), (10, 100)])
def test_95_percent_intervals_hold_the_truth_95_percent_of_the_time(seeds, groups):
    # 1500 experiments: standard error of a coverage of .95 is .0056.  The interval over prompts alone (seeds taken as
    # fixed) and that over seeds alone (S means, S - 1 degrees of freedom) have to fail where their other half matters.
    rng = np.random.default_rng(seeds)
    t = {3: 4.302653, 5: 2.776445, 10: 2.262157}[seeds]
    for seed_part, prompt_part in [(3.0, 1.0), (1.0, 3.0), (1.0, 1.0)]:
        hits, prompts_alone, seeds_alone = [], [], []
        for values in worlds(1500, seeds, groups, seed_part, prompt_part, math.sqrt(groups), rng):
            e = crossed_mean(values)
            hits.append(e.low <= 0 <= e.high)
            mean, by_group, by_seed = values.mean(), values.mean(axis=0), values.mean(axis=1)
            prompts_alone.append(abs(mean) < 1.98 * by_group.std(ddof=1) / math.sqrt(groups))
            seeds_alone.append(abs(mean) < t * by_seed.std(ddof=1) / math.sqrt(seeds))
        assert 0.95 - 3 * 0.0056 < np.mean(hits) < 0.99, (seed_part, prompt_part, np.mean(hits))
        if seed_part > prompt_part:
            assert np.mean(prompts_alone) < 0.75
        if prompt_part > seed_part and seeds > 3:  # with 3 seeds t is 4.3, which hides it
            assert np.mean(seeds_alone) < 0.88


def test_a_statistic_is_called_once_a_block_and_seed():
    # 10 seeds, 50 blocks: (10 + 1) (50 + 1) = 561 calls
    calls = 0

    def statistic(s, g):
        nonlocal calls
        calls += 1
        return float(s.sum() * g.sum())

    crossed_statistic(statistic, 10, 300)
    assert calls == 561


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04: 4 * .01 = .04, 3 * .02 = .06, 2 * .03 = .06, 1 * .04 -> not below .06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06], abs=1e-12)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    found = holm([math.nan, 0.02, 0.01])  # two tests, not three
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([0.02, 0.02], abs=1e-12)
    assert holm([]) == []


def test_what_does_not_vary_and_what_cannot_be_known():
    same = crossed_mean(np.full((3, 10), 0.1))
    assert (same.low, same.high, same.se) == (same.estimate, same.estimate, 0.0)
    assert math.isnan(same.p)
    assert crossed_mean(np.zeros((3, 10))).p == 1.0
    one = crossed_mean(np.array([[2.0], [3.0], [4.0]]))
    assert one.estimate == 3.0
    assert one.to_dict() == {
        "estimate": 3.0,
        "low": None,
        "high": None,
        "se": None,
        "p": None,
        "seeds": 3,
        "groups": 1,
        "se_seeds": None,
        "se_groups": None,
        "se_error": None,
    }
    assert math.isnan(crossed_statistic(lambda s, g: 1.0 if g.all() else math.nan, 3, 10).low)
    with pytest.raises(UserError, match="seed 1, group 0"):
        crossed_mean(np.array([[1.0, 2.0], [math.nan, 2.0]]))
    with pytest.raises(UserError, match="expected \\(seeds, groups\\)"):
        crossed_mean(np.array([1.0, 2.0]))


def test_means_of_groups_count_the_members_that_are_kept():
    values, groups = np.array([1.0, 2.0, 3.0, 5.0]), ["b", "b", "a", "c"]
    assert group_means(values, groups).tolist() == [3.0, 1.5, 5.0]
    kept = np.array([False, True, True, False])
    assert np.array_equal(group_means(values, groups, kept), [3.0, 2.0, np.nan], equal_nan=True)
