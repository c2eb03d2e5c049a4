"""The report card of a reward model on held-out pairs: accuracy with intervals, calibration, biases.

    card = report_card(pairs, chosen_scores, rejected_scores, chosen_lengths, rejected_lengths)
    write_card(card, output_dir)       # card.json, card.md, reliability.png

Pairs of one group are not independent (paraphrases share their answers), so intervals are over groups, and the `n` of
an interval is the number of groups. Scores are raw: P(chosen is better) = sigmoid(score gap).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.records import Preference
from rlhf.stats import jackknife_interval

LENGTH_DETECTOR = math.sqrt(0.5)  # a correlation by which length explains half of the variance
MAX_SLICES = 20  # sources or annotators listed, the largest first


def report_card(
    pairs: Sequence[Preference],
    chosen_scores: Sequence[float],
    rejected_scores: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    *,
    title: str = "held-out pairs",
) -> dict[str, Any]:
    """Everything the card says, as plain numbers (None where a number is not defined).

    All arguments have one entry per pair; lengths are in tokens including the end token.
    Raises ValueError if there are no pairs, the counts differ, or a score is not finite.
    """
    chosen, rejected = np.asarray(chosen_scores, float), np.asarray(rejected_scores, float)
    long_c, long_r = np.asarray(chosen_lengths, float), np.asarray(rejected_lengths, float)
    if not len(pairs) or any(len(x) != len(pairs) for x in (chosen, rejected, long_c, long_r)):
        raise ValueError(f"{len(pairs)} pairs, {len(chosen)} and {len(rejected)} scores: one of each per pair expected")
    if not (np.isfinite(chosen).all() and np.isfinite(rejected).all()):
        raise ValueError("a score is not finite")
    gaps, groups = chosen - rejected, [p.group for p in pairs]
    right = pair_accuracy(gaps)

    def part(rows: np.ndarray) -> dict[str, Any]:
        return accuracy_with_interval(right[rows], [groups[i] for i in np.flatnonzero(rows)])

    def by(field: str) -> dict[str, Any]:
        values = np.array([str(getattr(p, field)) for p in pairs])
        names, counts = np.unique([v for v in values if v != "None"], return_counts=True)
        largest = names[np.argsort(-counts, kind="stable")][:MAX_SLICES]
        return {str(name): part(values == name) for name in largest}

    everything = np.ones(len(pairs), bool)
    return {
        "title": title,
        "pairs": len(pairs),
        "groups": len(set(groups)),
        "accuracy": part(everything),
        "ties": int((gaps == 0).sum()),
        "calibration": calibration(gaps),
        "length": length_bias(gaps, chosen, rejected, long_c, long_r, part),
        "by_source": by("source"),
        "by_annotator": by("annotator"),
        "scores": {"chosen": distribution(chosen), "rejected": distribution(rejected), "gap": distribution(gaps)},
        "mistakes": worst_mistakes(pairs, gaps),
    }


def pair_accuracy(gaps: np.ndarray) -> np.ndarray:
    """(n,) 1 where the chosen response scores higher, 0 where lower, one half at a tie."""
    return (gaps > 0) + 0.5 * (gaps == 0)


def accuracy_with_interval(right: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    """Mean of `right` over pairs, with its 95 % interval over groups (`jackknife_interval`, within 0 and 1).

    With one group, or none, there is no interval (None).
    """
    right = np.asarray(right, float)
    if not len(right):
        return {"accuracy": None, "low": None, "high": None, "n": 0, "pairs": 0}
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, right), np.bincount(index)
    n, mean = len(counts), float(right.mean())
    result = {"accuracy": mean, "low": None, "high": None, "n": n, "pairs": len(right)}
    if n > 1:
        without = (sums.sum() - sums) / (counts.sum() - counts)
        result["low"], result["high"], _ = jackknife_interval(mean, without, bounds=(0.0, 1.0))
    return result


def calibration(gaps: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Does sigmoid(gap) mean what it says? Expected calibration error, Brier score and the reliability table.

    A pair has no natural order, so the model's confidence is max(p, 1 - p), in [0.5, 1], and it is right where the
    human choice agrees (half at a tie). ECE = sum over equal-width bins of share * |accuracy - confidence|
    (Naeini et al. 2015; Guo et al. 2017, eq. 3); Brier = mean (1 - p)^2, p the probability given to the choice made.

    ECE adds up what is off by chance in every bin, so that a calibrated model has one above 0 too. `ece_expected` is
    the mean ECE of a calibrated model with these confidences: the number right of a bin's pairs is then binomial with
    the bin's mean confidence. Pairs count as independent; a tie is right by half without any chance and adds nothing.
    """
    p = 1 / (1 + np.exp(-np.clip(gaps, -500, 500)))
    confidence, right = np.maximum(p, 1 - p), pair_accuracy(gaps)
    edges = np.linspace(0.5, 1.0, bins + 1)
    index = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)
    table, by_chance = [], 0.0
    for b in range(bins):
        rows = index == b
        decided = confidence[rows & (gaps != 0)]
        by_chance += binomial_deviation(len(decided), float(decided.mean())) if len(decided) else 0.0
        if rows.any():
            table.append(
                {
                    "from": round(float(edges[b]), 6),
                    "to": round(float(edges[b + 1]), 6),
                    "pairs": int(rows.sum()),
                    "confidence": float(confidence[rows].mean()),
                    "accuracy": float(right[rows].mean()),
                }
            )
    ece = sum(row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(gaps)
    brier = float(((1 - p) ** 2).mean())
    return {"ece": float(ece), "ece_expected": by_chance / len(gaps), "brier": brier, "bins": table}


def binomial_deviation(n: int, p: float) -> float:
    """Return E|X - n p| of a binomial X: 2 (1 - p) v P(X = v) with v = floor(n p) + 1 (de Moivre 1730)."""
    from scipy.stats import binom

    v = math.floor(n * p) + 1
    return float(2 * (1 - p) * v * binom.pmf(v, n, p))


def length_bias(gaps, chosen, rejected, long_c, long_r, part) -> dict[str, Any]:
    """How much of the score is length.

    Accuracy where the chosen response is the longer, the shorter, or as long; Pearson correlations of score with
    length over all responses and of the score gap with the length gap over pairs; and the accuracy of the rule
    "the longer is better" (or "the shorter", whichever wins on these very pairs), which a model must beat.
    """
    gap = long_c - long_r
    longer_wins = float(pair_accuracy(gap).mean())
    return {
        "chosen_longer": part(gap > 0),
        "chosen_shorter": part(gap < 0),
        "same_length": part(gap == 0),
        "correlation": correlation(np.concatenate([chosen, rejected]), np.concatenate([long_c, long_r])),
        "gap_correlation": correlation(gaps, gap),
        "baseline": {
            "accuracy": max(longer_wins, 1 - longer_wins),
            "rule": "longer" if longer_wins >= 0.5 else "shorter",
        },
        "mean_chosen": float(long_c.mean()),
        "mean_rejected": float(long_r.mean()),
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's r, or None where one side does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def distribution(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation (n in the denominator) and quantiles."""
    quantiles = np.percentile(values, [0, 5, 50, 95, 100])
    names = ("min", "p5", "median", "p95", "max")
    summary = {"mean": float(values.mean()), "std": float(values.std())}
    return summary | {name: float(q) for name, q in zip(names, quantiles, strict=True)}


def worst_mistakes(pairs: Sequence[Preference], gaps: np.ndarray, count: int = 5) -> list[dict[str, Any]]:
    """The pairs the model was most sure of and wrong about: bad labels or blind spots, worth a look by eye."""
    order = [int(i) for i in np.argsort(gaps, kind="stable")[:count] if gaps[i] < 0]
    return [
        {
            "gap": float(gaps[i]),
            "prompt": pairs[i].prompt[-1]["content"],
            "chosen": pairs[i].chosen,
            "rejected": pairs[i].rejected,
        }
        for i in order
    ]


def doubts(card: dict[str, Any]) -> list[str]:
    """What a card says against learning from its reward model, one sentence each; empty where it says nothing.

    At chance: the interval of the accuracy holds one half or lies below it. A length detector: length explains half or
    more of the variance of scores, or of score gaps (r^2 >= 1/2).
    """
    found, accuracy, length = [], card["accuracy"], card["length"]
    if accuracy["low"] is None:
        found.append(f"{accuracy['n']} group of held-out pairs: too few to know its accuracy")
    elif accuracy["low"] <= 0.5:
        side = "cannot be told from guessing" if accuracy["high"] >= 0.5 else "is worse than guessing"
        found.append(
            f"its accuracy on held-out pairs is {accuracy['accuracy']:.3f} ({accuracy['low']:.3f} to "
            f"{accuracy['high']:.3f}), which {side}: what is learnt from it is noise. Look at the pairs, train it anew"
        )
    correlations = {"scores": length["correlation"], "score gaps": length["gap_correlation"]}
    of, largest = max(correlations.items(), key=lambda item: abs(item[1] or 0.0))
    if abs(largest or 0.0) >= LENGTH_DETECTOR:
        rule = length["baseline"]
        found.append(
            f"its {of} go with length (correlation {largest:+.2f}; 'the {rule['rule']} is better' alone is right in "
            f"{rule['accuracy']:.2f} of the pairs): the policy learns length. Balance the pairs, or set length_penalty"
        )
    return found


def doubts_of(folder: str | Path) -> list[str]:
    """The doubts of the card that a reward model's folder holds; that there is none is one too. None for a Hub name."""
    file = Path(folder) / "card.json"
    if not file.parent.is_dir():
        return []
    if not file.is_file():
        return ["no report card (card.json) there, so nothing is known of its accuracy on held-out pairs"]
    try:
        return doubts(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"card.json cannot be read as a report card ({error!r})"]


def write_card(card: dict[str, Any], directory: str | Path) -> Path:
    """Write card.json, card.md and reliability.png into `directory`; returns the path of card.md."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    plot_reliability(card["calibration"]["bins"], directory / "reliability.png")
    path = directory / "card.md"
    path.write_text(card_text(card), encoding="utf-8")
    return path


def card_text(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    length, calibrated = card["length"], card["calibration"]
    lines = [f"# Reward model report card: {card['title']}", ""]
    lines += [
        f"{card['pairs']} pairs in {card['groups']} groups; intervals are 95 % and count groups (n), not pairs.",
        "",
    ]
    lines += [
        "| | accuracy | 95 % interval | n | pairs |",
        "|---|---|---|---|---|",
        _row("**all pairs**", card["accuracy"]),
    ]
    lines += [_row("chosen is longer", length["chosen_longer"]), _row("chosen is shorter", length["chosen_shorter"])]
    lines += [_row("same length", length["same_length"])]
    lines += [_row(f"source {name}", part) for name, part in card["by_source"].items()]
    lines += [_row(f"annotator {name}", part) for name, part in card["by_annotator"].items()]
    base = length["baseline"]
    lines += ["", f"A tie counts as half; {card['ties']} pairs tied."]
    for split, rows in card.get("rows", {}).items():
        reasons = "".join(f"; {count}: {reason}" for reason, count in rows["dropped"].items())
        lines += [f"Rows of {split}: {rows['used']} of {rows['read']} are used{reasons}."]
    lines += ["", "## Length", ""]
    lines += [
        f'- length alone ("the {base["rule"]} is better", the better rule on these pairs): {base["accuracy"]:.3f}'
    ]
    lines += [f"- correlation of score and length: {_number(length['correlation'])}"]
    lines += [f"- correlation of score gap and length gap: {_number(length['gap_correlation'])}"]
    lines += [f"- mean tokens: chosen {length['mean_chosen']:.1f}, rejected {length['mean_rejected']:.1f}"]
    lines += ["", "## Calibration", "", f"Brier score {calibrated['brier']:.4f} (always one half: 0.25), "]
    lines[-1] += f"expected calibration error {calibrated['ece']:.4f} (a calibrated model with as many pairs: "
    lines[-1] += f"{calibrated['ece_expected']:.4f})."
    lines += [
        "",
        "![reliability](reliability.png)",
        "",
        "| confidence | pairs | mean confidence | accuracy |",
        "|---|---|---|---|",
    ]
    for b in calibrated["bins"]:
        lines += [f"| {b['from']:.2f} to {b['to']:.2f} | {b['pairs']} | {b['confidence']:.3f} | {b['accuracy']:.3f} |"]
    names = list(card["scores"]["chosen"])
    lines += ["", "## Scores (raw)", "", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for side, values in card["scores"].items():
        lines += [f"| {side} | " + " | ".join(f"{values[name]:.3f}" for name in names) + " |"]
    if card["mistakes"]:
        lines += ["", "## Surest mistakes", ""]
    for m in card["mistakes"]:
        lines += [f"- gap {m['gap']:.2f}: {_line(m['prompt'])}", f"  - chosen: {_line(m['chosen'])}"]
        lines += [f"  - rejected: {_line(m['rejected'])}"]
    return "\n".join(lines) + "\n"


def plot_reliability(bins: list[dict[str, Any]], path: str | Path) -> None:
    """Accuracy against confidence, area of a point by its pairs; the diagonal is a perfectly calibrated model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.2), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0.5, 1.0], [0.5, 1.0], color="0.6", linestyle="--", linewidth=1, label="perfect")
    total = sum(b["pairs"] for b in bins)
    sizes = [20 + 300 * b["pairs"] / total for b in bins]
    x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    axes.plot(x, y, color="C0", linewidth=1)
    axes.scatter(x, y, s=sizes, color="C0", alpha=0.6, label="this model (area: pairs)")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0.49, 1.01), ylim=(-0.02, 1.02), title="Reliability")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def _row(name: str, part: dict[str, Any]) -> str:
    if part["accuracy"] is None:
        return f"| {name} | - | - | 0 | 0 |"
    interval = "-" if part["low"] is None else f"{part['low']:.3f} to {part['high']:.3f}"
    return f"| {name} | {part['accuracy']:.3f} | {interval} | {part['n']} | {part['pairs']} |"


def _number(value: float | None) -> str:
    return "not defined (no variation)" if value is None else f"{value:+.3f}"


def _line(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
