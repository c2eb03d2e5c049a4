"""Build a scorer from its specification (reward/specs.py): a weighted sum of named scorers, with
its breakdown.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from reward.checks import checked_scores
from reward.ensemble import ensemble_scorer, member_names
from reward.files import check_reward_files
from reward.http import http_scorer
from reward.loaded import RewardModels, reward_scorer
from reward.rules import RULES
from reward.specs import (
    EnsembleSpec,
    FunctionSpec,
    HttpSpec,
    JudgeSpec,
    ModelSpec,
    RuleSpec,
    ScorerSpec,
    VoiceSpec,
    check_tone_judge,
    parse_specs,
)
from reward.voice.scorer import choose_channel, load_voice, voice_scorer
from reward.voice.tone import language_model_tone
from rlhf.data.records import Samples, Scorer, Scores
from rlhf.errors import UserError
from rlhf.plugins import import_function

# (specification, tokenizer of the samples' ids or None) -> scorer
Build = Callable[[Any, Any], Scorer]


def build_model(spec: ModelSpec, tokenizer: Any = None, *, models: RewardModels) -> Scorer:
    """Load a reward model beside `models`; it reads the samples' ids where it has their tokenizer."""
    return reward_scorer(
        spec.model,
        spec.name,
        tokenizer=tokenizer,
        batch_size=spec.batch_size,
        dtype=spec.dtype,
        models=models,
    )


def _build_function(spec: FunctionSpec, tokenizer: Any = None) -> Scorer:
    return functools.partial(import_function(spec.function, spec.name), **spec.options)


def _build_rule(spec: RuleSpec, tokenizer: Any = None) -> Scorer:
    rule = functools.partial(RULES[spec.rule], **spec.options)

    def score(samples: Samples) -> Scores:
        return Scores(list(map(rule, samples.responses, samples.metadata)))

    return score


def _build_http(spec: HttpSpec, tokenizer: Any = None) -> Scorer:
    return http_scorer(spec)


def _build_judge(spec: JudgeSpec, tokenizer: Any = None) -> Scorer:
    # imported where one is asked: scorers without a judge need none of it
    from reward.judge import judge_scorer

    return judge_scorer(spec)


def _build_voice(spec: VoiceSpec, tokenizer: Any = None) -> Scorer:
    judge = build_tone_judge(spec.judge) if spec.judge else None
    return voice_scorer(spec.voice, spec.name, spec.channel, judge)


def build_tone_judge(entry: dict[str, Any]) -> Scorer:
    """Return the scorer that measures the sliders of a voice's tone; a language model is asked for
    each of them. Raises UserError.
    """
    named = {**entry, "name": "judge"}
    check_tone_judge(named, "judge")
    spec = parse_specs([named], "judge")[0]
    if isinstance(spec, JudgeSpec):
        return language_model_tone(spec)
    return build_scorer([named])


# reward models and ensembles are built by `build_scorer`, which shares bases among them
BUILDERS: dict[type[ScorerSpec], Build] = {
    VoiceSpec: _build_voice,
    FunctionSpec: _build_function,
    RuleSpec: _build_rule,
    HttpSpec: _build_http,
    JudgeSpec: _build_judge,
}


def build_scorer(
    entries: list[dict[str, Any]],
    tokenizer: Any = None,
    builders: Mapping[type[ScorerSpec], Build] | None = None,
) -> Scorer:
    """Return the weighted sum of one or more scorers.

    tokenizer: the one that the samples' ids come from; a reward model with the same one reads the
    ids as they are.
    builders: replace some of BUILDERS, for example `ModelSpec` by a role on the policy's base; an
    ensemble builds its members with it too. Without one for `ModelSpec` the reward models of this
    list that are adapters on one base share it.

    The scorer returns total = sum of weight * score, and a breakdown with each scorer's own total
    under its name and its parts under `name/part`, unweighted. A scorer of weight 0 is monitored:
    it is in the breakdown alone. Everything is checked by `checked_scores`. Raises UserError for a
    bad specification.
    """
    build_models = functools.partial(build_model, models=RewardModels())
    builders = BUILDERS | {ModelSpec: build_models} | (builders or {})

    def build(spec: ScorerSpec) -> Scorer:
        if not isinstance(spec, EnsembleSpec):
            return builders[type(spec)](spec, tokenizer)
        members = {}
        for member, model in spec.members().items():
            # each member is checked by itself, so that an error names it and not the ensemble alone
            members[member] = functools.partial(checked_scores, model.name, build(model))
        return ensemble_scorer(members, spec.how, spec.penalty)

    scorers = [(spec, build(spec)) for spec in parse_specs(entries)]

    def score(samples: Samples) -> Scores:
        total = [0.0] * len(samples)
        breakdown = {}
        for spec, scorer in scorers:
            scores = checked_scores(spec.name, scorer, samples)
            # one of weight 0 is in the breakdown alone
            if spec.weight:
                total = [t + spec.weight * s for t, s in zip(total, scores.total, strict=True)]
            for part, values in scores.breakdown.items():
                # voices and reward models put their name before their parts themselves
                named = part == spec.name or part.startswith(f"{spec.name}/")
                breakdown[part if named else f"{spec.name}/{part}"] = values
            breakdown[spec.name] = scores.total
        return Scores(total, breakdown)

    return score


def member_scorer(folders: list[str]) -> Scorer:
    """Return a scorer whose breakdown holds the score of each of these reward models. Raises
    UserError.
    """
    try:
        names = member_names(folders)
    except ValueError as error:
        raise UserError(f"select_by: {error}") from None
    pairs = zip(names, folders, strict=True)
    return build_scorer([{"model": folder, "name": name} for name, folder in pairs])


def check_scorers(
    entries: list[dict[str, Any]],
    made_later: Collection[str] = (),
    where: str = "scorers",
    *,
    without_torch: bool = False,
) -> None:
    """Raise UserError for a scorer that cannot be built, as far as its specification and its files
    tell.

    made_later: folders of reward models that need not be there yet. without_torch: only what is seen
    within a moment, by a program that builds the scorers soon.
    """
    for spec in parse_specs(entries, where):
        # its file is read and checked, which takes no model
        if isinstance(spec, VoiceSpec):
            choose_channel(load_voice(spec.voice), spec.channel, spec.voice)
        models = spec.members().values() if isinstance(spec, EnsembleSpec) else [spec]
        for model in models:
            if isinstance(model, ModelSpec) and model.model not in made_later:
                _check_model(model.model, spec.name, without_torch)


def _check_model(folder: str, name: str, without_torch: bool) -> None:
    try:
        check_reward_files(folder)
        if not without_torch:
            from reward.model import check_reward

            check_reward(folder)
    except UserError as error:
        raise UserError(f"scorers ({name}): {error}") from None
