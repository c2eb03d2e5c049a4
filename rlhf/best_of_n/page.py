"""The page of the best of n: best_of_n.json, best_of_n.md and its figure; and the table on the
screen.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.best_of_n.curve import Fit
from rlhf.files import dumps, write_atomic
from rlhf.report.figure_style import (
    NATS,
    NEUTRAL,
    SETTINGS,
    STYLES,
    new_figure,
    save_svg,
    spans,
)
from rlhf.report.format import number
from rlhf.text import markdown_table, with_interval

# the figure's name, beside the page
FIGURE = "best_of_n"
KL_NOTE = (
    "KL is log n - (n - 1)/n (Stiennon et al. 2020, appendix G.3), an upper bound where answers repeat or tie "
    "(Beirami et al. 2024)"
)


def write_page(result: dict[str, Any], folder: Path) -> Path:
    """Write JSON, Markdown and figure; return the place of the Markdown."""
    write_atomic(folder / "best_of_n.json", dumps(result, indent=2) + "\n")
    draw(result, folder)
    page = folder / "best_of_n.md"
    write_atomic(page, "\n".join(markdown(result)) + "\n")
    return page


def print_table(result: dict[str, Any]) -> None:
    """Print the curve and what follows from it."""
    names = ["proxy", *result["turning"]]
    print(f"{'n':>6} {'KL':>6}" + columns(names))
    for row in result["curve"]:
        print(f"{row['n']:6d} {row['kl']:6.2f}" + columns(means(row, names)))
    print()
    for name, turning in result["turning"].items():
        print(sentence(name, turning))


def columns(cells: list[str]) -> str:
    """Return cells of the table on the screen, each wide enough for an interval."""
    return "".join(map("{:>28}".format, cells))


def means(row: dict[str, Any], names: list[str]) -> list[str]:
    """Return the mean of each of these scores at one n, with its interval."""
    return [interval(row["scores"][name]["mean"]) for name in names]


def interval(estimate: dict[str, float | None]) -> str:
    """Return "0.612 [0.590, 0.634]"."""
    return with_interval(estimate, number)


def sentence(name: str, turning: dict[str, Any]) -> str:
    """Say where a score turns down, or that it does not."""
    n, kl, last = turning["n"], turning["kl"], turning["last"]
    # n for people, KL for comparing it with a run of PPO
    place = (
        f"n = {n['estimate']} [{n['low']}, {n['high']}], "
        f"KL {kl['estimate']:.2f} [{kl['low']:.2f}, {kl['high']:.2f}] nats"
    )
    fall = f"from its peak to n = {last} it changes by {interval(turning['fall'])}"
    if turning["outcome"] == "turns down":
        return f"{name}: turns down at {place}; {fall}."
    if turning["outcome"] == "undecided":
        return f"{name}: highest at {place}; too few groups of prompts to tell whether it falls."
    return f"{name}: a turn is not within n = {last}: highest at {place}; {fall}."


def markdown(result: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    names = ["proxy", *result["turning"]]
    # what follows from the curve comes before it
    lines = [f"# Best of n by {Path(result['reward']).name}", ""]
    for name, turning in result["turning"].items():
        lines.append(f"- {sentence(name, turning)}")
    lines += [
        "",
        f"![the proxy and the scores that count against KL]({FIGURE}.png)",
        "",
        f"{result['samples']} answers of `{result['policy']}` to each of {result['prompts']} test prompts in "
        f"{result['groups']} groups, temperature {result['sampling']['temperature']:g}. The value at n is the mean "
        "over all subsets of n answers (Nakano et al. 2021, appendix I); 95 % over groups. "
        f"{KL_NOTE}; {result['repeated']:.1%} of the answers repeat another one to their prompt.",
        "",
    ]
    lines += [scorer_line(result["scorers"]), ""]
    rows = []
    for row in result["curve"]:
        rows.append([row["n"], f"{row['kl']:.3f}", *means(row, names)])
    header = ["n", "KL, nats", *names]
    lines += markdown_table(header, rows, right=range(len(header)))
    return [*lines, "", *law_lines(result)]


def scorer_line(specs: list[dict[str, Any]]) -> str:
    """Say which scorer each name stands for."""
    said = []
    for spec in specs:
        given = dict(spec)
        name = given.pop("name")
        said.append(f"{name}: `{dumps(given)}`")
    return "; ".join(said) + "."


def law_lines(result: dict[str, Any]) -> list[str]:
    """Return the table of the fitted laws."""
    rows = []
    for name, law in result["laws"].items():
        if law is None:
            continue
        # the law is in d = √KL, the page in KL; a peak that is not known stays None
        peak_kl = {key: value and value**2 for key, value in law["peak"].items()}
        rows.append(
            [
                name,
                interval(law["alpha"]),
                interval(law["beta"]),
                number(law["rmse"]),
                interval(peak_kl),
            ]
        )
    if not rows:
        return []
    header = ["score", "alpha", "beta", "rmse", "KL at its peak"]
    return [
        "The law R(d) = d (alpha - beta d), d = √KL (Gao et al. 2022), fitted to the gains over n = 1:",
        "",
        *markdown_table(header, rows, right=range(1, 5)),
    ]


def draw(result: dict[str, Any], folder: Path) -> None:
    """Draw the gain of every score over n = 1 against √KL, as PNG and SVG."""
    import matplotlib

    names = ["proxy", *result["turning"]]
    with matplotlib.rc_context(SETTINGS):
        figure, axes = new_figure(3.4 * len(names), 3.2, 1, len(names))
        for axis, name, style in zip(axes[0], names, STYLES * len(names), strict=False):
            draw_score(axis, result, name, style.color)
        figure.savefig(folder / f"{FIGURE}.png", dpi=160, facecolor="white")
        save_svg(figure, folder / f"{FIGURE}.svg")


def draw_score(axis, result: dict[str, Any], name: str, color: str) -> None:
    """Draw one score with its interval, its turning point and its law."""
    rows = result["curve"]
    d = np.sqrt([row["kl"] for row in rows])
    gain, (below, above) = spans([row["scores"][name]["gain"] for row in rows])
    axis.fill_between(d, gain - below, gain + above, color=color, alpha=0.2, lw=0)
    axis.plot(d, gain, "o-", color=color, ms=4)
    axis.axhline(0, color=NEUTRAL, lw=1, zorder=1)

    turning = result["turning"].get(name)
    if turning is not None and turning["outcome"] == "turns down":
        kl = turning["kl"]
        axis.axvspan(math.sqrt(kl["low"]), math.sqrt(kl["high"]), color=NEUTRAL, alpha=0.2, lw=0)
        axis.axvline(math.sqrt(kl["estimate"]), color=NEUTRAL, lw=1)
    law = result["laws"].get(name)
    if law is not None:
        fit = Fit("best_of_n", law["alpha"]["estimate"], law["beta"]["estimate"], law["rmse"])
        fine = np.linspace(0, d[-1], 100)
        axis.plot(fine, fit(fine), "--", color=NEUTRAL, lw=1)
    # the small ones would lie on each other
    ticks = [kl for kl in NATS if math.sqrt(kl) <= d[-1] and kl not in (0.05, 0.5)]
    axis.set_xticks(np.sqrt(ticks), list(map("{:g}".format, ticks)))
    axis.set_xlabel("KL, nats (drawn in √KL)", fontsize=8.5)
    axis.set_title(f"{name}, over n = 1")
