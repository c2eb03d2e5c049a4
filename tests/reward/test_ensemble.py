import math

import pytest

from reward.compose import build_scorer
from reward.ensemble import combine, ensemble_scorer, member_names, spread
from reward.specs import ModelSpec
from rlhf.data.records import BadScore, Samples, Scores

# three members, two samples: sample 0 (1, 2, 6), sample 1 (2, 2, 2)
# mean 3, 2; min 1, 2; variance (4 + 1 + 9) / 3 = 14/3 and 0
MEMBERS = [[1.0, 2.0], [2.0, 2.0], [6.0, 2.0]]


def samples(n):
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(n)]
    return Samples(
        prompts, ["answer"] * n, [[1]] * n, [[2]] * n, [True] * n, [{} for _ in range(n)]
    )


def test_mean():
    assert combine(MEMBERS, "mean") == pytest.approx([3.0, 2.0], abs=1e-6)


def test_worst_case_is_the_least_member_of_each_sample():
    assert combine(MEMBERS, "worst") == [1.0, 2.0]
    assert combine([[1.0, 5.0], [4.0, -3.0]], "worst") == [1.0, -3.0]


def test_uncertainty_takes_the_variance_off_the_mean():
    # 3 - 0.5 * 14/3 = 2/3; agreement costs nothing
    assert combine(MEMBERS, "uncertainty", 0.5) == pytest.approx([2 / 3, 2.0], abs=1e-6)
    assert combine(MEMBERS, "uncertainty", 0.0) == pytest.approx(combine(MEMBERS, "mean"), abs=1e-6)


def test_spread_is_the_standard_deviation_over_k():
    assert spread(MEMBERS) == pytest.approx([math.sqrt(14 / 3), 0.0], abs=1e-6)


def test_members_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        combine([[1.0, 2.0], [1.0]], "mean")


def test_the_breakdown_holds_each_member_and_the_spread():
    members = {name: (lambda s, v=v: Scores(v)) for name, v in zip("abc", MEMBERS, strict=True)}
    scores = ensemble_scorer(members, "uncertainty", 0.5)(samples(2))
    assert scores.total == pytest.approx([2 / 3, 2.0], abs=1e-6)
    assert list(scores.breakdown) == ["a", "b", "c", "spread"]
    assert scores.breakdown["c"] == [6.0, 2.0]
    assert scores.breakdown["spread"] == pytest.approx([math.sqrt(14 / 3), 0.0], abs=1e-6)


def test_names_are_the_shortest_tails_that_differ():
    assert member_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert member_names(["s0/reward", "s1/reward"]) == ["s0-reward", "s1-reward"]
    assert member_names(["runs/a", "runs/spread"]) == ["runs-a", "runs-spread"]  # 'spread' is taken
    with pytest.raises(ValueError, match="twice"):
        member_names(["runs/a", "runs/a"])


def table(scores):
    """A `model` builder whose reward models return these, by folder; it keeps what it was called
    with.
    """
    calls = []

    def build(spec, tokenizer):
        calls.append((spec.model, spec.name, spec.dtype, tokenizer))
        return lambda s: scores[spec.model]

    return build, calls


def test_members_are_made_by_the_builder_of_models():
    # worst of (1, 4) and (3, 2) is (1, 2); times 2, plus the model itself: (1, 4)
    build, calls = table({"runs/a": [1.0, 4.0], "runs/b": [3.0, 2.0]})
    specs = [
        {"ensemble": ["runs/a", "runs/b"], "how": "worst", "weight": 2, "dtype": "bfloat16"},
        {"model": "runs/a", "weight": 1},
    ]
    scores = build_scorer(specs, "tokenizer", {ModelSpec: build})(samples(2))
    assert scores.total == pytest.approx([3.0, 8.0], abs=1e-6)
    assert scores.breakdown == {
        "ensemble": [1.0, 2.0],
        "ensemble/a": [1.0, 4.0],
        "ensemble/b": [3.0, 2.0],
        "ensemble/spread": [1.0, 1.0],
        "a": [1.0, 4.0],
    }
    assert calls == [
        ("runs/a", "ensemble/a", "bfloat16", "tokenizer"),
        ("runs/b", "ensemble/b", "bfloat16", "tokenizer"),
        ("runs/a", "a", "float32", "tokenizer"),
    ]


def test_a_member_that_fails_is_named():
    build, _ = table({"runs/a": [1.0, 4.0], "runs/b": [3.0, math.nan]})
    with pytest.raises(BadScore, match="scorer 'ensemble/b' returned nan for sample 1") as caught:
        build_scorer([{"ensemble": ["runs/a", "runs/b"]}], builders={ModelSpec: build})(samples(2))
    assert (caught.value.scorer, caught.value.index) == ("ensemble/b", 1)
