"""The figures of a report card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def _axes(width: float, height: float) -> tuple[Any, Any]:
    # the objects: pyplot would keep global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="tight")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def plot_reliability(calibration: dict[str, Any], path: str | Path) -> None:
    """Draw accuracy against confidence, the area of a point by its pairs, before and after the
    temperature; a calibrated model lies on the diagonal.
    """
    figure, axes = _axes(4.2, 4.2)
    axes.plot([0.5, 1.0], [0.5, 1.0], color="0.6", linestyle="--", linewidth=1, label="perfect")
    curves = [("as it is (area: pairs)", calibration, "C0"), ("with its temperature", None, "C1")]
    for label, part, colour in curves:
        part = part or calibration.get("after")
        if not part:
            continue
        bins = part["bins"]
        pairs = np.array([b["pairs"] for b in bins])
        confidence = [b["confidence"] for b in bins]
        accuracy = [b["accuracy"] for b in bins]
        sizes = 20 + 300 * pairs / pairs.sum()
        axes.plot(confidence, accuracy, color=colour, linewidth=1)
        axes.scatter(confidence, accuracy, s=sizes, color=colour, alpha=0.6, label=label)
    axes.set(
        xlabel="confidence",
        ylabel="accuracy",
        xlim=(0.49, 1.01),
        ylim=(-0.02, 1.02),
        title="Reliability",
    )
    # where it hides the fewest points
    axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=120)


def plot_curve(points: list[dict[str, Any]], path: str | Path) -> None:
    """Draw accuracy with its interval against the number of training pairs, in doublings."""
    figure, axes = _axes(5.0, 3.6)
    pairs = np.array([point["training_pairs"] for point in points], float)
    accuracy = [point["accuracy"] for point in points]
    middle = np.array([part["accuracy"] for part in accuracy])
    low = np.array([part["accuracy"] if part["low"] is None else part["low"] for part in accuracy])
    high = np.array(
        [part["accuracy"] if part["high"] is None else part["high"] for part in accuracy]
    )
    axes.errorbar(pairs, middle, yerr=[middle - low, high - middle], fmt="o-", capsize=3)
    axes.axhline(0.5, color="0.6", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs, [f"{count:.0f}" for count in pairs])
    axes.minorticks_off()
    axes.set(xlabel="training pairs", ylabel="accuracy on held-out pairs", title="Learning curve")
    figure.savefig(path, dpi=120)
