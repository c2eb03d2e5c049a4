"""`rlhf experiment run FILE`: check, run the jobs that an experiment still needs, and report."""

from collections.abc import Callable
from pathlib import Path

from rlhf.config import save_options
from rlhf.errors import EarlyExit
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.cost import known_lengths, planned_lengths
from rlhf.experiment.plan import plan
from rlhf.jobs.runner import RunOptions, claim, failures, run_jobs, set_jobs
from rlhf.jobs.state import PlanState


def run_experiment(
    config: ExperimentConfig, check_scorers: Callable[..., None] = lambda *_: None
) -> None:
    """Do all jobs and write the report; `check_scorers(specs, made_later)` refuses scorers that
    cannot be made.

    Raises UserError on options that cannot work or do not fit what is there, EarlyExit when interrupted
    or when programs failed; what is done stays.
    """
    # these import torch and rich, which the quickstart does without
    from rlhf.experiment import check
    from rlhf.experiment.progress import LiveTable
    from rlhf.experiment.report import write_report

    check.check_files(config)
    check.check_decisions(config)
    check.check_starts(config, check.check_programs(config), check_scorers)

    state = PlanState(Path(config.output_dir))
    how = RunOptions(
        launcher=config.launcher,
        processes=config.processes,
        changed="set aside" if config.redo else "refuse",
    )
    with claim(state) as signals:
        replan(config, state, how)
        save_options(config, state.folder / "experiment.yaml")
        with LiveTable(config, state) as display:
            run_jobs(state, how, display, signals, lambda: replan(config, state, how))
    if state.failed:
        raise EarlyExit(failures(state), 1)
    write_report(config, state.folder / "report", config.report_to, config.project)


def replan(config: ExperimentConfig, state: PlanState, how: RunOptions) -> None:
    """Plan the jobs; trials once all is done from which the lengths of the runs follow."""
    if state.lengths is not None:
        return
    if config.matched is None:
        state.lengths = known_lengths(config)
    else:
        if not state.jobs:
            set_jobs(state, plan(config, None), how)
        # pilots say what a step costs; pairs and reward model count as a part of each budget
        for job in state.jobs:
            decides = job.kind in ("pilot", "reward", "sample") and job.seed == config.seeds[0]
            if decides and job.name not in state.done:
                return
        state.lengths = planned_lengths(config)
    set_jobs(state, plan(config, state.lengths), how)
