"""The commands of `rlhf`: what each does, its options, and what it runs.

Options and functions are named as "module:name", and imported only when a command is called.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command. `options` is "module:class".

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


def lazily(target: str, *handed: str) -> Callable[..., Any]:
    """Return a function that imports `target`, "module:function", when it is called.

    handed: functions, as "module:function" too, that `target` gets after what it is given; each is
    imported when it is called.
    """
    more = list(map(lazily, handed))
    return lambda *given, **named: pkgutil.resolve_name(target)(*given, *more, **named)


# The rest of rlhf/ does not import reward/: these commands hand it in.
BUILD, CHECK = "reward.compose:build_scorer", "reward.compose:check_scorers"


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
        "simulated annotators vote on a store's open comparisons: --store STORE",
        "rlhf.sandbox.annotators:AnnotateConfig",
        run_annotate,
    ),
    "sandbox quickstart": Command(
        "the whole pipeline on the sandbox, with a report",
        "rlhf.sandbox.quickstart:QuickstartConfig",
        lazily("rlhf.sandbox.quickstart:quickstart"),
    ),
    "collect sample": Command(
        "sample pairs, or answers to order, from policies into a preference store",
        "rlhf.collect.sample:SampleConfig",
        run_sample,
        loads_models=True,
        models=("model_name_or_path", "other", "runs", "select_by"),
    ),
    "collect serve": Command(
        "the web app in which people compare or order answers: STORE",
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
        lazily("rlhf.best_of_n.command:best_of_n", BUILD, CHECK),
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
        lazily("rlhf.experiment.cross_validate:cross_validate", "reward.model:load_reward"),
        words="reward_config",
        loads_models=True,
    ),
    "voice check": Command(
        "a brand voice in plain words: its contradictions, examples, spread: FILE",
        "reward.voice.check:CheckConfig",
        lazily("reward.voice.check:check"),
        words="voice",
        loads_models=True,
        models=("model_name_or_path",),
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
        lazily("rlhf.compare.measure:compare", BUILD),
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
        lazily("rlhf.experiment.run:run_experiment", CHECK),
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
        lazily("rlhf.experiment.measure:measure", BUILD),
        words="experiment",
    ),
}
