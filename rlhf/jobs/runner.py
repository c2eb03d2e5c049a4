"""Run the jobs that a plan still needs, a few at a time.

What is done is not done again. A run that was cut off is started again and resumes by itself. What
was made with other options is never mixed with the rest: it is named, and set aside on request.
"""

import contextlib
import resource
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from rlhf.errors import EXIT_GUARD, EXIT_INTERRUPTED, EXIT_USER_ERROR, EarlyExit, UserError
from rlhf.files import lock_folder, unlock_folder
from rlhf.jobs.commands import (
    end_programs,
    environment,
    full_command,
    programs_of,
    shown_command,
)
from rlhf.jobs.job import Job, draws_tokens, record_of, recorded_options
from rlhf.jobs.state import (
    PlanState,
    RunningJob,
    code_version,
    is_complete,
    now,
    read_json,
    write_record,
)
from rlhf.options.shared import NOISE_VERSION

ATTEMPTS = 3  # of a program that was killed; each resumes where the one before was cut off
POLL_SECONDS = 0.5
SHOWN = 8  # jobs that differ, in a message


@dataclass(frozen=True)
class RunOptions:
    """How the jobs of a plan are run."""

    launcher: str = "deepspeed --num_accelerators 1"
    processes: int = 1
    # of each program on a CPU; by default its share of the cores where several run at a time
    threads: int | None = None
    attempts: int = ATTEMPTS
    stop_at_failure: bool = False  # start no other job once one has failed
    # what happens to results of other options
    changed: Literal["refuse", "set aside", "delete"] = "refuse"


def set_jobs(state: PlanState, jobs: list[Job], how: RunOptions) -> None:
    """Make these the jobs. Results of other options under their names are refused, set aside or
    deleted.
    """
    state.set_jobs(jobs)
    outdated = drawn_with_other_noise(state)
    deletes = how.changed == "delete"
    changed = []
    for job in jobs:
        if job.name in outdated or has_other_results(state, job, unknown_too=deletes):
            changed.append(job)
    if changed and how.changed == "refuse":
        refuse(state, changed)
    for job in changed:
        clear(state, job, delete=deletes)
    # what was cleared is to be done again
    state.done = {job.name for job in jobs if state.is_done(job)}


def refuse(state: PlanState, changed: list[Job]) -> NoReturn:
    """Raise UserError that says in what the results of these jobs differ from what is planned."""
    lines = [
        f"{state.folder} holds results of other options, which are not mixed with new ones. Choose another "
        "--output_dir, or remake them with --redo true (the old ones are set aside). They differ in:"
    ]
    for job in changed[:SHOWN]:
        lines.append(f"  {job.name}: {difference(state, job)}")
    if len(changed) > SHOWN:
        lines.append(f"  and {len(changed) - SHOWN} more")
    raise UserError("\n".join(lines))


def has_other_results(state: PlanState, job: Job, *, unknown_too: bool) -> bool:
    """Return whether files are there that a job of this name with another fingerprint (or an
    unknown one) has made.
    """
    before = state.record(job.name).get("fingerprint")
    if before == state.fingerprints[job.name] or (before is None and not unknown_too):
        return False
    return has_left_files(job)


def has_left_files(job: Job) -> bool:
    """Return whether anything that a job owns is there; one that was refused has left nothing."""

    def has_content(path: Path) -> bool:
        return path.is_file() or any(path.glob("*"))

    return any(map(has_content, map(Path, job.owned)))


def drawn_with_other_noise(state: PlanState) -> set[str]:
    """Return the jobs whose results come from another version of the sampling noise, with all that
    depend on them; none where everything is done, so that nothing new would be put beside them.
    """
    if len(state.done) == len(state.jobs):
        return set()
    outdated: set[str] = set()
    for job in state.jobs:
        is_first = draws_tokens(job) and noise_of(state, job) != NOISE_VERSION
        if has_left_files(job) and (is_first or outdated & set(job.needs)):
            outdated.add(job.name)
    return outdated


def noise_of(state: PlanState, job: Job) -> int:
    """Return the version of the sampling noise of a job that was started; 1 was not recorded."""
    record = state.record(job.name)
    return record.get("noise", 1) if record else NOISE_VERSION


def difference(state: PlanState, job: Job) -> str:
    """Say in which options a job differs from the one that was done under its name."""
    record = state.record(job.name)
    if draws_tokens(job):
        record = record | {"noise": noise_of(state, job)}
    before, after = recorded_options(record), recorded_options(record_of(job))
    differences = []
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            was, now_is = before.get(name, "not given"), after.get(name, "not given")
            differences.append(f"{name} was {was}, now {now_is}")
    return "; ".join(differences) or "what it reads or depends on"


def clear(state: PlanState, job: Job, *, delete: bool = False) -> None:
    """Move what a job owns to OUT/aside/, where nothing reads it, or delete it."""
    aside = state.folder / "aside" / f"{job.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    for path in map(Path, job.owned):
        if not path.exists():
            continue
        if not delete:
            aside.mkdir(parents=True, exist_ok=True)
            shutil.move(path, aside / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (state.folder / "jobs" / f"{job.name}.json").unlink(missing_ok=True)


@contextlib.contextmanager
def claim(state: PlanState) -> Iterator[list[int]]:
    """Hold the folder of an experiment, and yield the list that signals are added to.

    Programs that a killed experiment has left are ended first, and all that are running at the end.
    """
    lock_folder(state.folder)
    signals: list[int] = []

    def note(number: int, _: Any) -> None:
        signals.append(number)

    # `run_jobs` ends between two looks at the programs, which then get to save
    handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, note)
    try:
        orphans = programs_of(state.folder)
        if orphans:
            print(
                f"{state.folder}: ending {len(orphans)} processes of a run that was cut off",
                flush=True,
            )
            end_programs(state.folder)
        yield signals
    finally:
        stop_all(state)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        unlock_folder(state.folder)


def run_jobs(
    state: PlanState,
    how: RunOptions,
    display: Any,
    signals: list[int],
    replan: Callable[[], None] = lambda: None,
) -> None:
    """Start what is ready and collect what has ended, until nothing is left; `replan` may add jobs.

    Raises EarlyExit on a signal.
    """
    while not signals:
        collect_ended(state, how, display)
        replan()
        start_ready(state, how, display)
        display.update()
        if not state.running:
            break
        time.sleep(POLL_SECONDS)
    if signals:
        name = signal.Signals(signals[0]).name
        raise EarlyExit(f"stopped by {name}; the same command resumes", EXIT_INTERRUPTED)


def start_ready(state: PlanState, how: RunOptions, display: Any) -> None:
    """Start jobs whose needs are done, as many as may run at a time."""
    if how.stop_at_failure and state.failed:
        return
    for job in state.jobs:
        if len(state.running) >= how.processes:
            return
        if state.status(job) == "waiting" and set(job.needs) <= state.done:
            display.started(job)
            start(state, how, job)


def start(state: PlanState, how: RunOptions, job: Job) -> None:
    """Start the job's program in a session of its own."""
    if job.fresh:
        clear(state, job, delete=how.changed == "delete")
    record = {
        "fingerprint": state.fingerprints[job.name],
        **record_of(job),
        "started": now(),
        "code": code_version(),
    }
    write_record(state, job, record)

    log = state.log_file(job.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"\n$ {shlex.join(shown_command(how.launcher, job))}\n".encode())
        file.flush()
        process = subprocess.Popen(
            full_command(how.launcher, job),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(state.folder, job, how.processes, how.threads),
            start_new_session=True,
        )
    state.attempts[job.name] = state.attempts.get(job.name, 0) + 1
    state.running[job.name] = RunningJob(process, time.monotonic())


def collect_ended(state: PlanState, how: RunOptions, display: Any) -> None:
    """See which programs have ended, and how; start again those that were killed."""
    for name, running in list(state.running.items()):
        # what a child and its own children have used is added to this process's when it is reaped
        before = children_cpu_seconds()
        code = running.process.poll()
        if code is None:
            continue
        cpu_seconds = children_cpu_seconds() - before
        del state.running[name]
        job = state.job(name)
        seconds = time.monotonic() - running.started
        if has_result(job, code):
            result = {
                "finished": now(),
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "exit": code,
            }
            write_record(state, job, state.record(name) | result)
            state.done.add(name)
            display.log(f"{name}: done in {seconds:.0f} s{', stopped by a guard' if code else ''}")
        elif code not in (0, EXIT_USER_ERROR, EXIT_GUARD) and state.attempts[name] < how.attempts:
            display.log(
                f"{name}: ended with exit code {code} after {seconds:.0f} s; starting it again"
            )
            # where a launcher was killed, what it launched lives on
            end_programs(state.folder, name)
            display.started(job)
            start(state, how, job)
        else:
            state.failed[name] = code
            display.log(f"{name}: failed, {ended(code)}: {state.log_file(name)}")


def children_cpu_seconds() -> float:
    """Return the CPU seconds, in user and system mode, of all children that have been reaped."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def has_result(job: Job, code: int) -> bool:
    """Return whether a program that ended with this code has left all its outputs."""
    if not all(map(is_complete, job.outputs)):
        return False
    # a run that a guard has stopped is a result too; torchrun makes 1 of every exit code
    is_stopped = code == 1 and job.run_folder and read_json(Path(job.outputs[0])).get("stopped")
    return code in (0, EXIT_GUARD) or bool(is_stopped)


def stop_all(state: PlanState) -> None:
    """Ask every program to save and end, wait, then end what is left."""
    if state.running:
        end_programs(state.folder)
    for running in state.running.values():
        running.process.wait()
    state.running.clear()


def failures(state: PlanState) -> str:
    """Return which jobs have failed, how, and where their output is."""
    blocked = list(map(state.status, state.jobs)).count("blocked")
    tail = f"; {blocked} that need them were not started" if blocked else ""
    lines = [f"{len(state.failed)} of {len(state.jobs)} jobs failed{tail}:"]
    for name, code in state.failed.items():
        log = state.log_file(name)
        lines.append(f"  {name}: {ended(code)}, {log}{last_error(log)}")
    return "\n".join(lines)


def stop_at_failure(state: PlanState) -> None:
    """Raise UserError, naming the log, where a job has failed."""
    for name, code in state.failed.items():
        log = state.log_file(name)
        raise UserError(
            f"step '{name}' failed, {ended(code)}; its output is in {log}{last_error(log)}"
        )


def ended(code: int) -> str:
    return f"exit code {code}" if code else "ended without a result"


def last_error(log: Path) -> str:
    """Return ': ' and the last error message of a program, or nothing."""
    if not log.is_file():
        return ""
    # the last one: an earlier one may be of a run that was started again
    for line in reversed(log.read_text(errors="replace").splitlines()):
        if line.startswith("error"):
            return f": {line}"
    return ""
