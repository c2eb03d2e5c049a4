import json
import math
import random

import krippendorff
import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from rlhf.data.agreement import Share, agreement_summary, annotator_reliability
from rlhf.data.alpha import alpha_interval, kappa_interval, pairwise_kappas, ratings_of
from rlhf.data.votes import Vote
from rlhf.stats import fair_coin_p, wilson


def votes_of(rows):
    """[(comparison, annotator, choice, more fields)] -> votes."""
    return [
        Vote(i, c, name, choice, **(more[0] if more else {}))
        for i, (c, name, choice, *more) in enumerate(rows, 1)
    ]


# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: four observers, twelve
# units
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
PUBLISHED = {
    u: {f"observer {j}": row[u] for j, row in enumerate(OBSERVERS) if row[u] is not None}
    for u in range(12)
}


def test_alpha_of_the_published_example():
    # the paper's section C: nominal 0.743, ordinal 0.815
    assert alpha_interval(PUBLISHED)[0] == pytest.approx(0.743, abs=5e-4)
    assert alpha_interval(PUBLISHED, "ordinal")[0] == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand():
    # two judges, items (a, a), (a, b), (b, b): o_ab = o_ba = 1, n_a = n_b = 3, n = 6 alpha = 1 - 5
    # * (1 + 1) / (2 * 3 * 3) = 1 - 10 / 18 = 4 / 9; a third item judged once changes nothing
    ratings = {
        1: {"x": "a", "y": "a"},
        2: {"x": "a", "y": "b"},
        3: {"x": "b", "y": "b"},
        4: {"x": "b"},
    }
    assert alpha_interval(ratings)[0] == pytest.approx(4 / 9, abs=1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
@pytest.mark.parametrize("seed", range(4))
def test_alpha_equals_the_reference_library(level, seed):
    rng = random.Random(seed)
    items, people = 60, 5
    table = [
        [rng.choice([-3, -1, 0, 2, 3]) if rng.random() < 0.6 else None for _ in range(items)]
        for _ in range(people)
    ]
    data = np.array([[np.nan if v is None else v for v in row] for row in table], dtype=float)
    ratings = {
        u: {f"p{j}": row[u] for j, row in enumerate(table) if row[u] is not None}
        for u in range(items)
    }
    expected = krippendorff.alpha(reliability_data=data, level_of_measurement=level)
    assert alpha_interval(ratings, level)[0] == pytest.approx(expected, abs=1e-9)


def test_alpha_where_there_is_nothing_to_compare():
    assert math.isnan(alpha_interval({})[0])
    assert math.isnan(alpha_interval({1: {"x": "a"}, 2: {"y": "b"}})[0])
    # all said the same
    assert math.isnan(alpha_interval({1: {"x": "a", "y": "a"}, 2: {"x": "a", "y": "a"}})[0])
    assert all(map(math.isnan, alpha_interval({})))


def test_the_interval_of_alpha_by_hand():
    # two judges, items aa, ab, bb; without each of them alpha is 0 (ab, bb: 1 - 3 * 2 / (2 * 3)),
    # 1, 0; with all 4/9 se^2 = 2/3 (1/9 + 4/9 + 1/9) = 4/9; on (1 + alpha) / 2: p = 13/18, se =
    # 1/3, N = (65/324) / (1/9) = 65/36 t(.975, 2)^2 = 18.512821, over N: 10.253255; (.722222 +
    # 5.126627 +- sqrt(2.057060 + 26.282306)) / 11.253255
    ratings = {1: {"x": "a", "y": "a"}, 2: {"x": "a", "y": "b"}, 3: {"x": "b", "y": "b"}}
    alpha, low, high = alpha_interval(ratings)
    assert alpha == pytest.approx(4 / 9, abs=1e-12)
    assert (low, high) == pytest.approx((2 * 0.0466873 - 1, 2 * 0.9928075 - 1), abs=1e-6)


def test_perfect_agreement_on_a_few_items_is_not_certainty():
    # 20 items: (1 + alpha) / 2 from 1 / (1 + t(.975, 19)^2 / 20) = .820319, as of a share
    ratings = {i: {"x": "ab"[i % 2], "y": "ab"[i % 2]} for i in range(20)}
    assert alpha_interval(ratings) == pytest.approx((1.0, 2 * 0.820319 - 1, 1.0), abs=1e-6)
    # one b alone decides whether there is an alpha at all: without that item there is none, so
    # there is no interval
    assert all(
        map(math.isnan, alpha_interval({i: {"x": "a", "y": "ab"[i == 0]} for i in range(9)})[1:])
    )


def test_the_interval_of_alpha_holds_with_twenty_items():
    # two people right in 80 %, a coin decides else: 1000 crowds, standard error .7 %; percentiles
    # held 92.6 % of them
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        truth = rng.integers(0, 2, 20)[:, None]
        said = np.where(rng.random((20, 2)) < 0.8, truth, rng.integers(0, 2, (20, 2)))
        _, low, high = alpha_interval(
            {i: {"x": int(x), "y": int(y)} for i, (x, y) in enumerate(said)}
        )
        held += low <= 0.64 <= high  # 1 - P(differ) / .5, P(differ) = (1 - .8^2) / 2 = .18
    assert 0.94 <= held / 1000 <= 1.0


def test_kappa_by_hand_and_equal_to_the_reference_library():
    # 1 of 4 equal: p_o = 1/4; x says a thrice, y twice: p_e = 3/4 * 1/2 + 1/4 * 1/2 = 1/2, so kappa
    # = -1/2
    x, y = dict(enumerate("aaab")), dict(enumerate("abba")) | {9: "a"}
    assert kappa_interval(x, y)[0] == pytest.approx(-0.5, abs=1e-12)
    rng = random.Random(1)
    one = {i: rng.choice(["a", "b", "tie"]) for i in range(80)}
    other = {
        i: value if rng.random() < 0.6 else rng.choice(["a", "b", "tie"])
        for i, value in one.items()
    }
    expected = cohen_kappa_score(list(one.values()), list(other.values()))
    assert kappa_interval(one, other)[0] == pytest.approx(expected, abs=1e-12)
    kappa, low, high = kappa_interval(one, other)
    assert low < kappa < high
    assert math.isnan(kappa_interval({1: "a"}, {2: "a"})[0]) and math.isnan(
        kappa_interval({1: "a"}, {1: "a"})[0]
    )


def test_pairwise_kappas_are_over_common_items():
    ratings = {1: {"x": "a", "y": "a", "z": "b"}, 2: {"x": "b", "y": "b"}, 3: {"w": "a"}}
    found = {(k["one"], k["other"]): (k["kappa"], k["pairs"]) for k in pairwise_kappas(ratings)}
    assert found["x", "y"] == (1.0, 2)
    assert found["x", "z"][1] == 1 and set(found) == {("x", "y"), ("x", "z"), ("y", "z")}


def test_ratings_leave_skips_out_and_carry_the_strength():
    votes = votes_of(
        [
            (1, "x", "a", {"strength": 3}),
            (1, "y", "b"),
            (2, "x", "tie"),
            (2, "y", "skip"),
            (3, "x", "both_bad"),
        ]
    )
    assert ratings_of(votes) == {1: {"x": "a", "y": "b"}, 2: {"x": "tie"}, 3: {"x": "both_bad"}}
    assert ratings_of(votes, "ordinal") == {1: {"x": 3, "y": -1}, 2: {"x": 0}, 3: {"x": 0}}


@pytest.mark.parametrize(("count", "n"), [(0, 5), (7, 10), (70, 100), (40, 40)])
def test_shares_equal_the_reference_library(count, n):
    expected = binomtest(count, n).proportion_ci(method="wilson")
    assert wilson(count, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert fair_coin_p(count, n) == pytest.approx(binomtest(count, n).pvalue, rel=1e-9)


def test_an_empty_share_is_not_a_number():
    assert math.isnan(Share(0, 0).estimate) and math.isnan(fair_coin_p(0, 0))


def test_reliability_by_hand():
    votes = votes_of(
        [
            (1, "x", "a", {"left": "a", "duration_ms": 500}),
            (1, "y", "a", {"left": "b", "duration_ms": 4000}),
            (1, "z", "b", {"left": "b", "duration_ms": 2500}),
            (2, "x", "b", {"left": "b", "duration_ms": 3000}),
            (2, "y", "tie", {"left": "a", "duration_ms": 9000}),
            (2, "z", "skip", {"left": "a", "duration_ms": 9000}),
            (9, "x", "a", {"left": "a", "duration_ms": 3000}),
            (9, "y", "b", {"left": "a", "duration_ms": 3000}),
        ]
    )
    x, y, z = annotator_reliability(votes, controls={9: "a"}, words={1: 45})
    # pair 1: y agrees with x, z does not: 1/2; pair 2: y said tie: 0. Controls count nowhere else
    assert (x.rest.count, x.rest.n) == (0.5, 2) and (y.rest.count, z.rest.count) == (0.5, 0.0)
    assert (x.controls.count, x.controls.n, y.controls.count) == (1, 1, 0)
    assert (x.left.count, x.left.n, y.left.count, y.left.n) == (3, 3, 0, 2)
    # 45 words at 15 a second take 3 s: too fast for x (0.5 s) and z (2.5 s) on pair 1; elsewhere a
    # second is enough
    assert [(p.fast.count, p.fast.n) for p in (x, y, z)] == [(1, 3), (0, 3), (1, 2)]
    assert (x.seconds, y.votes, z.choices) == (3.0, 3, {"b": 1, "skip": 1})


def crowd(honest=4, pairs=300, seed=0, accuracy=0.85, **others):
    """Votes of honest annotators and of `others` (name -> function(truth, left, rng) -> choice) on
    the same pairs.
    """
    rng = random.Random(seed)
    rows = []
    for pair in range(pairs):
        truth = rng.choice("ab")
        wrong = "b" if truth == "a" else "a"
        for j in range(honest):
            left = rng.choice("ab")
            rows.append(
                (pair, f"honest {j}", truth if rng.random() < accuracy else wrong, {"left": left})
            )
        for name, vote in others.items():
            left = rng.choice("ab")
            rows.append((pair, name, vote(truth, left, rng), {"left": left}))
    return votes_of(rows)


def test_a_careless_and_a_side_biased_annotator_are_found_and_nobody_else():
    votes = crowd(
        careless=lambda truth, left, rng: rng.choice("ab"),
        leftist=lambda truth, left, rng: left if rng.random() < 0.4 else truth,
    )
    people = {p.annotator: p for p in annotator_reliability(votes)}
    assert any("agrees less" in flag for flag in people["careless"].flags)
    assert any("left side" in flag for flag in people["leftist"].flags)
    assert all(people[f"honest {j}"].flags == [] for j in range(4))
    # the planted accuracies: 0.85, 0.5, and 0.4 / 2 + 0.6 = 0.8
    assert people["honest 0"].skill == pytest.approx(0.85, abs=0.05)
    assert people["careless"].skill == pytest.approx(0.5, abs=0.08)
    assert people["leftist"].skill == pytest.approx(0.8, abs=0.06)


def test_control_pairs_catch_someone_alone():
    votes = votes_of([(i, "alone", "ab"[i % 2]) for i in range(40)])
    (person,) = annotator_reliability(votes, controls=dict.fromkeys(range(40), "a"))
    assert person.flags == ["fails control pairs (20 of 40 right)"]


def test_honest_annotators_are_rarely_flagged():
    flagged = sum(
        bool(p.flags)
        for seed in range(20)
        for p in annotator_reliability(crowd(pairs=100, seed=seed))
    )
    assert flagged <= 6  # of 80, at one in a hundred for each of two questions


def test_the_summary_is_json():
    summary = agreement_summary(
        crowd(honest=2, pairs=20) + votes_of([(99, "new", "skip")]), controls={0: "a"}
    )
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["pairs"] == summary["pairs_judged_twice"] == 19 and summary["votes"] == 39
    assert summary["alpha"]["nominal"]["low"] < summary["alpha"]["nominal"]["estimate"]
    new = next(p for p in summary["annotators"] if p["annotator"] == "new")
    assert new["skill"] is None and new["left"]["estimate"] is None and new["flags"] == []
