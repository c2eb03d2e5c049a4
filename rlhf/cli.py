"""`rlhf COMMAND`: prepare data, collect preferences, compare runs. The programs that train are in
launch/.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from rlhf import __version__, startup
from rlhf.config import parse
from rlhf.errors import UserError, did_you_mean
from rlhf.program import program
from rlhf.values import type_name


@dataclass(frozen=True)
class Command:
    """One command. `options` is "module:class", imported only when the command is called, and so is
    what `run` does.

    `words` is the option that words without a flag fill; libraries that load models are silenced
    for `loads_models`, and `models` are the options that name them.
    """

    help: str
    options: str
    run: Callable[[Any], Any]
    words: str | None = None
    needs_words: bool = True
    # between words that were not quoted
    joiner: str = ","
    loads_models: bool = False
    models: tuple[str, ...] = ()


def lazily(target: str) -> Callable[[Any], Any]:
    """Return a function that imports `target`, "module:function", when it is called."""
    return lambda config: pkgutil.resolve_name(target)(config)


# rlhf/ does not import reward/; these commands hand it in.


def run_annotate(config: Any) -> None:
    from reward.compose import build_scorer
    from rlhf.sandbox.annotators import annotate

    annotate(config, build_scorer([{"voice": config.voice}]))


def run_serve(config: Any) -> None:
    from reward.voice.scorer import load_voice
    from reward.voice.words import voice_guide
    from rlhf.collect.serve import serve

    # a misspelt key is found before anyone is asked to judge by it
    serve(config, voice_guide(load_voice(config.voice)) if config.voice else None)


def run_chat(config: Any) -> None:
    from reward.compose import build_scorer
    from rlhf.serve.chat import chat

    chat(config, build_scorer([{"voice": config.voice}]) if config.voice else None)


def run_data_export(config: Any) -> None:
    if config.form in ("argilla", "label_studio"):
        from rlhf.exchange.commands import export
    else:
        from rlhf.data.export import export

    export(config)


def run_sample(config: Any) -> None:
    from rlhf.collect.sample import sample

    if not config.select_by:
        sample(config)
    elif config.select_reference:
        from reward.implicit import implicit_reward

        limits = (config.max_prompt_length, config.max_response_length)
        scorer = implicit_reward(config.select_by[0], config.select_reference, *limits)
        sample(config, scorer)
    else:
        from reward.compose import member_scorer

        sample(config, member_scorer(config.select_by))


def run_compare(config: Any) -> None:
    from reward.compose import build_scorer
    from rlhf.compare.measure import compare

    compare(config, build_scorer)


def run_best_of_n(config: Any) -> None:
    from reward.compose import build_scorer, check_scorers
    from rlhf.best_of_n.command import best_of_n

    best_of_n(config, build_scorer, check_scorers)


def start_experiment(config: Any) -> None:
    from reward.compose import check_scorers
    from rlhf.experiment.runner import run_experiment

    run_experiment(config, check_scorers)


def run_cross_validate(config: Any) -> None:
    from rlhf.experiment.cross_validate import cross_validate

    # torch comes with it, and the experiment is read before
    def load_reward(*given: Any, **named: Any) -> Any:
        return pkgutil.resolve_name("reward.model:load_reward")(*given, **named)

    cross_validate(config, load_reward)


def run_measure(config: Any) -> None:
    from reward.compose import build_scorer
    from rlhf.experiment.measure import measure

    measure(config, build_scorer)


def run_brand(config: Any) -> None:
    from reward.compose import check_scorers
    from rlhf.brand.run import run_brand

    # a contradiction, or a judge that cannot be one, is found before anything is sampled
    check_scorers([voice_entry(config)], where="voice and judge")
    run_brand(config)


def run_brand_pairs(config: Any) -> None:
    from reward.compose import build_scorer
    from reward.voice.rewrite import rewrite
    from reward.voice.scorer import load_voice
    from rlhf.brand.pairs import pairs

    voice = load_voice(config.voice)
    scorer = build_scorer([voice_entry(config)])
    pairs(config, scorer, lambda text, metadata: rewrite(voice, text, metadata))


def run_brand_verdict(config: Any) -> None:
    from reward.compose import build_scorer
    from rlhf.brand.verdict import verdict

    verdict(config, build_scorer([voice_entry(config)]))


def voice_entry(config: Any) -> dict[str, Any]:
    """Return the scorer's entry of a brand voice, with the judge of its tone where one is given."""
    return {"voice": config.voice, **({"judge": config.judge} if config.judge else {})}


def run_voice_check(config: Any) -> None:
    from reward.voice.check import check

    if config.model_name_or_path:
        startup.silence_libraries()
    check(config)


COMMANDS = {
    "data show": Command(
        "what a data file or store holds: form, groups, splits, bad rows",
        "rlhf.data.describe:DescribeConfig",
        lazily("rlhf.data.describe:describe"),
        words="source",
    ),
    "data prepare": Command(
        "clean a source, find its faults, write it with a data card",
        "rlhf.data.prepare.run:PrepareConfig",
        lazily("rlhf.data.prepare.run:prepare"),
        words="source",
    ),
    "data export": Command(
        "write a source as rows, unpaired (KTO), hh, openai, argilla or label_studio",
        "rlhf.data.export:ExportConfig",
        run_data_export,
        words="source",
    ),
    "sandbox build": Command(
        "make the small world: corpus, prompts, pretrained base",
        "rlhf.sandbox.build:SandboxConfig",
        lazily("rlhf.sandbox.build:build"),
    ),
    "sandbox annotate": Command(
        "simulated annotators vote on a store's open comparisons",
        "rlhf.sandbox.annotators:AnnotateConfig",
        run_annotate,
    ),
    "sandbox quickstart": Command(
        "the whole pipeline on the sandbox, with a report",
        "rlhf.sandbox.quickstart:QuickstartConfig",
        lazily("rlhf.sandbox.quickstart:quickstart"),
    ),
    "collect sample": Command(
        "sample pairs from a policy into a preference store",
        "rlhf.collect.sample:SampleConfig",
        run_sample,
        loads_models=True,
        models=("model_name_or_path", "other", "runs", "select_by"),
    ),
    "collect serve": Command(
        "the web app in which people compare two answers: STORE",
        "rlhf.collect.serve:ServeConfig",
        run_serve,
        words="store",
    ),
    "collect links": Command(
        "new personal links to the web app: STORE --annotators ann,bob",
        "rlhf.collect.serve:LinksConfig",
        lazily("rlhf.collect.serve:links"),
        words="store",
    ),
    "collect exclude": Command(
        "votes of an annotator that count no more, or again: STORE --annotators NAME",
        "rlhf.collect.serve:ExcludeConfig",
        lazily("rlhf.collect.serve:exclude"),
        words="store",
    ),
    "collect import": Command(
        "votes of Argilla or Label Studio, or labelled pairs, into a store: FILE --store STORE",
        "rlhf.exchange.commands:ImportConfig",
        lazily("rlhf.exchange.commands:import_votes"),
        words="source",
    ),
    "collect status": Command(
        "progress, agreement and annotators of a store: STORE",
        "rlhf.collect.status:StatusConfig",
        lazily("rlhf.collect.status:status"),
        words="store",
    ),
    "reward card": Command(
        "the report card of a reward model, before RL starts: RUN",
        "reward.cards.command:CardConfig",
        lazily("reward.cards.command:make_card"),
        words="run",
        loads_models=True,
        models=("run",),
    ),
    "reward best-of-n": Command(
        "where the best of n turns down in what counts: RUN --prompts FILE --gold SPEC",
        "rlhf.best_of_n.command:BestOfNConfig",
        run_best_of_n,
        words="run",
        loads_models=True,
        models=("run", "policy"),
    ),
    "reward learning-curve": Command(
        "its accuracy by the number of training pairs: RUN",
        "reward.cards.learning_curve:CurveConfig",
        lazily("reward.cards.learning_curve:learning_curve"),
        words="run",
        loads_models=True,
        models=("run",),
    ),
    "reward cross-validate": Command(
        "train a reward model without each fold, score what it has not seen: CONFIG",
        "rlhf.experiment.cross_validate:CrossValidateConfig",
        run_cross_validate,
        words="reward_config",
        loads_models=True,
    ),
    "voice check": Command(
        "a brand voice in plain words: its contradictions, examples, spread: FILE",
        "reward.voice.check:CheckConfig",
        run_voice_check,
        words="voice",
    ),
    "voice score": Command(
        "the score of a text, rule by rule: FILE, TEXT or - --voice FILE",
        "reward.voice.score:ScoreConfig",
        lazily("reward.voice.score:score"),
        words="text",
        joiner=" ",
    ),
    "brand run": Command(
        "from a brand voice to an adapter with a ship verdict: FILE",
        "rlhf.brand.config:BrandConfig",
        run_brand,
        words="config",
    ),
    "brand prompts": Command(
        "prompts from templates, with their facts",
        "rlhf.brand.prompts:PromptsConfig",
        lazily("rlhf.brand.prompts:prompts"),
    ),
    "brand pairs": Command(
        "pairs by a brand voice from sampled answers, also rewritten by rule",
        "rlhf.brand.pairs:PairsConfig",
        run_brand_pairs,
    ),
    "brand checked": Command(
        "the pairs as votes on some of them leave them",
        "rlhf.brand.pairs:CheckedConfig",
        lazily("rlhf.brand.pairs:checked"),
    ),
    "brand measure": Command(
        "what an adapter forgets: perplexity of other text, a small task",
        "rlhf.brand.measure:MeasureConfig",
        lazily("rlhf.brand.measure:measure"),
        loads_models=True,
        models=("model_name_or_path", "run"),
    ),
    "brand verdict": Command(
        "SHIP or DO NOT SHIP, by named gates with their intervals",
        "rlhf.brand.verdict:VerdictConfig",
        run_brand_verdict,
    ),
    "plan": Command(
        "what a run will take before it starts, memory, time and cost: FILE --gpu H100 --gpus 8",
        "rlhf.plan.command:PlanConfig",
        lazily("rlhf.plan.command:plan"),
        words="file",
        loads_models=True,
    ),
    "compare": Command(
        "compare trained policies on test prompts: RUN RUN ... --prompts FILE",
        "rlhf.compare.measure:CompareConfig",
        run_compare,
        words="runs",
        loads_models=True,
    ),
    "judge pairs": Command(
        "a judge of pairs, and how far it can be believed: STORE or FILE --judge SPEC",
        "rlhf.judge.commands:PairsConfig",
        lazily("rlhf.judge.commands:judge_pairs"),
        words="source",
    ),
    "judge export": Command(
        "answers or judged pairs as files of AlpacaEval or Arena-Hard: FILE --to FORM",
        "rlhf.judge.commands:ExportConfig",
        lazily("rlhf.judge.commands:export"),
        words="source",
    ),
    "judge import": Command(
        "files of AlpacaEval or Arena-Hard as answers or judged pairs: FILE ...",
        "rlhf.judge.commands:ImportConfig",
        lazily("rlhf.judge.commands:import_"),
        words="source",
    ),
    "export": Command(
        "write a policy as safetensors, GGUF, for Ollama or vLLM: RUN --to FORM",
        "rlhf.export.run:ExportConfig",
        lazily("rlhf.export.run:export"),
        words="run",
        loads_models=True,
        models=("run",),
    ),
    "doctor": Command(
        "whether this machine, and what a run reads, are as they should be: [CONFIG]",
        "rlhf.doctor.run:DoctorConfig",
        lazily("rlhf.doctor.run:doctor"),
        words="run_config",
        needs_words=False,
    ),
    "chat": Command(
        "talk to policies in the terminal: RUN RUN ... --voice FILE",
        "rlhf.serve.chat:ChatConfig",
        run_chat,
        words="runs",
        loads_models=True,
        models=("runs",),
    ),
    "serve": Command(
        "an OpenAI-compatible endpoint, adapters of one base by name: RUN RUN ...",
        "rlhf.serve.run:ServeConfig",
        lazily("rlhf.serve.run:serve"),
        words="runs",
        loads_models=True,
        models=("runs",),
    ),
    "experiment run": Command(
        "train and measure methods, swept values and seeds at one budget: FILE",
        "rlhf.experiment.config:ExperimentConfig",
        start_experiment,
        words="config",
        loads_models=True,
    ),
    "experiment report": Command(
        "write its report from what is there: FILE or FOLDER",
        "rlhf.experiment.report:ReportConfig",
        lazily("rlhf.experiment.report:report_of"),
        words="experiment",
    ),
    "experiment status": Command(
        "its jobs: done, running, missing: FILE",
        "rlhf.experiment.config:ExperimentConfig",
        lazily("rlhf.experiment.progress:experiment_status"),
        words="config",
    ),
    "experiment measure": Command(
        "measure one trial; `experiment run` calls it",
        "rlhf.experiment.measure:MeasureConfig",
        run_measure,
        words="experiment",
    ),
}

# words that are the file of a program's options
OF_PROGRAMS = ("run_config", "reward_config", "file")
RENAMED = {f"compare {name}": f"experiment {name}" for name in ("run", "report", "measure")}


@program
def main(argv: list[str] | None = None) -> None:
    """Run the command that `argv` names, or print help."""
    argv = sys.argv[1:] if argv is None else argv
    words = " ".join(argv[:2])
    # a run may have one of these names: `rlhf compare run other`
    if words in RENAMED and not Path(argv[1]).is_dir():
        raise UserError(f"'rlhf {words}' is now: rlhf {' '.join([RENAMED[words], *argv[2:]])}")
    if words.startswith("compare ") and words.endswith((".yaml", ".yml")):
        raise UserError(
            f"{argv[1]} is a file, not a run. To run an experiment: rlhf experiment run {argv[1]}"
        )
    if words == "--version":
        print(f"rlhf {__version__}")
        return

    name = words if words in COMMANDS else words.partition(" ")[0]
    if name in COMMANDS:
        run_command(name, argv[len(name.split()) :])
        return

    wants_help = {*argv} <= {"-h", "--help"} or {*argv[1:]} <= {"-h", "--help"}
    group = "" if name in ("", "-h", "--help") else f"{name} "
    width = max(map(len, COMMANDS))
    listed = []
    for known, command in COMMANDS.items():
        if known.startswith(group):
            listed.append(f"  {known:<{width}}  {command.help}")
    if not listed or not wants_help:
        raise UserError(
            f"unknown command '{words}'.{did_you_mean(words, COMMANDS)} All commands: rlhf --help"
        )
    usage = f"usage: rlhf {group}COMMAND [--option VALUE ...]      rlhf {group}COMMAND --help"
    training = "Training: deepspeed --module launch.{sft,reward,dpo,ppo} --help"
    print("\n".join([usage, "", *listed, "", training]))


def run_command(name: str, argv: list[str]) -> None:
    """Parse the options of a command and run it."""
    command = COMMANDS[name]
    options = pkgutil.resolve_name(command.options)
    # words before the first flag: `rlhf compare a b --seed 1` -> --runs a,b --seed 1
    # a lone dash is standard input, and what has blanks is a text
    flags = [
        i for i, word in enumerate(argv) if word.startswith("-") and word != "-" and " " not in word
    ]
    first_flag = flags[0] if flags else len(argv)
    words, argv = argv[:first_flag], argv[first_flag:]
    hint = get_type_hints(options).get(command.words, str)
    takes_several = command.joiner == " " or "list of" in type_name(hint)
    shown = (command.words or "").upper() + (" ..." if takes_several else "")
    if not command.needs_words:
        shown = f"[{shown}]"
    if len(words) > 1 and command.words and not takes_several:
        raise UserError(
            f"'rlhf {name}' takes one '{command.words}', found {len(words)}: {', '.join(words)}"
        )
    if command.words and command.needs_words and not words and not argv:
        raise UserError(
            f"'rlhf {name}' needs its '{command.words}': rlhf {name} {shown} (all options: rlhf {name} --help)"
        )
    if command.words and words:
        words = [f"--{command.words}", command.joiner.join(words)]

    try:
        config = parse(options, [*words, *argv], f"rlhf {name}", shown)
    except UserError as error:
        # the programs take their files by this flag
        if command.words in OF_PROGRAMS and "--config" in argv:
            raise UserError(f"{error}. For a program's file: rlhf {name} FILE") from None
        raise
    if command.loads_models:
        startup.silence_libraries()
        check_models(config, command.models)
    command.run(config)


def check_models(config: Any, names: tuple[str, ...]) -> None:
    """Raise UserError where a model that one of these options names cannot be loaded, before torch is
    imported for it.
    """
    from rlhf.data.sources import FILES
    from rlhf.model_files import check_model

    for name in names:
        given = getattr(config, name)
        for path in given if isinstance(given, list) else [given]:
            # answers may come from a file instead
            if path and not path.lower().endswith(FILES):
                check_model(path)


if __name__ == "__main__":
    main()
