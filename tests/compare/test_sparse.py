"""Experiments that lack something: a proxy, a judge, methods, strengths, seeds. Each gets its whole
report.
"""

from dataclasses import replace
from functools import partial

import pytest

from rlhf.compare.summary import summarise
from rlhf.report.figures import draw
from rlhf.report.files import html_page
from rlhf.report.markdown import markdown
from rlhf.report.sentences import headline, report_sentences, verdict_sentence
from rlhf.report.wandb_tables import rows_of
from tests.compare import results_example
from tests.compare.results_example import STRENGTHS, flat

make = partial(results_example.make, groups=8)
BOTH = {"ppo": lambda d: 0.2 * d, "dpo": flat}
ALL = {(m, s, seed) for m, values in STRENGTHS.items() for s in values for seed in range(5)}


def without_scores(results, *names):
    """The results as if these scores had never been asked for."""
    gone = {f"score/{name}" for name in names}
    points = [
        replace(p, values={n: v for n, v in p.values.items() if n not in gone})
        for p in results.points
    ]
    kinds = {name: kind for name, kind in results.score_kinds.items() if name not in names}
    judge = results.judge if results.judge in kinds else None
    return replace(results, points=points, score_kinds=kinds, judge=judge)


def best_of_n(results):
    """No method that trains anything: the baseline alone."""
    points = [replace(p, method="best_of_n") if p.method == "ppo" else p for p in results.points]
    methods = {
        "sft": results.methods["sft"],
        "best_of_n": results.methods["ppo"] | {"swept": "n", "baseline": True},
    }
    return replace(results, points=points, methods=methods)


CASES = {
    "no proxy": lambda: without_scores(make(BOTH), "reward"),
    "no proxy, one method": lambda: without_scores(make({"dpo": flat}), "reward"),
    "no proxy, one method, one strength": lambda: without_scores(
        make({"dpo": flat}, without={t for t in ALL if t[1] != 0.3}), "reward"
    ),
    "no judge": lambda: replace(make(BOTH), judge=None),
    "no judge and no proxy": lambda: without_scores(make(BOTH), "gold", "reward"),
    "no judge, no proxy, one seed": lambda: without_scores(make(BOTH, seeds=1), "gold", "reward"),
    "one method": lambda: make({"ppo": flat}),
    "one strength": lambda: make(BOTH, without={t for t in ALL if t[1] not in (0.1, 0.3)}),
    "one seed": lambda: make(BOTH, seeds=1),
    "one seed, one strength, one method": lambda: make(
        {"dpo": flat}, seeds=1, without={t for t in ALL if t[1] != 0.3}
    ),
    "a method that has not begun": lambda: make(BOTH, without={t for t in ALL if t[0] == "dpo"}),
    "no seed in common": lambda: make(
        BOTH, seeds=2, without={t for t in ALL if (t[0] == "dpo") == (t[2] == 0)}
    ),
    "a baseline alone": lambda: best_of_n(make({"ppo": flat})),
    "matched, nothing spent": lambda: make(
        BOTH,
        budget={"match": "flops", "total": 100, "tolerance": 0.1},
        spent={"ppo": {}, "dpo": {}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_report_is_whole_whatever_is_missing(name):
    report = summarise(CASES[name]())
    said = [
        headline(report),
        *(verdict_sentence(v, report) for v in report["verdicts"]),
        *report_sentences(report),
    ]
    for line in said:
        assert line == line.strip() and line.endswith((".", ")")), line
        for slip in ("  ", "()", " ,", " .", "None", "nan", " by .", "and and"):
            assert slip not in line, line
    assert said[-1].startswith(("Intervals are", "All of this holds"))
    assert html_page(markdown(report), {}) and rows_of(report)["frontier"]


@pytest.mark.parametrize("name", ["no proxy, one method, one strength", "no judge and no proxy"])
def test_figures_too(name, tmp_path):
    report = summarise(CASES[name]())
    figures = draw(report, tmp_path)
    assert "cost" in figures and ("frontier" in figures) == (report["judge"] is not None)
    text = markdown(report, figures)
    assert all(f"({name}.svg)" in text for name in figures)


def test_without_a_proxy_nothing_is_said_of_one():
    first = report_sentences(summarise(CASES["no proxy"]()))[0]
    assert "gold score" in first and "learnt from" not in first
