"""Draw the figures of a report with matplotlib; each is left out where the report lacks what it
shows.

Every function takes report.json's dict (rlhf/compare/summary.py) and returns a Figure, or None. A
method has one colour, marker and line in all figures; its swept values are tones of that colour,
the one furthest from the initial policy darkest.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rlhf.report.figure_style import (
    NEUTRAL,
    SETTINGS,
    axis_label,
    difference,
    draw_legend,
    draw_paths,
    draw_shares,
    has_differences,
    is_baseline,
    label_x,
    methods_of,
    new_figure,
    paths_of,
    root,
    save_svg,
    short_name,
    spans,
    style_of,
    tint,
    trained_methods,
    value_of,
)
from rlhf.report.format import (
    Report,
    amount,
    initial_name,
    main_score,
    method_name,
    policy_name,
    proxies_of,
    score_name,
)
from rlhf.text import clip

DPI = 160
# panels of differences below the frontier; the tables have all
PAIRS = 3
# rows of scores over training
SCORES = 6
COUNTERS = ("flops", "tokens_trained", "tokens_generated", "seconds")
# The parts of a method's cost: label, hatching and opacity of their bars
COSTS = {
    "own": ("its own run", "", 1.0),
    "reward": ("reward model", "///", 0.55),
    "pairs": ("sampling the pairs", "", 0.25),
}


def draw(report: Report, folder: str | Path) -> dict[str, Path]:
    """Write each figure that the report has numbers for to `folder` as PNG and SVG; returns name ->
    path of the PNG.
    """
    import matplotlib

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    with matplotlib.rc_context(SETTINGS):
        for name, function in FIGURES.items():
            figure = function(report)
            if figure is not None:
                paths[name] = folder / f"{name}.png"
                figure.savefig(paths[name], dpi=DPI, facecolor="white")
                save_svg(figure, folder / f"{name}.svg")
    return paths


def frontier(report: Report):
    """Draw the main score against √KL, a point a checkpoint; below it the difference of two methods
    at equal KL.
    """
    score = main_score(report)
    if score is None or not has_differences(report, score):
        return None
    pairs = [pair for pair in report["frontier"] if pair["rows"]][:PAIRS]
    figure, axes = new_figure(
        6.2,
        4.4 + 1.6 * len(pairs),
        1 + len(pairs),
        sharex=True,
        gridspec_kw={"height_ratios": [3.2] + [1.2] * len(pairs)},
    )
    top = axes[0, 0]

    for method in methods_of(report):
        style = style_of(report, method)
        # A baseline has a few points, which are joined, where a trained method has a fitted curve
        joined = style.linestyle if is_baseline(report, method) else "none"
        draw_paths(top, report, method, "kl", score, linestyle=joined)
        _draw_seeds(top, report, method, score)
    _draw_curves(top, report)

    # The initial policy is the origin: no KL, no difference
    top.plot(0, 0, "o", color=NEUTRAL, ms=7, zorder=6)
    top.axhline(0, color=NEUTRAL, lw=1, zorder=1)
    top.set_ylabel(axis_label(report, score))
    top.margins(x=0.06, y=0.1)
    draw_legend(figure, report, ncols=2)

    for panel, pair in zip(axes[1:, 0], pairs, strict=True):
        _draw_equal_kl(panel, report, pair)
    label_x(axes[-1, 0], report, "kl")
    return figure


def _draw_seeds(axes, report: Report, method: str, score: str) -> None:
    """Draw the single seeds faintly; not those of a proxy, since each seed has a proxy of its own
    scale.
    """
    if report["score_kinds"][score] == "proxy":
        return
    color = style_of(report, method).color
    initial = value_of(report["initial_policy"]["scores"].get(score, {}).get("mean"))
    for _, points in paths_of(report, method):
        for point in points:
            x, y = [], []
            for seed in point["per_seed"]:
                x.append(root(seed["kl"]))
                y.append(seed["scores"].get(score, math.nan) - initial)
            # One seed is the point itself
            if len(x) > 1:
                axes.plot(x, y, ".", color=color, ms=3, alpha=0.35, zorder=2, mew=0)


def _draw_curves(axes, report: Report) -> None:
    """Draw the fitted curve of each trained method with its 95 % band, over its own range of KL."""
    for method, curve in report["curves"].items():
        if is_baseline(report, method):
            continue
        style = style_of(report, method)
        x = list(map(root, curve["kl"]))
        y, (below, above) = spans(curve["score"])
        axes.fill_between(x, y - below, y + above, color=style.color, alpha=0.15, lw=0, zorder=1)
        axes.plot(x, y, color=style.color, linestyle=style.linestyle, lw=1.8, zorder=3)


def _draw_equal_kl(axes, report: Report, pair: dict) -> None:
    """Draw differences a - b at equal KL: full where shown after Holm's correction, else hollow."""
    alpha = report["claims"]["alpha"]
    axes.axvspan(*map(root, pair["overlap"]), color=NEUTRAL, alpha=0.15, lw=0, zorder=0)
    axes.axhline(0, color=NEUTRAL, lw=1.2, zorder=1)
    largest = 1e-9
    for row in pair["rows"]:
        y, bars = spans([row["difference"]])
        style = style_of(report, pair["a"] if y[0] > 0 else pair["b"])
        shown = row["p_adjusted"] is not None and row["p_adjusted"] < alpha
        face = style.color if shown else "none"
        axes.errorbar(
            root(row["kl"]), y, bars, fmt=style.marker, color=style.color, mfc=face, ms=7, zorder=3
        )
        largest = max(largest, abs(y[0]) + np.nan_to_num(bars).max())

    # Zero in the middle: above it the first method is ahead, below it the second
    axes.set_ylim(-1.5 * largest, 1.5 * largest)
    axes.set_ylabel("at equal KL")
    for name, y, side in ((pair["a"], 0.95, "top"), (pair["b"], 0.05, "bottom")):
        axes.text(
            0.01, y, f"{short_name(name)} ahead", transform=axes.transAxes, va=side, fontsize=8.5
        )


def scores(report: Report):
    """Draw how far runs lie from the first one by each score, in its standard deviations over
    groups.
    """
    if report["kind"] != "runs":
        return None
    names = [score for score in report["score_kinds"] if _deviation(report, score)]
    # single runs without any spread have no unit to be drawn in
    if not names:
        return None
    scale = np.array([_deviation(report, score) for score in names])
    ends = [point for point in report["points"] if point["last"]]
    figure, axes = new_figure(6.2, 1.4 + (0.2 + 0.22 * len(ends)) * len(names))
    panel = axes[0, 0]

    # Runs are drawn below each other within the line of their score
    offsets = (np.arange(len(ends)) - (len(ends) - 1) / 2) * min(0.3, 0.6 / len(ends))
    for point, offset in zip(ends, offsets, strict=True):
        style = style_of(report, point["method"])
        x, bars = spans([difference(point, score) for score in names])
        panel.errorbar(
            x / scale,
            np.arange(len(names)) + offset,
            xerr=bars / scale,
            fmt=style.marker,
            color=style.color,
            label=short_name(point["method"]),
        )
    panel.axvline(0, color=NEUTRAL, lw=1.2, zorder=1)
    panel.set_yticks(range(len(names)), [score_name(report, score) for score in names])
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.set_xlabel(
        f"difference to {initial_name(report)}, in its standard deviations over groups"
    )
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _deviation(report: Report, score: str) -> float:
    """Return the standard deviation of the initial policy's score over groups; 0 where it is not
    known.
    """
    mean = report["initial_policy"]["scores"].get(score, {}).get("mean")
    if mean is None or mean["se"] is None:
        return 0.0
    return mean["se"] * math.sqrt(mean["groups"])


def proxy_and_judge(report: Report):
    """Draw a column a method: proxy against √KL, judge against √KL, judge against proxy; baselines
    dotted.
    """
    judge = report["judge"]
    proxy = next(iter(proxies_of(report["score_kinds"])), None)
    scored = {point["method"] for point in report["points"] if difference(point, proxy)}
    methods = [method for method in trained_methods(report) if method in scored]
    if judge is None or report["kind"] == "runs" or not methods:
        return None
    return _grid(report, methods, [("kl", proxy), ("kl", judge), (proxy, judge)], from_zero=True)


def training(report: Report):
    """Draw a row a score, a column a method: the score over the initial policy's by training step."""
    methods = trained_methods(report)
    names = []
    for score in report["score_kinds"]:
        if has_differences(report, score):
            names.append(score)
    # The judge first, then what methods learnt from; a sort keeps the order of equals
    names.sort(key=lambda score: report["score_kinds"][score] != "proxy")
    names.sort(key=lambda score: score != report["judge"])
    longest = 0
    for method in methods:
        for _, points in paths_of(report, method):
            longest = max(longest, len(points))
    # One checkpoint makes no line
    if not names or longest < 2:
        return None
    return _grid(report, methods, [("step", score) for score in names[:SCORES]])


def _grid(
    report: Report, methods: list[str], views: list[tuple[str, str]], *, from_zero: bool = False
):
    """Draw a row a view (measures of x and y) and a column a method, with a line a swept value."""
    size = (0.9 + 3.2 * len(methods), 0.6 + 2.1 * len(views))
    figure, axes = new_figure(*size, len(views), len(methods), sharey="row")
    # A baseline has no training steps to be drawn by
    baselines = []
    if from_zero:
        baselines = [method for method in methods_of(report) if is_baseline(report, method)]
    for row, (x, y) in zip(axes, views, strict=True):
        for panel, method in zip(row, methods, strict=True):
            draw_paths(panel, report, method, x, y, from_zero=from_zero)
            for baseline in baselines:
                draw_paths(
                    panel, report, baseline, x, y, from_zero=True, linestyle=":", color=NEUTRAL
                )
            panel.axhline(0, color=NEUTRAL, lw=1, zorder=1)
            label_x(panel, report, x)
        row[0].set_ylabel(axis_label(report, y), fontsize=8.5)
    for panel, method in zip(axes[0], methods, strict=True):
        panel.set_title(method_name(method))
        panel.legend(
            title=report["methods"][method]["swept"], fontsize=8, title_fontsize=8, ncols=2
        )
    return figure


def wins(report: Report):
    """Draw how often the row's policy beats the column's, raw and at equal length."""
    found = report["wins"]
    if found is None:
        return None
    titles = {"raw": "The row beats the column, %", "controlled": "The same at equal length"}
    kinds = [kind for kind in titles if any(map(any, found[kind]))]
    if not kinds:
        return None
    labels = []
    for policy in found["policies"]:
        labels.append(clip(policy_name(policy["method"], policy["swept"], report), 26))
    size = 2.1 + 0.5 * len(labels)
    # Small matrices side by side, large ones below each other
    rows, columns = 1, len(kinds)
    if len(labels) >= 8:
        rows, columns = len(kinds), 1
    figure, axes = new_figure(size * columns, size * rows, rows, columns)
    for panel, kind in zip(axes.flat, kinds, strict=True):
        draw_shares(panel, found[kind], labels)
        panel.set_title(titles[kind], pad=10)
    return figure


def lengths(report: Report):
    """Draw the length of the responses and the share that ends by itself against √KL, a point a
    checkpoint.
    """
    titles = {"length": "tokens in a response", "ended": "share of responses that end"}
    panels = []
    for name, title in titles.items():
        if any(point[name] for point in report["points"]):
            panels.append((name, title))
    if not panels:
        return None
    figure, axes = new_figure(4.9 * len(panels), 3.7, 1, len(panels))
    for panel, (name, title) in zip(axes[0], panels, strict=True):
        for method in methods_of(report):
            draw_paths(panel, report, method, "kl", name, linestyle="none")
        initial = value_of(report["initial_policy"][name])
        panel.axhline(initial, color=NEUTRAL, linestyle="--", zorder=1)
        panel.set_title(title)
        label_x(panel, report, "kl")
    # No share is above 1, whatever margin the axis has
    if panels[-1][0] == "ended":
        axes[0, -1].set_ylim(top=min(axes[0, -1].get_ylim()[1], 1.01))
    draw_legend(figure, report, ncols=4)
    return figure


def cost(report: Report):
    """Draw what each method cost, mean over its swept values: its own runs, the reward model, the
    pairs.
    """
    rows: dict[str, list[dict]] = {}
    for row in report["budget"]["rows"]:
        rows.setdefault(row["method"], []).append(row)
    known: set[str] = set()
    for row in report["budget"]["rows"]:
        known.update(row["total"])
    counters = [counter for counter in COUNTERS if counter in known]
    if not counters:
        return None

    # Two panels a line; the last one may be empty
    columns = min(2, len(counters))
    lines = math.ceil(len(counters) / columns)
    figure, axes = new_figure(
        4.9 * columns, 0.5 + lines * (0.8 + 0.42 * len(rows)), lines, columns, sharey=True
    )
    for panel in axes.flat[len(counters) :]:
        panel.set_visible(False)
    for panel, counter in zip(axes.flat, counters, strict=False):
        _draw_cost(panel, report, rows, counter)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _draw_cost(axes, report: Report, rows: Mapping[str, list[dict]], counter: str) -> None:
    """Draw one counter: a stacked bar a method, in its colour; the parts differ in opacity and
    hatching.
    """
    colours = [style_of(report, method).color for method in rows]
    left = np.zeros(len(rows))
    for part, (label, hatch, alpha) in COSTS.items():
        # Mean over the swept values of each method
        widths = np.zeros(len(rows))
        for i, own in enumerate(rows.values()):
            widths[i] = np.mean([row[part].get(counter) or 0.0 for row in own])
        axes.barh(
            range(len(rows)),
            widths,
            height=0.62,
            left=left,
            hatch=hatch,
            color=[tint(colour, alpha) for colour in colours],
            edgecolor=NEUTRAL,
            label=label,
        )
        left += widths
    for y, total in enumerate(left):
        axes.annotate(
            amount(total), (total, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    axes.set_title(counter.replace("_", " ").replace("flops", "FLOPs"))
    axes.set_yticks(range(len(rows)), list(map(short_name, rows)))
    axes.set_xlim(0, 1.2 * max(left.max(), 1e-9))
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))
    axes.grid(axis="y", visible=False)


FIGURES = {
    "scores": scores,
    "frontier": frontier,
    "proxy_gold": proxy_and_judge,
    "wins": wins,
    "time": training,
    "lengths": lengths,
    "cost": cost,
}
