"""The two pictures of a report, in colours the colour-blind can tell apart (Okabe and Ito), each with its marker."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

REFERENCE_COLOUR = "#555555"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("s", "^", "D", "v", "P", "X", "*")


def plot_frontier(report: dict[str, Any], path: Path) -> None:
    """Score against sqrt(sequence KL), a point with 95 % bars for each policy (axes as in Gao et al. 2022)."""
    figure, axes = _figure(6.4, 4.4)
    score = report["judge"] or next(iter(report["score_kinds"]))
    for i, (name, policy) in enumerate(report["policies"].items()):
        colour, marker = _style(i)
        kl, mean = policy["kl"], policy["scores"][score]["mean"]
        x, y = math.sqrt(max(kl["estimate"], 0.0)), mean["estimate"]
        bars = {}
        if kl["low"] is not None:
            bars["xerr"] = [[x - math.sqrt(max(kl["low"], 0.0))], [math.sqrt(max(kl["high"], 0.0)) - x]]
            bars["yerr"] = [[y - mean["low"]], [mean["high"] - y]]
        axes.errorbar(x, y, fmt=marker, ms=8, color=colour, elinewidth=1.8, **bars)
        axes.annotate(name, (x, y), (9, 7), textcoords="offset points", color=colour, fontsize=11, fontweight="bold")
    axes.margins(x=0.16, y=0.16)
    axes.set_xlim(left=-0.05 * axes.get_xlim()[1])
    axes.set_xlabel(f"distance from {report['reference']}:  √ sequence KL  (√nats)")
    axes.set_ylabel(_kind_label(report, score))
    unit = report["unit"]
    axes.set_title(f"Score against distance, {unit['groups']} test groups, bars: 95 %", fontsize=11, loc="left")
    figure.savefig(path, dpi=160)


def plot_scores(report: dict[str, Any], path: Path) -> None:
    """Each score's difference to the reference in standard deviations of the reference, with 95 % bars."""
    names = list(report["score_kinds"])
    trained = list(report["policies"])[1:]
    figure, axes = _figure(6.4, 1.5 + 0.28 * len(names) * max(len(trained), 1))
    for i, policy in enumerate(trained):
        colour, marker = _style(i + 1)
        axes.plot([], [], marker, color=colour, ms=6, label=policy)
        for row, name in enumerate(names):
            entry = report["policies"][policy]["scores"][name]
            sd, difference = report["policies"][report["reference"]]["scores"][name]["sd"], entry["difference"]
            if not sd:
                continue
            x = difference["estimate"] / sd
            bars = {}
            if difference["low"] is not None:
                bars["xerr"] = [[x - difference["low"] / sd], [difference["high"] / sd - x]]
            y = row + (i - (len(trained) - 1) / 2) * min(0.3, 0.6 / len(trained))
            axes.errorbar(x, y, fmt=marker, ms=6, color=colour, elinewidth=1.8, **bars)
    axes.axvline(0.0, color=REFERENCE_COLOUR, lw=1.4, zorder=1)
    axes.set_yticks(range(len(names)), [_kind_label(report, name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(f"difference to {report['reference']}, in its standard deviations over groups")
    if trained:
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(trained), borderaxespad=0.2)
    figure.savefig(path, dpi=160)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # the object, not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _style(i: int) -> tuple[str, str]:
    return (REFERENCE_COLOUR, "o") if i == 0 else (COLOURS[(i - 1) % len(COLOURS)], MARKERS[(i - 1) % len(MARKERS)])


def _kind_label(report: dict[str, Any], name: str) -> str:
    kind = report["score_kinds"][name]
    return name if kind == "other" else f"{kind} score" if kind == name else f"{name} ({kind})"
