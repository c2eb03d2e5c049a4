"""`rlhf ...`: looking and handling, one process. The programs that train stand in launch/."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from rlhf.config import parse
from rlhf.errors import UserError, did_you_mean
from rlhf.program import program


@dataclass
class Command:
    """One command: a line of help, a function of its arguments, and the option that bare words fill."""

    help: str
    run: Callable[[list[str]], None]
    words: str | None = None


def data_show(argv: list[str]) -> None:
    from rlhf.data.describe import DescribeConfig, describe

    describe(parse(DescribeConfig, argv, "rlhf data show"))


def data_prepare(argv: list[str]) -> None:
    from rlhf.data.prepare.run import PrepareConfig, prepare

    prepare(parse(PrepareConfig, argv, "rlhf data prepare"))


def data_export(argv: list[str]) -> None:
    from rlhf.data.export import ExportConfig, export

    export(parse(ExportConfig, argv, "rlhf data export"))


def sandbox_build(argv: list[str]) -> None:
    from rlhf.sandbox.build import SandboxConfig, build

    build(parse(SandboxConfig, argv, "rlhf sandbox build"))


def sandbox_annotate(argv: list[str]) -> None:
    from reward.compose import build_scorer
    from rlhf.sandbox.annotators import AnnotateConfig, annotate

    config = parse(AnnotateConfig, argv, "rlhf sandbox annotate")
    annotate(config, build_scorer([{"voice": config.voice}]))


def sandbox_quickstart(argv: list[str]) -> None:
    from rlhf.sandbox.quickstart import QuickstartConfig, quickstart

    quickstart(parse(QuickstartConfig, argv, "rlhf sandbox quickstart"))


def collect_sample(argv: list[str]) -> None:
    from rlhf.collect.sample import SampleConfig, sample
    from rlhf.models import silence_libraries

    config = parse(SampleConfig, argv, "rlhf collect sample")
    silence_libraries()
    sample(config)


def collect_serve(argv: list[str]) -> None:
    from rlhf.collect.serve import ServeConfig, serve

    config = parse(ServeConfig, argv, "rlhf collect serve")
    guide = None
    if config.voice:
        from reward.voice import load_voice, voice_guide

        guide = voice_guide(load_voice(config.voice))
    serve(config, guide)


def collect_links(argv: list[str]) -> None:
    from rlhf.collect.serve import LinksConfig, links

    links(parse(LinksConfig, argv, "rlhf collect links"))


def collect_status(argv: list[str]) -> None:
    from rlhf.collect.status import StatusConfig, status

    status(parse(StatusConfig, argv, "rlhf collect status"))


def compare(argv: list[str]) -> None:
    from rlhf.compare.measure import CompareConfig
    from rlhf.compare.measure import compare as run

    if argv[:1] == ["--runs"] and argv[1:] and argv[1].endswith((".yaml", ".yml")):
        raise UserError(f"{argv[1]} is a file, no run; an experiment is started with: rlhf compare run {argv[1]}")
    config = parse(CompareConfig, argv, "rlhf compare")
    from reward.compose import build_scorer
    from rlhf.models import silence_libraries

    silence_libraries()
    run(config, build_scorer)


def compare_run(argv: list[str]) -> None:
    from reward.compose import check_scorers
    from rlhf.experiment.config import ExperimentConfig
    from rlhf.experiment.runner import run_experiment
    from rlhf.models import silence_libraries

    silence_libraries()
    run_experiment(parse(ExperimentConfig, argv, "rlhf compare run"), check_scorers)


def compare_measure(argv: list[str]) -> None:
    from rlhf.experiment.measure import MeasureConfig, measure

    config = parse(MeasureConfig, argv, "rlhf compare measure")
    from reward.compose import build_scorer

    measure(config, build_scorer)


def compare_report(argv: list[str]) -> None:
    from rlhf.experiment.report import ReportConfig, report_of

    report_of(parse(ReportConfig, argv, "rlhf compare report"))


COMMANDS = {
    "data show": Command("what a data file or store holds: form, groups, splits, bad rows", data_show, "source"),
    "data prepare": Command("clean a source, find its faults, write it with a data card", data_prepare, "source"),
    "data export": Command("write a source as rows, unpaired (KTO), hh or openai", data_export, "source"),
    "sandbox build": Command("make the small world: corpus, prompts, pretrained base", sandbox_build),
    "sandbox annotate": Command("simulated annotators vote on a store's open comparisons", sandbox_annotate),
    "sandbox quickstart": Command("the whole pipeline on the sandbox, with a report", sandbox_quickstart),
    "collect sample": Command("sample pairs from a policy into a preference store", collect_sample),
    "collect serve": Command("the web app in which people compare two answers: STORE", collect_serve, "store"),
    "collect links": Command("new personal links to the web app: STORE --annotators ann,bob", collect_links, "store"),
    "collect status": Command("progress, agreement and annotators of a store: STORE", collect_status, "store"),
    "compare run": Command("an experiment: methods, strengths and seeds at one budget: FILE", compare_run, "config"),
    "compare report": Command("its report, from what is there: FILE or FOLDER", compare_report, "experiment"),
    "compare measure": Command(
        "measure one trial of an experiment, as `compare run` does", compare_measure, "experiment"
    ),
    "compare": Command("compare trained policies on test prompts: RUN RUN ... --prompts FILE", compare, "runs"),
}


@program
def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    for length in (2, 1):
        name = " ".join(argv[:length])
        if name in COMMANDS:
            command = COMMANDS[name]
            command.run(bare_words(argv[length:], command.words))
            return
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: rlhf COMMAND [--option value ...]      rlhf COMMAND --help\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<20} {command.help}")
        print("\nTraining: deepspeed launch/{sft,reward,dpo,ppo}.py --help")
        return
    name = " ".join(argv[:2])
    raise UserError(f"unknown command '{name}'.{did_you_mean(name, COMMANDS)} All commands: rlhf --help")


def bare_words(argv: list[str], option: str | None) -> list[str]:
    """Words before the first flag as the value of `option`: `rlhf compare a b --seed 1` -> --runs a,b --seed 1."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    if not count or option is None:
        return argv
    return [f"--{option}", ",".join(argv[:count]), *argv[count:]]


if __name__ == "__main__":
    main()
