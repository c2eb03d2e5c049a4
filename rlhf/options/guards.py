"""The table of guards: thresholds, actions, windows; and the option `guards` that changes it.

rlhf/ppo/guards.py acts on it, docs/guards.md explains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config import UserError, coerce, did_you_mean

ACTIONS = ("off", "warn", "skip", "end", "stop", "rollback")  # what each does: guards.Decision


@dataclass(frozen=True, kw_only=True)
class Guard:
    """One watch over a run. None means that the guard has no such setting.

    `window` is how long it must be so: steps in a row, or for `not_finite` and `ratio` the stretch in which skips are
    counted. `limit` is how many skips in that stretch, or rollbacks in the run, are borne before it becomes a stop.
    """

    threshold: float | None
    action: str
    window: int | None
    limit: int | None
    help: str  # what it means when it strikes
    remedy: str
    actions: tuple[str, ...]
    refused: str  # why not the other actions
    watch: tuple[str, ...] | None = None
    least: float = 0.0  # the threshold lies between these two
    most: float = math.inf
    shortest: int = 1  # window


_STEP = {"actions": ("off", "warn", "stop", "rollback"), "refused": "it sees a step whose updates are already made"}

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
        remedy="look at rollout/logprob_gap, the temperature and the engine's weights",
        actions=("off", "warn", "stop"), refused="what samples wrongly does so after a rollback as well",
    ),
    "not_finite": Guard(
        threshold=None, action="skip", window=20, limit=4,
        help="an update with it would make every weight NaN",
        remedy="mend the scorer if it is a score; else lower learning_rate or take dtype float32",
        actions=("skip", "stop", "rollback"), refused="one such update would make every weight NaN",
    ),
    "ratio": Guard(
        threshold=10.0, action="skip", window=5, limit=2, least=1.0,
        help="the updates of this rollout have thrown the policy far from where it sampled",
        remedy="lower learning_rate, num_ppo_epochs or max_grad_norm",
        actions=("off", "warn", "skip", "stop", "rollback"), refused="ending a rollout is what target_kl does",
    ),
    "entropy": Guard(
        threshold=0.1, action="stop", window=5, limit=3, most=1.0,
        help="the policy says one thing only and explores no more",
        remedy="raise kl_coef or entropy_coef, or lower learning_rate", **_STEP,
    ),
    "length": Guard(
        threshold=2.0, action="warn", window=5, limit=3, least=1.0,
        help="the score pays for length",
        remedy="look at the samples and at the reward report's length bias, set length_penalty or raise kl_coef",
        **_STEP,
    ),
    "repetition": Guard(
        threshold=0.2, action="warn", window=5, limit=3, most=1.0,
        help="responses go round in circles",
        remedy="look at the samples, raise kl_coef", **_STEP,
    ),
    "truncation": Guard(
        threshold=0.5, action="warn", window=5, limit=3, most=1.0,
        help="responses run into the token limit and are not judged as they stand",
        remedy="raise max_response_length, train SFT until it ends its answers, lower missing_eos_score", **_STEP,
    ),
    "no_signal": Guard(
        threshold=None, action="stop", window=None, limit=None,
        help="there is nothing to learn from, and an update would learn the critic's noise",
        remedy="mend the scorer; where no response ends, raise max_response_length or train SFT until it ends its "
               "answers; where a reward is rare, take more responses or guards.no_signal: warn",
        actions=("off", "warn", "stop"), refused="it looks once, before there is an update to leave out or take back",
    ),
    "length_detector": Guard(
        threshold=0.7, action="warn", window=None, limit=None, most=1.0,
        help="the score is mostly length, and the policy will learn that",
        remedy="look at the reward model's report card, balance its pairs, or set length_penalty",
        actions=("off", "warn", "stop"), refused="it looks once, before there is an update to leave out or take back",
    ),
    "score_collapse": Guard(
        threshold=0.05, action="warn", window=5, limit=3, most=1.0,
        help="the scorer tells the responses apart no longer, so that nothing more can be learnt from it",
        remedy="stop here, or look whether the scorer or the policy says one thing only", **_STEP,
    ),
    "hacking": Guard(
        threshold=5.0, action="stop", window=20, limit=None, shortest=8, watch=(),
        help="the policy exploits what it is rewarded for",
        remedy="take the best checkpoint, raise kl_coef or mend the scorers",
        actions=("off", "warn", "stop"), refused="the same score would be exploited again",
    ),
}  # fmt: skip

OLD_NAMES = {"no_end": "truncation", "score_spread": "score_collapse"}  # still read in options and checkpoints


def current_name(name: str) -> str:
    """Return a guard's name of today for the one that an older file gives it."""
    return OLD_NAMES.get(name, name)


def check_guards(overrides: dict[str, Any]) -> dict[str, Guard]:
    """GUARDS with the user's settings; raises UserError for what is unknown, out of range or makes no sense.

    A value is a mapping of settings, or short for one: `off`, an action, or a number for the threshold.
    """
    guards = dict(GUARDS)
    for given, value in overrides.items():
        name = current_name(given)
        if name not in GUARDS:
            hint = did_you_mean(name, GUARDS)
            raise UserError(f"guards: unknown guard '{name}'.{hint} There are: {', '.join(GUARDS)}")
        guards[name] = _override(name, value)
    return guards


def _override(name: str, value: Any) -> Guard:
    guard, where = GUARDS[name], f"guards.{name}"
    given = _settings(value, where)
    keys = [k for k in ("threshold", "action", "window", "limit", "watch") if getattr(guard, k) is not None]
    for key, found in given.items():
        if key not in keys:
            hint = did_you_mean(key, keys)
            raise UserError(f"{where}: it has no setting '{key}'.{hint} It has: {', '.join(keys)}")
        place = f"{where}.{key}"
        if key == "action":
            given[key] = _action(guard, found, place)
        elif key == "threshold":
            given[key] = number = coerce(found, float, place)
            if not guard.least < number < guard.most:
                upper = "" if guard.most == math.inf else f" and less than {guard.most:g}"
                raise UserError(f"{place} is {found}, expected more than {guard.least:g}{upper}")
        elif key == "watch":
            given[key] = tuple(coerce(found, list[str], place))
        else:
            given[key] = number = coerce(found, int, place)
            least = guard.shortest if key == "window" else 0
            if number < least:
                raise UserError(f"{place} is {found}, expected at least {least}")
    return replace(guard, **given)


def _settings(value: Any, where: str) -> dict[str, Any]:
    """The mapping that a short form stands for. YAML reads a bare `off` as false, and `3e-2` as text."""
    if value is None or value is False:
        return {"action": "off"}
    if isinstance(value, dict):
        return {str(k): v for k, v in value.items()}
    if isinstance(value, str):
        try:
            return {"threshold": float(value)}
        except ValueError:
            return {"action": value}
    if isinstance(value, (int, float)) and value is not True:
        return {"threshold": value}
    raise UserError(f"{where}: found {value!r}, expected settings such as {{threshold: 1, action: warn}}, or off")


def _action(guard: Guard, found: Any, place: str) -> str:
    action = "off" if found is None or found is False else str(found)
    if action not in ACTIONS:
        raise UserError(
            f"{place}: found {found!r}, expected one of {', '.join(guard.actions)}.{did_you_mean(action, ACTIONS)}"
        )
    if action not in guard.actions:
        raise UserError(f"{place} cannot be {action}: {guard.refused}. Possible: {', '.join(guard.actions)}")
    return action
