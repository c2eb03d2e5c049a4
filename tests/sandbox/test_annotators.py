"""Simulated annotators: probabilities worked by hand, habits that show, and votes that can be
repeated.
"""

import math
import random

import pytest

from rlhf.config import parse
from rlhf.data.load import load
from rlhf.data.records import Preference, Scores
from rlhf.data.store import Store
from rlhf.errors import UserError
from rlhf.sandbox.annotators import (
    ANNOTATORS,
    AnnotateConfig,
    Annotator,
    annotate,
    choose,
    preference_logit,
    sigmoid,
    strength_of,
)

PLAIN = Annotator("plain", ties=0.0, skips=0.0, strict=-1.0)


def shares(annotator, gold, words=(10, 10), left="a", noise=0.5, n=4000):
    rng = random.Random(0)
    found = [choose(annotator, gold, words, left, noise, rng).choice for _ in range(n)]
    return {c: found.count(c) / n for c in ("a", "b", "tie", "both_bad", "skip")}


def test_logit_by_hand():
    # (0.9 - 0.4) / 0.25 = 2; ten words more at 0.8 = 0.8; b on the left at 0.6 = -0.6; together 2.2
    annotator = Annotator("x", length_bias=0.8, side_bias=0.6)
    assert preference_logit(annotator, (0.9, 0.4), (25, 15), "b", 0.25) == pytest.approx(
        2.2, abs=1e-12
    )
    assert preference_logit(PLAIN, (0.9, 0.4), (25, 15), "b", 0.25) == pytest.approx(2.0, abs=1e-12)


def test_choices_follow_bradley_terry():
    # logit 0.5 / 0.5 = 1: sigmoid(1) = 0.731058579; three standard errors at n = 4000 are 0.021
    assert sigmoid(1.0) == pytest.approx(0.7310585786, abs=1e-9)
    assert sigmoid(-800.0) == 0.0 and sigmoid(800.0) == 1.0
    found = shares(PLAIN, (0.8, 0.3))
    assert found["a"] == pytest.approx(0.7311, abs=0.021)
    assert found["a"] + found["b"] == pytest.approx(1.0)
    assert shares(PLAIN, (0.3, 0.8))["b"] == pytest.approx(0.7311, abs=0.021)


def test_ties_are_the_share_between_the_thresholds():
    # equal gold, half width 0.5: p(tie) = 1 - 2 sigmoid(-0.5) = 1 - 2 * 0.377540669 = 0.244918662
    tying = Annotator("x", ties=0.5, skips=0.0, strict=-1.0)
    assert shares(tying, (0.5, 0.5))["tie"] == pytest.approx(0.2449, abs=0.021)


def test_habits_show():
    length = Annotator("x", length_bias=1.0, ties=0.0, skips=0.0)
    side = Annotator("x", side_bias=1.0, ties=0.0, skips=0.0)
    careless = Annotator("x", careless=0.5, ties=0.0, skips=0.0)
    skipping = Annotator("x", skips=0.2)
    assert shares(length, (0.5, 0.5), words=(20, 10))["a"] == pytest.approx(0.7311, abs=0.021)
    assert shares(side, (0.5, 0.5), left="b")["b"] == pytest.approx(0.7311, abs=0.021)
    assert shares(careless, (1.0, 0.0), noise=0.01)["b"] == pytest.approx(0.25, abs=0.021)
    assert shares(skipping, (1.0, 0.0))["skip"] == pytest.approx(0.2, abs=0.02)
    assert shares(Annotator("x", strict=0.3, skips=0.0), (0.2, 0.1))["both_bad"] == 1.0


def test_strength_grows_with_the_difference():
    assert [strength_of(x) for x in (-0.5, 0.99, 1.0, 2.99, 3.0)] == [1, 1, 2, 2, 3]


@pytest.fixture
def store(tmp_path):
    """200 comparisons; the gold of a response is the number it ends with."""
    path = tmp_path / "votes.db"
    rng = random.Random(0)
    with Store.open(path, create=True) as opened, opened.transaction():
        for i in range(200):
            prompt = opened.add_prompt(
                [{"role": "user", "content": f"question {i}"}], metadata={"i": i}
            )
            x, y = round(rng.random(), 3), round(rng.random(), 3)
            one, other = (
                opened.add_response(prompt, f"answer {g}", ended=True) for g in (x, y + 1e-4)
            )
            opened.add_comparison(one, other)
    return path


def gold(samples):
    assert all(m["i"] >= 0 and m["group"] for m in samples.metadata) and all(samples.ended)
    return Scores([float(text.split()[1]) for text in samples.responses])


def standing(path):
    with Store.open(path) as opened:
        return [
            (v.comparison, v.annotator, v.choice, v.left, v.strength, v.duration_ms)
            for v in opened.at().votes()
        ]


def test_votes_agree_with_gold_as_the_noise_says_and_are_recorded(store, capsys):
    report = annotate(AnnotateConfig(store=str(store), noise=0.02, habits=False), gold)
    votes = standing(store)
    assert len(votes) == report["all"]["votes"] == report["comparisons"] == 200
    assert report["all"]["agreement"] > 0.9
    assert {v[1] for v in votes} == {a.name for a in ANNOTATORS} and {v[3] for v in votes} == {
        "a",
        "b",
    }
    assert all(v[5] > 0 for v in votes)
    said = capsys.readouterr().out
    assert "200 new votes" in said and "sim-careless" in said
    with Store.open(store) as opened:
        right = sum(
            float(p.chosen.split()[1]) > float(p.rejected.split()[1])
            for p in opened.at().preferences()
        )
    assert right / 200 == pytest.approx(report["all"]["agreement"])


def test_great_noise_is_a_coin(store):
    report = annotate(AnnotateConfig(store=str(store), noise=1e6, habits=False), gold)
    assert report["all"]["agreement"] == pytest.approx(0.5, abs=0.11)  # three standard errors


def test_same_seed_same_votes_and_a_second_call_adds_nothing(store, tmp_path):
    copy = tmp_path / "copy.db"
    copy.write_bytes(store.read_bytes())
    other = tmp_path / "other.db"
    other.write_bytes(store.read_bytes())
    annotate(AnnotateConfig(store=str(store), seed=1), gold)
    annotate(AnnotateConfig(store=str(store), seed=1), gold)
    annotate(AnnotateConfig(store=str(copy), seed=1), gold)
    annotate(AnnotateConfig(store=str(other), seed=2), gold)
    assert len(standing(store)) == 200
    assert standing(store) == standing(copy) != standing(other)


def test_more_votes_a_pair_come_from_other_annotators(store):
    annotate(AnnotateConfig(store=str(store), votes_per_pair=1), gold)
    report = annotate(AnnotateConfig(store=str(store), votes_per_pair=3), gold)
    votes = standing(store)
    assert len(votes) == len({v[:2] for v in votes}) == 600
    assert report["all"]["votes"] == 600 and not math.isnan(report["all"]["agreement"])


def test_nothing_to_judge_and_bad_options_are_said(tmp_path):
    Store.open(tmp_path / "empty.db", create=True).close()
    with pytest.raises(UserError, match="has no comparisons"):
        annotate(AnnotateConfig(store=str(tmp_path / "empty.db")), gold)
    for bad in (["--noise", "0"], ["--votes_per_pair", "9"]):
        with pytest.raises(UserError, match=bad[0].removeprefix("--")):
            parse(AnnotateConfig, ["--store", "x", *bad])


def test_agreement_is_measured_on_held_out_pairs_and_training_sees_nothing_of_it(
    store, tmp_path, capsys
):
    alone = tmp_path / "alone.db"
    alone.write_bytes(store.read_bytes())
    annotate(AnnotateConfig(store=str(alone)), gold)
    report = annotate(AnnotateConfig(store=str(store), judged_by_all=100), gold)
    before, after = (load(str(path), Preference, split="train") for path in (alone, store))
    assert len(before) > 100
    assert [(r.chosen, r.metadata) for r in before] == [(r.chosen, r.metadata) for r in after]
    held_out = {
        r.metadata["vote"]["comparison"] for r in load(str(store), Preference, split="validation")
    }
    votes = standing(store)
    several = {v[0] for v in votes if sum(w[0] == v[0] for w in votes) > 1}
    assert held_out <= several and len(votes) == 200 + 4 * len(several)
    assert report["between"]["pairs_judged_twice"] == len(several) > 0
    assert {p["annotator"] for p in report["between"]["annotators"]} == {a.name for a in ANNOTATORS}
    said = capsys.readouterr().out
    assert "judged by all" in said and "Krippendorff's alpha" in said  # fewer than 100 are held out
    annotate(AnnotateConfig(store=str(store), judged_by_all=100), gold)
    assert standing(store) == votes
