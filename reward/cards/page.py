"""The files of a report card: card.json, card.md and its figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from reward.cards.verdict import SLICES, verdict
from rlhf.text import clip, markdown_table


def write_card(card: dict[str, Any], directory: str | Path) -> Path:
    """Add its verdict to the card, and write card.json, card.md and the figures into `directory`.

    Returns the path of card.md.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    card |= verdict(card)
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    (directory / "card.json").write_text(text, encoding="utf-8")
    plot_reliability(card["calibration"], directory / "reliability.png")
    if card.get("learning_curve"):
        plot_curve(card["learning_curve"], directory / "learning_curve.png")
    path = directory / "card.md"
    path.write_text(card_text(card), encoding="utf-8")
    return path


def card_text(card: dict[str, Any]) -> str:
    """Return the card as Markdown."""
    sections = (
        _verdict,
        _accuracy,
        _baselines,
        _on_policy,
        _people,
        _bias,
        _calibration,
        _curve,
        _benchmark,
        _scores,
        _mistakes,
    )
    parts = []
    for section in sections:
        text = section(card)
        # a card without what a section is about has no such section
        if text:
            parts.append(text)
    return "\n\n".join(parts) + "\n"


def _verdict(card: dict[str, Any]) -> str:
    lines = [f"# Reward model report card: {card['title']}", "", f"**Verdict: {card['verdict']}.**"]
    if card["reasons"]:
        lines.append("")
    for reason in card["reasons"]:
        sentence = reason["sentence"]
        lines.append(f"- {reason['severity']}: {sentence[0].upper()}{sentence[1:]}.")
    return "\n".join(lines)


def _accuracy(card: dict[str, Any]) -> str:
    length = card["length"]
    parts = {
        "**all pairs**": card["accuracy"],
        "chosen is longer": length["chosen_longer"],
        "chosen is shorter": length["chosen_shorter"],
        "same length": length["same_length"],
    }
    for key, field in SLICES.items():
        # one part of all pairs says nothing more
        shown = card[key] if len(card[key]) > 1 else {}
        for name, part in shown.items():
            parts[f"{field} {name}"] = part
    rows = [_accuracy_cells(name, part) for name, part in parts.items()]
    table = _table(("", "accuracy", "95 % interval", "n", "pairs"), rows)
    return f"""\
{card["pairs"]} pairs in {card["groups"]} groups; intervals are 95 % and count groups (n), not pairs.

{table}

A tie counts as half; {card["ties"]} pairs tied.{_row_counts(card.get("rows", {}))}"""


def _accuracy_cells(name: str, part: dict[str, Any]) -> tuple:
    if part["accuracy"] is None:
        return name, "-", "-", 0, 0
    return name, f"{part['accuracy']:.3f}", _interval(part), part["n"], part["pairs"]


def _interval(part: dict[str, Any], form: str = ".3f") -> str:
    if part["low"] is None:
        return "-"
    return f"{part['low']:{form}} to {part['high']:{form}}"


def _row_counts(splits: dict[str, Any]) -> str:
    text = "\n" if splits else ""
    for split, rows in splits.items():
        reasons = "".join(f"; {count}: {reason}" for reason, count in rows["dropped"].items())
        text += f"\nRows of {split}: {rows['used']} of {rows['read']} are used{reasons}."
    return text


def _baselines(card: dict[str, Any]) -> str:
    rows = []
    for part in card["baselines"].values():
        accuracy, difference = part["accuracy"], part["difference"]
        mean = difference["mean"]
        cells = ["-", "-"] if mean is None else [f"{mean:+.3f}", _interval(difference, "+.3f")]
        rows.append((part["rule"], f"{accuracy['accuracy']:.3f}", _interval(accuracy), *cells))
    header = ("rule", "accuracy", "95 % interval", "model - rule", "95 % interval")
    return f"""\
## Baselines

A model is worth its cost where its accuracy less the rule's, on the same pairs, lies above 0.

{_table(header, rows)}"""


def _on_policy(card: dict[str, Any]) -> str:
    part = card.get("on_policy")
    if part is None:
        return ""
    if part["labels"] == "held-out":
        return f"""\
## On the policy's answers

The held-out pairs are answers of the policy that RL starts from ({part["source"]})."""
    rows = [
        _accuracy_cells("held-out pairs", part["held_out"]),
        _accuracy_cells("**answers of the policy**", part["accuracy"]),
    ]
    difference = part["difference"]
    calibrated = part["calibration"]
    return f"""\
## On the policy's answers

Pairs of {part["source"]} on prompts that the model was not trained on; both are labelled by {part["labels"]}.

{_table(("", "accuracy", "95 % interval", "n", "pairs"), rows)}

- difference: {difference["mean"]:+.3f} ({_interval(difference, "+.3f")})
- log-loss at the temperature of the held-out pairs: {calibrated["after"]["log_loss"]:.3f} (always one half: 0.693)
- raw scores: mean {part["scores"]["mean"]:.3f}, deviation {part["scores"]["std"]:.3f} (held-out answers: \
{card["scores"]["chosen"]["mean"]:.3f} chosen, {card["scores"]["rejected"]["mean"]:.3f} rejected)
- correlation of score gap and length gap: {_correlation(part["length_correlation"])}"""


def _people(card: dict[str, Any]) -> str:
    part = card.get("ceiling")
    if part is None:
        return ""
    rows = [
        _accuracy_cells("another person", part["agreement"]),
        _accuracy_cells("the model", part["model"]),
    ]
    difference = part["difference"]
    return f"""\
## Agreement of people

Who foresees a person's choice how often, on the pairs that several people judged (each pair counts once):

{_table(("", "right", "95 % interval", "n", "pairs"), rows)}

Difference: {difference["mean"]:+.3f} ({_interval(difference, "+.3f")})."""


BIAS = {
    "labels_length": "labels: the longer answer, log-odds for each ten tokens",
    "labels_position": "labels: the answer shown first, log-odds",
    "score_length": "score: the longer answer, raw score for each ten tokens",
    "score_overuse": "score: the longer answer more than people do, log-odds for each ten tokens",
}


def _bias(card: dict[str, Any]) -> str:
    length = card["length"]
    rows = []
    for test in card["bias"]:
        p = "-" if test["p"] is None else f"{test['p']:.2g}"
        more = f" ({test['share']:.1%} of the rest)" if "share" in test else ""
        cells = (f"{test['effect']:+.3f}{more}", _interval(test, "+.3f"), p)
        found = "**yes**" if test["found"] else "no"
        rows.append((BIAS[test["kind"]], test["beyond"], *cells, found))
    header = ("preference for", "beyond", "effect", "95 % interval", "p", "bias")
    table = _table(header, rows) if rows else "Too few groups for a test."
    rule = length["baseline"]
    return f"""\
## Length and position

{table}

- length alone ("the {rule["rule"]} is better", the better rule on these pairs): {rule["accuracy"]:.3f}
- correlation of score and length: {_correlation(length["correlation"])}
- correlation of score gap and length gap: {_correlation(length["gap_correlation"])}
- mean tokens: chosen {length["mean_chosen"]:.1f}, rejected {length["mean_rejected"]:.1f}"""


def _correlation(value: float | None) -> str:
    return "not defined (no variation)" if value is None else f"{value:+.3f}"


def _calibration(card: dict[str, Any]) -> str:
    before = card["calibration"]
    after, temperature = before["after"], before["temperature"]
    rows = []
    # before and after its temperature
    measures = ("log_loss", "brier", "ece", "ece_expected")
    for name, part in (("sigmoid(gap)", before), ("sigmoid(gap / temperature)", after)):
        # None: too few groups to fit one on others
        if part is not None:
            rows.append((name, *map("{:.4f}".format, map(part.get, measures))))
    header = ("probability", "log-loss", "Brier score", "ECE", "ECE of a calibrated model")
    bins = []
    for entry in before["bins"]:
        place = f"{entry['from']:.2f} to {entry['to']:.2f}"
        confidence, accuracy = f"{entry['confidence']:.3f}", f"{entry['accuracy']:.3f}"
        bins.append((place, entry["pairs"], confidence, accuracy))
    shown = "infinite" if temperature is None else f"{temperature:.3f}"
    fitted = "each fifth of the groups with the temperature of the others"
    if before["temperature_from"] != "these pairs":
        fitted = "fitted on other pairs"
    return f"""\
## Calibration

Temperature {shown} ({fitted}). It turns score gaps into probabilities; `reward.json` keeps that of the run's held-out
pairs. The score that PPO learns from does not contain it. Always one half: log-loss 0.693, Brier score 0.25.

{_table(header, rows)}

![reliability](reliability.png)

{_table(("confidence", "pairs", "mean confidence", "accuracy"), bins)}"""


def _curve(card: dict[str, Any]) -> str:
    points = card.get("learning_curve")
    if not points:
        return ""
    rows = []
    for point in points:
        accuracy = point["accuracy"]
        rows.append(
            (
                point["training_pairs"],
                f"{accuracy['accuracy']:.3f}",
                _interval(accuracy),
                f"{point['log_loss']:.3f}",
            )
        )
    header = ("training pairs", "accuracy", "95 % interval", "log-loss at its temperature")
    gain = points[-1]["gain"]
    return f"""\
## Learning curve

The same held-out pairs, judged by models that were trained on a part of the pairs.

{_table(header, rows)}

The last step from {points[-2]["training_pairs"]} to {points[-1]["training_pairs"]} pairs: {gain["mean"]:+.3f} \
({_interval(gain, "+.3f")}).

![learning curve](learning_curve.png)"""


def _benchmark(card: dict[str, Any]) -> str:
    part = card.get("rewardbench")
    if part is None:
        return ""
    rows = []
    for name, subset in part["subsets"].items():
        rows.append((name, f"{subset['score']:.3f}", _interval(subset), subset["prompts"]))
    left_out = f"; {part['left_out']} rows were too long" if part["left_out"] else ""
    return f"""\
## RewardBench 2

Mean over subsets {part["score"]:.3f} ({part["source"]}{left_out}). A subset is the share of prompts whose best answer
of four scores highest (by chance 0.25); Ties is the benchmark's own sum (arXiv 2506.01937).

{_table(("subset", "score", "95 % interval", "prompts"), rows)}"""


def _scores(card: dict[str, Any]) -> str:
    scores, rows = card["scores"], []
    for side, values in scores.items():
        rows.append((side, *map("{:.3f}".format, values.values())))
    return f"## Scores (raw)\n\n{_table(('', *scores['chosen']), rows)}"


def _mistakes(card: dict[str, Any]) -> str:
    lines = ["## Surest mistakes", ""] if card["mistakes"] else []
    for mistake in card["mistakes"]:
        lines.append(f"- gap {mistake['gap']:.2f}: {clip(mistake['prompt'], 160)}")
        lines.append(f"  - chosen: {clip(mistake['chosen'], 160)}")
        lines.append(f"  - rejected: {clip(mistake['rejected'], 160)}")
    return "\n".join(lines)


def _table(header: tuple, rows: list[tuple]) -> str:
    return "\n".join(markdown_table(header, rows))


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
        pairs, confidence, accuracy = [], [], []
        for entry in part["bins"]:
            pairs.append(entry["pairs"])
            confidence.append(entry["confidence"])
            accuracy.append(entry["accuracy"])
        # areas: a large bin says more
        sizes = 20 + 300 * np.array(pairs) / sum(pairs)
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
    middle, below, above = [], [], []
    for point in points:
        part = point["accuracy"]
        middle.append(part["accuracy"])
        # no bar where there is no interval
        has_interval = part["low"] is not None
        below.append(part["accuracy"] - part["low"] if has_interval else 0.0)
        above.append(part["high"] - part["accuracy"] if has_interval else 0.0)
    axes.errorbar(pairs, middle, yerr=[below, above], fmt="o-", capsize=3)
    axes.axhline(0.5, color="0.6", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs, list(map("{:.0f}".format, pairs)))
    axes.minorticks_off()
    axes.set(xlabel="training pairs", ylabel="accuracy on held-out pairs", title="Learning curve")
    figure.savefig(path, dpi=120)
