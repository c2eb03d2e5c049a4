"""The figures: what they draw, that labels can be read, and that a report may lack any part."""

import copy
import math
import re
import struct

import numpy as np
import pytest
from matplotlib import rc_context

from rlhf.compare.summary import summarise
from rlhf.report.figure_style import INK, SETTINGS, paths_of, root, spans, style_of
from rlhf.report.figures import FIGURES, cost, draw, frontier, lengths, scores, training, wins
from rlhf.report.format import amount
from tests.compare.report_example import example, interval
from tests.compare.results_example import make

ALL = {"frontier", "proxy_gold", "wins", "time", "lengths", "cost"}
CURVES = {"ppo": lambda d: 0.5 * d - 0.06 * d * d, "dpo": lambda d: 0.5 * d - 0.11 * d * d}


@pytest.fixture(scope="module")
def report():
    return example()


@pytest.fixture(autouse=True)
def look():
    with rc_context(SETTINGS):
        yield


@pytest.fixture
def small():
    return less(example())


def less(report):
    """Two scores, two strengths of a method, two checkpoints of each: quicker to draw."""
    points = [
        p
        for p in report["points"]
        if p["step"] in (25, 100, 4, 8) and p["swept"] in (0.1, 0.05, 4, 8)
    ]
    return report | {"points": points, "score_kinds": {"gold": "gold", "reward_model": "proxy"}}


def drawn(report):
    return {name for name, function in FIGURES.items() if function(report) is not None}


def estimate(middle, low, high, p=None):
    return interval(middle) | {"low": low, "high": high, "p": p}


def test_six_figures_are_written_and_named(report, tmp_path):
    found = draw(report, tmp_path / "new")
    assert set(found) == ALL and all(path.parent == tmp_path / "new" for path in found.values())
    data = found["frontier"].read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", data[16:20])[0] == round(6.2 * 160)  # inches x dots per inch


def test_the_svg_has_the_ink_of_the_page_in_light_and_dark(report, tmp_path):
    text = draw(less(report), tmp_path)["frontier"].with_suffix(".svg").read_text()
    assert "prefers-color-scheme: dark" in text.replace(":dark", ": dark") and "var(--ink)" in text
    assert text.lower().count(INK) == 1  # its definition: everything drawn uses the variable
    assert not re.search(r"(?:href|src|url)\W+https?:", text)


def test_legends_name_methods_and_swept_values(report):
    figure = frontier(report)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "PPO (kl_coef 0.02 to 0.2)", "DPO (beta 0.05 to 1)", "best of n (n 2 to 16)", "SFT",
    ]  # fmt: skip
    legends = [axes.get_legend() for axes in training(report).axes[:2]]
    assert [legend.get_title().get_text() for legend in legends] == ["kl_coef", "beta"]
    # from near to far
    assert [t.get_text() for t in legends[0].get_texts()] == ["0.2", "0.1", "0.05", "0.02"]


def test_runs_are_dots_at_their_difference_in_standard_deviations():
    # sft: se 0.1 over 25 groups, sd 0.5; run a is 0.25 [0.1, 0.4] over it: 0.5 sd, from 0.2 to 0.8
    mean = {"mean": estimate(0.0, -0.2, 0.2) | {"se": 0.1, "groups": 25}, "difference": None}
    point = {"method": "a", "swept": None, "step": 0, "last": True, "kl": interval(1.0)}
    point["scores"] = {"gold": {"mean": None, "difference": estimate(0.25, 0.1, 0.4)}}
    report = {
        "kind": "runs", "score_kinds": {"gold": "gold"}, "points": [point],
        "initial_policy": {"method": "sft", "scores": {"gold": mean}}, "methods": {"a": {"baseline": False}},
    }  # fmt: skip
    axes = scores(report).axes[0]
    (dot,) = [line for line in axes.lines if line.get_marker() == "s"]
    assert dot.get_xdata() == pytest.approx([0.5])
    (bar,) = axes.collections[0].get_segments()
    assert bar[:, 0] == pytest.approx([0.2, 0.8])
    assert scores(report | {"kind": "experiment"}) is None


def test_bars_reach_from_the_estimate_to_its_bounds():
    # KL 4 [1, 9] -> d = 2, down to 1, up to 3; below 0 counts as 0; without bounds no bar
    middle, bars = spans(
        [estimate(4.0, 1.0, 9.0), estimate(1.0, -4.0, 4.0), interval(2.25), None], root
    )
    np.testing.assert_allclose(middle, [2.0, 1.0, 1.5, math.nan], atol=1e-12)
    np.testing.assert_allclose(
        bars, [[1.0, 1.0, math.nan, math.nan], [1.0, 1.0, math.nan, math.nan]], atol=1e-12
    )


def test_a_point_stands_at_the_root_of_its_kl_and_at_its_difference(report):
    report = copy.deepcopy(report)
    report["points"] = [p for p in report["points"] if p["method"] == "dpo"][:1]
    report["points"][0] |= {"kl": estimate(4.0, 1.0, 9.0), "swept": 0.3}
    report["points"][0]["scores"]["gold"]["difference"] = estimate(0.5, 0.4, 0.8)
    report["curves"], report["frontier"] = {}, []
    axes = frontier(report).axes[0]
    marks = [
        line.get_xydata().tolist()
        for line in axes.lines
        if line.get_marker() == style_of(report, "dpo").marker
    ]
    assert [[2.0, 0.5]] in marks
    ends = sorted(segment.tolist() for bars in axes.collections for segment in bars.get_segments())
    assert np.allclose(ends, [[[1.0, 0.5], [3.0, 0.5]], [[2.0, 0.4], [2.0, 0.8]]])


def test_the_seeds_lie_faintly_around_their_point(report):
    axes = frontier(report).axes[0]
    faint = [line for line in axes.lines if line.get_alpha() == 0.35]
    assert len(faint) == 16 + 16 + 4 and all(len(line.get_xdata()) == 5 for line in faint)
    point, base = (
        report["points"][0],
        report["initial_policy"]["scores"]["gold"]["mean"]["estimate"],
    )
    seed = point["per_seed"][2]
    found = next(line for line in faint if math.isclose(line.get_xdata()[2], math.sqrt(seed["kl"])))
    assert math.isclose(found.get_ydata()[2], seed["scores"]["gold"] - base)


def test_a_difference_is_full_where_it_is_shown_and_hollow_where_not(report):
    report = copy.deepcopy(report)
    for row, p in zip(report["frontier"][0]["rows"], (0.2, 0.049, 0.051, None), strict=True):
        row["p_adjusted"] = p
    panel = frontier(report).axes[1]
    marks = [line for line in panel.lines if line.get_markersize() == 7]
    assert [line.get_markerfacecolor() == "none" for line in marks] == [True, False, True, True]
    assert [round(float(line.get_xdata()[0]) ** 2, 9) for line in marks] == [1.0, 4.0, 9.0, 16.0]
    low, high = panel.get_ylim()
    assert low == -high  # 0 stands in the middle
    shaded = panel.patches[0]  # KL 0.8 to 20, in roots
    assert math.isclose(shaded.get_x(), 0.8**0.5) and math.isclose(
        shaded.get_width(), 20**0.5 - 0.8**0.5
    )


def test_without_a_judge_the_proxy_is_drawn_and_says_that_it_decides_nothing():
    figure = frontier(example(judge=None))
    assert len(figure.axes) == 1
    assert figure.axes[0].get_ylabel().startswith("reward_model (proxy)")


def test_the_win_matrix_has_its_numbers_and_no_verdict(report):
    report = copy.deepcopy(report)
    found = report["wins"]
    for kind in ("policies", "raw", "controlled"):
        found[kind] = found[kind][:3]
    for kind in ("raw", "controlled"):
        found[kind] = [row[:3] for row in found[kind]]
    shares = {(1, 0): 0.734, (2, 0): 0.251, (2, 1): None}
    for (i, j), share in shares.items():
        found["raw"][i][j] = None if share is None else estimate(share, None, None, 0.5)
        found["raw"][j][i] = None if share is None else estimate(1 - share, None, None, 0.5)
        found["controlled"][i][j] = found["controlled"][j][i] = (
            None if share is None else estimate(0.5, None, None, 0.9)
        )
    raw, held = wins(report).axes[:2]
    assert [t.get_text() for t in raw.texts] == ["27", "75", "73", "25"]
    assert {t.get_fontweight() for t in raw.texts} == {"normal"}
    assert {t.get_text() for t in held.texts} == {"50"}
    assert [t.get_text() for t in raw.get_yticklabels()] == [
        "SFT",
        "PPO (kl_coef 0.02)",
        "PPO (kl_coef 0.05)",
    ]
    low, middle, high = (raw.images[0].cmap(x)[:3] for x in (0.0, 0.5, 1.0))
    # orange, white, blue
    assert np.allclose(middle, 1.0, atol=0.01) and low[0] > low[2] and high[2] > high[0]


def test_costs_are_stacked_over_the_strengths_mean(report):
    report = copy.deepcopy(report)
    rows = report["budget"]["rows"] = [
        row for row in report["budget"]["rows"] if row["method"] == "ppo"
    ][:2]
    for row, own in zip(rows, (100.0, 300.0), strict=True):
        row["own"], row["reward"], row["pairs"] = {"flops": own}, {"flops": 40.0}, {}
        row["total"] = {"flops": own + 40.0}
    axes = cost(report).axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [
        (0.0, 200.0),
        (200.0, 40.0),
        (240.0, 0.0),
    ]
    assert [text.get_text() for text in axes.texts] == ["240"]


def test_strengths_go_from_near_to_far(report):
    assert [swept for swept, _ in paths_of(report, "dpo")] == [1.0, 0.3, 0.1, 0.05]
    assert [p["step"] for p in paths_of(report, "dpo")[0][1]] == [25, 50, 75, 100]


def test_every_method_has_a_look_of_its_own():
    report = {
        "methods": {name: {} for name in ("sft", *"abcdefg")},
        "initial_policy": {"method": "sft"},
    }
    looks = [style_of(report, name) for name in "abcdefg"]
    for part in ("color", "marker", "linestyle"):
        # readable without colours too
        assert len({getattr(look, part) for look in looks}) == 7, part


def test_a_dollar_in_a_name_is_no_mathematics(small):
    small["score_kinds"]["$to$ne_{$"] = "other"
    for point in small["points"]:
        point["scores"]["$to$ne_{$"] = point["scores"]["tone"]
    small["methods"]["ppo"]["swept"] = "$\\frac$"
    training(small).draw_without_rendering()


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        ({"wins": None}, {"wins"}),
        ({"frontier": [], "curves": {}}, set()),
        ({"budget": {"match": None, "rows": [], "matched": None}}, {"cost"}),
        ({"points": []}, ALL - {"wins", "cost"}),
        ({"score_kinds": {"gold": "gold", "tone": "other"}}, {"proxy_gold"}),
        ({"judge": None, "wins": None, "frontier": [], "curves": {}}, {"wins", "proxy_gold"}),
    ],
)
def test_a_report_may_lack_any_part(small, without, missing):
    report = small | without
    assert drawn(report) == ALL - missing


def test_points_may_lack_estimates_and_intervals():
    report = less(example(seeds=1))
    for point in report["points"][::2]:
        point |= {"length": None, "ended": None}
        point["scores"].pop("reward_model")
    report["initial_policy"] |= {"length": None, "scores": {}}
    assert drawn(report) == ALL


def test_what_summarise_makes_is_drawn():
    assert drawn(
        summarise(make(CURVES, kls=dict.fromkeys(CURVES, ((1, 2), (3, 4), (6, 9)))))
    ) >= ALL - {"cost"}
    apart = {"ppo": ((0.1, 0.2), (0.3, 0.4), (0.5, 0.6)), "dpo": ((3, 4), (5, 6), (8, 9))}
    assert len(frontier(summarise(make(CURVES, kls=apart))).axes) == 1  # nothing at equal KL
    assert "frontier" in drawn(summarise(make(CURVES, judge=None, seeds=1)))


def test_amounts():
    assert [amount(x) for x in (0, 12.5, 1234567, 1.22e15)] == ["0", "12.5", "1.23M", "1.22P"]


def test_shares_do_not_go_beyond_all_of_them(report):
    report = copy.deepcopy(report)
    for point in report["points"]:
        point["ended"] = interval(1.0)
    assert lengths(report).axes[1].get_ylim()[1] <= 101
