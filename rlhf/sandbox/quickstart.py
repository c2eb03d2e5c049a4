"""`rlhf sandbox quickstart`: every stage on the sandbox by the real programs, ending in the
comparison.

It is a plan for the runner of experiments. Each job is a command that can be typed by hand (it is
printed). A job that was done with the same command, configuration and code is not done again; one
that changed is, and so are those that depend on it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rlhf.config import SEED, option
from rlhf.errors import UserError
from rlhf.experiment.plan import Job
from rlhf.experiment.runner import RunOptions, claim, ended, run_jobs, set_jobs
from rlhf.experiment.state import ExperimentState, code_files
from rlhf.sandbox import CONFIGS, shown_path

REPORT_FILES = ("report.md", "report.json", "frontier.png")


@dataclass(kw_only=True)
class QuickstartConfig:
    """The whole pipeline in a small world with a known true reward: minutes on two CPU cores."""

    run: str = option("runs/quickstart", "the folder of the run")
    world: str = option(
        "runs/sandbox", "the folder of the small world, built when missing and shared by runs"
    )
    seed: int = option(
        0,
        "run seed: annotators, sampling, training (the world has its own in the sandbox's config)",
        **SEED,
    )


def jobs(config: QuickstartConfig) -> list[Job]:
    """Return the pipeline, in order. Paths and seed are flags; everything else is in
    rlhf/sandbox/configs/.
    """
    run, world = config.run, config.world
    store, prompts = f"{run}/preferences.db", f"{world}/prompts.jsonl"
    store_files = [store, f"{store}-wal", f"{store}-shm"]
    gold = f"[{{voice: {world}/voice.yaml, name: gold}}]"
    pairs = ["--model_name_or_path", f"{run}/sft", "--data", store]
    evaluation = ["--eval_data", prompts, "--eval_scorers", gold]
    compared = [f"{run}/{name}" for name in ("sft", "dpo", "ppo")]

    planned = [
        Job(
            name="sandbox",
            program="rlhf",
            arguments=["sandbox", "build", *configured("sandbox"), "--output_dir", world],
            kind="sandbox",
            description="a world, its shop and a base model",
            outputs=[f"{world}/base/model.safetensors", prompts],
        ),
        training(
            config,
            "sft",
            "imitate the shop's answers",
            [
                "--model_name_or_path",
                f"{world}/base",
                "--data",
                f"{world}/instructions.jsonl",
                *evaluation,
            ],
            needs=["sandbox"],
        ),
        Job(
            name="sample",
            program="rlhf",
            arguments=[
                *("collect", "sample", *configured("sample"), "--model_name_or_path", f"{run}/sft"),
                *("--data", prompts, "--store", store, "--seed", str(config.seed)),
            ],
            kind="sample",
            description="two answers of the SFT policy to each prompt",
            needs=["sft"],
            outputs=[store],
            owned=store_files,
            fresh=True,  # responses of another policy, and votes on them, would stay in the store
        ),
        Job(
            name="annotate",
            program="rlhf",
            arguments=[
                *("sandbox", "annotate", *configured("annotate"), "--store", store),
                *("--voice", f"{world}/voice.yaml", "--seed", str(config.seed)),
            ],
            kind="annotate",
            description="simulated annotators choose the better one",
            needs=["sample"],
            outputs=[store],
            owned=store_files,
        ),
        training(config, "reward", "learn to judge from their votes", pairs, needs=["annotate"]),
        training(
            config,
            "dpo",
            "learn from the same votes directly",
            [*pairs, *evaluation],
            needs=["annotate"],
        ),
        training(
            config,
            "ppo",
            "learn from the reward model",
            [*pairs, *evaluation, "--reward", f"[{{model: {run}/reward}}]"],
            needs=["annotate", "reward"],
        ),
        Job(
            name="compare",
            program="rlhf",
            arguments=[
                *(
                    "compare",
                    *compared,
                    *configured("compare"),
                    "--gold",
                    f"[{{voice: {world}/voice.yaml}}]",
                ),
                *("--prompts", prompts, "--votes", store),
                *("--output_dir", f"{run}/report", "--seed", str(config.seed)),
            ],
            kind="compare",
            description="both against SFT by the true reward",
            needs=["sft", "dpo", "ppo"],
            outputs=[f"{run}/report/report.json"],
            owned=[f"{run}/report"],
        ),
    ]
    return in_order(planned)


def in_order(planned: list[Job]) -> list[Job]:
    """Let each job wait for the one before it, so that the first that fails ends the pipeline, and
    read the code.
    """
    code = [str(file) for file in (CONFIGS / "voice.yaml", *code_files())]
    for job in planned:
        job.reads = [str(CONFIGS / f"{job.name}.yaml"), *code]
    for before, job in pairwise(planned):
        if before.name not in job.needs:
            job.needs.append(before.name)
            job.after.append(before.name)
    return planned


def configured(name: str) -> list[str]:
    return ["--config", shown_path(CONFIGS / f"{name}.yaml")]


def training(
    config: QuickstartConfig, name: str, description: str, options: list[str], needs: list[str]
) -> Job:
    folder = f"{config.run}/{name}"
    return Job(
        name=name,
        program=f"launch.{name}",
        arguments=[*configured(name), *options, "--output_dir", folder, "--seed", str(config.seed)],
        kind="reward" if name == "reward" else "trial",
        description=description,
        needs=needs,
        outputs=[f"{folder}/result.json", f"{folder}/adapter_model.safetensors"],
        owned=[folder],
        run_folder=folder,
    )


class StepDisplay:
    """Shows each job and its command when it starts, and its output as it comes."""

    def __init__(self, state: ExperimentState):
        self.state = state
        self.started_at = time.monotonic()
        self.log_file: Path | None = None  # of the job that runs
        self.shown = 0  # bytes of it

    def title(self, job: Job) -> str:
        number = 1 + self.state.jobs.index(job)
        return f"[{number}/{len(self.state.jobs)}] {job.name}: {job.description}"

    def started(self, job: Job) -> None:
        self.log_file = self.state.log_file(job.name)
        self.shown = self.log_file.stat().st_size if self.log_file.is_file() else 0
        print(
            f"\n{self.title(job)}  (at {time.monotonic() - self.started_at:.0f} s)",
            end="",
            flush=True,
        )

    def log(self, text: str) -> None:
        self.update()
        print(text, flush=True)

    def update(self) -> None:
        """Copy what has come to the log since; its first line is the command."""
        if self.log_file is None:
            return
        with open(self.log_file, "rb") as log:
            log.seek(self.shown)
            new = log.read()
        self.shown += len(new)
        sys.stdout.buffer.write(new)
        sys.stdout.buffer.flush()


def quickstart(config: QuickstartConfig) -> None:
    """Do the jobs that are not done; raises UserError naming the log when one fails, EarlyExit on a
    signal.
    """
    state = ExperimentState(Path(config.run))
    # a program that fails here fails again: it is not started several times, as one of a long
    # experiment is
    how = RunOptions(attempts=1, changed="delete")
    with claim(state) as signals:
        set_jobs(state, jobs(config), how)
        display = StepDisplay(state)
        reused = [job for job in state.jobs if job.name in state.done]
        for job in reused:
            saved = state.record(job.name)["seconds"]
            print(f"{display.title(job)} - done before, reused ({saved:.0f} s saved)", flush=True)
        run_jobs(state, how, display, signals)
    for name, code in state.failed.items():
        raise UserError(
            f"step '{name}' failed, {ended(code)}; its output is in {state.log_file(name)}"
        )

    names = [job.name for job in reused]
    if names:
        print(
            f"\nreused: {', '.join(names)}. To start over: rm -r {config.run} (and {config.world} for the world)"
        )
    report = state.folder / "report"
    if "compare" in names:
        show_report(report)
    total = sum(state.record(job.name)["seconds"] for job in state.jobs)
    now = time.monotonic() - display.started_at
    print(f"\nquickstart: {now:.0f} s now, {total:.0f} s for all steps. Report: {report}/")
    for name in REPORT_FILES:
        print(f"  {report / name}")


def show_report(report: Path) -> None:
    from rlhf.compare.report import print_report, read_report

    print_report(read_report(report / "report.json"), report)
