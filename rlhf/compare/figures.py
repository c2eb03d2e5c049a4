"""Draw the figures of a report with matplotlib; each is left out where the report lacks what it shows.

Every function takes report.json's dict (rlhf/compare/summary.py) and returns a Figure, or None. A method has one
colour, marker and line in all figures; its swept values are tones of that colour, the one furthest from the initial
policy darkest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlhf.compare.figure_style import (
    NEUTRAL,
    SETTINGS,
    Style,
    difference,
    few_ticks,
    label_kl,
    methods_of,
    new_figure,
    paths_of,
    root,
    save_svg,
    shade,
    spans,
    style_of,
    tint,
    trained_methods,
    value_of,
)
from rlhf.compare.format import Report, amount, initial_name, main_score, method_name, policy_name, score_name
from rlhf.text import clip

DPI = 160
PAIRS = 3  # panels of differences below the frontier; the tables have all
SCORES = 6  # rows of scores over training
COUNTERS = ("flops", "tokens_trained", "tokens_generated", "seconds")
# The parts of a method's cost: label, hatching and opacity of their bars
COSTS = {
    "own": ("its own run", "", 1.0),
    "reward": ("reward model", "///", 0.55),
    "pairs": ("sampling the pairs", "", 0.25),
}


def draw(report: Report, folder: str | Path) -> dict[str, Path]:
    """Write each figure that the report has numbers for to `folder` as PNG and SVG; returns name -> path of the PNG."""
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
    """Draw the main score against √KL, a point a checkpoint; below it the difference of two methods at equal KL."""
    score = main_score(report)
    if score is None or not any(difference(point, score) for point in report["points"]):
        return None
    pairs = [pair for pair in report["frontier"] if pair["rows"]][:PAIRS]
    heights = {"height_ratios": [3.2] + [1.2] * len(pairs)}
    figure, axes = new_figure(6.2, 4.4 + 1.6 * len(pairs), 1 + len(pairs), sharex=True, gridspec_kw=heights)
    top = axes[0, 0]

    for method in methods_of(report):
        _draw_method(top, report, method, score)
    _draw_curves(top, report)
    top.plot(0, 0, "o", color=NEUTRAL, ms=7, zorder=6, label=initial_name(report))
    top.axhline(0, color=NEUTRAL, lw=1, zorder=1)
    top.set_ylabel(f"{score_name(report, score)}\nover {initial_name(report)}")
    top.margins(x=0.06, y=0.1)
    figure.legend(loc="outside upper left", ncols=2)

    for panel, pair in zip(axes[1:, 0], pairs, strict=True):
        _draw_equal_kl(panel, report, pair)
    label_kl(axes[-1, 0], report)
    return figure


def _draw_method(axes, report: Report, method: str, score: str) -> None:
    """Draw the checkpoints of a method with their bars, the ends of training large, single seeds faint."""
    style = style_of(report, method)
    label = _legend_label(report, method)
    ends = []
    for _, points in paths_of(report, method):
        x, x_bars = spans([point["kl"] for point in points], root)
        y, y_bars = spans([difference(point, score) for point in points])
        axes.errorbar(x, y, y_bars, x_bars, fmt=style.marker, color=style.color, ms=4, elinewidth=0.9, zorder=4)
        axes.plot(x[-1], y[-1], style.marker, color=style.color, ms=8, zorder=5, label=label)
        label = None
        ends.append((x[-1], y[-1]))
        for point in points:
            _draw_seeds(axes, report, point, score, style)
    # The few points of a baseline are joined, where a trained method has a fitted curve
    if report["methods"][method]["baseline"]:
        axes.plot(*zip(*ends, strict=True), color=style.color, linestyle=style.linestyle, lw=1.2, zorder=2)


def _draw_seeds(axes, report: Report, point: dict, score: str, style: Style) -> None:
    seeds = [seed for seed in point["per_seed"] if score in seed["scores"]]
    # Each seed has a proxy of its own, whose scale says nothing beside the mean
    if len(seeds) < 2 or report["score_kinds"][score] == "proxy":
        return
    initial = value_of(report["foundation"]["scores"].get(score, {}).get("mean"))
    x = [root(seed["kl"]) for seed in seeds]
    y = [seed["scores"][score] - initial for seed in seeds]
    axes.plot(x, y, ".", color=style.color, ms=3, alpha=0.35, zorder=2, mew=0)


def _draw_curves(axes, report: Report) -> None:
    """Draw the fitted curve of each trained method with its 95 % band, over its own range of KL."""
    for method, curve in report["curves"].items():
        if report["methods"][method]["baseline"]:
            continue
        style = style_of(report, method)
        x = [root(kl) for kl in curve["kl"]]
        y, low, high = (np.array([value_of(e, part) for e in curve["score"]]) for part in ("estimate", "low", "high"))
        axes.fill_between(x, low, high, color=style.color, alpha=0.15, lw=0, zorder=1)
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
        axes.errorbar(root(row["kl"]), y, bars, fmt=style.marker, color=style.color, mfc=face, ms=7, zorder=3)
        largest = max(largest, abs(y[0]) + np.nan_to_num(bars).max())

    # Zero in the middle: above it the first method is ahead, below it the second
    axes.set_ylim(-1.5 * largest, 1.5 * largest)
    axes.set_ylabel("at equal KL")
    for name, y, side in ((pair["a"], 0.95, "top"), (pair["b"], 0.05, "bottom")):
        axes.text(0.01, y, f"{_name(name)} ahead", transform=axes.transAxes, va=side, fontsize=8.5)


def scores(report: Report):
    """Draw how far runs lie from the first one by each score, in its standard deviations over groups."""
    if report["kind"] != "runs":
        return None
    names = [score for score in report["score_kinds"] if _deviation(report, score)]
    if not names:
        return None
    methods = methods_of(report)
    figure, axes = new_figure(6.2, 1.4 + (0.2 + 0.22 * len(methods)) * len(names))
    panel = axes[0, 0]
    offsets = np.linspace(-0.25, 0.25, len(methods)) if len(methods) > 1 else [0.0]
    for method, offset in zip(methods, offsets, strict=True):
        style = style_of(report, method)
        ends = [point for point in report["points"] if point["method"] == method and point["last"]]
        x, bars = spans([difference(ends[0], score) for score in names])
        scale = np.array([_deviation(report, score) for score in names])
        y = np.arange(len(names)) + offset
        panel.errorbar(x / scale, y, None, bars / scale, fmt=style.marker, color=style.color, label=_name(method))
    panel.axvline(0, color=NEUTRAL, lw=1.2, zorder=1)
    panel.set_yticks(range(len(names)), [score_name(report, score) for score in names])
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.set_xlabel(f"difference to {initial_name(report)}, in its standard deviations over groups")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _deviation(report: Report, score: str) -> float:
    """Return the standard deviation of the initial policy's score over groups; 0 where it is not known."""
    mean = report["foundation"]["scores"].get(score, {}).get("mean")
    if mean is None or mean["se"] is None:
        return 0.0
    return mean["se"] * math.sqrt(mean["groups"])


def proxy_and_judge(report: Report):
    """Draw a row a method: proxy against √KL, judge against √KL, judge against proxy, a path a swept value."""
    proxy = next((score for score, kind in report["score_kinds"].items() if kind == "proxy"), None)
    judge = report["judge"]
    scored = {point["method"] for point in report["points"] if difference(point, proxy)}
    methods = [method for method in trained_methods(report) if method in scored]
    if judge is None or report["kind"] == "runs" or not methods:
        return None

    labels = [f"{score_name(report, score)} over {initial_name(report)}" for score in (proxy, judge)]
    figure, axes = new_figure(10.2, 0.7 + 2.9 * len(methods), len(methods), 3, sharex="col", sharey="col")
    for row, method in zip(axes, methods, strict=True):
        _draw_paths(row, report, method, proxy, judge)
        row[0].set_title(method_name(method))
        for panel, label in zip(row, (labels[0], labels[1], labels[1]), strict=True):
            panel.set_ylabel(label, fontsize=8.5)
            panel.axhline(0, color=NEUTRAL, lw=0.9, zorder=1)
    for panel in axes[-1, :2]:
        label_kl(panel, report)
    axes[-1, 2].set_xlabel(labels[0], fontsize=8.5)
    return figure


def _draw_paths(panels, report: Report, method: str, proxy: str, judge: str) -> None:
    """Draw the ways of a method's swept values from the initial policy, and those of the baselines dotted."""
    style, paths = style_of(report, method), paths_of(report, method)
    for i, (swept, points) in enumerate(paths):
        tone = shade(style.color, i, len(paths))
        for panel, (x, y) in zip(panels, _views(points, proxy, judge), strict=True):
            panel.plot(x, y, color=tone, marker=style.marker, ms=4, lw=1.3, label=_swept_label(swept))
    for baseline in methods_of(report):
        if not report["methods"][baseline]["baseline"]:
            continue
        ends = [points[-1] for _, points in paths_of(report, baseline)]
        for panel, (x, y) in zip(panels, _views(ends, proxy, judge), strict=True):
            panel.plot(x, y, ":", color=NEUTRAL, lw=1.4, zorder=1, label=_name(baseline))
    panels[0].legend(title=report["methods"][method]["swept"], fontsize=8, title_fontsize=8)


def _views(points: Sequence[dict], proxy: str, judge: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (x, y) of the three panels, from the initial policy at 0."""
    kl = spans([point["kl"] for point in points], root)[0]
    optimised = spans([difference(point, proxy) for point in points])[0]
    wanted = spans([difference(point, judge) for point in points])[0]
    kl, optimised, wanted = (np.concatenate([[0.0], values]) for values in (kl, optimised, wanted))
    return [(kl, optimised), (kl, wanted), (optimised, wanted)]


def wins(report: Report):
    """Draw how often the row's policy beats the column's, raw and at equal length."""
    found = report["wins"]
    if found is None:
        return None
    titles = {"raw": "The row beats the column, %", "controlled": "The same at equal length"}
    kinds = [kind for kind in titles if any(any(row) for row in found[kind])]
    if not kinds:
        return None
    labels = [clip(policy_name(p["method"], p["swept"], report), 26) for p in found["policies"]]
    size = 2.1 + 0.5 * len(labels)
    # Large matrices below each other, small ones side by side
    rows, columns = (1, len(kinds)) if len(labels) < 8 else (len(kinds), 1)
    figure, axes = new_figure(size * columns, size * rows, rows, columns)
    for panel, kind in zip(axes.flat, kinds, strict=True):
        _draw_shares(panel, found[kind], labels)
        panel.set_title(titles[kind], pad=10)
    return figure


def _draw_shares(axes, matrix: list, labels: list[str]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    # Orange: the row loses, white: a draw, blue: it wins; the lightness keeps its order for the colour-blind
    colours = LinearSegmentedColormap.from_list("wins", ["#B34700", "#E9A877", "#FFFFFF", "#86B8DB", "#00568A"])
    shares = np.array([[100 * value_of(estimate) for estimate in row] for row in matrix])
    axes.imshow(shares, cmap=colours, vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        if not math.isnan(share):
            colour = "#ffffff" if abs(share - 50) > 36 else "#111111"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8.5, color=colour)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0, labelsize=8.5, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def training(report: Report):
    """Draw a row a score, a column a method: the score over the initial policy's by training step."""
    methods = trained_methods(report)
    names = [s for s in report["score_kinds"] if any(difference(point, s) for point in report["points"])]
    names.sort(key=lambda score: (score != report["judge"], report["score_kinds"][score] != "proxy"))
    names = names[:SCORES]
    steps = {(point["method"], point["step"]) for point in report["points"] if point["method"] in methods}
    if not names or len(steps) <= len(methods):
        return None

    size = (0.9 + 3.2 * len(methods), 0.6 + 1.9 * len(names))
    figure, axes = new_figure(*size, len(names), len(methods), sharex="col", sharey="row")
    for column, method in zip(axes.T, methods, strict=True):
        for panel, score in zip(column, names, strict=True):
            _draw_training(panel, report, method, score)
        column[0].set_title(method_name(method))
        column[0].legend(title=report["methods"][method]["swept"], fontsize=8, title_fontsize=8, ncols=2)
        column[-1].set_xlabel("training step")
    for panel, score in zip(axes[:, 0], names, strict=True):
        panel.set_ylabel(f"{score_name(report, score)}\nover {initial_name(report)}", fontsize=8.5)
    return figure


def _draw_training(axes, report: Report, method: str, score: str) -> None:
    style, paths = style_of(report, method), paths_of(report, method)
    for i, (swept, points) in enumerate(paths):
        y, bars = spans([difference(point, score) for point in points])
        steps = [point["step"] for point in points]
        tone = shade(style.color, i, len(paths))
        axes.errorbar(steps, y, bars, color=tone, marker=style.marker, ms=4, lw=1.3, label=_swept_label(swept))
    axes.axhline(0, color=NEUTRAL, lw=1, zorder=1)


def lengths(report: Report):
    """Draw the length of the responses and the share that ends by itself against √KL, a point a checkpoint."""
    panels = [("length", "tokens in a response", 1.0), ("ended", "responses that end, %", 100.0)]
    panels = [panel for panel in panels if any(point[panel[0]] for point in report["points"])]
    if not panels:
        return None
    figure, axes = new_figure(4.9 * len(panels), 3.7, 1, len(panels))
    for panel, (name, title, factor) in zip(axes[0], panels, strict=True):
        for method in methods_of(report):
            points = [point for _, path in paths_of(report, method) for point in path]
            style = style_of(report, method)
            x, _ = spans([point["kl"] for point in points], root)
            y, bars = spans([point[name] for point in points])
            line = {"fmt": style.marker, "color": style.color, "ms": 4.5, "elinewidth": 0.9}
            panel.errorbar(x, factor * y, factor * bars, **line, label=_name(method))
        initial = factor * value_of(report["foundation"][name])
        panel.axhline(initial, color=NEUTRAL, linestyle="--", zorder=1, label=initial_name(report))
        panel.set_title(title)
        # No share is above all of them, whatever margin the axis has
        panel.set_ylim(top=min(panel.get_ylim()[1], 101) if name == "ended" else None)
        label_kl(panel, report)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def cost(report: Report):
    """Draw what each method cost, mean over its swept values: its own runs, the reward model, the pairs."""
    rows: dict[str, list[dict]] = {}
    for row in report["budget"]["rows"]:
        rows.setdefault(row["method"], []).append(row)
    known = {counter for own in rows.values() for row in own for counter in row["total"]}
    counters = [counter for counter in COUNTERS if counter in known]
    if not counters:
        return None

    columns = min(2, len(counters))
    lines = math.ceil(len(counters) / columns)
    figure, axes = new_figure(4.9 * columns, 0.5 + lines * (0.8 + 0.42 * len(rows)), lines, columns, sharey=True)
    for panel in axes.flat[len(counters) :]:
        panel.set_visible(False)
    for panel, counter in zip(axes.flat, counters, strict=False):
        _draw_cost(panel, report, rows, counter)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _draw_cost(axes, report: Report, rows: Mapping[str, list[dict]], counter: str) -> None:
    """Draw one counter: a stacked bar a method, in its colour; the parts differ in opacity and hatching."""
    colours = [style_of(report, method).color for method in rows]
    left = np.zeros(len(rows))
    for part, (label, hatch, alpha) in COSTS.items():
        widths = np.array([np.mean([row[part].get(counter) or 0.0 for row in own]) for own in rows.values()])
        faces = [tint(colour, alpha) for colour in colours]
        axes.barh(range(len(rows)), widths, 0.62, left, hatch=hatch, color=faces, edgecolor=NEUTRAL, label=label)
        left += widths
    for y, total in enumerate(left):
        axes.annotate(amount(total), (total, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_title(counter.replace("_", " ").replace("flops", "FLOPs"))
    axes.set_yticks(range(len(rows)), [_name(method) for method in rows])
    axes.set_xlim(0, 1.2 * max(left.max(), 1e-9))
    axes.xaxis.set_major_locator(few_ticks())
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))
    axes.grid(axis="y", visible=False)


def _legend_label(report: Report, method: str) -> str:
    """Return "PPO (kl_coef 0.02 to 0.2)"."""
    option, values = report["methods"][method]["swept"], report["methods"][method]["swept_values"]
    if len(values) < 2:
        return _name(method)
    return f"{_name(method)} ({option} {min(values):g} to {max(values):g})"


def _swept_label(swept: float | None) -> str:
    return "run" if swept is None else f"{swept:g}"


def _name(method: str) -> str:
    return clip(method_name(method), 24)


FIGURES = {
    "scores": scores,
    "frontier": frontier,
    "proxy_gold": proxy_and_judge,
    "wins": wins,
    "time": training,
    "lengths": lengths,
    "cost": cost,
}
