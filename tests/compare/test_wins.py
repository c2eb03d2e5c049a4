import math
from dataclasses import replace

import numpy as np
import pytest

from rlhf.compare.results import Point, Results, independent_pairs
from rlhf.compare.wins import LengthFit, Verdicts, win_rate
from rlhf.experiment.results import blocks
from rlhf.stats.crossed import crossed_mean
from rlhf.stats.logistic import logistic_fit, separable


def point(seed=0, method="ppo", **values):
    values = {name: np.asarray(v, dtype=float) for name, v in values.items()}
    return Point(method=method, swept=0.1, seed=seed, step=1, last=True, values=values)


def results_of(groups):
    return Results(
        points=[], groups=list(groups), prompts=list(groups), score_kinds={"gold": "gold"}, judge="gold",
        methods={}, shared_budget={}, meta={},
    )  # fmt: skip


def verdicts(wins, consistency=1.0):
    wins = np.asarray(wins, dtype=float)
    return Verdicts(wins, [(k, k) for k in range(wins.shape[1])], consistency, 0.5, len(wins))


def judged(wins, lengths, groups=None, seeds=1):
    """win_rate where A wins `wins` and is longer by `lengths`, the same for each seed, one sample a
    prompt.
    """
    groups = groups or [str(i) for i in range(len(wins))]
    a = [point(s, length=np.asarray(lengths, dtype=float)[:, None] + 50) for s in range(seeds)]
    b = [point(s, length=np.full((len(wins), 1), 50.0)) for s in range(seeds)]
    return win_rate(a, b, results_of(groups), [verdicts(np.asarray(wins)[:, None])] * seeds)


def test_samples_with_independent_noise_meet_and_ties_count_half():
    # prompt 0: sample 0 of A meets sample 1 of B: 3>1, 1<2 -> .5; prompt 1: 0=0, 0<5 -> .25.  Mean over groups: .375.
    # at most 1 apart a tie: 3>1, 1=2 -> .75; 0=0, 0<5 -> .25; at most 2 apart: 3=1, 1=2 -> .5
    a, b = (
        point(0, **{"score/gold": scores, "length": np.full((2, 2), 9)})
        for scores in ([[3, 1], [0, 0]], [[2, 1], [5, 0]])
    )
    for margin, expected in ((0.0, 0.375), (1.0, 0.5), (2.0, 0.375)):
        found = win_rate([a], [b], results_of("xy"), "gold", tie_margin=margin).raw.estimate
        assert found == pytest.approx(expected, abs=1e-12)
        back = win_rate([b], [a], results_of("xy"), "gold", tie_margin=margin).raw.estimate
        assert back == pytest.approx(1 - expected, abs=1e-12)


def test_pairs_that_share_a_draw_of_noise_are_left_out():
    one, three = (point(length=np.ones((2, n))) for n in (1, 3))
    assert independent_pairs(three, three) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert independent_pairs(one, one) == [] and independent_pairs(one, three) == [(0, 1), (0, 2)]
    # the best of 2 and of 4 after a foundation's own two samples: 2-3, 4-5 and 2-5, 6-9
    two, four = (replace(point(length=np.ones((2, 2))), noise=blocks(n, 2)) for n in (2, 4))
    assert independent_pairs(two, four) == [(0, 1), (1, 1)]
    # the third sample is draw 2
    assert independent_pairs(two, three) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("samples", [2, 5])
def test_a_win_rate_is_that_of_independent_answers_whatever_the_number_of_samples(samples):
    # both see the same noise and A is better by 0.1: with it A would win always.  Phi(0.1 / sqrt 2) = .52819
    z = np.random.default_rng(samples).normal(size=(3000, samples))
    a, b = (
        point(0, **{"score/gold": z + plus, "length": np.full(z.shape, 9.0)}) for plus in (0.1, 0.0)
    )
    found = win_rate([a], [b], results_of(map(str, range(3000))), "gold")
    assert (
        found.raw.estimate == pytest.approx(0.52819, abs=0.03)
        and found.raw.low < 0.52819 < found.raw.high
    )
    same = win_rate([b], [b], results_of(map(str, range(3000))), "gold")
    assert same.raw.estimate == pytest.approx(0.5, abs=1e-12)


def test_one_sample_a_prompt_gives_no_win_rate():
    a, b = (point(0, **{"score/gold": [[1.0], [2.0]], "length": [[1], [1]]}) for _ in range(2))
    assert win_rate([a], [b], results_of("xy"), "gold") is None
    assert (
        win_rate(
            [a], [b], results_of("xy"), [Verdicts(np.zeros((2, 0)), [], math.nan, math.nan, 0)]
        )
        is None
    )


def test_a_policy_that_wins_by_length_alone_is_level_at_equal_length():
    # A is 10 tokens longer at 30 prompts of 40 and wins 90 % there, 10 shorter at 10 and wins 10 %.  Raw: 70 %.
    # tanh(10/sd) and tanh(-10/sd) are +-c: logit .9 = theta + phi c, logit .1 = theta - phi c  ->  theta = 0.
    found = judged([0.9] * 30 + [0.1] * 10, [10] * 30 + [-10] * 10)
    assert found.raw.estimate == pytest.approx(0.7, abs=1e-9)
    assert found.controlled.estimate == pytest.approx(0.5, abs=1e-9)
    assert found.length_difference == pytest.approx(5.0, abs=1e-9)
    assert not found.ridge and found.ties == 0


def test_where_length_does_not_matter_both_rates_are_the_same():
    # 70 % at every length, so phi = 0 and theta = logit .7
    found = judged([0.7] * 40, [10] * 30 + [-10] * 10)
    assert found.raw.estimate == pytest.approx(0.7, abs=1e-9)
    assert found.controlled.estimate == pytest.approx(0.7, abs=1e-9)


def test_the_controlled_rate_is_read_at_equal_length():
    # two lengths, two parameters: the fit goes through both shares, and d = 0 was seen: 60 %,
    # though raw is 70 %
    found = judged([0.8] * 20 + [0.6] * 20, [10] * 20 + [0] * 20)
    assert found.raw.estimate == pytest.approx(0.7, abs=1e-9)
    assert found.controlled.estimate == pytest.approx(0.6, abs=1e-9)


def test_without_any_difference_of_length_the_controlled_rate_is_the_raw_one():
    rng = np.random.default_rng(0)
    # of 1 and 3 prompts: each group counts once
    groups = [str(i // 3) if i < 30 else f"g{i}" for i in range(50)]
    wins = rng.random(50)
    found = judged(wins, [0] * 50, groups)
    assert found.controlled.estimate == pytest.approx(found.raw.estimate, abs=1e-9)
    # the jackknife of a mean, a group at a time
    assert found.controlled.se == pytest.approx(found.raw.se, rel=1e-6)
    means = results_of(groups).group_means(wins[:, None])
    mean = crossed_mean(means[None, :], null=0.5)
    assert (found.raw.estimate, found.raw.se) == (mean.estimate, mean.se)
    assert math.isnan(found.raw.p)  # a share is shown, not claimed
    assert found.raw.estimate != pytest.approx(wins.mean(), abs=1e-3)


def test_a_length_that_never_varies_cannot_be_told_from_the_policy():
    found = judged([0.9, 0.4, 0.7], [5, 5, 5])
    assert (
        math.isnan(found.controlled.estimate) and found.to_dict()["controlled"]["estimate"] is None
    )
    assert found.raw.estimate == pytest.approx(2 / 3, abs=1e-9)


def test_where_length_decides_all_a_ridge_keeps_the_fit_finite_and_says_so():
    found = judged([1.0] * 20 + [0.0] * 20, [4] * 20 + [-4] * 20)
    assert found.ridge
    assert found.controlled.estimate == pytest.approx(0.5, abs=1e-9)
    # as many wins when longer as when shorter
    assert not judged([1.0] * 20 + [0.0] * 20, [4, -4] * 20).ridge


def test_separable():
    x = np.array([-1.0, 0.0, 1.0])
    assert separable(x, np.array([0.0, 0.0, 1.0])) and separable(x, np.array([1.0, 0.0, 0.0]))
    assert separable(x, np.array([0.0, 0.5, 1.0]))  # meeting in one point alone
    assert not separable(x, np.array([0.0, 1.0, 0.0])) and not separable(
        x, np.array([0.1, 0.5, 0.9])
    )


def test_the_logistic_fit_is_a_maximum():
    # the gradient by hand: sum w (y - p) and sum w (y - p) x - ridge phi vanish
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=200), rng.random(200)
    w = rng.random(200)
    w /= w.sum()
    for ridge in (0.0, 0.3):
        theta, phi = logistic_fit(x, y, w, ridge, np.array([3.0, -8.0]))
        rest = w * (y - 1 / (1 + np.exp(-theta - phi * x)))
        assert rest.sum() == pytest.approx(0, abs=1e-9)
        assert rest @ x - ridge * phi == pytest.approx(0, abs=1e-9)


def test_every_resample_is_fitted_anew():
    # without seed 1 and group "0": the same as a fit that never saw them, its sd(d) included
    rng = np.random.default_rng(2)
    outcomes, lengths = (rng.random((3, 8, 4)) > 0.4).astype(float), rng.normal(3, 10, (3, 8, 4))
    groups = [str(i // 2) for i in range(8)]
    fit = LengthFit(outcomes, lengths, groups)
    fit(np.ones(3), np.ones(4))
    less = LengthFit(outcomes[[0, 2]][:, 2:], lengths[[0, 2]][:, 2:], groups[2:])
    expected = less(np.ones(2), np.ones(3))
    assert fit(np.array([1.0, 0, 1]), np.array([0.0, 1, 1, 1])) == pytest.approx(expected, abs=1e-9)
    d = lengths[[0, 2]][:, 2:].ravel()
    by_hand = logistic_fit(
        np.tanh(d / d.std()),
        outcomes[[0, 2]][:, 2:].ravel(),
        np.full(d.size, 1 / d.size),
        0.0,
        np.zeros(2),
    )
    assert expected == pytest.approx(1 / (1 + math.exp(-by_hand[0])), abs=1e-9)


def test_the_interval_of_the_controlled_rate_is_that_of_repeated_draws():
    # 300 worlds of 60 prompts: the mean standard error against the spread, whose own error is 4 %
    rng = np.random.default_rng(3)
    estimates, errors = [], []
    for _ in range(300):
        d = rng.normal(8, 12, (1, 60))
        p = 1 / (1 + np.exp(-0.3 - 0.8 * np.tanh(d / 12)))
        wins = (rng.random((1, 60)) < p).astype(float)
        found = judged(wins[0], d[0])
        estimates.append(found.controlled.estimate)
        errors.append(found.controlled.se)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_scores_decide_where_no_judge_of_pairs_is_given():
    rng = np.random.default_rng(4)
    a = [
        point(s, **{"score/gold": rng.normal(0.5, 1, (6, 2)), "length": rng.integers(5, 9, (6, 2))})
        for s in range(3)
    ]
    b = point(
        None,
        method="sft",
        **{"score/gold": rng.normal(0, 1, (6, 2)), "length": rng.integers(5, 9, (6, 2))},
    )
    results = results_of("aabbcd")
    found = win_rate(a, [b] * 3, results, "gold")
    # sample 0 meets sample 1, and 1 meets 0
    table = [
        results.group_means(x.values["score/gold"] > b.values["score/gold"][:, ::-1]) for x in a
    ]
    assert found.raw.estimate == pytest.approx(np.mean(table), abs=1e-12)
    assert (found.raw.seeds, found.raw.groups, found.consistency) == (3, 4, None)
    back = win_rate([b] * 3, a, results, "gold")
    assert back.raw.estimate == pytest.approx(1 - found.raw.estimate, abs=1e-12)
    assert back.controlled.estimate == pytest.approx(1 - found.controlled.estimate, abs=1e-9)


def test_where_every_group_is_won_the_interval_is_that_of_as_many_groups():
    # 8 of 8: 1 / (1 + t(.975, 7)^2 / 8) = 1 / (1 + 5.591448 / 8) = .588605
    found = judged([1.0] * 8, [3, -3] * 4)
    assert (found.raw.estimate, found.controlled.estimate, found.raw.high) == (1.0, 1.0, 1.0)
    assert found.raw.low == pytest.approx(0.588605, abs=1e-6)
    near = judged([1.0] * 7 + [0.5], [3, -3] * 4)
    assert near.raw.high < 1.0 and 0.5 < near.raw.low < 0.9375


def test_with_seeds_at_random_a_share_has_their_quantile():
    # seed means .5, .7, .9 of all 8 groups alike: mean .7, se .2 / sqrt(3), half t(.975, 2) se =
    # 4.302653 se N = .21 / se^2 = 15.75, share = 4.302653^2 / 15.75 = 1.175417: (.7 + .587708 +-
    # sqrt(1.175417 * .21 + .345401)) / 2.175417 = (1.287708 +- .769571) / 2.175417
    wins = [verdicts(np.full((8, 1), share)) for share in (0.5, 0.7, 0.9)]
    sides = [[point(s, length=np.full((8, 1), 50.0)) for s in range(3)] for _ in range(2)]
    found = win_rate(*sides, results_of("abcdefgh"), wins).raw
    assert (found.low, found.high) == pytest.approx((0.238179, 0.945694), abs=1e-5)


def test_consistency_is_handed_on_and_ties_are_counted():
    a, b = (point(0, length=np.ones((2, 1))) for _ in range(2))
    found = win_rate([a], [b], results_of("xy"), [verdicts([[0.5], [1.0]], 0.75)])
    assert (found.consistency, found.ties) == (0.75, 0.5)


def test_meetings_without_a_verdict_are_left_out_of_their_prompt_alone():
    # prompt 0: 1 and none -> 1; prompt 1: 0 and 1 -> 1/2; prompt 2: none, left out -> mean 3/4
    a, b = (point(length=np.full((3, 2), 9)) for _ in range(2))
    wins = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, np.nan]])
    found = win_rate([a], [b], results_of("xyz"), [verdicts(wins)])
    assert found.raw.estimate == pytest.approx(0.75) and found.raw.groups == 2
    assert found.no_verdict == 3 and found.ties == 0.0
    nothing = verdicts(np.full((3, 2), np.nan), math.nan)
    assert win_rate([a], [b], results_of("xyz"), [nothing]) is None
