"""`rlhf experiment report`: report.html, report.md, report.json and figures of what was measured so far."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.compare.results import Results
from rlhf.config import UserError, option, parse
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.measure import load_experiment
from rlhf.experiment.results import read_results
from rlhf.runs.tracking import Tracker


@dataclass(kw_only=True)
class ReportConfig:
    """Draw the report of an experiment from what is there; nothing is trained or sampled."""

    experiment: str = option(help="its file (configs/experiments/x.yaml) or its folder")
    output_dir: str | None = option(None, "where the report goes; default: report/ in the experiment's folder")
    report_to: Literal["none", "wandb"] = option("none", "wandb: the same as tables, offline when no key is set")
    project: str | None = option(None, "W&B project; default: WANDB_PROJECT, else rlhf")


def report_of(asked: ReportConfig) -> dict[str, Any]:
    """Read, summarise and draw. UserError if nothing is measured."""
    if Path(asked.experiment).is_file():
        config = parse(ExperimentConfig, ["--config", asked.experiment], "rlhf experiment report")
    else:
        config = load_experiment(asked.experiment)
    folder = Path(asked.output_dir or f"{config.output_dir}/report")
    return write_report(config, folder, asked.report_to, asked.project)


def write_report(config: ExperimentConfig, folder: Path, report_to: str, project: str | None) -> dict[str, Any]:
    """All files of the report in `folder`; returns report.json's content."""
    from rlhf.compare.report import print_report, write_files
    from rlhf.compare.summary import summarise
    from rlhf.compare.wandb_tables import log_report

    results = read_results(config)
    if len(results.points) < 2:
        raise UserError(f"{config.output_dir}: only the foundation is measured yet; there is nothing to compare")
    report = summarise(results)
    if config.judge:
        report["judge_of_pairs"] = ask_judge(config, results, report)
    figures = write_files(report, folder)
    with Tracker(
        folder, report_to=report_to, project=project, run_name=report["name"], config=report["meta"]
    ) as tracker:
        log_report(report, tracker, figures)
    for name in report["meta"]["left_out"]:
        print(f"left out, made with other options: {name}")
    print_report(report, folder)
    return report


def ask_judge(config: ExperimentConfig, results: Results, report: dict[str, Any]) -> dict[str, Any]:
    """What a judge of pairs says of each method's tuned end against the foundation and each other, both orders asked.

    Answers are kept in OUT/judge.jsonl: a report that was cut off asks only for what it lacks.
    """
    from itertools import combinations

    from rlhf.compare.judge import judge_wins, load_judge
    from rlhf.compare.wins import win_rate

    judge = load_judge(config.judge)
    cache = Path(config.output_dir) / "judge.jsonl"
    ends = {}
    for name in config.methods:
        swept = swept_to_ask(report, name)
        if swept is None:
            continue
        ends[name] = {p.seed: p for p in results.of(name, swept) if p.last}
    rows = []
    initial = {seed: results.initial for own in ends.values() for seed in own}
    for (a, first), (b, second) in [
        *combinations(ends.items(), 2),
        *((own, ("sft", initial)) for own in ends.items()),
    ]:
        seeds = sorted(set(first) & set(second))
        if not seeds:
            continue
        said = [judge_wins(judge, results, first[s], second[s], cache) for s in seeds]
        found = win_rate([first[s] for s in seeds], [second[s] for s in seeds], results, said)
        if found is None:  # one sample a prompt: no two answers have independent noise
            continue
        rows.append({"a": a, "b": b, "seeds": seeds, **found.to_dict()})
    return {"name": judge.name, "rows": rows}


def swept_to_ask(report: dict[str, Any], method: str) -> float | None:
    """The strength that a score has chosen, else the middle one; None where none is measured."""
    if method in report["tuned"]["methods"]:
        return report["tuned"]["methods"][method]["usual"]
    swept_values = report["methods"][method]["swept_values"]
    return swept_values[len(swept_values) // 2] if swept_values else None
