"""`rlhf experiment run FILE`: do what an experiment still needs, a few processes at a time.

What is done and whole is not done again. A run that was cut off is started again and resumes by itself. What was made
with other options is never mixed with the rest: it is named, and set aside if asked.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf import config as options
from rlhf.errors import EXIT_GUARD, EXIT_INTERRUPTED, EXIT_USER_ERROR, Halt, UserError
from rlhf.experiment.check import check_decisions, check_programs, check_starts
from rlhf.experiment.config import ExperimentConfig, check_files
from rlhf.experiment.cost import planned_lengths
from rlhf.experiment.plan import Job, fingerprints, given_length, plan
from rlhf.files import dumps, lock_folder, unlock_folder, write_atomic

MARK = "RLHF_EXPERIMENT"  # in the environment of every program that an experiment has started
JOB = "RLHF_EXPERIMENT_JOB"  # which of its jobs
ATTEMPTS = 3  # of a program that was killed; each goes on where the one before was cut off
PATIENCE = 120.0  # seconds that programs get to save and end


@dataclass
class Work:
    """An experiment under way: its jobs, and what has become of each."""

    config: ExperimentConfig
    jobs: list[Job] = field(default_factory=list)
    marks: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, int] | None = None
    running: dict[str, tuple[subprocess.Popen, float]] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)  # name -> exit code
    attempts: dict[str, int] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    @property
    def out(self) -> Path:
        return Path(self.config.output_dir)

    def record(self, name: str) -> dict[str, Any]:
        """What jobs/NAME.json says; empty where there is none."""
        return read_json(self.out / "jobs" / f"{name}.json")

    def whole(self, job: Job) -> bool:
        """Whether the job was finished as it is planned now, and what it left is there."""
        record = self.record(job.name)
        return (
            bool(record.get("finished"))
            and record.get("fingerprint") == self.marks[job.name]
            and all(is_whole(file) for file in job.leaves)
        )

    def state(self, job: Job) -> str:
        """done, running, failed, blocked (by a failed one) or waiting."""
        if job.name in self.done:
            return "done"
        if job.name in self.running:
            return "running"
        if job.name in self.failed:
            return "failed"
        blocked = any(self.state(other) in ("failed", "blocked") for other in self.jobs if other.name in job.needs)
        return "blocked" if blocked else "waiting"


def run_experiment(config: ExperimentConfig, check_scorers: Callable[..., None] = lambda *_: None) -> None:
    """Do all jobs; `check_scorers(specs, made_later)` refuses scorers that cannot be made.

    Raises UserError on options that cannot work or do not fit what is there, Halt when interrupted or when programs
    failed; what is done stays.
    """
    from rlhf.experiment.progress import Display
    from rlhf.experiment.report import write_report

    check_files(config)
    started = check_programs(config)
    check_decisions(config)
    check_starts(config, started, check_scorers)
    out = Path(config.output_dir)
    lock_folder(out)
    asked: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: asked.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    work = Work(config)
    try:
        end_orphans(out)
        replan(work)
        options.save(config, out / "experiment.yaml")
        with Display(work) as display:
            loop(work, display, asked)
    finally:
        stop_all(work)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        unlock_folder(out)
    if asked:
        raise Halt(f"stopped by {signal.Signals(asked[0]).name}; the same command goes on", EXIT_INTERRUPTED)
    if work.failed:
        logs = {name: out / "logs" / f"{name}.log" for name in work.failed}
        lines = [f"  {name}: {ended(code)}, {logs[name]}{last_error(logs[name])}" for name, code in work.failed.items()]
        left = sum(work.state(job) == "blocked" for job in work.jobs)
        tail = f"; {left} that need them were not started" if left else ""
        raise Halt("\n".join([f"{len(work.failed)} of {len(work.jobs)} jobs failed{tail}:", *lines]), 1)
    write_report(config, out / "report", config.report_to, config.project)


def loop(work: Work, display, asked: list[int]) -> None:
    """Start what is ready, collect what has ended, until nothing is left or a signal came."""
    while not asked:
        collect(work, display)
        if work.lengths is None and pilots_done(work):
            replan(work)
        ready = [job for job in work.jobs if work.state(job) == "waiting" and set(job.needs) <= work.done]
        for job in ready[: max(0, work.config.processes - len(work.running))]:
            start(work, job)
            display.log(f"{job.name}: begins")
        display.update()
        if not work.running:
            return
        time.sleep(0.5)


def replan(work: Work) -> None:
    """The jobs as far as they are known; with the lengths of the runs once the pilots have told what a step costs."""
    config = work.config
    if config.matched is None:
        work.lengths = {name: given_length(config.methods[name]) for name in config.trained}
    take(work, plan(config, work.lengths))
    if work.lengths is None and pilots_done(work):
        work.lengths = planned_lengths(config)
        take(work, plan(config, work.lengths))


def take(work: Work, jobs: list[Job]) -> None:
    """These are the jobs now; what was made by others under their names is refused or set aside."""
    work.jobs, work.marks = jobs, fingerprints(jobs)
    changed = [job for job in jobs if work.record(job.name).get("fingerprint") not in (None, work.marks[job.name])]
    # a job that was refused has left nothing to mix
    changed = [job for job in changed if any(p.is_file() or any(p.glob("*")) for p in places(work, job))]
    if changed and not work.config.redo:
        shown = [f"  {job.name}: {difference(work, job)}" for job in changed[:8]]
        more = [f"  and {len(changed) - 8} more"] if len(changed) > 8 else []
        raise UserError(
            "\n".join(
                [
                    f"{work.out} holds results of other options, which are not mixed with new ones. Choose another "
                    "--output_dir, or make them anew with --redo true (the old ones are set aside). They differ in:",
                    *shown,
                    *more,
                ]
            )
        )
    for job in changed:
        archive(work, job)
    work.done = {job.name for job in jobs if work.whole(job)}


def difference(work: Work, job: Job) -> str:
    """In which options a job differs from the one that was done under its name."""
    before, after = (options_of(command) for command in (work.record(job.name).get("command", []), job.command))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return "; ".join(f"{n} was {before.get(n, 'not given')}, now {after.get(n, 'not given')}" for n in names) or (
        "what it reads or stands on"
    )


def options_of(command: list[str]) -> dict[str, str]:
    """The options among the words of a command; how a trial is measured stands in its last word."""
    result = {name: value for name, value in pairwise(command) if name.startswith("--")}
    if command and command[-1].startswith("# {"):
        result |= {name: str(value) for name, value in json.loads(command[-1][2:]).items()}
    return result


def archive(work: Work, job: Job) -> None:
    """Move what a job has left to OUT/aside/, where nothing reads it."""
    aside = work.out / "aside" / f"{job.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    for place in places(work, job):
        if place.exists():
            aside.mkdir(parents=True, exist_ok=True)
            shutil.move(place, aside / place.name)
    (work.out / "jobs" / f"{job.name}.json").unlink(missing_ok=True)


def places(work: Work, job: Job) -> list[Path]:
    """Where a job writes. Votes are in the store of the samples, so both are made anew together."""
    if job.name.startswith("measure/"):
        return [work.out / "measures" / job.name.removeprefix("measure/")]
    if job.name.endswith(("/sample", "/annotate")):
        return [Path(job.leaves[0] + suffix) for suffix in ("", "-wal", "-shm")]
    return [work.out / job.name]


def pilots_done(work: Work) -> bool:
    """Whether all is done from which the lengths of the runs follow."""
    first = work.config.seeds[0]
    names = ("pilot/", f"seed-{first}/reward", f"seed-{first}/sample")
    wanted = [job.name for job in work.jobs if job.name.startswith(names)]
    return set(wanted) <= work.done


def start(work: Work, job: Job) -> None:
    """Start the job's program in a session of its own."""
    command = full_command(work.config, job)
    if job.name.endswith("/sample"):  # a store that it filled before would be told the cost of sampling twice
        archive(work, job)
    log = work.out / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    about = {"fingerprint": work.marks[job.name], "command": job.command, "started": now(), "code": code_version()}
    write_record(work, job, about)
    with open(log, "ab") as file:
        file.write(f"\n$ {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(work.config, job), start_new_session=True
        )
    work.attempts[job.name] = work.attempts.get(job.name, 0) + 1
    work.running[job.name] = (process, time.monotonic())


def full_command(config: ExperimentConfig, job: Job) -> list[str]:
    """Return the words that start the job: this Python, the program as a module, a port of its own."""
    first, *rest = job.command
    if first == "rlhf":
        return [sys.executable, "-m", "rlhf.cli", *[word for word in rest if not word.startswith("# ")]]
    launcher = shlex.split(config.launcher)
    own_port = any(word.replace("-", "_").startswith("__master_port") for word in launcher)
    if Path(launcher[0]).name in ("deepspeed", "torchrun") and not own_port:
        launcher += ["--master_port", str(free_port())]
    if launcher[0] == "python":
        launcher[0] = sys.executable
    as_module = "--module" if Path(launcher[0]).name == "deepspeed" else "-m"
    return [*launcher, as_module, first.removesuffix(".py").replace("/", "."), *rest]


def environment(config: ExperimentConfig, job: Job) -> dict[str, str]:
    result = {**os.environ, "PYTHONUNBUFFERED": "1", MARK: str(Path(config.output_dir).resolve()), JOB: job.name}
    for name in ("WANDB_RUN_ID", "WANDB_NAME"):  # meant for one run, and these are many
        result.pop(name, None)
    if not has_accelerator():
        result.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds this out too, with a warning each time
        if config.processes > 1:
            result.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.processes)))
    result["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{result.get('PATH', '')}"
    return result


@functools.cache
def has_accelerator() -> bool:
    """Return whether torch finds an accelerator. A process of its own asks: this one holds no device while jobs run."""
    question = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    return subprocess.run([sys.executable, "-c", question], capture_output=True).returncode == 0


def collect(work: Work, display) -> None:
    """See which programs have ended, and how."""
    for name, (process, began) in list(work.running.items()):
        code = process.poll()
        if code is None:
            continue
        del work.running[name]
        job = next(job for job in work.jobs if job.name == name)
        seconds = time.monotonic() - began
        whole = all(is_whole(file) for file in job.leaves)
        # a run that a guard has stopped is a result too; torchrun makes 1 of every exit code
        stopped = code == EXIT_GUARD or (code == 1 and job.folder and read_json(Path(job.leaves[0])).get("stopped"))
        if whole and (code == 0 or stopped):
            write_record(work, job, work.record(name) | {"finished": now(), "seconds": seconds, "exit": code})
            work.done.add(name)
            display.log(f"{name}: done in {seconds:.0f} s" + (", stopped by a guard" if code else ""))
        elif code not in (0, EXIT_USER_ERROR, EXIT_GUARD) and work.attempts[name] < ATTEMPTS:
            display.log(f"{name}: ended with exit code {code} after {seconds:.0f} s; started again")
            ask_to_end(work.out, name)  # where a launcher was killed, what it launched lives on
            start(work, job)
        else:
            work.failed[name] = code
            display.log(f"{name}: failed, {ended(code)}: {work.out}/logs/{name}.log")


def ended(code: int) -> str:
    return f"exit code {code}" if code else "ended without a result"


def stop_all(work: Work) -> None:
    """Ask every program to save and end, wait, then end what is left."""
    if work.running:
        ask_to_end(work.out)
    for process, _ in work.running.values():
        process.wait()
    work.running.clear()


def end_orphans(out: Path) -> None:
    """End the programs of an experiment that was killed: they would write into the same folders."""
    left = programs_of(out)
    if left:
        print(f"{out}: ending {len(left)} processes of a run that was cut off", flush=True)
        ask_to_end(out)


def programs_of(out: Path, name: str | None = None) -> list[Any]:
    """The processes that an experiment in this folder has started (for one of its jobs), as psutil sees them; this one
    is none of them."""
    import psutil

    own, found = str(out.resolve()), []
    for process in psutil.process_iter():
        try:
            about = process.environ()
        except psutil.Error:
            continue
        if process.pid != os.getpid() and about.get(MARK) == own and name in (None, about.get(JOB)):
            found.append(process)
    return found


def ask_to_end(out: Path, name: str | None = None) -> None:
    """SIGTERM to the programs, on which they save and end; SIGKILL to what is left after PATIENCE.

    Once to the topmost process of each program: to a launcher whose programs are alive it would be their end, and to a
    helper the program's failure. Looked at again and again, since a launcher may be about to launch.
    """
    import psutil

    asked, late = set(), time.monotonic() + PATIENCE
    while (found := programs_of(out, name)) and time.monotonic() < late + PATIENCE:
        launchers = [process for process in found if has_launched(process)]
        for process in found:
            try:
                if time.monotonic() > late:
                    process.kill()
                    continue
                parent = process.parent()
                if process in asked or process in launchers or (parent in found and parent not in launchers):
                    continue
                process.send_signal(signal.SIGTERM)
                asked.add(process)
            except psutil.Error:
                continue
        time.sleep(0.1)


def has_launched(process) -> bool:
    """Whether it is a launcher (deepspeed, torchrun) with a program of its own still there."""
    import psutil

    def is_rank(one) -> bool:
        try:
            return "LOCAL_RANK" in one.environ()
        except psutil.Error:
            return False

    try:
        return not is_rank(process) and any(is_rank(child) for child in process.children(recursive=True))
    except psutil.Error:
        return False


def last_error(log: Path) -> str:
    """': ' and what the program said was wrong, or nothing."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((f": {line}" for line in reversed(lines) if line.startswith("error")), "")


def is_whole(file: str) -> bool:
    """Whether a file that a job leaves is there; a result.json or done.json has to say that it is finished."""
    path = Path(file)
    return bool(read_json(path).get("finished")) if path.suffix == ".json" else path.is_file()


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_record(work: Work, job: Job, about: dict[str, Any]) -> None:
    file = work.out / "jobs" / f"{job.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, dumps(about, indent=2) + "\n")


def code_version() -> dict[str, str | None]:
    """Return the fingerprint of the packages' code, and its commit where it lies in a git work tree."""
    import hashlib

    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("rlhf", "reward", "launch"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.read_bytes())
    commit = None
    if (root / ".git").exists():
        with contextlib.suppress(OSError):
            command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {"commit": commit, "code": digest.hexdigest()[:16]}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
