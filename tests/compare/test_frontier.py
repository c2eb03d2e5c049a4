import math

import numpy as np
import pytest

from rlhf.stats.crossed import block_weights
from rlhf.stats.frontier import (
    FORM,
    LINES,
    Track,
    _residual,
    curve,
    equal_kl,
    kl_range,
    near,
    round_kls,
)

KL = np.array([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])


def level_track(kls, scores, groups=4):
    """Each seed's points, the same in all groups, so that only seeds vary."""
    return Track(
        [np.repeat(np.asarray(k)[:, None], groups, axis=1) for k in kls],
        [np.repeat(np.asarray(y)[:, None], groups, axis=1) for y in scores],
    )


def gao(kl, a, b, c):
    d = np.sqrt(kl)
    return d * (a + b * np.log(d) + c * d)


def test_points_on_the_form_give_its_differences_to_the_digit():
    # Seeds' curves a: (1, -.3, -.05), (1.2, -.3, -.05), (1.4, -.3, -.05); b: .5 d.  At KL 4, d = 2:
    # a = 2 (1.2 - .3 log 2 - .1) = 2.2 - .6 log 2, b = 1; the seeds' differences are .4 apart: se .4 / sqrt(3)
    a = level_track([KL] * 3, [gao(KL, x, -0.3, -0.05) for x in (1.0, 1.2, 1.4)])
    b = level_track([KL * 1.1] * 3, [gao(KL * 1.1, 0.5, 0.0, 0.0)] * 3)
    found = equal_kl(a, b, [4.0])
    assert found.overlap == pytest.approx((0.55, 16.0), abs=1e-12)
    difference = found.rows[0]["difference"]
    assert difference.estimate == pytest.approx(2.2 - 0.6 * math.log(2) - 1.0, abs=1e-6)
    assert difference.se == pytest.approx(0.4 / math.sqrt(3), abs=1e-6)
    assert (difference.seeds, difference.groups) == (3, 4)
    assert found.residual == pytest.approx({"a": 0.0, "b": 0.0}, abs=1e-9)
    swapped = equal_kl(b, a, [4.0]).rows[0]["difference"]
    assert (swapped.estimate, swapped.low) == pytest.approx(
        (-difference.estimate, -difference.high), abs=1e-9
    )


def test_curve_starts_at_the_foundation_and_is_the_mean_over_seeds():
    track = level_track([KL] * 3, [gao(KL, x, 0.2, -0.1) for x in (1.0, 2.0, 3.0)])
    found = curve(track, [0.5, 9.0])
    assert found[0].estimate == pytest.approx(gao(np.array(0.5), 2.0, 0.2, -0.1), abs=1e-6)
    assert found[1].estimate == pytest.approx(3 * (2.0 + 0.2 * math.log(3) - 0.3), abs=1e-6)
    # two points, and with the foundation a line: 1 at KL 1 and 2 at KL 4 is a = 1, so 1.5 at KL
    # 2.25
    assert curve(level_track([[1.0, 4.0]], [[1.0, 2.0]]), [2.25])[0].estimate == pytest.approx(
        1.5, abs=1e-9
    )


def test_lines_from_point_to_point_are_the_sensitivity():
    # d = 1, 2, 3, 4 with scores d^2, which the form holds: 2.25 at d = 1.5, where the line from 1
    # to 4 says 2.5
    a = level_track([[4.0, 1.0, 16.0, 9.0]], [[4.0, 1.0, 16.0, 9.0]])
    found = equal_kl(a, level_track([[0.25, 0.5, 20.0, 30.0]], [[0.0] * 4]), [2.25])
    assert found.form == FORM and found.rows[0]["difference"].estimate == pytest.approx(
        2.25, abs=1e-6
    )
    assert found.sensitivity[0]["difference"].estimate == pytest.approx(2.5, abs=1e-9)
    assert found.disagreement == pytest.approx(0.25, abs=1e-6) and found.residual[
        "a"
    ] == pytest.approx(0, abs=1e-6)


def test_the_residual_is_the_distance_of_the_points_from_their_curve():
    # one seed, two points, one term: least squares of d = 1, 2 on 1, 3 is 1.4; residuals .4 and -.2
    track = level_track([[4.0, 1.0]], [[3.0, 1.0]])
    assert curve(track, [2.25])[0].estimate == pytest.approx(2.1, abs=1e-9)
    assert _residual(track) == pytest.approx(math.sqrt((0.16 + 0.04) / 2), abs=1e-9)


def test_few_points_near_by_are_joined_by_lines():
    # d = 1, 2 with scores 1, 3: at d = 1.5 the line says 2; the other method is 0 everywhere
    a, b = level_track([[4.0, 1.0]], [[3.0, 1.0]]), level_track([[0.25, 9.0]], [[0.0, 0.0]])
    found = equal_kl(a, b, [2.25])
    assert found.form == LINES and found.rows[0]["difference"].estimate == pytest.approx(
        2.0, abs=1e-9
    )


def test_points_far_beyond_the_overlap_do_not_bend_the_curve():
    # score d up to d = 2, as the form has it; beyond it the first method collapses, the second ends
    # at d = 2
    kl = [0.25, 1.0, 2.25, 4.0]
    a = level_track([[*kl, 100.0, 144.0]], [[0.5, 1.0, 1.5, 2.0, -50.0, -70.0]])
    b = level_track([kl], [[0.0] * 4])
    found = equal_kl(a, b, [1.0])
    assert found.overlap == (0.25, 4.0) and found.rows[0]["difference"].estimate == pytest.approx(
        1.0, abs=1e-6
    )
    # of a seed that leaps, the first point beyond is kept, so that the overlap stays enclosed
    leaps = near(level_track([[1.0, 50.0, 100.0]], [[1.0, 0.0, 0.0]]), 4.0)
    assert leaps.kl[0].mean(axis=1).tolist() == [1.0, 50.0]


def test_kl_is_measured_again_in_each_resample():
    # One seed, two points, scores without noise: all uncertainty is the KL's.  Fit and KL without each group, by a loop
    rng = np.random.default_rng(0)
    kl, score = rng.gamma(2.0, [[1.0], [3.0]], (2, 12)), np.repeat([[1.0], [2.0]], 12, axis=1)

    def at_three(keep):
        d = np.sqrt(kl[:, keep].mean(axis=1))
        return math.sqrt(3.0) * float(d @ score[:, 0]) / float(d @ d)

    without = np.array([at_three(np.arange(12) != g) for g in range(12)])
    expected = math.sqrt(11 / 12 * np.sum((without - without.mean()) ** 2))
    found = curve(Track([kl], [score]), [3.0])[0]
    assert found.estimate == pytest.approx(at_three(np.arange(12) >= 0), abs=1e-9)
    # around the pseudo-values' mean here, around theirs there
    assert found.se == pytest.approx(expected, rel=0.01)
    # t of 11 degrees of freedom
    assert found.high - found.estimate == pytest.approx(2.200985 * found.se, rel=1e-6)
    assert found.se > 0.05


def test_ranges_are_what_every_seed_covers():
    a = level_track([[1.0, 2.0, 9.0], [2.0, 5.0, 7.0]], [[1.0, 2.0, 3.0]] * 2)
    b = level_track([[0.5, 6.0], [0.4, 30.0]], [[1.0, 2.0]] * 2)
    assert kl_range(a) == (2.0, 7.0)
    assert kl_range(b) == (0.5, 6.0)
    found = equal_kl(a, b, [1.9, 2.0, 4.0, 6.0, 6.1])
    assert found.overlap == (2.0, 6.0)
    assert (
        [row["kl"] for row in found.rows]
        == [row["kl"] for row in found.sensitivity]
        == [2.0, 4.0, 6.0]
    )
    apart = equal_kl(a, level_track([[8.0, 9.0]] * 2, [[1.0, 2.0]] * 2))
    assert (apart.overlap, apart.rows, apart.sensitivity) == (None, [], [])


def test_a_method_does_not_differ_from_itself():
    track = simulated(np.random.default_rng(0), 4, 30, 1.0)
    same = equal_kl(track, track).rows[0]["difference"]
    assert (same.estimate, same.p) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.3, 17, [0.4, 2, 6, 10, 15]),
        (2, 9, [2, 3, 5, 7, 8]),
        (0, 0.5, [0.01, 0.06, 0.15, 0.3, 0.5]),
        (5, 5.3, [5.05, 5.15, 5.2, 5.25]),
    ],
)
def test_kls_are_round_and_inside(low, high, expected):
    assert round_kls(low, high) == pytest.approx(expected, abs=1e-12)


def simulated(rng, seeds, groups, slope):
    """Over-optimised runs, d (slope - .5 log d), 4 strengths x 3 checkpoints.

    The run is off by .15 d, a prompt by .3 d in score and 40 % in KL, and each point by a little of
    its own.
    """
    kl = np.sort(np.outer((2.0, 5.0, 10.0, 20.0), (0.2, 0.6, 1.0)).ravel())
    hard, far = rng.normal(size=groups) * 0.3, np.exp(rng.normal(size=groups) * 0.4 - 0.08)
    track = ([], [])
    for _ in range(seeds):
        own = kl * np.exp(rng.normal(size=(len(kl), 1)).ravel() * 0.1)
        d = np.sqrt(own)[:, None]
        score = d * (slope + 0.15 * rng.normal() - 0.5 * np.log(d)) + 0.03 * rng.normal(
            size=d.shape
        )
        track[0].append(own[:, None] * far)
        track[1].append(score + d * hard + 0.3 * rng.normal(size=(len(kl), groups)))
    return Track(*track)


def test_intervals_at_equal_kl_hold_the_truth():
    # a - b = (1 - .7) d.  300 experiments, 3 KLs: the standard error of a coverage of .95 is .0126.
    # Points taken as independent (a regression over all seeds' points, residuals over their number) are overconfident.
    rng = np.random.default_rng(5)
    kls, hits, naive = np.array([1.0, 4.0, 9.0]), np.zeros(3), 0
    for _ in range(300):
        a, b = simulated(rng, 4, 40, 1.0), simulated(rng, 4, 40, 0.7)
        rows = equal_kl(a, b, kls).rows
        hits += [
            r["difference"].low <= 0.3 * math.sqrt(r["kl"]) <= r["difference"].high for r in rows
        ]
        naive += abs(pooled(a)[0] - pooled(b)[0] - 0.6) < 1.96 * math.hypot(
            pooled(a)[1], pooled(b)[1]
        )
    assert np.all(hits / 300 > 0.95 - 3 * 0.0126), hits / 300
    assert np.all(hits / 300 < 0.995), hits / 300
    assert naive / 300 < 0.8


def pooled(track):
    """Prediction at KL 4 and its textbook standard error, as if all points of all seeds were
    independent.
    """
    d = np.sqrt(np.concatenate([k.mean(axis=1) for k in track.kl]))
    y = np.concatenate([s.mean(axis=1) for s in track.score])
    terms, at = np.stack([d, d * np.log(d), d * d], axis=1), np.array([2.0, 2 * math.log(2), 4.0])
    fit = np.linalg.lstsq(terms, y, rcond=None)[0]
    variance = np.sum((y - terms @ fit) ** 2) / (len(y) - 3)
    return float(at @ fit), math.sqrt(variance * float(at @ np.linalg.inv(terms.T @ terms) @ at))


def test_all_groups_fall_out_once():
    weights = block_weights(10, 4)  # blocks of 3, 3, 2 and 2
    assert weights.shape == (5, 10)
    assert weights.sum(axis=1).tolist() == [10, 7, 7, 8, 8]
    np.testing.assert_array_equal((1 - weights[1:]).sum(axis=0), np.ones(10))
