"""`rlhf experiment report`: report.html, report.md, report.json and figures of what was measured so
far.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.compare.results import Results
from rlhf.config import option, parse
from rlhf.errors import UserError
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.results import read_results
from rlhf.experiment.state import load_experiment
from rlhf.runs.tracking import Tracker


@dataclass(kw_only=True)
class ReportConfig:
    """Draw the report of an experiment from what is there; nothing is trained or sampled."""

    experiment: str = option(help="its file (configs/experiments/x.yaml) or its folder")
    output_dir: str | None = option(
        None, "where the report goes; default: report/ in the experiment's folder"
    )
    report_to: Literal["none", "wandb"] = option(
        "none", "wandb: the same as tables, offline when no key is set"
    )
    project: str | None = option(None, "W&B project; default: WANDB_PROJECT, else rlhf")


def report_of(asked: ReportConfig) -> dict[str, Any]:
    """Write the report of an experiment; returns report.json's content. Raises UserError if nothing
    is measured.
    """
    if Path(asked.experiment).is_file():
        config = parse(ExperimentConfig, ["--config", asked.experiment], "rlhf experiment report")
    else:
        config = load_experiment(asked.experiment)
    folder = Path(asked.output_dir or f"{config.output_dir}/report")
    return write_report(config, folder, asked.report_to, asked.project)


def write_report(
    config: ExperimentConfig, folder: Path, report_to: str, project: str | None
) -> dict[str, Any]:
    """Write all files of the report to `folder`; returns report.json's content."""
    from rlhf.compare.report import print_report, write_files
    from rlhf.compare.summary import summarise
    from rlhf.compare.wandb_tables import log_report

    results = read_results(config)
    # all differences are to the initial policy, so it alone says nothing
    if len(results.points) < 2:
        raise UserError(
            f"{config.output_dir}: only the initial policy is measured yet; there is nothing to compare"
        )
    report = summarise(results)
    if config.judge:
        report["judge_of_pairs"] = ask_judge(config, results, report)
    figures = write_files(report, folder)
    trials = sorted(file.parent for file in Path(config.output_dir).glob("seed-*/*/result.json"))
    with Tracker(
        folder,
        report_to=report_to,
        project=project,
        run_name=report["name"],
        job_type="report",
        config=report["meta"],
    ) as tracker:
        log_report(report, tracker, figures)
        tracker.page("report", (folder / "report.html").read_text(encoding="utf-8"))
        tracker.artifacts([config.initial_policy, *config.prompts, *trials], "report")
    for name in report["meta"]["left_out"]:
        print(f"left out, made with other options: {name}")
    print_report(report, folder)
    return report


def ask_judge(config: ExperimentConfig, results: Results, report: dict[str, Any]) -> dict[str, Any]:
    """Ask a judge of pairs about the tuned ends of all methods, against each other and against the
    initial policy.

    Answers are kept in OUT/judge.jsonl, so that a report that was cut off asks only for what it
    lacks.
    """
    from rlhf.compare.judge import judge_wins, load_judge
    from rlhf.compare.wins import win_rate

    judge = load_judge(config.judge)
    cache = Path(config.output_dir) / "judge.jsonl"
    # Method -> seed -> the policy
    ends = {}
    for method in config.methods:
        swept = swept_to_ask(report, method)
        if swept is not None:
            ends[method] = {point.seed: point for point in results.ends(method, swept)}
    initial = results.initial.method
    pairs = [*itertools.combinations(ends, 2), *itertools.product(ends, [initial])]
    # it has no seed: it is compared with the policies of each
    ends[initial] = dict.fromkeys(report["unit"]["seeds"], results.initial)

    rows = []
    for a, b in pairs:
        seeds = sorted(set(ends[a]) & set(ends[b]))
        if not seeds:
            continue
        first, second = [ends[a][seed] for seed in seeds], [ends[b][seed] for seed in seeds]
        answers = []
        for one, other in zip(first, second, strict=True):
            answers.append(judge_wins(judge, results, one, other, cache))
        found = win_rate(first, second, results, answers)
        # With one sample a prompt no two answers have independent noise
        if found is not None:
            rows.append({"a": a, "b": b, "seeds": seeds, **found.to_dict()})
    return {"name": judge.name, "rows": rows}


def swept_to_ask(report: dict[str, Any], method: str) -> float | None:
    """Return the swept value that a score has chosen, else the middle one; None where none is
    measured.
    """
    if method in report["tuned"]["methods"]:
        return report["tuned"]["methods"][method]["usual"]
    # no score has chosen a value: ask about the middle one
    values = report["methods"][method]["swept_values"]
    return values[len(values) // 2] if values else None
