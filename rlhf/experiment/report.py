"""`rlhf experiment report`: report.html, report.md, report.json and figures of what was measured so
far.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config import option, parse
from rlhf.errors import UserError
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.results import read_results
from rlhf.experiment.state import load_experiment
from rlhf.runs.tracking import Tracker
from rlhf.voting.rates import votes_of_store


@dataclass(kw_only=True)
class ReportConfig:
    """Draw the report of an experiment from what is there; nothing is trained or sampled."""

    experiment: str = option(help="its file (configs/experiments/x.yaml) or its folder")
    output_dir: str | None = option(
        None, "where the report goes; default: report/ in the experiment's folder"
    )
    votes: str | None = option(
        None,
        "a preference store with pairs of trained policies: which one its votes prefer; votes "
        "on the answers that were measured correct a judge of pairs",
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
    return write_report(config, folder, asked.report_to, asked.project, asked.votes)


def write_report(
    config: ExperimentConfig,
    folder: Path,
    report_to: str,
    project: str | None,
    votes: str | None = None,
) -> dict[str, Any]:
    """Write all files of the report to `folder`; returns report.json's content."""
    from rlhf.compare.summary import summarise
    from rlhf.report.files import print_report, write_files
    from rlhf.report.wandb_tables import log_report

    results = read_results(config)
    # all differences are to the initial policy, so it alone says nothing
    if len(results.points) < 2:
        raise UserError(
            f"{config.output_dir}: only the initial policy is measured yet; there is nothing to compare"
        )
    if votes:
        results.meta |= votes_of_store(votes)
    report = summarise(results)
    if config.judge:
        from rlhf.judge.policies import judge_policies

        report["judge_of_pairs"] = judge_policies(
            config.judge, config.methods, results, report, Path(config.output_dir), votes
        )
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
