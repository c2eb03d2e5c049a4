"""The figures of an experiment's report, each left out where the report lacks what it shows.

`draw` writes PNGs; the others take report.json's dict (rlhf/compare/summary.py) and return a Figure, or None.
A method has one colour, marker and line everywhere; its strengths are tones of that colour, the weakest constraint
(furthest from the foundation) darkest.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.compare.drawing import (
    FOUNDATION,
    LOOK,
    Report,
    amount,
    complete,
    difference,
    end_labels,
    methods_of,
    nats_axis,
    new_figure,
    number,
    paths_of,
    root,
    score_label,
    shade,
    short,
    shown_name,
    spans,
    strength_text,
    style,
    tint,
    trained_of,
)
from rlhf.compare.figures_kl import frontier, proxy_gold
from rlhf.compare.phrases import trial

DPI = 160
SCORES = 6  # rows of scores in time
COUNTERS = ("flops", "tokens_trained", "tokens_generated", "seconds")
COSTS = {"own": ("its own run", ""), "reward": ("reward model", "///"), "pairs": ("sampling the pairs", "...")}


def draw(report: Report, folder: str | Path) -> dict[str, Path]:
    """Write the figures that the report has numbers for into `folder`; returns name -> path of the PNG."""
    import matplotlib

    report = complete(report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    with matplotlib.rc_context(LOOK):
        for name, function in FIGURES.items():
            figure = function(report)
            if figure is not None:
                paths[name] = folder / f"{name}.png"
                figure.savefig(paths[name], dpi=DPI)
    return paths


def time(report: Report):
    """A row a score, a column a method: each strength's score over the foundation, by training step."""
    methods = trained_of(report)
    scores = [n for n in report["score_kinds"] if any(difference(p, n) for p in report["points"])]
    scores = sorted(scores, key=lambda n: (n != report["judge"], report["score_kinds"][n] != "proxy"))[:SCORES]
    if not methods or not scores:
        return None
    figure, axes = new_figure(
        0.9 + 3.7 * len(methods), 0.6 + 1.9 * len(scores), len(scores), len(methods), sharex="col", sharey="row"
    )
    ends: dict[Any, list] = {}
    for column, method in enumerate(methods):
        look, paths = style(report, method), paths_of(report, method)
        for i, (swept, points) in enumerate(paths):
            tone = shade(look["color"], i, len(paths))
            steps = np.array([p["step"] for p in points], dtype=float)
            for row, score in enumerate(scores):
                panel = axes[row][column]
                y, bar = spans([difference(p, score) for p in points])
                panel.errorbar(
                    steps,
                    y,
                    bar,
                    color=tone,
                    marker=look["marker"],
                    linestyle=look["linestyle"],
                    ms=4,
                    lw=1.3,
                    elinewidth=0.8,
                )
                ends.setdefault((row, column), []).append((steps[-1], y[-1], strength_text(swept), look["color"]))
        option = report["methods"][method].get("swept")
        axes[0][column].set_title(
            shown_name(method) + (f"  (numbers: {option})" if option else ""), color=look["color"]
        )
        axes[-1][column].set_xlabel("training step")
        steps = sorted({p["step"] for _, points in paths for p in points})
        if len(steps) <= 8:
            axes[-1][column].set_xticks(steps)
    for row, score in enumerate(scores):
        axes[row][0].set_ylabel(f"{score_label(report, score)}\nover the foundation", fontsize=8.5)
        for panel in axes[row]:
            panel.axhline(0, color=FOUNDATION, lw=1, zorder=1)
            panel.margins(x=0.05, y=0.12)
    figure.draw_without_rendering()
    for (row, column), items in ends.items():
        end_labels(axes[row][column], items, 7.5)
    return figure


def lengths(report: Report):
    """Length of the responses and the share that ended, against √KL: a point a checkpoint."""
    panels = [("length", "tokens in a response", 1.0), ("ended", "responses that end by themselves, %", 100.0)]
    panels = [panel for panel in panels if any(p.get(panel[0]) for p in report["points"])]
    methods = methods_of(report)
    if not panels or not methods:
        return None
    figure, axes = new_figure(4.9 * len(panels), 3.7, 1, len(panels))
    for panel, (name, label, factor) in zip(axes[0], panels, strict=True):
        for method in methods:
            look = style(report, method)
            for _, points in paths_of(report, method):
                x = spans([p["kl"] for p in points], root)[0]
                y, bar = spans([p.get(name) for p in points], lambda v, f=factor: f * v)
                panel.errorbar(
                    x, y, bar, color=look["color"], fmt=look["marker"], ms=4.5, elinewidth=0.9, mec="white", mew=0.5
                )
        base = factor * number(report["foundation"].get(name))
        if not math.isnan(base):
            panel.axhline(base, color=FOUNDATION, lw=1.2, linestyle="--", zorder=1)
            panel.annotate("the foundation", (1, base), (0, 3), xycoords=("axes fraction", "data"), color=FOUNDATION,
                           textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
        panel.set_title(label)
        panel.margins(x=0.05, y=0.1)
        if name == "ended":
            panel.set_ylim(top=min(panel.get_ylim()[1], 101))
        nats_axis(panel)
    for method in methods:
        look = style(report, method)
        axes[0][0].plot([], [], look["marker"], color=look["color"], label=shown_name(method), ms=6)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=min(4, len(methods)), fontsize=9
    )
    return figure


def wins(report: Report):
    """How often the row's policy beats the column's, raw and at equal length."""
    found = report["wins"]
    if not found or len(found["policies"]) < 2 or not any(e for row in found["raw"] for e in row):
        return None
    labels = [short(trial(p["method"], p["swept"], report), 26) for p in found["policies"]]
    n = len(labels)
    kinds = [
        (k, t) for k, t in (("raw", "Raw"), ("controlled", "At equal length")) if any(e for r in found[k] for e in r)
    ]
    cell = 0.46 if n > 5 else 0.62
    beside = n <= 7
    size = (2.1 + n * cell, 1.9 + n * cell)
    rows, columns = (1, len(kinds)) if beside else (len(kinds), 1)
    figure, axes = new_figure(size[0] * columns, size[1] * rows, rows, columns)
    for panel, (kind, title) in zip(axes.ravel(), kinds, strict=True):
        image = _heat(panel, found[kind], labels)
        panel.set_title(f"{title}: the row beats the column, %", pad=10)
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), location="bottom", fraction=0.03, aspect=40, pad=0.02)
    bar.set_label("orange: the row loses    white: 50 %    blue: the row wins", fontsize=8.5)
    bar.outline.set_visible(False)
    return figure


def _heat(axes, matrix: list, labels: list[str]):
    """One matrix; a cell's number is in per cent. The colours keep their order of lightness for the colour-blind."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("wins", ["#B34700", "#E9A877", "#FFFFFF", "#86B8DB", "#00568A"])
    shares = np.array([[100 * number(e) for e in row] for row in matrix])
    image = axes.imshow(shares, cmap=colours, vmin=0, vmax=100)
    for (i, j), share in np.ndenumerate(shares):
        if math.isnan(share):
            axes.text(j, i, "–", ha="center", va="center", color="#888888", fontsize=8)
            continue
        ink = "white" if abs(share - 50) > 36 else "#111111"
        axes.text(j, i, f"{share:.0f}", ha="center", va="center", fontsize=8.5, color=ink)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0, labelsize=8.5, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return image


def cost(report: Report):
    """What each method cost, mean over its strengths, stacked: its own runs, the reward model, the pairs."""
    table: dict[str, list[dict]] = {}
    for row in (report["budget"] or {}).get("rows", []):
        table.setdefault(row["method"], []).append(row)
    known = {_plain(c) for rows in table.values() for row in rows for c in row["total"]}
    counters = [c for c in COUNTERS if c in known]
    if not table or not counters:
        return None
    names = list(table)
    columns = min(2, len(counters))
    lines = math.ceil(len(counters) / columns)
    figure, axes = new_figure(4.9 * columns, lines * (0.75 + 0.42 * len(names)) + 0.4, lines, columns, sharey=True)
    for panel in axes.ravel()[len(counters) :]:
        panel.set_visible(False)
    for panel, counter in zip(axes.ravel(), counters, strict=False):
        left = np.zeros(len(names))
        for (part, (label, hatch)), alpha in zip(COSTS.items(), (1.0, 0.55, 0.25), strict=True):
            widths = np.array([np.mean([_count(row[part], counter) for row in table[m]]) for m in names])
            bars = panel.barh(
                range(len(names)), widths, 0.62, left, hatch=hatch, edgecolor="#333333", lw=0.7, label=label
            )
            for bar, method in zip(bars, names, strict=True):
                bar.set_facecolor(tint(style(report, method)["color"], alpha))
            left += widths
        for y, total in enumerate(left):
            panel.annotate(amount(total), (total, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
        panel.set_title(counter.replace("_", " ").replace("flops", "FLOPs"))
        panel.set_yticks(range(len(names)), [shown_name(name, 18) for name in names])
        panel.set_xlim(0, 1.2 * max(left.max(), 1e-9))
        panel.grid(axis="y", visible=False)
        panel.set_xticks(panel.get_xticks()[:-1:2], [amount(x) for x in panel.get_xticks()[:-1:2]])
    axes[0][0].invert_yaxis()
    figure.legend(*_part_legend(), loc="outside upper left", ncols=3, fontsize=9)
    return figure


def _part_legend() -> tuple[list, list[str]]:
    """Grey boxes: a part is told by its lightness and hatching, the method by the colour."""
    from matplotlib.patches import Patch

    tones = ("#555555", "#a5a5a5", "#d8d8d8")
    boxes = [
        Patch(facecolor=t, hatch=h, edgecolor="#333333", lw=0.7)
        for t, (_, h) in zip(tones, COSTS.values(), strict=True)
    ]
    return boxes, [label for label, _ in COSTS.values()]


def _plain(counter: str) -> str:
    return counter.removeprefix("budget/")


def _count(part: dict, counter: str) -> float:
    return float(part.get(counter, part.get(f"budget/{counter}", 0.0)) or 0.0)


FIGURES = {
    "frontier": frontier,
    "proxy_gold": proxy_gold,
    "wins": wins,
    "time": time,
    "lengths": lengths,
    "cost": cost,
}
