"""What is shown of an experiment: a table that stays in its place on a terminal, lines in a log,
and its status.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.state import load_state
from rlhf.jobs.commands import JOB, environment_of, programs_of
from rlhf.jobs.job import Job
from rlhf.jobs.state import PlanState, read_json
from rlhf.runs.tracking import read_metrics
from rlhf.text import markdown_table

# between summaries where there is no terminal
LOG_SECONDS = 60.0
LOG_WIDTH = 130
SIGNS = {"waiting": "·", "blocked": "blocked", "failed": "failed", "done": "trained"}


class LiveTable:
    """The state of all trials, drawn once a second on a terminal, logged in lines elsewhere."""

    def __init__(self, config: ExperimentConfig, state: PlanState):
        self.config, self.state = config, state
        console = Console()
        if not console.is_terminal:
            console = Console(width=LOG_WIDTH)
        self.started_at = self.logged_at = time.monotonic()
        self.done_before = len(state.done)
        self.live = Live(console=console, refresh_per_second=1, get_renderable=self.table)

    def __enter__(self) -> Self:
        self.live.start()
        self.log(f"{len(self.state.done)} of {len(self.state.jobs)} jobs are done already")
        return self

    def __exit__(self, *error) -> None:
        # where there is no terminal, the table is printed now
        self.live.stop()

    def log(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self.live.console.print(f"{stamp}  {text}", markup=False, highlight=False, soft_wrap=True)

    def started(self, job: Job) -> None:
        self.log(f"{job.name}: started")

    def update(self) -> None:
        """Log a summary once a minute where there is no terminal."""
        if self.live.console.is_terminal or time.monotonic() - self.logged_at < LOG_SECONDS:
            return
        self.logged_at = time.monotonic()
        jobs = map(self.state.job, self.state.running)
        running = [f"{job.name} {share_done(job)}".strip() for job in jobs]
        self.log(f"{self.summary()}; running: {', '.join(running) or 'nothing'}")

    def summary(self) -> str:
        done, total = len(self.state.done), len(self.state.jobs)
        text = f"{done} of {total} jobs"
        if self.state.lengths is None:
            return f"{text} (the trials follow once the pilots have shown what a step costs)"
        done_now = done - self.done_before
        # the first jobs are the short ones: an estimate from them would be far off
        if done_now < 3:
            return text
        seconds_each = (time.monotonic() - self.started_at) / done_now
        minutes = seconds_each * (total - done) / 60
        return f"{text}, about {minutes:.0f} min left"

    def table(self):
        """Return one row for each method and swept value, one column for each seed."""
        seeds = self.config.seeds
        table = Table(
            title=self.summary(),
            title_justify="left",
            caption="judge @ KL; trained: not yet measured",
        )
        table.add_column("method")
        for seed in seeds:
            table.add_column(f"seed {seed}", justify="right")
        trials, others = {}, []
        for job in self.state.jobs:
            if job.kind == "trial":
                trials[job.method, job.swept, job.seed] = job
            elif job.name in self.state.running and not is_in_table(job):
                others.append(job.name)
        for name in self.config.trained:
            method = self.config.method_specs[name]
            for swept in method.values:
                cells = [self.cell(trials.get((name, swept, seed))) for seed in seeds]
                table.add_row(f"{name} {method.swept_option} {swept:g}", *cells)
        if others:
            table.add_row("running", ", ".join(others), *[""] * (len(seeds) - 1))
        return table

    def cell(self, trial: Job | None) -> str:
        # trials are planned only once the pilots have told their length
        if trial is None:
            return SIGNS["waiting"]
        # a trial counts as done once its policies are measured
        measuring = next(
            job for job in self.state.jobs if job.measures and job.measures.trial == trial.name
        )
        measured = self.state.status(measuring)
        if measured == "done":
            return end_of_trial(Path(measuring.outputs[0]))
        if measured == "running":
            return "measuring"
        status = self.state.status(trial)
        if status == "running":
            return share_done(trial) or "starting"
        return SIGNS[status]


def is_in_table(job: Job) -> bool:
    return job.kind == "trial" or (job.measures is not None and job.measures.kind == "trial")


def share_done(job: Job) -> str:
    """Return the share of a run's steps that is logged, or nothing."""
    if not job.steps:
        return ""
    metrics = Path(job.run_folder) / "metrics.jsonl"
    step = 0
    # a run that has just been started has logged nothing
    if metrics.is_file():
        step = max((row["step"] for row in read_metrics(metrics)), default=0)
    return f"{min(100 * step // job.steps, 100)} %"


def end_of_trial(file: Path) -> str:
    """Return what done.json says of the end of a trial: 0.812 @ 2.1."""
    end = read_json(file).get("end")
    if end is None:
        return "measured"
    judge = "" if end["judge"] is None else f"{end['judge']:.3f} @ "
    return f"{judge}{end['kl']:.1f}"


def experiment_status(config: ExperimentConfig) -> None:
    """Print the jobs of an experiment and what has become of each, from what is there; nothing is
    started.
    """
    state = load_state(config)
    # asked of the system: a runner that was killed has left no word
    running = {environment_of(process).get(JOB) for process in programs_of(state.folder)}
    rows, counts = [], Counter()
    for job in state.jobs:
        record = state.record(job.name)
        status = "running" if job.name in running else status_from_record(state, job, record)
        rows.append((job.name, status, record.get("seconds", "")))
        counts[status] += 1
    print("\n".join(markdown_table(("job", "status", "seconds"), rows, right=[2])))
    summary = [f"{count} {status}" for status, count in counts.items()]
    print(f"{state.folder}: {', '.join(summary)}")
    if state.lengths is None:
        print("The trials follow once the pilots have shown what a step costs.")


def status_from_record(state: PlanState, job: Job, record: dict[str, Any]) -> str:
    if job.name in state.done:
        return "done"
    if not record:
        return "missing"
    if record.get("fingerprint") != state.fingerprints[job.name]:
        return "of other options"
    return "output missing" if record.get("finished") else "interrupted"
