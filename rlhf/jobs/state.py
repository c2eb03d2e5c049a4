"""The jobs in one folder, and what has become of each."""

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.files import dumps, write_atomic
from rlhf.jobs.job import Job, fingerprints

PACKAGES = ("rlhf", "reward", "launch")
# files with a field that tells whether all is there
SAYS_FINISHED = ("result.json", "done.json")


@dataclass
class RunningJob:
    process: subprocess.Popen
    # seconds of the monotonic clock
    started: float


@dataclass
class PlanState:
    """The jobs that are planned in a folder, and what has become of each."""

    folder: Path
    jobs: list[Job] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    # steps of each method, once they are known
    lengths: dict[str, int] | None = None
    running: dict[str, RunningJob] = field(default_factory=dict)
    # name -> exit code
    failed: dict[str, int] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    def set_jobs(self, jobs: list[Job]) -> None:
        """Make these the jobs, and find out which of them are done."""
        self.jobs, self.fingerprints = jobs, fingerprints(jobs)
        self.done = {job.name for job in jobs if self.is_done(job)}

    def job(self, name: str) -> Job:
        return next(job for job in self.jobs if job.name == name)

    def record(self, name: str) -> dict[str, Any]:
        """Return what jobs/NAME.json says; empty where there is none."""
        return read_json(self.folder / "jobs" / f"{name}.json")

    def log_file(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def is_done(self, job: Job) -> bool:
        """Return whether the job was finished as it is planned now, and its outputs are there."""
        record = self.record(job.name)
        # the same name with other options is another result
        as_planned = record.get("fingerprint") == self.fingerprints[job.name]
        return bool(record.get("finished")) and as_planned and all(map(is_complete, job.outputs))

    def status(self, job: Job) -> str:
        """Return done, running, failed, blocked (by a failed one) or waiting."""
        for status, names in (
            ("done", self.done),
            ("running", self.running),
            ("failed", self.failed),
        ):
            if job.name in names:
                return status
        # what needs a failed job will never start, and neither will what needs that
        for other in self.jobs:
            if other.name in job.needs and self.status(other) in ("failed", "blocked"):
                return "blocked"
        return "waiting"


def is_complete(file: str | Path) -> bool:
    """Return whether an output is there; a result.json or done.json has to say that it is finished."""
    path = Path(file)
    if path.name in SAYS_FINISHED:
        return bool(read_json(path).get("finished"))
    return path.is_file()


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; empty where it is missing or cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_record(state: PlanState, job: Job, record: dict[str, Any]) -> None:
    file = state.folder / "jobs" / f"{job.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, dumps(record, indent=2) + "\n")


def code_files() -> Iterator[Path]:
    """Yield the Python files of the packages, in a fixed order."""
    root = Path(__file__).resolve().parents[2]
    for package in PACKAGES:
        yield from sorted((root / package).rglob("*.py"))


def code_version() -> dict[str, str | None]:
    """Return the fingerprint of the packages' code, and its commit where it lies in a git work
    tree.
    """
    digest = hashlib.sha256()
    for file in code_files():
        digest.update(file.read_bytes())
    root = Path(__file__).resolve().parents[2]
    commit = None
    # an installed package has no commit; its hash still says which code it was
    if (root / ".git").exists():
        with contextlib.suppress(OSError):
            command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"commit": commit, "code": digest.hexdigest()[:16]}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
