"""A scorer from a specification: a weighted sum of named scorers, always with its breakdown.

    scorers:
      - {model: runs/reward}                                # a reward model; name 'reward', weight 1
      - {voice: configs/voices/shop.yaml, weight: 0.5}
      - {function: my_package.scores:politeness, name: polite}
      - {rule: length, low: 5, high: 60, weight: 0.1}
      - {http: "http://localhost:8000/tone", weight: 0.2}
      - {ensemble: [runs/a, runs/b, runs/c], how: worst, weight: 0}   # weight 0: watched, not learnt from

Each entry has one of the keys in KINDS, and may have `name` and `weight`; the rest are options of its kind.
All kinds with examples: docs/scorers.md.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from reward.ensemble import check_ensemble, ensemble_scorer, member_names
from reward.rules import RULES, check_rule_options
from rlhf.config import UserError, did_you_mean, import_function
from rlhf.data.records import BadScore, Samples, Scorer, Scores

# (what the kind's key says, name, options, tokenizer of the samples' ids or None) -> scorer
Build = Callable[[Any, str, dict[str, Any], Any], Scorer]


def model_scorer(path: str, name: str, options: dict[str, Any], tokenizer: Any = None) -> Scorer:
    """A reward model with weights of its own; it reads the samples' ids where their tokenizer is its own too."""
    from reward.model import reward_scorer

    return reward_scorer(path, name, tokenizer=tokenizer, **options)


def brand_voice_scorer(path: str, name: str, options: dict[str, Any], tokenizer: Any = None) -> Scorer:
    """A brand voice from its specification."""
    from reward.voice import voice_scorer

    return voice_scorer(path, name, **options)


def function_scorer(path: str, name: str, options: dict[str, Any], tokenizer: Any = None) -> Scorer:
    """`module:function`, called with Samples (and the options); it returns one number a sample, or Scores."""
    module_name, _, function_name = path.partition(":")
    function = import_function(module_name, function_name, name)
    return lambda samples: function(samples, **options)


def rule_scorer(rule: str, name: str, options: dict[str, Any], tokenizer: Any = None) -> Scorer:
    """One of reward.rules, applied to each response."""
    check_rule_options(rule, options)
    function = RULES[rule]

    def score(samples: Samples) -> Scores:
        rows = zip(samples.responses, samples.metadata, strict=True)
        return Scores([function(text, metadata, **options) for text, metadata in rows])

    return score


def service_scorer(url: str, name: str, options: dict[str, Any], tokenizer: Any = None) -> Scorer:
    """A service that is asked over HTTP."""
    from reward.http import http_scorer

    return http_scorer(url, name, **options)


def models_scorer(
    folders: list[str], name: str, options: dict[str, Any], tokenizer: Any = None, model: Build = model_scorer
) -> Scorer:
    """Several reward models as one; each is made by `model` and checked under `name/member`."""
    own = {key: value for key, value in options.items() if key in ("how", "penalty")}
    rest = {key: value for key, value in options.items() if key not in own}
    members = {}
    for member, folder in zip(member_names(folders), folders, strict=True):
        label = f"{name}/{member}"
        members[member] = functools.partial(checked, label, model(folder, label, rest, tokenizer))
    return ensemble_scorer(members, **own)


KINDS: dict[str, Build] = {
    "model": model_scorer,
    "ensemble": models_scorer,
    "voice": brand_voice_scorer,
    "function": function_scorer,
    "rule": rule_scorer,
    "http": service_scorer,
}
OPTIONS = {  # of the kinds whose options stand in no signature that a person writes
    "model": ("batch_size", "dtype"),
    "ensemble": ("how", "penalty", "batch_size", "dtype"),
    "voice": (),
    "http": ("timeout", "retries", "batch_size", "token_env"),
}


def build_scorer(specs: list[dict[str, Any]], tokenizer: Any = None, kinds: dict[str, Build] | None = None) -> Scorer:
    """The weighted sum of the scorers in `specs`, of which there may be one.

    tokenizer: the one the samples' ids come from; a reward model with the same one reads them as they are.
    kinds: builders to use in the place of some of KINDS (say, `model` by a role on the policy's base, which then
    makes the members of an ensemble too).

    The scorer returns total = sum of weight * score, and a breakdown with each scorer's own total under its name and
    its parts under `name/part`, unweighted. A scorer of weight 0 is watched: it is in the breakdown alone. What any
    scorer returns is checked, naming the scorer and the prompt: BadScore where a total is NaN or infinite, UserError
    on a wrong count or type; NaN in a part says that the part does not apply to that sample. Raises UserError on a
    bad specification.
    """
    kinds = {**KINDS, **(kinds or {})}
    if kinds["ensemble"] is models_scorer:
        kinds["ensemble"] = functools.partial(models_scorer, model=kinds["model"])
    entries = check_specs(specs)
    scorers = [(name, weight, kinds[kind](what, name, opts, tokenizer)) for kind, what, name, weight, opts in entries]

    def score(samples: Samples) -> Scores:
        total, breakdown = [0.0] * len(samples), {}
        for name, weight, scorer in scorers:
            scores = checked(name, scorer, samples)
            if weight:
                total = [t + weight * s for t, s in zip(total, scores.total, strict=True)]
            breakdown |= {_part_name(name, part): values for part, values in scores.breakdown.items()}
            breakdown[name] = scores.total
        return Scores(total, breakdown)

    return score


def _part_name(name: str, part: str) -> str:
    return part if part == name or part.startswith(f"{name}/") else f"{name}/{part}"


def check_scorers(specs: list[dict[str, Any]], made_later: Collection[str] = ()) -> None:
    """Raise UserError for a scorer that could not be made, as far as its specification and its files tell.

    made_later: folders of reward models that need not be there yet.
    """
    for kind, what, name, _, _ in check_specs(specs):
        if kind == "voice":
            from reward.voice import load_voice

            load_voice(what)
        folders = [what] if kind == "model" else what if kind == "ensemble" else []
        for folder in folders:
            if folder not in made_later:
                from reward.model import check_reward

                try:
                    check_reward(folder)
                except UserError as error:
                    raise UserError(f"scorers ({name}): {error}") from None


def monitored(specs: list[dict[str, Any]]) -> list[str]:
    """The names of the scorers of weight 0: measured at every step, never learnt from."""
    return [name for _, _, name, weight, _ in check_specs(specs) if not weight]


def check_specs(specs: list[dict[str, Any]]) -> list[tuple[str, Any, str, float, dict[str, Any]]]:
    """(kind, what, name, weight, options) of each entry; UserError names the entry and the nearest right key."""
    if not isinstance(specs, list) or not specs:
        raise UserError(f"scorers: found {specs!r}, expected a list such as [{{model: runs/reward}}]")
    rows: list[tuple[str, Any, str, float, dict[str, Any]]] = []
    for i, spec in enumerate(specs):
        where = f"scorers, entry {i + 1}"
        if not isinstance(spec, dict):
            raise UserError(f"{where}: found {spec!r}, expected a mapping such as {{model: runs/reward}}")
        rows.append(_check_spec(dict(spec), where))
        name = rows[-1][2]
        first = next(n for n, row in enumerate(rows) if row[2] == name)
        if first != i:
            raise UserError(
                f"{where}: a second scorer is called '{name}', as entry {first + 1} is. Give one of them a name of "
                f"its own: {{{rows[i][0]}: ..., name: {name}-{i + 1}}}"
            )
    if not any(weight for _, _, _, weight, _ in rows):
        raise UserError(
            f"scorers: every weight is 0 ({', '.join(row[2] for row in rows)}), so that every total would be 0. "
            "Weight 0 only watches; give at least one scorer another weight"
        )
    return rows


def _check_spec(spec: dict[str, Any], where: str) -> tuple[str, Any, str, float, dict[str, Any]]:
    named = [kind for kind in KINDS if kind in spec]
    if len(named) != 1:
        near = (
            "".join(did_you_mean(str(key), KINDS) for key in spec if key not in ("name", "weight")) if not named else ""
        )
        raise UserError(
            f"{where}: found {', '.join(map(str, spec))}; expected exactly one of {', '.join(KINDS)}.{near}"
        )
    kind = named[0]
    what = spec.pop(kind)
    if kind == "ensemble":
        check_ensemble(what, spec, where)
    elif not isinstance(what, str) or not what:
        raise UserError(f"{where}: '{kind}' is {what!r}, expected text")
    elif kind == "http":
        from reward.http import check_http

        check_http(what, spec, where)
    name, weight = spec.pop("name", _default_name(kind, what)), spec.pop("weight", 1.0)
    if not isinstance(name, str) or not name or "/" in name or name == "total":
        raise UserError(f"{where}: name {name!r} cannot be used (text without '/', and not 'total')")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise UserError(f"{where}: weight is {weight!r}, expected a number")
    allowed, required = _options(kind, what, f"{where} ({name})")
    for key in spec:
        if allowed is not None and key not in allowed:
            known = ("name", "weight", *allowed)
            raise UserError(f"{where}: unknown key '{key}'.{did_you_mean(str(key), known)} Keys: {', '.join(known)}")
    for key in required:
        if key not in spec:
            raise UserError(f"{where}: {kind} '{what}' needs '{key}'")
    return kind, what, name, float(weight), spec


def checked(name: str, scorer: Callable[[Samples], Any], samples: Samples) -> Scores:
    """What the scorer returns, as Scores of finite floats.

    Raises BadScore, with the sample, where a number is NaN (in a part that is allowed) or infinite, and UserError,
    with a prompt, where it is no number, or where their count is wrong.
    """
    try:
        result = scorer(samples)
    except Exception as error:
        error.add_note(f"(raised inside scorer '{name}', on {len(samples)} samples)")
        raise
    scores = result if isinstance(result, Scores) else Scores(result)
    if not isinstance(scores.breakdown, dict):
        found = type(scores.breakdown).__name__
        raise UserError(f"scorer '{name}': the breakdown is {found}, expected a dict.\n{first_prompt(samples)}")
    parts = {str(part): values for part, values in scores.breakdown.items()}
    breakdown = {part: _numbers(name, values, samples, part) for part, values in parts.items()}
    return Scores(_numbers(name, scores.total, samples), breakdown)


def _numbers(name: str, values: Any, samples: Samples, part: str | None = None) -> list[float]:
    label = f"scorer '{name}'" if part is None else f"scorer '{name}', part '{part}'"
    if hasattr(values, "tolist"):  # numpy and torch
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        found = f"{label} returned {type(values).__name__}, expected a list of {len(samples)} numbers or Scores"
        raise UserError(f"{found}.\n{first_prompt(samples)}")
    if len(values) != len(samples):
        found = f"{label} returned {len(values)} scores for {len(samples)} samples"
        raise UserError(f"{found}.\n{first_prompt(samples)}")
    return [_number(name, label, value, samples, i, part is not None) for i, value in enumerate(values)]


def _number(name: str, label: str, value: Any, samples: Samples, i: int, allow_nan: bool) -> float:
    number = None
    if hasattr(value, "__float__"):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # the last of a whole number of 400 digits
            number = float(value)
    if number is not None and (math.isfinite(number) or (allow_nan and math.isnan(number))):
        return number
    message = (
        f"{label} returned {_clip(repr(value))} for sample {i}, expected a finite number.\n"
        f"  prompt: {_last_turn(samples, i)}\n  response: {_short(samples.responses[i])}"
    )
    raise UserError(message) if number is None else BadScore(message, name, i, number)


def first_prompt(samples: Samples) -> str:
    """A line that shows which batch is meant."""
    return f"  first prompt of the batch: {_last_turn(samples, 0) if len(samples) else '(it is empty)'}"


def _last_turn(samples: Samples, i: int) -> str:
    return _short(samples.prompts[i][-1]["content"])


def _options(kind: str, what: Any, where: str) -> tuple[tuple[str, ...] | None, list[str]]:
    """The options an entry may have (None: any) and those it must have, read off the rule's or function's signature."""
    if kind in OPTIONS:
        return OPTIONS[kind], []
    if kind == "rule":
        if what not in RULES:
            known = ", ".join(RULES)
            raise UserError(f"{where}: unknown rule '{what}'.{did_you_mean(what, RULES)} Rules: {known}")
        function, given = RULES[what], 2  # text and metadata
    else:
        module_name, colon, function_name = what.partition(":")
        if not colon or not module_name or not function_name:
            raise UserError(f"{where}: function '{what}' should be written module:function")
        function, given = import_function(module_name, function_name, where), 1  # samples
    try:
        parameters = list(inspect.signature(function).parameters.values())[given:]
    except (TypeError, ValueError):  # some builtins have no signature
        return None, []
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None, []
    parameters = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
    return tuple(p.name for p in parameters), [p.name for p in parameters if p.default is p.empty]


def _default_name(kind: str, what: Any) -> str:
    """runs/reward -> reward, voices/shop.yaml -> shop, module:function -> function, http://host/tone -> tone."""
    if kind == "ensemble":
        return kind
    if kind == "function":
        return what.rpartition(":")[2]
    if kind == "http":
        return what.partition("?")[0].rstrip("/").rpartition("/")[2]
    return Path(what).stem if kind == "voice" else Path(what).name


def _short(text: str) -> str:
    return repr(_clip(" ".join(text.split())))


def _clip(text: str, width: int = 120) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
