"""What a report card comes to: use the reward model, use it with care, or do not, and why.

Do not use it:
  accuracy_unknown, guessing  the interval of the accuracy reaches 0.5, or there is none: what is
                      learnt from noise is noise
  length_detector     length explains half of the variance of scores or of score gaps: the policy
                      would learn length
  baseline_better     a rule (the longer, the first, a bag of words) is surely the better judge
  on_policy_guessing  the same as guessing, on answers of the policy that RL starts from

With care:
  baseline_not_beaten the model is not surely better than a rule, which is cheaper
  on_policy_lower     it is surely less right on the policy's answers than on the held-out pairs
  on_policy_unknown   nobody has measured that, and RL asks about the policy's answers alone
  labels_*, score_*   a test of reward/cards/bias.py has found a bias: RL finds what a score gives away
  slice_wrong         it is surely below 0.5 on a source, annotator, category, margin or length
  people_disagree     two people surely agree in less than 0.6 of the pairs: mostly noise

"Surely" is by a 95 % interval; over the slices together by Bonferroni. Calibration does not count:
PPO reads scores, not probabilities.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

USE, CARE, NOT = "use it", "with care", "do not use it"
# a correlation by which length explains half of the variance
LENGTH_DETECTOR = math.sqrt(0.5)
# two people who agree this rarely leave a model little to learn: of ten labels one more than by
# chance is explained
AGREEMENT = 0.6
SLICES = {
    "by_source": "source",
    "by_annotator": "annotator",
    "by_category": "category",
    "by_margin": "margin",
    "by_length_difference": "length difference",
}

# one sentence for each kind and severity, filled from the reason
SENTENCES = {
    "accuracy_unknown": "{n} group of held-out pairs: too few to know its accuracy",
    "guessing": (
        "its accuracy on held-out pairs is {accuracy:.3f} ({low:.3f} to {high:.3f}), which {finding}: what is learnt "
        "from it is noise. Inspect the pairs and train it again"
    ),
    "length_detector": (
        "its {what} go with length (correlation {correlation:+.2f}; 'the {rule} is better' alone is right in "
        "{accuracy:.2f} of the pairs): the policy learns length. Balance the pairs, or set length_penalty"
    ),
    "baseline_better": (
        "{rule} is right in {accuracy:.3f} of the pairs, {shortfall:.3f} more than the model ({less_low:.3f} to "
        "{less_high:.3f}): the rule is the better judge. Train on more or other pairs"
    ),
    "baseline_not_beaten": (
        "it is not shown to beat {rule}, right in {accuracy:.3f} of the pairs: difference {mean:+.3f} ({low:+.3f} to "
        "{high:+.3f})"
    ),
    "on_policy_guessing": (
        "on the policy's own answers its accuracy is {accuracy:.3f} ({low:.3f} to {high:.3f}), which cannot be told "
        "from guessing: RL would learn noise. Train it on pairs of this policy"
    ),
    "on_policy_lower": (
        "on the policy's own answers it is right in {accuracy:.3f}, {shortfall:.3f} less than on held-out pairs "
        "({less_low:.3f} to {less_high:.3f}). Train it on pairs of this policy too"
    ),
    "on_policy_unknown": (
        "nobody knows its accuracy on answers of the policy that RL starts from. Measure it: rlhf collect sample, "
        "then rlhf reward card RUN --on_policy STORE"
    ),
    "labels_length": (
        "people give the longer of two answers {effect:+.2f} log-odds for each ten tokens, gold alike (p = {p:.1g}): "
        "the labels are biased, and so is what is learnt from them"
    ),
    "labels_position": (
        "people give the answer shown first {effect:+.2f} log-odds beyond {beyond} (p = {p:.1g}): show the sides in "
        "random order, which makes this noise, and look at the annotators"
    ),
    "score_length": (
        "its score rises by {effect:+.2f} for each ten tokens, gold alike (p = {p:.1g}), which is {share:.0%} of what "
        "gold leaves open: RL will change the length. Balance the pairs, or set length_penalty"
    ),
    "score_overuse": (
        "it gives longer answers {effect:+.2f} log-odds for each ten tokens more than people do (p = {p:.1g}): RL will "
        "change the length. Balance the pairs, or set length_penalty"
    ),
    "slice_wrong": (
        "on {field} {name} it is right in {accuracy:.3f} ({low:.3f} to {high:.3f}): worse than guessing there"
    ),
    "people_disagree": (
        "two people agree in {accuracy:.3f} of the pairs ({low:.3f} to {high:.3f}): the labels are mostly noise"
    ),
}


def verdict(card: dict[str, Any]) -> dict[str, Any]:
    """Return {"verdict", "reasons"} of a card; a reason is {"kind", "severity", numbers,
    "sentence"}, the gravest first.

    Sections that a card lacks give no reason.
    """
    reasons = [
        *_of_accuracy(card),
        *_of_baselines(card),
        *_of_the_policy(card.get("on_policy")),
        *_of_bias(card.get("bias", [])),
        *_of_slices(card),
        *_of_people(card.get("ceiling")),
    ]
    kinds = {reason["kind"] for reason in reasons}
    # which says all that there is to say of length
    if "length_detector" in kinds:
        reasons = [reason for reason in reasons if not _is_about_length(reason)]
    for reason in reasons:
        reason["sentence"] = SENTENCES[reason["kind"]].format(**reason)
    reasons.sort(key=lambda reason: reason["severity"] != NOT)
    # the gravest stands first
    worst = reasons[0]["severity"] if reasons else USE
    return {"verdict": worst, "reasons": reasons}


def _is_about_length(reason: dict[str, Any]) -> bool:
    return (
        reason["kind"] in ("score_length", "score_overuse")
        or reason.get("field") == SLICES["by_length_difference"]
        or reason.get("name") == "length"
    )


def _reason(kind: str, severity: str, **numbers: Any) -> dict[str, Any]:
    return {"kind": kind, "severity": severity, **numbers}


def _of_accuracy(card: dict[str, Any]) -> Iterator[dict[str, Any]]:
    accuracy, length = card["accuracy"], card["length"]
    if accuracy["low"] is None:
        yield _reason("accuracy_unknown", NOT, n=accuracy["n"])
    elif accuracy["low"] <= 0.5:
        below = accuracy["high"] < 0.5
        finding = "is worse than guessing" if below else "cannot be told from guessing"
        yield _reason("guessing", NOT, **accuracy, finding=finding)

    # one reason for length, whichever of the two shows it
    what, r = _stronger_correlation(length)
    if abs(r) >= LENGTH_DETECTOR:
        yield _reason("length_detector", NOT, what=what, correlation=r, **length["baseline"])


def _stronger_correlation(length: dict[str, Any]) -> tuple[str, float]:
    correlations = {
        "scores": length["correlation"] or 0.0,
        "score gaps": length["gap_correlation"] or 0.0,
    }
    return max(correlations.items(), key=lambda item: abs(item[1]))


def _of_baselines(card: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    # a model that guesses has its reason already
    if card["accuracy"]["low"] is None:
        return found
    for name, baseline in card.get("baselines", {}).items():
        difference, accuracy = baseline["difference"], baseline["accuracy"]["accuracy"]
        if difference["low"] is None or difference["low"] > 0:
            continue
        numbers = {"name": name, "rule": baseline["rule"], "accuracy": accuracy}
        if difference["high"] < 0:
            found.append(_reason("baseline_better", NOT, **numbers, **_less(difference)))
        elif _is_better_than_chance(card):
            found.append(_reason("baseline_not_beaten", CARE, **(difference | numbers)))
    return found


def _is_better_than_chance(card: dict[str, Any]) -> bool:
    low = card["accuracy"]["low"]
    return low is not None and low > 0.5


def _less(difference: dict[str, Any]) -> dict[str, Any]:
    """Return a negative difference as a shortfall with its interval."""
    low, high = -difference["high"], -difference["low"]
    return {"shortfall": -difference["mean"], "less_low": low, "less_high": high}


def _of_the_policy(on_policy: dict[str, Any] | None) -> list[dict[str, Any]]:
    if on_policy is None:
        return [_reason("on_policy_unknown", CARE)]
    accuracy, difference = on_policy["accuracy"], on_policy.get("difference")
    # one group of prompts has no interval
    if accuracy["low"] is None:
        return [_reason("on_policy_unknown", CARE)]
    if accuracy["low"] <= 0.5:
        return [_reason("on_policy_guessing", NOT, **accuracy)]
    if difference and difference["high"] is not None and difference["high"] < 0:
        return [_reason("on_policy_lower", CARE, **accuracy, **_less(difference))]
    return []


def _of_bias(tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_reason(severity=CARE, **test) for test in tests if test["found"]]


def _of_slices(card: dict[str, Any]) -> Iterator[dict[str, Any]]:
    # a model that guesses is wrong by chance everywhere
    parts = SLICES if _is_better_than_chance(card) else {}
    for key, field in parts.items():
        for name, part in card.get(key, {}).items():
            if part.get("surely_wrong"):
                yield _reason("slice_wrong", CARE, field=field, name=name, **part)


def _of_people(people: dict[str, Any] | None) -> list[dict[str, Any]]:
    if people is None or people["agreement"]["high"] is None:
        return []
    if people["agreement"]["high"] >= AGREEMENT:
        return []
    return [_reason("people_disagree", CARE, **people["agreement"])]


def doubts(card: dict[str, Any]) -> list[str]:
    """Return what a card says against learning from its reward model, one sentence each; that
    something was not measured is no doubt.
    """
    sentences = []
    for reason in verdict(card)["reasons"]:
        if reason["kind"] != "on_policy_unknown":
            sentences.append(reason["sentence"])
    return sentences


def doubts_of(folder: str | Path) -> list[str]:
    """Return `doubts` of the card in a reward model's folder; a folder without a card is one. Empty
    for a Hub name.
    """
    path = Path(folder) / "card.json"
    # a model on the Hub comes without our card
    if not Path(folder).is_dir():
        return []
    if not path.is_file():
        return [
            "no report card (card.json) there, so nothing is known of its accuracy on held-out pairs"
        ]
    try:
        return doubts(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"card.json cannot be read as a report card ({error!r})"]
