"""What is seen while an experiment runs: a table that stays in its place on a terminal, lines in a log."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rlhf.experiment.config import sweep_of

EVERY = 60.0  # seconds between summaries where there is no terminal
SIGNS = {"waiting": "·", "blocked": "blocked", "failed": "failed", "done": "trained"}


class Display:
    """The state of all trials, drawn once a second on a terminal, told in lines elsewhere."""

    def __init__(self, work: Any):
        from rich.console import Console

        self.work, self.console = work, Console()
        if not self.console.is_terminal:
            self.console = Console(width=130)  # a log wraps nothing
        self.began, self.told, self.live = time.monotonic(), time.monotonic(), None
        self.known_done = len(work.done)

    def __enter__(self):
        if self.console.is_terminal:
            from rich.live import Live

            self.live = Live(console=self.console, refresh_per_second=1, get_renderable=self.table)
            self.live.__enter__()
        self.log(f"{len(self.work.done)} of {len(self.work.jobs)} jobs are done already")
        return self

    def __exit__(self, *error) -> None:
        if self.live:
            self.live.__exit__(*error)
        else:
            self.console.print(self.table())

    def log(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self.console.print(f"{stamp}  {text}", markup=False, highlight=False, soft_wrap=True)

    def update(self) -> None:
        """In a log: a line once a minute."""
        if self.live is None and time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            parts = [f"{name} {self.progress(name) or ''}".strip() for name in self.work.running]
            self.log(f"{self.summary()}; running: {', '.join(parts) or 'nothing'}")

    def summary(self) -> str:
        work = self.work
        done, total, now_done = len(work.done), len(work.jobs), len(work.done) - self.known_done
        text = f"{done} of {total} jobs"
        if work.lengths is None:
            return f"{text} (the trials follow when the pilots have told what a step costs)"
        if now_done >= 3:
            left = (time.monotonic() - self.began) / now_done * (total - done) / 60
            text += f", about {left:.0f} min left"
        return text

    def table(self):
        """One row for each method and strength, one column for each seed."""
        from rich.table import Table

        config = self.work.config
        table = Table(title=self.summary(), title_justify="left", caption="judge @ KL; trained: not yet measured")
        table.add_column("method")
        for seed in config.seeds:
            table.add_column(f"seed {seed}", justify="right")
        states = {job.name: self.work.state(job) for job in self.work.jobs}
        for name in config.trained:
            option, values = sweep_of(config.methods[name])
            for swept in values:
                own = f"{name}-{option}-{swept:g}"
                cells = [self.cell(f"seed-{seed}/{own}", states) for seed in config.seeds]
                table.add_row(f"{name} {option} {swept:g}", *cells)
        before = [n for n, s in states.items() if s == "running" and not any(n.endswith(m) for m in self.trials())]
        if before:
            table.add_row("running", ", ".join(before), *[""] * (len(config.seeds) - 1))
        return table

    def trials(self) -> list[str]:
        return [job.name for job in self.work.jobs if job.trial]

    def cell(self, name: str, states: dict[str, str]) -> str:
        if states.get(f"measure/{name}") == "done":
            return measured(self.work.out / "measures" / name / "done.json")
        if states.get(f"measure/{name}") == "running":
            return "measuring"
        state = states.get(name, "waiting")
        return self.progress(name) or "starting" if state == "running" else SIGNS[state]

    def progress(self, name: str) -> str | None:
        """The share of a run's steps that is logged."""
        job = next(job for job in self.work.jobs if job.name == name)
        if not job.steps:
            return None
        step = last_step(Path(job.folder) / "metrics.jsonl")
        return f"{min(100 * step // job.steps, 100)} %"


def measured(file: Path) -> str:
    """What done.json says of the end of a trial: 0.812 @ 2.1."""
    try:
        end = json.loads(file.read_text())["end"]
    except (OSError, ValueError, KeyError):
        return "measured"
    judge = "" if end.get("judge") is None else f"{end['judge']:.3f} @ "
    return f"{judge}{end['kl']:.1f}"


def last_step(file: Path) -> int:
    """The step of the last whole line of a metrics file; 0 without one."""
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, file.stat().st_size - 20_000))
            lines = opened.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
