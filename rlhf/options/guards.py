"""The table of guards (thresholds, actions, windows) and the option `guards` that changes it.

rlhf/ppo/guards.py and rlhf/offline/guards.py apply it, docs/guards.md explains it.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from rlhf.errors import UserError, did_you_mean

# What each action does is described at guards.Decision.
ACTIONS = ("off", "warn", "skip", "end", "stop", "rollback")


@dataclass(frozen=True, kw_only=True)
class Guard:
    """One guard over a run; a setting that is None is one that this guard does not have.

    `window` is how many steps in a row the fault must last; for `not_finite` and `ratio` it is the
    stretch in which skips are counted. `limit` is how many skips in that stretch, or rollbacks in
    the run, are allowed before the next becomes a stop. `help` says what the fault means, `refused`
    why the actions not in `actions` are not allowed. A threshold lies between `lower` and `upper`,
    and a window is at least `shortest`.
    """

    threshold: float | None
    action: str
    window: int | None
    limit: int | None
    help: str
    remedy: str
    actions: tuple[str, ...]
    refused: str
    watch: tuple[str, ...] | None = None
    lower: float = 0.0
    upper: float = math.inf
    shortest: int = 1


_STEP = {
    "actions": ("off", "warn", "stop", "rollback"),
    "refused": "it sees a step only after its updates were made",
}

GUARDS: dict[str, Guard] = {
    "target_kl": Guard(
        threshold=math.inf, action="end", window=None, limit=None,
        help="this rollout has moved the policy far enough",
        remedy="lower learning_rate or num_ppo_epochs if it happens at most steps",
        actions=("off", "warn", "end"), refused="it only ends the updates of one rollout; for a run see max_kl",
    ),
    "max_kl": Guard(
        threshold=100.0, action="stop", window=3, limit=3,
        help="the policy has left the reference",
        remedy="raise kl_coef or lower learning_rate", **_STEP,
    ),
    "negative_kl": Guard(
        threshold=3.0, action="warn", window=3, limit=None,
        help="a KL cannot be negative, so the responses were not sampled from the policy that is measured",
        remedy="check rollout/logprob_gap, the temperature and the engine's weights",
        actions=("off", "warn", "stop"), refused="wrong sampling would go on after a rollback",
    ),
    "not_finite": Guard(
        threshold=None, action="skip", window=20, limit=4,
        help="an update with it would make every weight NaN",
        remedy="fix the scorer if it is a score; otherwise lower learning_rate or use dtype float32",
        actions=("skip", "stop", "rollback"), refused="one such update would make every weight NaN",
    ),
    "ratio": Guard(
        threshold=10.0, action="skip", window=5, limit=2, lower=1.0,
        help="the updates of this rollout have moved the policy far from the one that sampled",
        remedy="lower learning_rate, num_ppo_epochs or max_grad_norm",
        actions=("off", "warn", "skip", "stop", "rollback"), refused="ending a rollout is what target_kl does",
    ),
    "entropy": Guard(
        threshold=0.1, action="stop", window=5, limit=3, upper=1.0,
        help="the policy has collapsed and explores no more",
        remedy="raise kl_coef or entropy_coef, or lower learning_rate", **_STEP,
    ),
    "length": Guard(
        threshold=2.0, action="warn", window=5, limit=3, lower=1.0,
        help="the score pays for length",
        remedy="look at the samples and at the reward report's length bias, set length_penalty or raise kl_coef",
        **_STEP,
    ),
    "repetition": Guard(
        threshold=0.2, action="warn", window=5, limit=3, upper=1.0,
        help="responses are repetitive",
        remedy="look at the samples, raise kl_coef", **_STEP,
    ),
    "truncation": Guard(
        threshold=0.5, action="warn", window=5, limit=3, upper=1.0,
        help="responses reach the token limit and are scored as truncated",
        remedy="raise max_response_length, train SFT until its answers end, lower missing_eos_score", **_STEP,
    ),
    "no_signal": Guard(
        threshold=None, action="stop", window=None, limit=None,
        help="there is nothing to learn from, and an update would learn the critic's noise",
        remedy="fix the scorer; where no response ends, raise max_response_length or train SFT until its answers end; "
               "where a reward is rare, take more responses or set guards.no_signal: warn",
        actions=("off", "warn", "stop"), refused="it checks once, before there is an update to skip or roll back",
    ),
    "length_detector": Guard(
        threshold=0.7, action="warn", window=None, limit=None, upper=1.0,
        help="the score is mostly length, and the policy will learn that",
        remedy="look at the reward model's report card, balance its pairs, or set length_penalty",
        actions=("off", "warn", "stop"), refused="it checks once, before there is an update to skip or roll back",
    ),
    "score_collapse": Guard(
        threshold=0.05, action="warn", window=5, limit=3, upper=1.0,
        help="the scorer no longer tells the responses apart, so there is nothing more to learn from it",
        remedy="stop here, or check whether the scorer or the policy has collapsed", **_STEP,
    ),
    "disagreement": Guard(
        threshold=2.0, action="warn", window=5, limit=3, lower=1.0,
        help="the policy has gone where the members of the ensemble contradict each other, so that their score "
             "means little",
        remedy="take an earlier checkpoint, raise kl_coef, or set how: worst or uncertainty", **_STEP,
    ),
    "hacking": Guard(
        threshold=5.0, action="stop", window=20, limit=None, shortest=8, watch=(),
        help="the policy exploits what it is rewarded for",
        remedy="take the best checkpoint, raise kl_coef or fix the scorers",
        actions=("off", "warn", "stop"), refused="the same score would be exploited again",
    ),
}  # fmt: skip

_LOGGED = {
    "actions": ("off", "warn", "stop"),
    "refused": "TRL's trainers make each update before it can be judged, and cannot go back",
}
_LOSS_GUARDS: dict[str, Guard] = {
    "divergence": Guard(
        threshold=2.0, action="stop", window=5, limit=None, lower=1.0,
        help="the run has diverged",
        remedy="lower learning_rate, add warmup_steps, or take a checkpoint from before", **_LOGGED,
    ),
    "loss_spike": Guard(
        threshold=2.0, action="warn", window=20, limit=None, lower=1.0, shortest=5,
        help="one batch has much to learn, or the step size is near its limit",
        remedy="look at the rows of that step; lower learning_rate or max_grad_norm where it happens again",
        **_LOGGED,
    ),
}  # fmt: skip
# of the programs that train through TRL
OFFLINE_GUARDS: dict[str, dict[str, Guard]] = {
    "sft": _LOSS_GUARDS,
    "reward": _LOSS_GUARDS,
    "dpo": {
        **_LOSS_GUARDS,
        "max_kl": Guard(
            threshold=100.0, action="stop", window=1, limit=None,
            help="the policy has left the reference",
            remedy="raise beta or lower learning_rate", **_LOGGED,
        ),
        "chosen_logprob": Guard(
            threshold=2.0, action="warn", window=3, limit=None, lower=1.0,
            help="the chosen responses lose their probability with the rejected ones",
            remedy="raise beta, lower learning_rate, or add the loss sft to loss_type", **_LOGGED,
        ),
    },
}  # fmt: skip

# Names from before a renaming, which files and checkpoints may still hold.
OLD_NAMES = {"no_end": "truncation", "score_spread": "score_collapse"}


def current_name(name: str) -> str:
    """Return a guard's name of today for the one that an older file gives it."""
    return OLD_NAMES.get(name, name)


def check_guards(overrides: dict[str, Any], table: dict[str, Guard] = GUARDS) -> dict[str, Guard]:
    """Return the table with the user's settings.

    A value is a mapping of settings, or short for one: `off`, an action, or a number for the
    threshold. Raises UserError for what is unknown, out of range or makes no sense.
    """
    # pydantic takes as long to import as a program's --help takes in all
    from rlhf.validation import validate

    guards = dict(table)
    for given, value in overrides.items():
        name = current_name(given)
        if name not in table:
            hint = did_you_mean(name, table)
            raise UserError(f"guards: unknown guard '{name}'.{hint} There are: {', '.join(table)}")

        where = f"guards.{name}"
        settings = validate(_settings_model(table[name]), _as_mapping(value, where), where)
        guards[name] = replace(table[name], **settings.model_dump(exclude_unset=True))
    return guards


def _settings_model(guard: Guard) -> type:
    """Return the pydantic model of the settings that a guard has, which are those that are not
    None.
    """

    from pydantic import BeforeValidator, Field, create_model

    from rlhf.validation import Count, Number, Spec

    def check_action(found: Any) -> str:
        return _action(guard, found)

    types = {
        "threshold": Annotated[Number, Field(gt=guard.lower, lt=guard.upper)],
        "action": Annotated[str, BeforeValidator(check_action)],
        "window": Annotated[Count, Field(ge=guard.shortest)],
        "limit": Annotated[Count, Field(ge=0)],
        "watch": Annotated[tuple[str, ...], BeforeValidator(_as_list)],
    }
    defaults = {
        field.name: getattr(guard, field.name) for field in fields(guard) if field.name in types
    }
    known = {name: (types[name], value) for name, value in defaults.items() if value is not None}
    return create_model("GuardSettings", __base__=Spec, **known)


def _as_mapping(value: Any, where: str) -> dict[str, Any]:
    """Return the settings that a short form stands for."""
    # YAML reads a bare `off` as false, and `3e-2` as text
    if value is None or value is False:
        return {"action": "off"}
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"action": value} if value.isalpha() else {"threshold": value}
    if isinstance(value, (int, float)) and value is not True:
        return {"threshold": value}
    raise UserError(
        f"{where}: found {value!r}, expected settings such as {{threshold: 1, action: warn}}, or off"
    )


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _action(guard: Guard, found: Any) -> str:
    """Return the name of an action; raise ValueError where there is none such or the guard does not
    allow it.
    """
    action = "off" if found is None or found is False else str(found)
    allowed = ", ".join(guard.actions)
    if action not in ACTIONS:
        raise ValueError(
            f"found {found!r}, expected one of {allowed}.{did_you_mean(action, ACTIONS)}"
        )
    if action not in guard.actions:
        raise ValueError(f"cannot be {action}: {guard.refused}. Possible: {allowed}")
    return action
