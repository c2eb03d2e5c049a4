"""What the figures share: colours that the colour-blind can tell apart (Okabe and Ito), bars, the √KL axis, labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rlhf.compare.phrases import Report, name

ALPHA = 0.05  # below this, after Holm, a mark is full
FOUNDATION = "#555555"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("s", "^", "D", "v", "P", "X", "*")
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), "-.", (0, (8, 3)), ":")
NATS = (0, 0.05, 0.25, 0.5, 1, 2, 3, 4, 6, 9, 12, 16, 20, 25, 36, 49, 64, 81, 100, 144, 196, 256, 400, 625, 900)
LOOK = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # names come from a file: a dollar sign is a dollar sign
}


PARTS = {  # what a report may lack: without a judge, or of an experiment that was cut short
    "outliers": [],
    "claims": {"count": 0, "method": "Holm 1979", "alpha": 0.05},
    "curves": {},
    "frontier": [],
    "wins": None,
    "tuned": {"methods": {}, "rows": []},
    "overoptimisation": [],
    "budget": {"match": None, "rows": [], "matched": None},
    "power": None,
    "samples": [],
    "sentences": [],
    "meta": {},
}


def complete(report: Report) -> Report:
    """The report with empty parts where it has none."""
    return report | {part: empty for part, empty in PARTS.items() if report.get(part) is None}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A Figure (the object, not pyplot: no global state, no display) and its (rows, columns) axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def style(report: dict[str, Any], method: str) -> dict[str, Any]:
    """Colour, marker and line of a method: the same in every figure."""
    names = list(report["methods"])
    names = [name for name in names if name != report["foundation"].get("method", "sft")]
    i = names.index(method) if method in names else len(names)
    return {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "linestyle": LINES[i % 7]}


def tint(colour: str, alpha: float) -> tuple[float, ...]:
    """The colour as it looks on white at this opacity."""
    from matplotlib.colors import to_rgb

    return tuple(1 - alpha * (1 - c) for c in to_rgb(colour))


def shade(colour: str, i: int, n: int) -> tuple[float, ...]:
    """The i-th of n tones of a colour, the darkest last; all dark enough to read on white."""
    return tint(colour, 0.5 + 0.5 * (i + 1) / n)


def main_score(report: Report) -> str | None:
    """The judge; without one the first proxy, else the first score."""
    kinds = report["score_kinds"]
    proxies = [name for name, kind in kinds.items() if kind == "proxy"]
    return report["judge"] or next(iter([*proxies, *kinds]), None)


def score_label(report: Report, score: str) -> str:
    kind = report["score_kinds"].get(score, "other")
    return short(score) if kind == "other" else f"{kind} score" if kind == score else f"{short(score)} ({kind})"


def paths_of(report: Report, method: str) -> list[tuple[float | None, list[dict]]]:
    """(strength, its checkpoints by step), the one that stays nearest to the foundation first."""
    table: dict[float | None, list[dict]] = {}
    for point in report["points"]:
        if point["method"] == method:
            table.setdefault(point["swept"], []).append(point)
    paths = [(swept, sorted(points, key=lambda p: p["step"])) for swept, points in table.items()]
    return sorted(paths, key=lambda path: -math.inf if math.isnan(k := number(path[1][-1]["kl"])) else k)


def methods_of(report: Report) -> list[str]:
    found = {p["method"] for p in report["points"]} - {report["foundation"].get("method", "sft")}
    return [name for name in report["methods"] if name in found]


def trained_of(report: Report) -> list[str]:
    return [name for name in methods_of(report) if not report["methods"][name].get("baseline")]


def reference(report: Report) -> str:
    """The foundation's name."""
    return shown_name(report["foundation"].get("method", "sft"))


def shown_name(method: str, length: int = 24) -> str:
    return short(name(method), length)


def difference(point: dict, score: str) -> dict | None:
    return (point["scores"].get(score) or {}).get("difference")


def strength_text(swept: float | None) -> str:
    return "" if swept is None else f"{swept:g}"


def number(estimate: dict | None, part: str = "estimate") -> float:
    """A part of an Estimate's dict, NaN where there is none (which matplotlib does not draw)."""
    value = (estimate or {}).get(part)
    return math.nan if value is None else float(value)


def root(kl: float) -> float:
    """√KL; an estimate of KL may lie below 0 by chance."""
    return math.nan if math.isnan(kl) else math.sqrt(max(kl, 0.0))


def spans(estimates: Sequence[dict | None], scale: Callable[[float], float] = float) -> tuple[np.ndarray, np.ndarray]:
    """(n,) scaled estimates and the (2, n) lengths of their bars, as matplotlib's errorbar takes them."""
    middle, low, high = (
        np.array([scale(number(e, part)) for e in estimates], dtype=float) for part in ("estimate", "low", "high")
    )
    return middle, np.maximum(np.array([middle - low, high - middle]), 0.0)


def nats_axis(axes, remark: str = "") -> None:
    """Label a √KL axis in nats, and begin it at the foundation."""
    low, high = axes.get_xlim()
    axes.set_xlim(min(0.0, low) if low < 0 else -0.03 * high, high)
    fits, last = [], -math.inf
    for nats in NATS:
        at = math.sqrt(nats)
        if at <= high and at - last >= 0.075 * high:
            fits.append(nats)
            last = at
    axes.set_xticks([math.sqrt(n) for n in fits], [f"{n:g}" for n in fits])
    axes.set_xlabel(f"KL to the foundation, nats (drawn in √KL{remark})")


def short(text: str, length: int = 24) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def end_labels(axes, items: Iterable[tuple[float, float, str, Any]], size: float = 8.0) -> None:
    """Write each (x, y, text, colour) at the right edge, spread so that none covers another, a thin line to (x, y).

    The limits of the axes must stand already.
    """
    items = sorted((i for i in items if math.isfinite(i[0]) and math.isfinite(i[1])), key=lambda item: item[1])
    if not items:
        return
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height * 72 / axes.figure.dpi  # points
    gap = 1.25 * size / height
    wanted = [(item[1] - low) / (high - low) for item in items]
    for (x, y, text, colour), at in zip(items, spread(wanted, gap), strict=True):
        axes.annotate(
            text,
            (x, y),
            (1.02, at),
            textcoords="axes fraction",
            color=colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 2},
        )


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Sorted positions moved as little as needed (least squares) to be `gap` apart.

    Neighbours that are too close become a block around their own mean, as in isotonic regression.
    """
    blocks: list[list[float]] = []  # [sum of wanted - offset, count]
    for value in wanted:
        blocks.append([value, 1])
        while len(blocks) > 1 and _foot(blocks[-2]) + gap * blocks[-2][1] > _foot(blocks[-1]):
            total, count = blocks.pop()
            before = blocks[-1]
            before[0] += total - gap * before[1] * count
            before[1] += count
    return [_foot(block) + gap * k for block in blocks for k in range(int(block[1]))]


def _foot(block: list[float]) -> float:
    return block[0] / block[1]


def place_labels(axes, items: Sequence[tuple[float, float, str, Any]], taken: Sequence, size: float = 8.0) -> None:
    """Write each (x, y, text, colour) beside its point, where it covers least: other labels, points, the frame.

    taken: (x, y) of all that is drawn. The limits of the axes must stand already.
    """
    frame = axes.get_window_extent()
    dpi = axes.figure.dpi
    unit = size * dpi / 72
    marks = np.array([p for p in taken if math.isfinite(p[0]) and math.isfinite(p[1])]).reshape(-1, 2)
    marks = axes.transData.transform(marks)
    placed: list[tuple[float, float, float, float]] = []
    for x, y, text, colour in items:
        if not (text and math.isfinite(x) and math.isfinite(y)):
            continue
        px, py = axes.transData.transform((x, y))
        w, h = 0.62 * unit * len(text), 1.15 * unit
        best = None
        for far in (0.9, 1.6, 2.6, 3.8):
            for dx, dy in ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1)):
                left = px + dx * far * unit - (w if dx < 0 else w / 2 if dx == 0 else 0)
                bottom = py + dy * far * unit - h / 2
                box = (left, bottom, left + w, bottom + h)
                cost = far + 60 * sum(_common(box, b) for b in placed) / (w * h)
                cost += 4 * np.sum(
                    np.all((marks > (left - 4, bottom - 4)) & (marks < (box[2] + 4, box[3] + 4)), axis=1)
                )
                outside = max(frame.x0 - left, left + w - frame.x1, frame.y0 - bottom, bottom + h - frame.y1, 0)
                cost += 100 * (outside > 0)
                if best is None or cost < best[0]:
                    best = (cost, box, far)
        placed.append(best[1])
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 0, "shrinkB": 3} if best[2] > 1 else None
        at = ((best[1][0] - px) * 72 / dpi, (best[1][1] - py) * 72 / dpi)
        label = axes.annotate(
            text, (x, y), at, textcoords="offset points", color=colour, fontsize=size, va="bottom", arrowprops=line
        )
        label.set_in_layout(False)


def along(x: Sequence[float], y: Sequence[float], parts: int = 8) -> list[tuple[float, float]]:
    """Points on the line through all (x, y): what labels should not cover."""
    at = np.linspace(0, len(x) - 1, parts * (len(x) - 1) + 1)
    return list(zip(np.interp(at, range(len(x)), x), np.interp(at, range(len(y)), y), strict=True))


def amount(x: float) -> str:
    """1234567 -> 1.23M."""
    for limit, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{letter}"
    return f"{x:.3g}"


def _common(a: tuple, b: tuple) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
