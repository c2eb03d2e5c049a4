"""Each reason of the verdict, on cards that are alike but for it."""

import copy

import pytest

from reward.cards.verdict import CARE, NOT, SENTENCES, USE, verdict


def interval(low, high, name="accuracy", **more):
    return {name: (low + high) / 2, "low": low, "high": high, "n": 50, "pairs": 80, **more}


LENGTH = {"correlation": 0.1, "gap_correlation": None, "baseline": {"rule": "longer", "accuracy": 0.6}}  # fmt: skip
GOOD = {
    "accuracy": interval(0.7, 0.8),
    "length": LENGTH,
    "baselines": {
        "length": {
            "rule": "the longer",
            "accuracy": interval(0.5, 0.7),
            "difference": interval(0.05, 0.2, "mean"),
        }
    },
    "on_policy": {"accuracy": interval(0.7, 0.8), "difference": interval(-0.1, 0.1, "mean")},
    "bias": [],
    "ceiling": {"agreement": interval(0.7, 0.8)},
}


def with_(path, value):
    card = copy.deepcopy(GOOD)
    *inner, last = path
    part = card
    for key in inner:
        part = part[key]
    part[last] = value
    return card


BIAS = {"effect": 0.4, "low": 0.2, "high": 0.6, "p": 1e-4, "n": 50, "beyond": "gold", "share": 0.2}
CASES = [
    (("accuracy",), interval(0.45, 0.6), "guessing", NOT),
    (("accuracy",), interval(0.3, 0.4), "guessing", NOT),
    (("accuracy",), {"accuracy": 1.0, "low": None, "high": None, "n": 1, "pairs": 9},
     "accuracy_unknown", NOT),
    (("length", "correlation"), -0.8, "length_detector", NOT),
    (("baselines", "length", "difference"), interval(-0.2, -0.05, "mean"), "baseline_better", NOT),
    (("baselines", "length", "difference"), interval(-0.05, 0.1, "mean"), "baseline_not_beaten", CARE),
    (("on_policy", "accuracy"), interval(0.48, 0.6), "on_policy_guessing", NOT),
    (("on_policy", "difference"), interval(-0.2, -0.05, "mean"), "on_policy_lower", CARE),
    (("on_policy",), None, "on_policy_unknown", CARE),
    (("on_policy", "accuracy"), {"accuracy": 1.0, "low": None, "high": None, "n": 1, "pairs": 9},
     "on_policy_unknown", CARE),
    (("bias",), [{"kind": "labels_length", "found": True, **BIAS}], "labels_length", CARE),
    (("bias",), [{"kind": "labels_position", "found": True, **BIAS}], "labels_position", CARE),
    (("bias",), [{"kind": "score_length", "found": True, **BIAS}], "score_length", CARE),
    (("bias",), [{"kind": "score_overuse", "found": True, **BIAS}], "score_overuse", CARE),
    (("by_source",), {"a": interval(0.1, 0.4, surely_wrong=True)}, "slice_wrong", CARE),
    (("ceiling", "agreement"), interval(0.5, 0.58), "people_disagree", CARE),
]  # fmt: skip


def test_a_card_without_a_fault_says_use_it():
    assert verdict(GOOD) == {"verdict": USE, "reasons": []}


@pytest.mark.parametrize(("path", "value", "kind", "severity"), CASES)
def test_each_fault_is_one_reason(path, value, kind, severity):
    found = verdict(with_(path, value))
    assert [(r["kind"], r["severity"]) for r in found["reasons"]] == [(kind, severity)]
    assert found["verdict"] == severity
    assert "{" not in found["reasons"][0]["sentence"]


def test_every_kind_of_reason_has_a_case():
    assert {case[2] for case in CASES} == set(SENTENCES)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("bias",), [{"kind": "score_length", "found": False, **BIAS}]),
        (("by_source",), {"a": interval(0.1, 0.4, surely_wrong=False)}),
        (("on_policy", "difference"), interval(-0.2, 0.01, "mean")),
        (("ceiling",), None),
    ],
)
def test_what_is_not_sure_is_no_reason(path, value):
    assert verdict(with_(path, value))["verdict"] == USE


def test_the_gravest_reason_comes_first_and_decides():
    card = with_(("on_policy",), None)
    card["length"]["correlation"] = 0.9
    # a bias of length is part of being a length detector
    card["bias"] = [{"kind": "score_length", "found": True, **BIAS}]
    found = verdict(card)
    assert found["verdict"] == NOT
    assert [r["kind"] for r in found["reasons"]] == ["length_detector", "on_policy_unknown"]
