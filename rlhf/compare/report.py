"""The comparison of policies on the same test prompts: report.json, report.md, frontier.png, scores.png.

What the report says is generated from the numbers and hedges as they do. The unit is the group (rlhf/compare/stats.py);
a score that a run was trained on is a proxy and never decides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf.compare.plot import plot_frontier, plot_scores
from rlhf.compare.stats import Interval, group_means, mean_interval, mean_se, paired_difference, prompt_key, win_rate
from rlhf.compare.text import markdown, verdict
from rlhf.compare.text_metrics import distinct_n
from rlhf.config import UserError, did_you_mean
from rlhf.files import dumps, write_atomic
from rlhf.stats import MIN_CLUSTERS


def write_files(report: dict[str, Any], folder: Path) -> None:
    """Write a report of `summarise`: report.json, figures, report.md and report.html; print its sentences."""
    from rlhf.compare import markdown as experiment_markdown
    from rlhf.compare.figures import draw
    from rlhf.compare.page import page
    from rlhf.compare.words import add_sentences

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "report.json", dumps(report, indent=2) + "\n")
    report = add_sentences(report)
    figures = draw(report, folder)
    write_atomic(folder / "report.md", experiment_markdown.markdown(report, list(figures)))
    write_atomic(folder / "report.html", page(report, figures))
    print_sentences(report, folder)


def print_sentences(report: dict[str, Any], folder: Path) -> None:
    """Print what a report says and where it is."""
    from rlhf.compare.words import sentences

    for sentence in sentences(report):
        print(f"- {sentence}")
    print(f"\nReport: {folder / 'report.html'}")


ScoreKind = Literal["gold", "proxy", "referee", "other"]
KINDS = ("gold", "proxy", "referee", "other")
JUDGES = ("gold", "referee")


def write_report(
    output_dir: str | Path,
    policies: dict[str, Sequence],
    score_kinds: dict[str, ScoreKind],
    judge: str | None,
    meta: dict[str, Any],
    *,
    tie_margin: float = 0.0,
    samples: int = 3,
) -> dict[str, Any]:
    """Compare `policies` (name -> evaluation rows, the SFT reference first) and write the report; returns its JSON.

    score_kinds: what each named score is; `judge`: the gold or referee score that decides, None if there is none.
    meta: {"seeds": {"run": [...], "world": [...]}, "budgets": {policy: {episodes, tokens_generated, ...}},
    "configs": {policy: ...}, "fingerprints": {...}, ...}; everything in it is kept in report.json.
    Raises UserError if the policies' rows do not cover the same prompts, lack a score, or the judge cannot judge.
    """
    policies = {name: list(rows) for name, rows in policies.items()}
    _check(policies, score_kinds, judge)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    reference = next(iter(policies))
    report: dict[str, Any] = {
        "reference": reference,
        "judge": judge,
        "score_kinds": dict(score_kinds),
        "unit": _unit(policies, tie_margin),
        "policies": {name: _policy(rows, policies[reference], score_kinds) for name, rows in policies.items()},
        "pairs": [],
        "samples": _samples(policies, samples),
        "meta": meta,
    }
    for a, b in _pairs(list(policies)):
        report["pairs"].append(_pair(a, b, policies, judge, tie_margin))
    report["verdict"] = verdict(report)
    write_atomic(output_dir / "report.json", dumps(report, indent=2) + "\n")
    plot_frontier(report, output_dir / "frontier.png")
    plot_scores(report, output_dir / "scores.png")
    write_atomic(output_dir / "report.md", markdown(report))
    return report


def _check(policies: dict[str, list], score_kinds: dict[str, str], judge: str | None) -> None:
    if not policies:
        raise UserError("compare: no policy given; the first is the SFT reference, then those to compare with it")
    if not score_kinds:
        raise UserError("compare: no score given; at least one named score is needed")
    for name, kind in score_kinds.items():
        if kind not in KINDS:
            raise UserError(f"compare: score '{name}' is of kind {kind!r}, expected one of {', '.join(KINDS)}")
    if judge is not None and judge not in score_kinds:
        raise UserError(f"compare: the judge '{judge}' is not among the scores.{did_you_mean(judge, score_kinds)}")
    if judge is not None and score_kinds[judge] not in JUDGES:
        raise UserError(
            f"compare: the judge '{judge}' is of kind '{score_kinds[judge]}'; only a gold or referee score that no run "
            "has trained on can decide. Train a referee on other groups, or compare without a judge"
        )
    reference = next(iter(policies))
    expected = {(row.group, prompt_key(row.prompt)) for row in policies[reference]}
    for policy, rows in policies.items():
        found = {(row.group, prompt_key(row.prompt)) for row in rows}
        if not rows:
            raise UserError(f"compare: policy '{policy}' has no evaluation rows")
        if found != expected:
            raise UserError(
                f"compare: '{policy}' and '{reference}' do not cover the same prompts: {len(found - expected)} only in "
                f"'{policy}', {len(expected - found)} only in '{reference}'. Evaluate all policies with the same "
                "--prompts and length limits"
            )
        for name in score_kinds:
            bad = sum(not math.isfinite(row.scores.get(name, math.nan)) for row in rows)
            if bad:
                raise UserError(f"compare: {bad} of {len(rows)} rows of '{policy}' have no finite score '{name}'")
        bad = sum(not math.isfinite(row.kl) for row in rows)
        if bad:
            raise UserError(f"compare: {bad} of {len(rows)} rows of '{policy}' have a KL that is not a finite number")


def _unit(policies: dict[str, list], tie_margin: float) -> dict[str, Any]:
    first = next(iter(policies.values()))
    prompts = len({(row.group, prompt_key(row.prompt)) for row in first})
    return {
        "groups": len({row.group for row in first}),
        "prompts": prompts,
        "samples_per_prompt": {name: len(rows) / prompts for name, rows in policies.items()},
        "level": 0.95,
        "min_groups": MIN_CLUSTERS,
        "tie_margin": tie_margin,
    }


def _policy(rows: list, reference: list, score_kinds: dict[str, str]) -> dict[str, Any]:
    """The numbers of one policy; differences are to the reference (nothing for the reference itself)."""
    scores = {}
    for name in score_kinds:
        value = _score(name)
        means = group_means(rows, value)
        scores[name] = {
            "mean": mean_interval(rows, value).to_dict(),
            "sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        }
        if rows is not reference:
            scores[name]["difference"] = paired_difference(rows, reference, value).to_dict()
    return {
        "rows": len(rows),
        "scores": scores,
        "kl": mean_interval(rows, _kl).to_dict(),
        "length": mean_se(rows, lambda row: row.length)[0],
        "ended": mean_se(rows, lambda row: row.ended)[0],
        "distinct": distinct_n([row.response for row in rows], 2),
    }


def _pair(a: str, b: str, policies: dict[str, list], judge: str | None, tie_margin: float) -> dict[str, Any]:
    """A over B by the judge, and how their KL differs."""
    rows_a, rows_b = policies[a], policies[b]
    pair: dict[str, Any] = {"a": a, "b": b, "difference": None, "win_rate": None}
    if judge is not None:
        pair["difference"] = paired_difference(rows_a, rows_b, _score(judge)).to_dict()
        wins = win_rate(rows_a, rows_b, _score(judge), tie_margin=tie_margin)
        pair["win_rate"] = None if wins is None else wins.to_dict()
    pair["kl_difference"] = paired_difference(rows_a, rows_b, _kl).to_dict()
    return pair


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    """Each trained policy over the reference, then each later one over each earlier one."""
    trained = names[1:]
    return [(name, names[0]) for name in trained] + [(a, b) for i, a in enumerate(trained) for b in trained[:i]]


def _samples(policies: dict[str, list], count: int) -> list[dict[str, Any]]:
    """The same prompts for all policies, those whose hash comes first: neither chosen nor new at each run."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for name, rows in policies.items():
        for row in sorted(rows, key=lambda row: row.sample, reverse=True):  # the lowest sample stays
            by_prompt.setdefault(prompt_key(row.prompt), {})[name] = row
    chosen = sorted(by_prompt, key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:count]
    return [
        {
            "prompt": next(iter(by_prompt[key].values())).prompt,
            "responses": {
                name: {"response": row.response, "ended": bool(row.ended), "kl": row.kl, "scores": dict(row.scores)}
                for name, row in by_prompt[key].items()
            },
        }
        for key in chosen
    ]


def _score(name: str):
    return lambda row: row.scores[name]


def _kl(row) -> float:
    return row.kl


def print_table(report: dict[str, Any], output_dir: str | Path | None = None) -> None:
    """The final table on the terminal: policies, then methods against each other, then what can be said."""
    from rich.console import Console
    from rich.table import Table

    from rlhf.compare.text import pair_rows, policy_rows
    from rlhf.data.annotator_report import describe_alpha

    console = Console()
    if not console.is_terminal:
        console = Console(width=130)  # a log wraps nothing
    for title, (header, rows) in (("Policies", policy_rows(report)), ("Against each other", pair_rows(report))):
        if not rows:
            continue
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in report["verdict"]:
        console.print(f"- {line}", markup=False, highlight=False)
    if annotators := report["meta"].get("annotators"):
        console.print(f"- Annotators: {describe_alpha(annotators)}.", markup=False, highlight=False)
    if output_dir is not None:
        console.print(f"\nReport: {Path(output_dir) / 'report.md'}", markup=False, highlight=False)


__all__ = ["Interval", "print_table", "write_report"]
