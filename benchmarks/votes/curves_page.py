"""Ratios of votes for the same gold, and the page of benchmarks/votes/curves.py."""

from __future__ import annotations

import math
import textwrap
from datetime import date
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from benchmarks.paths import RESULTS, ROOT
from benchmarks.programs import paired
from benchmarks.result_rows import add_rows, made_with, row_of, write_page
from rlhf.files import dumps, write_atomic
from rlhf.report.figure_style import NEUTRAL, SETTINGS, STYLES, new_figure
from rlhf.text import markdown_table

PAGE = RESULTS / "2026-11-29-votes-curves.md"
FIGURE = ROOT / "docs" / "images" / "votes-curves.png"
COMMAND = "python -m benchmarks.votes.curves FOLDER"
CONTROL = "random"


def votes_for(level: float, votes: np.ndarray, gold: np.ndarray) -> float:
    """Return the votes at which a rising curve first comes to a level, between its points by a
    straight line in log votes; inf where it never does.
    """
    reached = np.flatnonzero(gold >= level)
    if not len(reached):
        return math.inf
    after = int(reached[0])
    if after == 0:
        return float(votes[0])
    part = slice(after - 1, after + 1)
    return float(np.exp(np.interp(level, gold[part], np.log(votes[part]))))


def votes_ratio(votes: np.ndarray, gold: np.ndarray, control: np.ndarray) -> float:
    """Return the votes for the highest gold that two curves both reach, over those of the control.

    Curves are made to rise first (isotonic regression). Both reach that gold by its choice, and a
    curve and its control that change places have the inverse ratio.
    """
    own, other = isotonic_regression(gold).x, isotonic_regression(control).x
    level = min(own[-1], other[-1])
    return votes_for(level, votes, own) / votes_for(level, votes, other)


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each rule's ratio of votes and its gold less that of the control, over seeds."""
    first = seeds[0]["curves"][CONTROL]
    votes = np.array([point["votes"] for point in first])
    gold = {rule: gold_of(seeds, rule) for rule in seeds[0]["curves"]}
    rules = {}
    for rule, curves in gold.items():
        found: dict[str, Any] = {"mean": curves.mean(axis=0).tolist()}
        for name in ("without_winner", "gold_gap"):
            # of the votes that the rule chose itself
            points = [point for seed in seeds for point in seed["curves"][rule][1:]]
            found[name] = float(np.mean([point[name] for point in points]))
        found["adapter"] = float(np.mean([seed["adapters"][rule] for seed in seeds]))
        if rule != CONTROL:
            both = list(zip(curves, gold[CONTROL], strict=True))
            ratios = [votes_ratio(votes, own, control) for own, control in both]
            found["log_ratio"] = paired([math.log(ratio) for ratio in ratios])
            ends = [own[-1] - control[-1] for own, control in both]
            found["at_end"] = paired(list(map(float, ends)))
            gaps = [seed["adapters"][rule] - seed["adapters"][CONTROL] for seed in seeds]
            found["adapter_gap"] = paired(gaps)
            found["less_control"] = [
                paired(list(map(float, column))) for column in (curves - gold[CONTROL]).T
            ]
        rules[rule] = found
    return {"votes": votes.tolist(), "rules": rules}


def gold_of(seeds: list[dict[str, Any]], rule: str) -> np.ndarray:
    """Return (seeds, points) gold of a rule."""
    return np.array([[point["gold"] for point in seed["curves"][rule]] for seed in seeds])


def write_all(seeds: list[dict[str, Any]], levels: dict[str, float]) -> None:
    """Write page, figure, JSON and rows.

    levels: mean gold of the answers that a policy chooses among, and of the best of each prompt.
    """
    found = summarise(seeds)
    write_atomic(RESULTS / "votes-curves.json", dumps(found | {"answers": levels}, indent=1) + "\n")
    draw(found)
    lines = [
        "# Gold against votes, by the rule that chooses the pairs",
        "",
        *introduction(len(seeds), levels),
        "",
        f"![gold against votes, and less random's](../../docs/images/{FIGURE.name})",
        "",
        *ratio_table(found),
        "",
        "Gold at so many votes, means over seeds:",
        "",
        *curve_table(found),
    ]
    write_page(PAGE, lines)
    add_rows(RESULTS / "votes.json", rows_of(found))
    print(PAGE.read_text())


def introduction(count: int, levels: dict[str, float]) -> list[str]:
    """Return how it was measured."""
    from benchmarks.votes import curves as setting

    text = f"""{date.today()}. `{COMMAND}` (resumes). **All votes are simulated**, by the sandbox's
annotators with their noise and habits. {count} run seeds; each has a pool of its own of
{setting.POOL["prompts"]} prompts with {setting.POOL["samples_per_prompt"]} answers of one SFT policy.
The first {setting.FIRST} pairs are random; from there each rule chooses {setting.ROUND} pairs a round
by {setting.MEMBERS} heads that have learnt from bootstrap samples of the votes so far, as `rlhf collect
sample --select` would. Reward models are linear heads on the SFT policy's mean hidden state (ridge
{setting.RIDGE:g}, chosen with random votes on another seed). The policy is the best of
{setting.SAMPLES} answers by a head of all votes, on {setting.PROMPTS} test prompts: the answers' mean
gold is {levels["mean"]:.3f}, the best of each prompt {levels["best"]:.3f}. A seed's curve is the mean of
{setting.REPEATS} repeats. Votes count whether or not they name a winner, the first {setting.FIRST}
too. {made_with()}"""
    method = """Ratio: votes for the highest gold that the rule and random both reach, over random's; below 1
the rule needs fewer. Curves are made to rise by isotonic regression, and points joined by straight
lines in log votes. Each seed gives one ratio; mean and 95 % t interval are those of its logarithm over
the seeds, which are paired. Both reach that gold by its choice: where one curve stays below the
other, it is the lower one's end. The adapter is the project's reward model (LoRA and head) on the
CHECKED votes of each of the first REPEATS repeats."""
    found = []
    method = method.replace("CHECKED", str(setting.CHECKED)).replace("REPEATS", str(setting.CHECKS))
    for part in (text, "", method):
        found += textwrap.fill(" ".join(part.split()), 130).splitlines() or [""]
    return found


def ratio_table(found: dict[str, Any]) -> list[str]:
    """Return ratios, gold at the end, and what the votes of each rule are like."""
    last = found["votes"][-1]
    rows = []
    for rule, own in found["rules"].items():
        cells = [rule, "1", "-", "-"]
        if rule != CONTROL:
            log = own["log_ratio"]
            middle, low, high = (f"{math.exp(log[part]):.2f}" for part in ("mean", "low", "high"))
            by_seed = " ".join(f"{math.exp(value):.2f}" for value in log["values"])
            cells = [rule, f"{middle} [{low}, {high}]", by_seed, interval(own["at_end"])]
        cells += [f"{own['without_winner']:.0%}", f"{own['gold_gap']:.2f}", f"{own['adapter']:.3f}"]
        cells.append(interval(own["adapter_gap"]) if rule != CONTROL else "-")
        rows.append(cells)
    header = ["rule", "votes for the same gold, of random's [95 %]", "by seed"]
    header += [f"gold at {last:g} votes less random's [95 %]", "votes without a winner"]
    header += ["difference in gold of its pairs", "gold with an adapter", "less random's [95 %]"]
    return markdown_table(header, rows, range(1, len(header)), escape=str)


def curve_table(found: dict[str, Any]) -> list[str]:
    rows = []
    for rule, own in found["rules"].items():
        rows.append([rule, *(f"{value:.3f}" for value in own["mean"])])
    header = ["rule", *(f"{votes:g}" for votes in found["votes"])]
    return markdown_table(header, rows, range(1, len(header)), escape=str)


def interval(value: dict[str, Any]) -> str:
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def draw(found: dict[str, Any]) -> None:
    """Draw mean gold against votes, and each rule's difference to the control with its interval."""
    import matplotlib.pyplot as plt

    votes = np.array(found["votes"])
    with plt.rc_context(SETTINGS):
        figure, axes = new_figure(9, 3.8, columns=2)
        curves, less = axes[0]
        for number, ((rule, own), style) in enumerate(
            zip(found["rules"].items(), STYLES, strict=False)
        ):
            color = NEUTRAL if rule == CONTROL else style.color
            look = {"color": color, "marker": style.marker, "ms": 4, "lw": 1.3, "label": rule}
            curves.plot(votes, own["mean"], **look)
            if rule == CONTROL:
                continue
            parts = []
            for part in ("low", "mean", "high"):
                parts.append([point[part] for point in own["less_control"]])
            low, middle, high = np.array(parts)
            # side by side, or the bars would cover each other
            places = votes + 6 * (number - 1)
            less.errorbar(places, middle, [middle - low, high - middle], **look, elinewidth=0.9)
        less.axhline(0, color=NEUTRAL, lw=1, zorder=1)
        curves.set_ylabel("gold of the best of n")
        less.set_ylabel("gold less random's, 95 % over seeds")
        for axis in (curves, less):
            axis.set_xlabel("simulated votes spent")
        curves.legend()
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(FIGURE, dpi=140, facecolor="white")


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the upper end of each rule's ratio: below 1, it needs fewer votes than random."""
    rows = []
    for rule, own in found["rules"].items():
        if rule == CONTROL:
            continue
        log = own["log_ratio"]
        low, middle, high = (math.exp(log[part]) for part in ("low", "mean", "high"))
        what = (
            f"votes for the same gold, {rule} over random, simulated votes on the sandbox: upper end "
            f"of the interval over {len(log['values'])} seeds (ratio {middle:.2f}, lower end {low:.2f})"
        )
        rows.append(row_of(f"votes-curves-{rule}", what, high, "< 1", COMMAND))
    return rows
