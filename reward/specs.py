"""Scorer specifications: the entries of `reward`, `eval_scorers`, `gold`, `referee` and `others` as
typed records.

    scorers:
      - {model: runs/reward}                                # a reward model; name 'reward', weight 1
      - {ensemble: [runs/a, runs/b, runs/c], how: worst}
      - {voice: configs/voices/shop.yaml, weight: 0.5}
      - {function: my_package.scores:politeness, name: polite}
      - {rule: length, low: 5, high: 60, weight: 0}         # weight 0: monitored, not learnt from
      - {http: "http://localhost:8000/tone", weight: 0.2}
      - {openai: "http://localhost:8000/v1", model: judge, guide: configs/voices/shop.yaml}

docs/rewards.md describes the kinds.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from reward.ensemble import PENALTY, member_names
from reward.rules import RULES, check_rule_options
from rlhf.errors import UserError, did_you_mean
from rlhf.http_client import check_url, read_token
from rlhf.judge.spec import ScoreSpec
from rlhf.plugins import import_function
from rlhf.validation import Count, Number, Spec, validate

Text = Annotated[str, Field(min_length=1)]


class ScorerSpec(Spec):
    """What every kind of scorer has: a name within its list, and its weight in the total score."""

    name: str | None = None
    weight: Number = 1.0

    @property
    def model_folders(self) -> list[str]:
        """The reward models that the scorer reads."""
        return []

    def check(self, where: str) -> None:
        """Raise UserError, naming `where`, for what the types of the fields cannot tell."""


class _LoadedSpec(ScorerSpec):
    """How reward models are loaded and called."""

    batch_size: Count = Field(32, ge=1)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"


class ModelSpec(_LoadedSpec):
    """A reward model."""

    model: Text

    @property
    def model_folders(self) -> list[str]:
        return [self.model]


class EnsembleSpec(_LoadedSpec):
    """Several reward models as one scorer, see reward/ensemble.py."""

    ensemble: list[Text]
    how: Literal["mean", "worst", "uncertainty"] = "mean"
    penalty: Number = Field(PENALTY, ge=0)

    @field_validator("ensemble", mode="before")
    @classmethod
    def _two_or_more(cls, folders: Any) -> Any:
        # one name alone is what a user writes who means {model: ...}; say more than "expected a
        # list"
        if not isinstance(folders, list) or len(folders) < 2:
            raise ValueError(
                f"found {folders!r}, expected two or more reward models: [runs/a, runs/b]"
            )
        return folders

    @model_validator(mode="after")
    def _check(self) -> Self:
        # raises ValueError where a model is named twice
        member_names(self.ensemble)
        if "penalty" in self.model_fields_set and self.how != "uncertainty":
            raise ValueError(
                f"'penalty' has no effect with how: {self.how}. Set how: uncertainty, or remove it"
            )
        return self

    @property
    def model_folders(self) -> list[str]:
        return self.ensemble

    def members(self) -> dict[str, ModelSpec]:
        """Return the specification of each member by its short name, the last part of its folder.

        Its own name, under which its scores are logged, is `ensemble/member`.
        """
        specs = {}
        for member, folder in zip(member_names(self.ensemble), self.ensemble, strict=True):
            specs[member] = ModelSpec(
                model=folder,
                name=f"{self.name}/{member}",
                batch_size=self.batch_size,
                dtype=self.dtype,
            )
        return specs


class VoiceSpec(ScorerSpec):
    """A brand voice, see reward/voice/scorer.py."""

    voice: Text
    # the variant for prompts whose metadata names none
    channel: str | None = None
    # the scorer that measures the sliders of its tone
    judge: dict[str, Any] | None = None

    def check(self, where: str) -> None:
        if self.judge is None:
            return
        check_tone_judge({**self.judge, "name": "judge"}, f"{where}, judge")


class HttpSpec(ScorerSpec):
    """A service, see reward/http.py."""

    http: Text
    timeout: Number = Field(
        60.0, gt=0, description="seconds for the connection, and for the whole answer"
    )
    retries: Count = Field(5, ge=0)
    batch_size: Count = Field(64, ge=1)
    # checked by `read_token`, whose messages do not show it: it may be the token itself
    token_env: Any = None

    def check(self, where: str) -> None:
        check_url(self.http, where)
        read_token(self.token_env, where)


class JudgeSpec(ScorerSpec, ScoreSpec):
    """A language model behind OpenAI's protocol that scores each answer, see reward/judge.py."""

    unreadable: Number | None = Field(
        None, description="score of an answer that the judge gave none for; default: an error"
    )

    def check(self, where: str) -> None:
        from rlhf.judge.prompts import question

        ScoreSpec.check(self, where)
        # its template and guide are read, so that what is wrong with them is found at the start
        question(self)


class _KeywordSpec(ScorerSpec):
    """A scorer whose other keys are keyword arguments of a function."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        return self.model_extra or {}

    def _check_options(self, function: Callable, positional: int, where: str) -> None:
        """Raise UserError unless `function` takes the options after its first `positional`
        arguments.
        """
        try:
            parameters = list(inspect.signature(function).parameters.values())[positional:]
        except (TypeError, ValueError):
            # some built-in functions have no signature
            return
        known, needed = ["name", "weight"], []
        for parameter in parameters:
            # a function with **kwargs takes every key
            if parameter.kind is parameter.VAR_KEYWORD:
                return
            # *args has no name that a key could have
            if parameter.kind is parameter.VAR_POSITIONAL:
                continue
            known.append(parameter.name)
            if parameter.default is parameter.empty:
                needed.append(parameter.name)
        for key in self.options:
            if key not in known:
                hint = did_you_mean(key, known)
                raise UserError(
                    f"{where}: unknown key '{key}'.{hint} Known keys: {', '.join(known)}"
                )
        for name in needed:
            # found here, not at the first batch of a run
            if name not in self.options:
                called = getattr(function, "__name__", "the function")
                raise UserError(f"{where}: {called} needs '{name}'")


class FunctionSpec(_KeywordSpec):
    """A Python function, written `module:function`, that is called with Samples and its options."""

    function: Text

    def check(self, where: str) -> None:
        self._check_options(import_function(self.function, where), 1, where)


class RuleSpec(_KeywordSpec):
    """One of reward/rules.py, which is called with a text, its metadata and its options."""

    rule: Text

    def check(self, where: str) -> None:
        if self.rule not in RULES:
            hint = did_you_mean(self.rule, RULES)
            raise UserError(f"{where}: unknown rule '{self.rule}'.{hint} Rules: {', '.join(RULES)}")
        self._check_options(RULES[self.rule], 2, where)
        check_rule_options(self.rule, self.options, where)


KINDS: dict[str, type[ScorerSpec]] = {
    "model": ModelSpec,
    "ensemble": EnsembleSpec,
    "voice": VoiceSpec,
    "function": FunctionSpec,
    "rule": RuleSpec,
    "http": HttpSpec,
    "openai": JudgeSpec,
}

# the name of an entry that gives none, from the value of its kind
DEFAULT_NAMES: dict[str, Callable[[Any], str]] = {
    "model": lambda folder: Path(folder).name,
    "ensemble": lambda _: "ensemble",
    "voice": lambda file: Path(file).stem,
    "function": lambda path: path.rpartition(":")[2],
    "rule": str,
    "http": lambda url: url.partition("?")[0].rstrip("/").rpartition("/")[2],
    "openai": lambda _: "judge",
}


def check_tone_judge(entry: dict[str, Any], where: str) -> None:
    """Raise UserError for a scorer that cannot measure each slider of a tone."""
    spec = parse_specs([entry], where)[0]
    if isinstance(spec, ModelSpec | EnsembleSpec | RuleSpec | VoiceSpec):
        raise UserError(
            f"{where}: gives one number for a text, and tone needs one for each slider; use a "
            "language model, a service or a function: {openai: URL, model: NAME}, {http: URL}, "
            "{function: module:name}"
        )


def parse_specs(entries: Any, option: str = "scorers") -> list[ScorerSpec]:
    """Return the entries of `option`, a list of scorers, as typed records with their names.

    Raises UserError with the option, the entry, what was found and the nearest right key.
    """
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{option}: found {entries!r}, expected a list such as [{{model: runs/reward}}]"
        )

    specs: list[ScorerSpec] = []
    number_of: dict[str, int] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{option}, entry {number}"
        kind = _kind_of(entry, where)
        spec = _parse_spec(kind, entry, where)
        if spec.name in number_of:
            raise UserError(
                f"{where}: a second scorer is called '{spec.name}', as entry {number_of[spec.name]} is. Give one of "
                f"them a name of its own: {{{kind}: ..., name: {spec.name}-{number}}}"
            )
        number_of[spec.name] = number
        specs.append(spec)

    if not any(spec.weight for spec in specs):
        raise UserError(
            f"{option}: every weight is 0 ({', '.join(number_of)}), so that every total would be 0. "
            "A scorer of weight 0 is only monitored; give at least one scorer another weight"
        )
    return specs


def _kind_of(entry: Any, where: str) -> str:
    if not isinstance(entry, dict):
        raise UserError(
            f"{where}: found {entry!r}, expected a mapping such as {{model: runs/reward}}"
        )
    kinds = [kind for kind in KINDS if kind in entry]
    # there 'model' is the name of the model behind the address
    if "openai" in kinds and "model" in kinds:
        kinds.remove("model")
    if len(kinds) == 1:
        return kinds[0]

    hint = ""
    if not kinds:
        # a misspelt kind, most likely
        others = [str(key) for key in entry if key not in ("name", "weight")]
        hint = "".join(did_you_mean(key, KINDS) for key in others)
    raise UserError(
        f"{where}: found {', '.join(map(str, entry))}; expected exactly one of {', '.join(KINDS)}.{hint}"
    )


def _parse_spec(kind: str, entry: dict[str, Any], where: str) -> ScorerSpec:
    spec = validate(KINDS[kind], entry, where)
    name = spec.name
    if name is None:
        name = DEFAULT_NAMES[kind](getattr(spec, kind))
    # "/" separates a scorer from its parts in the names of metrics, where "total" is the weighted
    # sum
    if not name or "/" in name or name == "total":
        raise UserError(
            f"{where}: name {name!r} cannot be used (text without '/', and not 'total')"
        )
    spec.check(f"{where} ({name})")
    return spec.model_copy(update={"name": name})
