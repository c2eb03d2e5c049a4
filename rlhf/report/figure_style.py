"""What the figures of a report share: colours and markers of methods, light and dark, bars, the √KL
axis.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.files import write_atomic
from rlhf.report.format import Number, Report, initial_name, method_name, score_name
from rlhf.text import clip

# Text and lines that are not data. The SVG turns this colour into a variable, which is light on a
# dark page.
INK = "#1d2322"
THEME = "<style>:root{--ink:#1d2322}@media(prefers-color-scheme:dark){:root{--ink:#e8ecea}}</style>"
NEUTRAL = "#868d8b"
NATS = (
    0,
    0.05,
    0.25,
    0.5,
    1,
    2,
    3,
    4,
    6,
    9,
    12,
    16,
    20,
    25,
    36,
    49,
    64,
    81,
    100,
    144,
    196,
    256,
    400,
    625,
    900,
)
SETTINGS = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": NEUTRAL,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    # Names come from a file: a dollar sign is a dollar sign
    "text.parse_math": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


@dataclass(frozen=True)
class Style:
    """How a method is drawn in every figure."""

    color: str
    marker: str
    linestyle: Any


# Colours that the colour-blind can tell apart (Okabe and Ito 2008, without black, which a dark page
# hides)
STYLES = (
    Style("#0072B2", "s", "-"),
    Style("#D55E00", "^", (0, (5, 1.5))),
    Style("#009E73", "D", (0, (1, 1))),
    Style("#CC79A7", "v", (0, (5, 1, 1, 1))),
    Style("#E69F00", "P", "-."),
    Style("#56B4E9", "X", (0, (8, 3))),
    Style("#8C6D46", "*", ":"),
)


def save_svg(figure, path: Path) -> None:
    """Write an SVG that follows the colour scheme of its page."""
    figure.savefig(path, transparent=True, metadata={"Date": None})
    # matplotlib writes colours into every element, so the ink becomes a variable that the theme
    # sets
    head, mark, body = path.read_text(encoding="utf-8").partition("<defs>")
    write_atomic(path, head + THEME + mark + body.replace(INK, "var(--ink)"))


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """Return a Figure (the object: pyplot would keep global state) and its (rows, columns) axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def style_of(report: Report, method: str) -> Style:
    """Return the style of a method; the eighth looks like the first again."""
    names = [name for name in report["methods"] if name != report["initial_policy"]["method"]]
    return STYLES[names.index(method) % len(STYLES)]


def tint(colour: str, alpha: float) -> tuple[float, ...]:
    """Return the colour as it looks on white at this opacity."""
    from matplotlib.colors import to_rgb

    return tuple(1 - alpha * (1 - channel) for channel in to_rgb(colour))


def is_baseline(report: Report, method: str) -> bool:
    """Return whether a method trains nothing, as best of n does."""
    return report["methods"][method]["baseline"]


def paths_of(report: Report, method: str) -> list[tuple[float | None, list[dict]]]:
    """Return (swept value, its checkpoints by step), the one that stays nearest to the initial
    policy first.

    A baseline trains nothing and has no checkpoints: its swept values are one path.
    """
    paths: dict[float | None, list[dict]] = {}
    for point in report["points"]:
        if point["method"] == method:
            swept = None if is_baseline(report, method) else point["swept"]
            paths.setdefault(swept, []).append(point)
    for points in paths.values():
        points.sort(key=lambda point: point["step"])
    return sorted(paths.items(), key=lambda path: value_of(path[1][-1]["kl"]))


def methods_of(report: Report) -> list[str]:
    """Return the methods that have points, without the initial policy."""
    found = {point["method"] for point in report["points"]}
    found.discard(report["initial_policy"]["method"])
    # in the order of the experiment's file
    return [method for method in report["methods"] if method in found]


def trained_methods(report: Report) -> list[str]:
    """Return the methods that have points and train something."""
    return [method for method in methods_of(report) if not is_baseline(report, method)]


def difference(point: dict, score: str | None) -> dict | None:
    """Return the estimate of a point's score over the initial policy's, None where it is not known."""
    return (point["scores"].get(score) or {}).get("difference")


def has_differences(report: Report, score: str | None) -> bool:
    """Return whether any policy's score is known over the initial policy's."""
    return any(difference(point, score) for point in report["points"])


def value_of(estimate: Number | None, part: str = "estimate") -> float:
    """Return a part of an estimate, NaN where there is none (matplotlib draws nothing there)."""
    value = (estimate or {}).get(part)
    return math.nan if value is None else float(value)


def root(kl: float) -> float:
    """Return √KL; an estimate of KL may lie below 0 by chance."""
    return math.nan if math.isnan(kl) else math.sqrt(max(kl, 0.0))


def spans(
    estimates: Sequence[Number | None], scale: Callable[[float], float] = float
) -> tuple[np.ndarray, np.ndarray]:
    """Return (n,) scaled estimates and the (2, n) lengths of their bars, as matplotlib's errorbar
    takes them.
    """
    parts = []
    for part in ("low", "estimate", "high"):
        parts.append([scale(value_of(estimate, part)) for estimate in estimates])
    low, middle, high = np.array(parts, dtype=float)
    # A root of a bound below 0 may lie on the wrong side by rounding
    return middle, np.maximum([middle - low, high - middle], 0.0)


def series(points: Sequence[dict], measure: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (n,) values of a measure and their bars: "step", "kl" (its root), "length", "ended",
    or a score.
    """
    if measure == "step":
        return np.array([point["step"] for point in points]), None
    if measure == "kl":
        return spans([point["kl"] for point in points], root)
    if measure in ("length", "ended"):
        return spans([point[measure] for point in points])
    return spans([difference(point, measure) for point in points])


def draw_paths(
    axes,
    report: Report,
    method: str,
    x: str,
    y: str,
    *,
    from_zero: bool = False,
    color: str = "",
    linestyle: Any = "-",
) -> None:
    """Draw measure y against measure x, a line a swept value in its tone, the ends of training
    large.

    from_zero: start each line at the initial policy and leave out the bars. color: instead of the
    tones.
    """
    style, paths = style_of(report, method), paths_of(report, method)
    for i, (swept, points) in enumerate(paths):
        xs, x_bars = series(points, x)
        ys, y_bars = series(points, y)
        # The furthest path has the full colour
        tone = color or tint(style.color, 0.5 + 0.5 * (i + 1) / len(paths))
        last = [point["last"] for point in points]
        axes.plot(xs[last], ys[last], style.marker, color=tone, ms=7, zorder=5)
        if from_zero:
            xs, ys = np.append(0.0, xs), np.append(0.0, ys)
            x_bars = y_bars = None
        label = method_name(method) if swept is None else f"{swept:g}"
        axes.errorbar(
            xs,
            ys,
            y_bars,
            x_bars,
            color=tone,
            marker=style.marker,
            linestyle=linestyle,
            ms=4,
            lw=1.3,
            elinewidth=0.9,
            label=label,
            zorder=4,
        )


def label_x(axes, report: Report, measure: str) -> None:
    """Label the horizontal axis; one of √KL in nats, from the initial policy on."""
    if measure != "kl":
        axes.set_xlabel(axis_label(report, measure), fontsize=8.5)
        return
    low, high = axes.get_xlim()
    # A little room before 0, where the initial policy is; more where a bar reaches below it
    left = -0.03 * high
    axes.set_xlim(min(left, low) if low < 0 else left, high)
    # As many round KLs as have room beside each other
    ticks: list[float] = []
    for kl in NATS:
        has_room = not ticks or root(kl) - root(ticks[-1]) >= 0.075 * high
        if has_room and root(kl) <= high:
            ticks.append(kl)
    axes.set_xticks(list(map(root, ticks)), list(map("{:g}".format, ticks)))
    axes.set_xlabel(f"KL to {initial_name(report)}, nats (drawn in √KL)")


def axis_label(report: Report, measure: str) -> str:
    """Return "training step", or a score "over SFT"."""
    if measure == "step":
        return "training step"
    return f"{score_name(report, measure)}\nover {initial_name(report)}"


def draw_shares(axes, matrix: list, labels: list[str]) -> None:
    """Draw a matrix of win rates as a heat map with its numbers, %."""
    from matplotlib.colors import LinearSegmentedColormap

    # Orange: the row loses, white: a draw, blue: it wins; the lightness keeps its order for the
    # colour-blind
    colours = LinearSegmentedColormap.from_list(
        "wins", ["#B34700", "#E9A877", "#FFFFFF", "#86B8DB", "#00568A"]
    )
    shares = 100 * np.array([list(map(value_of, row)) for row in matrix])
    axes.imshow(shares, cmap=colours, vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        # A policy against itself has none
        if math.isnan(share):
            continue
        # White text where the field is dark, at both ends of the scale
        colour = "#ffffff" if abs(share - 50) > 36 else "#111111"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8.5, color=colour)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0, labelsize=8.5, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def draw_legend(figure, report: Report, ncols: int) -> None:
    """Name the methods with the range of their swept values, and the initial policy, above the
    figure.
    """
    from matplotlib.lines import Line2D

    handles = []
    for method in methods_of(report):
        style, label = style_of(report, method), short_name(method)
        entry = report["methods"][method]
        values = entry["swept_values"]
        if len(values) > 1:
            label += f" ({entry['swept']} {min(values):g} to {max(values):g})"
        # The lines of a method differ in tone, so its entry has the marker alone
        handles.append(
            Line2D([], [], color=style.color, marker=style.marker, linestyle="none", label=label)
        )
    handles.append(Line2D([], [], color=NEUTRAL, marker="o", label=initial_name(report)))
    figure.legend(handles=handles, loc="outside upper left", ncols=ncols)


def short_name(method: str) -> str:
    """Return the name of a method, cut where a legend has no room."""
    return clip(method_name(method), 24)
