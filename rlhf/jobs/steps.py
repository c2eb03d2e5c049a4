"""The jobs of a short plan as they run: each with its command and its output."""

import sys
import time

from rlhf.jobs.job import Job
from rlhf.jobs.state import PlanState


class StepDisplay:
    """Shows each job and its command when it starts, and its output as it comes.

    The lines of jobs that run side by side begin with the job's name.
    """

    def __init__(self, state: PlanState):
        self.state = state
        self.started_at = time.monotonic()
        # job -> bytes of its log that are on the screen, of those that run
        self.shown: dict[str, int] = {}

    def title(self, job: Job) -> str:
        number = 1 + self.state.jobs.index(job)
        return f"[{number}/{len(self.state.jobs)}] {job.name}: {job.description}"

    def show_reused(self) -> None:
        """Show the jobs that were done before."""
        for job in self.state.jobs:
            if job.name in self.state.done:
                saved = self.state.record(job.name)["seconds"]
                print(f"{self.title(job)} - done before, reused ({saved:.0f} s saved)", flush=True)

    def started(self, job: Job) -> None:
        log = self.state.log_file(job.name)
        # the log goes on with an empty line and the command
        self.shown[job.name] = 1 + (log.stat().st_size if log.is_file() else 0)
        elapsed = time.monotonic() - self.started_at
        print(f"\n{self.title(job)}  (at {elapsed:.0f} s)", flush=True)

    def log(self, text: str) -> None:
        self.update()
        self.shown = {name: self.shown[name] for name in self.state.running}
        print(text, flush=True)

    def update(self) -> None:
        """Copy what has come to the logs since; the first line is the command."""
        for name in self.shown:
            with open(self.state.log_file(name), "rb") as log:
                log.seek(self.shown[name])
                new = log.read()
            text = new
            # lines of several jobs say whose they are
            if len(self.shown) > 1:
                # whole lines, unless no more will come
                if name in self.state.running:
                    new = new[: new.rfind(b"\n") + 1]
                lines = [b"%s | %s\n" % (name.encode(), line) for line in last_states(new)]
                text = b"".join(lines)
            self.shown[name] += len(new)
            sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()


def last_states(text: bytes) -> list[bytes]:
    """Return the lines of a program's output, of a progress bar only what it says at last."""
    lines = []
    for line in text.split(b"\n"):
        # a progress bar goes back to the start of its line and writes over it
        last = line.rstrip(b"\r").rpartition(b"\r")[2]
        if last.strip():
            lines.append(last)
    return lines
