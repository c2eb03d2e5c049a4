"""`rlhf sandbox quickstart`: every stage on the sandbox by the real programs, ending in the
comparison.

It is a plan for the runner of experiments. Each job is a command that can be typed by hand (it is
printed). A job that was done with the same command, configuration and code is not done again; one
that changed is, and so are those that depend on it.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import SEED, option
from rlhf.jobs.job import Job
from rlhf.jobs.runner import RunOptions, claim, run_jobs, set_jobs, stop_at_failure
from rlhf.jobs.state import PlanState, code_files
from rlhf.jobs.steps import StepDisplay
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

    # where the jobs find what the others have made
    @property
    def base(self) -> str:
        return f"{self.world}/base"

    @property
    def prompts(self) -> str:
        return f"{self.world}/prompts.jsonl"

    @property
    def voice(self) -> str:
        return f"{self.world}/voice.yaml"

    @property
    def store(self) -> str:
        return f"{self.run}/preferences.db"

    @property
    def store_files(self) -> list[str]:
        return [self.store, f"{self.store}-wal", f"{self.store}-shm"]


def jobs(config: QuickstartConfig) -> list[Job]:
    """Return the pipeline, in order. Paths and seed are flags; everything else is in
    rlhf/sandbox/configs/.
    """
    planned = [*data_jobs(config), *training_jobs(config), compare_job(config)]
    code = list(map(str, (CONFIGS / "voice.yaml", *code_files())))
    for job in planned:
        job.reads = [str(CONFIGS / f"{job.name}.yaml"), *code]
    return planned


def data_jobs(config: QuickstartConfig) -> list[Job]:
    """Return what leads to votes: the world, the SFT policy, its responses, and annotators."""
    build = ["sandbox", "build", *configured("sandbox"), "--output_dir", config.world]
    seed = ["--seed", str(config.seed)]
    # the pairs are the SFT policy's own answers: PPO and DPO start from it
    sample = ["collect", "sample", *configured("sample")]
    sample += ["--model_name_or_path", f"{config.run}/sft"]
    sample += ["--data", config.prompts, "--store", config.store, *seed]
    annotate = ["sandbox", "annotate", *configured("annotate"), "--store", config.store]
    annotate += ["--voice", config.voice, *seed]
    sft = ["--model_name_or_path", config.base, "--data", f"{config.world}/instructions.jsonl"]
    return [
        Job(
            name="sandbox",
            program="rlhf",
            arguments=build,
            kind="sandbox",
            description="a world, its shop and a base model",
            outputs=[f"{config.base}/model.safetensors", config.prompts],
        ),
        training(
            config,
            "sft",
            "imitate the shop's answers",
            [*sft, *evaluation(config)],
            needs=["sandbox"],
        ),
        Job(
            name="sample",
            program="rlhf",
            arguments=sample,
            kind="sample",
            description="two answers of the SFT policy to each prompt",
            needs=["sft"],
            outputs=[config.store],
            owned=config.store_files,
            fresh=True,  # responses of another policy, and votes on them, would stay in the store
        ),
        Job(
            name="annotate",
            program="rlhf",
            arguments=annotate,
            kind="annotate",
            description="simulated annotators choose the better one",
            needs=["sample"],
            outputs=[config.store],
            owned=config.store_files,
        ),
    ]


def training_jobs(config: QuickstartConfig) -> list[Job]:
    """Return what learns from the votes; DPO runs beside the other two where there is a core."""
    pairs = ["--model_name_or_path", f"{config.run}/sft", "--data", config.store]
    reward = ["--reward", f"[{{model: {config.run}/reward}}]"]
    return [
        training(config, "reward", "learn to judge from their votes", pairs, needs=["annotate"]),
        training(
            config,
            "dpo",
            "learn from the same votes directly",
            [*pairs, *evaluation(config)],
            needs=["annotate"],
        ),
        training(
            config,
            "ppo",
            "learn from the reward model",
            [*pairs, *evaluation(config), *reward],
            needs=["annotate", "reward"],
        ),
    ]


def compare_job(config: QuickstartConfig) -> Job:
    report = f"{config.run}/report"
    policies = [f"{config.run}/{name}" for name in ("sft", "dpo", "ppo")]
    arguments = ["compare", *policies, *configured("compare")]
    # the true reward decides, where a real project would have a referee or people
    arguments += ["--gold", f"[{{voice: {config.voice}}}]"]
    arguments += ["--prompts", config.prompts, "--votes", config.store]
    arguments += ["--output_dir", report, "--seed", str(config.seed)]
    return Job(
        name="compare",
        program="rlhf",
        arguments=arguments,
        kind="compare",
        description="both against SFT by the true reward",
        needs=["sft", "dpo", "ppo"],
        outputs=[f"{report}/report.json"],
        owned=[report],
    )


def evaluation(config: QuickstartConfig) -> list[str]:
    gold = f"[{{voice: {config.voice}, name: gold}}]"
    return ["--eval_data", config.prompts, "--eval_scorers", gold]


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


def quickstart(config: QuickstartConfig) -> None:
    """Do the jobs that are not done; raises UserError naming the log when one fails, EarlyExit on a
    signal.
    """
    state = PlanState(Path(config.run))
    how = RunOptions(
        # two small models side by side gain more than one of them does from a second thread
        processes=min(2, os.cpu_count() or 1),
        threads=1,
        # a program that fails here fails again: it is not started several times, as one of a long
        # experiment is
        attempts=1,
        stop_at_failure=True,
        changed="delete",
    )
    with claim(state) as signals:
        set_jobs(state, jobs(config), how)
        display = StepDisplay(state)
        display.show_reused()
        reused = [job.name for job in state.jobs if job.name in state.done]
        run_jobs(state, how, display, signals)
    stop_at_failure(state)

    if reused:
        print(
            f"\nreused: {', '.join(reused)}. To start over: rm -r {config.run} (and {config.world} for the world)"
        )
    report = state.folder / "report"
    if "compare" in reused:
        show_report(report)
    records = [state.record(job.name) for job in state.jobs]
    cpu = sum(record["cpu_seconds"] for record in records)
    now = time.monotonic() - display.started_at
    print(f"\nquickstart: {now:.0f} s now; all steps: {cpu:.0f} CPU seconds. Report: {report}/")
    for name in REPORT_FILES:
        print(f"  {report / name}")


def show_report(report: Path) -> None:
    from rlhf.report.files import print_report, read_report

    print_report(read_report(report / "report.json"), report)
