"""One job of an experiment or of the quickstart, and the fingerprint by which its results are
recognised.
"""

import hashlib
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rlhf.options.shared import NOISE_VERSION

# a setting of measurements whose sweep had another name in the first version
BEST_OF_N = "best_of_n"


@dataclass(frozen=True)
class Measurement:
    """What a job measures: the policies of a trial, the initial policy, or its responses by a
    seed's reward model.
    """

    # its folder below measures/
    trial: str
    kind: Literal["initial", "seed", "trial"]
    seed: int | None
    # what decides the result and is in no command
    settings: dict[str, Any]


@dataclass
class Job:
    """One program of a plan, what it needs and what it leaves."""

    name: str
    # "rlhf" or a module: launch.ppo
    program: str
    arguments: list[str]
    kind: Literal[
        "sandbox",
        "sample",
        "annotate",
        "reward",
        "referee",
        "pilot",
        "trial",
        "measure",
        "compare",
        "brand",
    ]
    description: str = ""
    needs: list[str] = field(default_factory=list)
    # those of `needs` that only have to be there, whatever they are
    after: list[str] = field(default_factory=list)
    # files whose contents count
    reads: list[str] = field(default_factory=list)
    # files that are there when it is done
    outputs: list[str] = field(default_factory=list)
    # files and folders that it writes, moved away with it
    owned: list[str] = field(default_factory=list)
    # nothing owned may be there when it starts
    fresh: bool = False
    # where a training program writes its metrics
    run_folder: str | None = None
    # how many it makes, where that is planned
    steps: int | None = None
    seed: int | None = None
    method: str | None = None
    swept: float | None = None
    measures: Measurement | None = None

    @property
    def command(self) -> list[str]:
        """The words of the command, without what launches it."""
        return [self.program, *self.arguments]


def fingerprints(jobs: list[Job]) -> dict[str, str]:
    """Return what each job is, by name: its command, the contents of what it reads, and the jobs it
    depends on.
    """
    contents: dict[str, str] = {}
    result: dict[str, str] = {}
    # in order, so that what a job needs comes before it
    for job in jobs:
        # a file that several jobs read is hashed once
        for file in job.reads:
            if file not in contents:
                contents[file] = sha256(file)
        dependencies = [result[name] for name in job.needs if name not in job.after]
        metadata = [fingerprint_words(job), [contents[file] for file in job.reads], dependencies]
        result[job.name] = hashlib.sha256(json.dumps(metadata).encode()).hexdigest()[:16]
    return result


def fingerprint_words(job: Job) -> list[str]:
    """Return the words that represent a job's command in its fingerprint.

    Their form and names are those of the first version, so that what it and later ones have made is
    recognised.
    """
    program = "rlhf" if job.program == "rlhf" else f"{job.program.replace('.', '/')}.py"
    words = renamed([program, *job.arguments], "--on_error", "--on_bad")
    if job.measures:
        words[1] = "compare"
        settings = dict(job.measures.settings)
        if "initial_policy" in settings:
            settings["foundation"] = settings.pop("initial_policy")
        if settings.get(BEST_OF_N):
            settings[BEST_OF_N] = {"strength": settings[BEST_OF_N]["sweep"]}
        words.append(f"# {json.dumps(settings, sort_keys=True)}")
    return words


def renamed(words: list[str], old: str, new: str) -> list[str]:
    """Return the words of a command with one option called by another name."""
    return [new if word == old else word for word in words]


def recorded_options(record: dict[str, Any]) -> dict[str, str]:
    """Return the options of a command and the settings of a measurement that a job's record holds,
    by today's names.
    """
    command = renamed(record.get("command", []), "--on_bad", "--on_error")
    settings = record.get("settings", {})
    if command and command[-1].startswith("# "):
        # the first version wrote the settings as the command's last word
        settings = json.loads(command.pop().removeprefix("# "))
        if "foundation" in settings:
            settings["initial_policy"] = settings.pop("foundation")
        if settings.get(BEST_OF_N):
            settings[BEST_OF_N] = {"sweep": settings[BEST_OF_N]["strength"]}
    options = {name: value for name, value in pairwise(command) if name.startswith("--")}
    if "noise" in record:
        settings = settings | {"sampling noise": record["noise"]}
    return options | {name: str(value) for name, value in settings.items()}


def draws_tokens(job: Job) -> bool:
    """Return whether what a job leaves depends on the sampling noise itself, not only on what other
    jobs left.
    """
    return job.kind in ("sample", "measure") or job.program == "launch.ppo"


def record_of(job: Job) -> dict[str, Any]:
    """Return what is recorded of how a job is done."""
    record: dict[str, Any] = {"command": job.command}
    if draws_tokens(job):
        record["noise"] = NOISE_VERSION
    if job.measures:
        record["settings"] = job.measures.settings
    return record


def sha256(file: str) -> str:
    """Return the hash of a file's contents, or its name where it is no file (a name on the Hub)."""
    if not Path(file).is_file():
        return f"name {file}"
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
