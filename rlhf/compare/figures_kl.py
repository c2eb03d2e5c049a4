"""The figures of a report that draw scores against KL: the frontier, and the proxy beside the judge."""

from __future__ import annotations

import math

import numpy as np

from rlhf.compare.drawing import (
    ALPHA,
    FOUNDATION,
    Report,
    along,
    difference,
    main_score,
    methods_of,
    nats_axis,
    new_figure,
    number,
    paths_of,
    place_labels,
    reference,
    root,
    score_label,
    shade,
    shown_name,
    spans,
    strength_text,
    style,
    trained_of,
)

PAIRS = 3  # panels of differences under the frontier; the tables have all


def frontier(report: Report):
    """Score over the foundation against √KL, a point a checkpoint; below, the difference of two methods at equal KL."""
    score = main_score(report)
    methods = methods_of(report)
    if score is None or not any(difference(p, score) for p in report["points"]):
        return None
    pairs = [pair for pair in report["frontier"] or [] if pair.get("rows")][:PAIRS]
    heights = [3.2] + [1] * len(pairs)
    figure, axes = new_figure(
        8.2, 4.9 + 1.6 * len(pairs), 1 + len(pairs), sharex=True, gridspec_kw={"height_ratios": heights}
    )
    top = axes[0][0]
    taken, labels = [(0.0, 0.0)], []
    for method in methods:
        seen, ends = _method_points(top, report, method, score)
        taken += seen
        labels += ends
    taken += _bands(top, report)
    top.plot(0, 0, "o", color=FOUNDATION, ms=7, zorder=6)
    top.axhline(0, color=FOUNDATION, lw=1, zorder=1)
    top.set_ylabel(f"{score_label(report, score)}\nover the foundation")
    top.set_title(_frontier_title(report, score), fontsize=10.5)
    top.margins(x=0.06, y=0.1)
    _method_legend(top, report, methods)
    for (panel,), pair in zip(axes[1:], pairs, strict=True):
        _equal_kl(panel, report, pair)
    nats_axis(axes[-1][0], "; shaded: where both were measured" if pairs else "")
    figure.draw_without_rendering()
    taken += along(top.get_xlim(), [0.0, 0.0], 80)
    labels.append((0.0, 0.0, reference(report), FOUNDATION))
    place_labels(top, labels, taken)
    return figure


def _frontier_title(report: Report, score: str) -> str:
    unit = report["unit"]
    kind = "" if report["judge"] else "; a proxy decides nothing" if report["score_kinds"][score] == "proxy" else ""
    n = len(unit["seeds"])
    return f"{n} {'seed' if n == 1 else 'seeds'} × {unit['groups']} groups of prompts, bars and bands 95 %{kind}"


def _method_points(axes, report: Report, method: str, score: str) -> tuple[list, list]:
    """Draw a method's points; returns what is taken and the labels of its strengths."""
    look = style(report, method)
    baseline = report["methods"][method].get("baseline")
    taken, labels, ends = [], [], []
    base = number((report["foundation"]["scores"].get(score) or {}).get("mean"))
    for swept, points in paths_of(report, method):
        x, xbar = spans([p["kl"] for p in points], root)
        y, ybar = spans([difference(p, score) for p in points])
        faint = {"elinewidth": 0.9, "alpha": 0.9, "markeredgecolor": "white", "markeredgewidth": 0.6}
        axes.errorbar(x, y, ybar, xbar, fmt=look["marker"], color=look["color"], ms=4.5, zorder=4, **faint)
        last = [i for i, p in enumerate(points) if p.get("last")]
        axes.plot(x[last], y[last], look["marker"], color=look["color"], ms=7.5, mec="white", mew=0.7, zorder=5)
        for p in points if report["score_kinds"].get(score) != "proxy" else []:
            seeds = [(root(s["kl"]), s["scores"].get(score, math.nan) - base) for s in p.get("per_seed") or []]
            if len(seeds) > 1:
                axes.plot(*zip(*seeds, strict=True), ".", color=look["color"], ms=3, alpha=0.35, zorder=2, mew=0)
        taken += list(zip(x, y, strict=True))
        taken += [(a, b + s * h) for a, b, h in zip(x, y, ybar[1], strict=True) for s in (-1, -0.5, 0.5, 1)]
        taken += [(a + s * w, b) for a, b, w in zip(x, y, xbar[1], strict=True) for s in (-1, -0.5, 0.5, 1)]
        ends.append((x[-1], y[-1]))
        if swept is not None:
            labels.append((x[-1], y[-1], strength_text(swept), look["color"]))
    if baseline and len(ends) > 1:
        axes.plot(*zip(*ends, strict=True), color=look["color"], linestyle=look["linestyle"], lw=1.2, zorder=2)
    return taken, labels


def _bands(axes, report: Report) -> list[tuple[float, float]]:
    """The curve of each trained method with its 95 % band, over its own range of KL alone."""
    taken = []
    for method, curve in (report["curves"] or {}).items():
        if report["methods"].get(method, {}).get("baseline"):
            continue  # its few points are joined instead
        look = style(report, method)
        x = np.array([root(k) for k in curve["kl"]])
        y, low, high = (np.array([number(e, part) for e in curve["score"]]) for part in ("estimate", "low", "high"))
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0, zorder=1)
        axes.plot(x, y, color=look["color"], linestyle=look["linestyle"], lw=1.8, zorder=3)
        taken += along(x, y, 3)
    return taken


def _method_legend(axes, report: Report, methods: list[str]) -> None:
    for method in methods:
        look, option = style(report, method), report["methods"][method].get("swept")
        name = shown_name(method) + (f"  (numbers: {option})" if option else "")
        axes.plot([], [], label=name, ms=6, lw=1.8, **look)
    columns = min(3, len(methods))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.07), ncols=columns, borderaxespad=0, fontsize=9, handlelength=3)


def _equal_kl(axes, report: Report, pair: dict) -> None:
    """Differences a - b at equal KL; full points are shown at 5 % after Holm's correction for all claims of the
    report, hollow ones are not."""
    a, b = pair["a"], pair["b"]
    rows = pair["rows"]
    if pair.get("overlap"):
        axes.axvspan(*map(root, pair["overlap"]), color="#000000", alpha=0.06, lw=0, zorder=0)
    y, bar = spans([row["difference"] for row in rows])
    for x, mid, low, high, row in zip((root(r["kl"]) for r in rows), y, *bar, rows, strict=True):
        p = row.get("p_adjusted")
        colour = style(report, a if mid > 0 else b)["color"]
        marker = style(report, a if mid > 0 else b)["marker"]
        face = colour if p is not None and p < ALPHA else "white"
        axes.errorbar(x, mid, [[low], [high]], fmt=marker, color=colour, mfc=face, ms=7, elinewidth=1.6, zorder=3)
    axes.axhline(0, color=FOUNDATION, lw=1.2, zorder=1)
    edge = 1.6 * max(np.nanmax(np.abs(np.concatenate([y - bar[0], y + bar[1], y, [1e-9]]))), 1e-9)
    axes.set_ylim(-edge, edge)
    axes.set_ylabel(f"{shown_name(a, 12)} − {shown_name(b, 12)}\nat equal KL")
    side = {"transform": axes.transAxes, "fontsize": 8.5}
    axes.text(0.008, 0.95, f"{shown_name(a)} ahead ↑", va="top", color=style(report, a)["color"], **side)
    axes.text(0.008, 0.05, f"{shown_name(b)} ahead ↓", va="bottom", color=style(report, b)["color"], **side)


def proxy_gold(report: Report):
    """A row a method: proxy against √KL, judge against √KL, judge against proxy; baselines dashed in each."""
    proxy = next((name for name, kind in report["score_kinds"].items() if kind == "proxy"), None)
    judge = report["judge"]
    if proxy is None or judge is None:
        return None
    both = {m for m in methods_of(report) for p in report["points"] if p["method"] == m and difference(p, proxy)}
    shown = [m for m in trained_of(report) if m in both]
    if not shown:
        return None
    baselines = [m for m in methods_of(report) if m in both and m not in shown]
    figure, axes = new_figure(10.2, 0.7 + 2.75 * len(shown), len(shown), 3, sharex="col", sharey="col")
    taken = [[[(0.0, 0.0)] for _ in range(3)] for _ in shown]
    ends: list[list[list]] = [[[] for _ in range(3)] for _ in shown]
    for row, method in enumerate(shown):
        look = style(report, method)
        paths = paths_of(report, method)
        for i, (swept, points) in enumerate(paths):
            tone = shade(look["color"], i, len(paths))
            for column, (x, y) in enumerate(_views(points, proxy, judge)):
                line = {"lw": 1.3, "linestyle": look["linestyle"], "marker": look["marker"], "ms": 4}
                axes[row][column].plot([0, *x], [0, *y], color=tone, **line)
                axes[row][column].plot(x[-1], y[-1], look["marker"], color=tone, ms=7, mec="white", mew=0.7)
                taken[row][column] += along([0, *x], [0, *y])
                ends[row][column].append((x[-1], y[-1], strength_text(swept), look["color"]))
        for baseline in baselines:
            points = [points[-1] for _, points in paths_of(report, baseline)]
            for column, (x, y) in enumerate(_views(points, proxy, judge)):
                axes[row][column].plot([0, *x], [0, *y], ":", color="#222222", lw=1.2, zorder=1)
                taken[row][column] += along([0, *x], [0, *y])
                if column == 0:
                    ends[row][column].append((x[-1], y[-1], shown_name(baseline), "#222222"))
    _proxy_gold_axes(axes, report, shown, proxy, judge)
    figure.draw_without_rendering()
    for row in range(len(shown)):
        for column in range(3):
            place_labels(axes[row][column], ends[row][column], taken[row][column], 7.5)
    return figure


def _views(points: list[dict], proxy: str, judge: str) -> list[tuple[np.ndarray, np.ndarray]]:
    d = spans([p["kl"] for p in points], root)[0]
    p, j = (spans([difference(point, score) for point in points])[0] for score in (proxy, judge))
    return [(d, p), (d, j), (p, j)]


def _proxy_gold_axes(axes, report: Report, shown: list[str], proxy: str, judge: str) -> None:
    p, j = score_label(report, proxy), score_label(report, judge)
    over = f" over {reference(report)}"
    titles = ("what was optimised: the proxy", "what was wanted: the judge", "wanted against optimised")
    for row, method in enumerate(shown):
        option = report["methods"][method].get("swept")
        for column in range(3):
            panel = axes[row][column]
            panel.axhline(0, color=FOUNDATION, lw=0.9, zorder=1)
            panel.margins(x=0.1, y=0.12)
            panel.set_ylabel((p, j, j)[column] + over)
            if row == 0:
                panel.set_title(titles[column])
        name = shown_name(method) + (f" (numbers: {option})" if option else "")
        axes[row][0].text(0.03, 0.96, name, transform=axes[row][0].transAxes, color=style(report, method)["color"],
                          va="top", fontweight="bold", fontsize=9)  # fmt: skip
    for column in (0, 1):
        nats_axis(axes[-1][column])
    axes[-1][2].set_xlabel(p + over)
