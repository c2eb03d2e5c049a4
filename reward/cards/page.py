"""The files of a report card: card.json, card.md and reliability.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.text import clip, markdown_table


def write_card(card: dict[str, Any], directory: str | Path) -> Path:
    """Write card.json, card.md and reliability.png into `directory`. Returns the path of card.md."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "card.json").write_text(
        json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    plot_reliability(card["calibration"]["bins"], directory / "reliability.png")
    path = directory / "card.md"
    path.write_text(card_text(card), encoding="utf-8")
    return path


TEMPLATE = """\
# Reward model report card: {title}

{pairs} pairs in {groups} groups; intervals are 95 % and count groups (n), not pairs.

{accuracy_table}

A tie counts as half; {ties} pairs tied.
{row_counts}
## Length

- length alone ("the {baseline[rule]} is better", the better rule on these pairs): {baseline[accuracy]:.3f}
- correlation of score and length: {correlation}
- correlation of score gap and length gap: {gap_correlation}
- mean tokens: chosen {length[mean_chosen]:.1f}, rejected {length[mean_rejected]:.1f}

## Calibration

Brier score {calibration[brier]:.4f} (always one half: 0.25), expected calibration error {calibration[ece]:.4f} \
(a calibrated model with as many pairs: {calibration[ece_expected]:.4f}).

![reliability](reliability.png)

{bin_table}

## Scores (raw)

{score_table}
"""


def card_text(card: dict[str, Any]) -> str:
    """Return the card as Markdown."""
    length, calibrated, scores = card["length"], card["calibration"], card["scores"]
    parts = {
        "**all pairs**": card["accuracy"],
        "chosen is longer": length["chosen_longer"],
        "chosen is shorter": length["chosen_shorter"],
        "same length": length["same_length"],
    }
    parts |= {f"source {name}": part for name, part in card["by_source"].items()}
    parts |= {f"annotator {name}": part for name, part in card["by_annotator"].items()}
    accuracy_rows = [_accuracy_cells(name, part) for name, part in parts.items()]

    bin_rows = []
    for b in calibrated["bins"]:
        confidence, accuracy = f"{b['confidence']:.3f}", f"{b['accuracy']:.3f}"
        bin_rows.append((f"{b['from']:.2f} to {b['to']:.2f}", b["pairs"], confidence, accuracy))
    score_rows = [(side, *map("{:.3f}".format, values.values())) for side, values in scores.items()]

    return TEMPLATE.format(
        **card,
        baseline=length["baseline"],
        correlation=_correlation(length["correlation"]),
        gap_correlation=_correlation(length["gap_correlation"]),
        row_counts=_row_counts(card.get("rows", {})),
        accuracy_table="\n".join(
            markdown_table(("", "accuracy", "95 % interval", "n", "pairs"), accuracy_rows)
        ),
        bin_table="\n".join(
            markdown_table(("confidence", "pairs", "mean confidence", "accuracy"), bin_rows)
        ),
        score_table="\n".join(markdown_table(("", *scores["chosen"]), score_rows)),
    ) + _mistakes(card["mistakes"])


def _accuracy_cells(name: str, part: dict[str, Any]) -> tuple:
    if part["accuracy"] is None:
        return name, "-", "-", 0, 0
    interval = "-" if part["low"] is None else f"{part['low']:.3f} to {part['high']:.3f}"
    return name, f"{part['accuracy']:.3f}", interval, part["n"], part["pairs"]


def _correlation(value: float | None) -> str:
    return "not defined (no variation)" if value is None else f"{value:+.3f}"


def _row_counts(splits: dict[str, Any]) -> str:
    text = ""
    for split, rows in splits.items():
        reasons = "".join(f"; {count}: {reason}" for reason, count in rows["dropped"].items())
        text += f"Rows of {split}: {rows['used']} of {rows['read']} are used{reasons}.\n"
    return text


def _mistakes(mistakes: list[dict[str, Any]]) -> str:
    text = "\n## Surest mistakes\n\n" if mistakes else ""
    for m in mistakes:
        prompt, chosen, rejected = (clip(m[key], 160) for key in ("prompt", "chosen", "rejected"))
        text += f"- gap {m['gap']:.2f}: {prompt}\n  - chosen: {chosen}\n  - rejected: {rejected}\n"
    return text


def plot_reliability(bins: list[dict[str, Any]], path: str | Path) -> None:
    """Draw accuracy against confidence, the area of a point by its pairs; a calibrated model lies
    on the diagonal.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.2), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0.5, 1.0], [0.5, 1.0], color="0.6", linestyle="--", linewidth=1, label="perfect")
    pairs = np.array([b["pairs"] for b in bins])
    confidence = [b["confidence"] for b in bins]
    accuracy = [b["accuracy"] for b in bins]
    axes.plot(confidence, accuracy, color="C0", linewidth=1)
    axes.scatter(
        confidence,
        accuracy,
        s=20 + 300 * pairs / pairs.sum(),
        color="C0",
        alpha=0.6,
        label="this model (area: pairs)",
    )
    axes.set(
        xlabel="confidence",
        ylabel="accuracy",
        xlim=(0.49, 1.01),
        ylim=(-0.02, 1.02),
        title="Reliability",
    )
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
