"""What the guards of a run have decided: one fault is one event, in the log, in result.json and in
checkpoints.

Numbers in, decisions out: no tensors and no ranks. Every rank hands in the same numbers and so
decides the same. What is looked at stands in rlhf/ppo/guards.py and rlhf/offline/guards.py, the
thresholds and actions in rlhf/options/guards.py; docs/guards.md explains them.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.options.guards import Guard, current_name


@dataclass(frozen=True)
class Decision:
    """What is to be done, and why.

    action: `warn` goes on; `skip` leaves out this update (or, after scoring, this rollout); `end`
    leaves out this update and the later ones of this rollout; `stop` ends the run; `rollback`
    returns to the last good checkpoint, one made before step `since`.
    """

    guard: str
    action: str
    step: int
    value: float
    threshold: float | None
    reason: str
    since: int  # checkpoints of this step and later may hold the fault

    @property
    def interrupts_run(self) -> bool:
        return self.action in ("stop", "rollback")


class Decisions:
    """The decisions of one run, and how many steps in a row each fault has lasted.

    `counts` are the names of what is counted beside warnings. `rate_scale` is what rollbacks have
    made of the step sizes.
    """

    def __init__(self, guards: dict[str, Guard], counts: Iterable[str] = ()):
        self.guards = guards
        self.events: list[dict[str, Any]] = []
        self.rollbacks, self.rate_scale = 0, 1.0
        self.counts = dict.fromkeys([*counts, "warnings"], 0)
        # steps in a row
        self.streaks: dict[str, int] = {}
        self._unread: list[Decision] = []

    def sustained(
        self, name, step, bad, value, bound, what, key=None, window=None
    ) -> Decision | None:
        """Decide about a fault that has to last `window` steps; a warning is given once, when it
        gets there.
        """
        guard, key = self.guards[name], keyed(name, key)
        window = guard.window if window is None else window
        streak = self.streaks[key] = self.streaks.get(key, 0) + 1 if bad else 0
        if guard.action == "off" or streak < window or (guard.action == "warn" and streak > window):
            return None
        # of steps, of log lines or of evaluations
        if window > 1:
            what += f", {streak} times in a row"
        return self.decide(name, guard.action, step, value, bound, what, step - streak)

    def decide(self, name, action, step, value, bound, what, since) -> Decision:
        """Record and return a decision.

        `since` is, for a bad rollout, the step before it: its updates made the policy that sampled
        the rollout.
        """
        guard = self.guards[name]
        if action == "rollback" and self.rollbacks >= guard.limit:
            action = "stop"
            what += f", after {self.rollbacks} rollbacks"
        self.counts["warnings"] += action == "warn"
        reason = f"{what}: {guard.help}; {guard.remedy} (or change guards.{name})"
        decision = Decision(name, action, step, value, bound, reason, since)
        same = [e for e in self.events if (e["guard"], e["action"]) == (name, action)]
        if (
            action not in ("stop", "rollback")
            and same
            and same[-1]["last_step"] in (step - 1, step)
        ):
            same[-1].update(times=same[-1]["times"] + 1, last_step=step)
        else:
            event = asdict(decision) | {"times": 1, "last_step": step}
            event["value"] = value if math.isfinite(value) else str(value)  # JSON knows no NaN
            self.events.append(event)
            self._unread.append(decision)
        return decision

    def drain_events(self) -> list[Decision]:
        """Return the decisions since the last call; a series of equal ones at consecutive steps
        appears once.
        """
        events, self._unread = self._unread, []
        return events

    def metrics(self) -> dict[str, float]:
        """Return what was done so far as guard/* metrics."""
        done = self.counts | {"rollbacks": self.rollbacks, "rate_scale": self.rate_scale}
        return {f"guard/{name}": float(number) for name, number in done.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, for JSON."""
        return copy.deepcopy({name: getattr(self, name) for name in (*_KEPT, "streaks")})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, copy.deepcopy(state[name]))
        for event in self.events:
            event["guard"] = current_name(event["guard"])
        self.restore_streaks(state)

    def restore_streaks(self, state: dict[str, Any]) -> None:
        """Take from a checkpoint how long faults had lasted; events and counts stay."""
        self.streaks = current_names(copy.deepcopy(state.get("streaks", {})))


# what a rollback leaves as it is
_KEPT = ("events", "rollbacks", "rate_scale", "counts")


def keyed(name: str, key: str | None) -> str:
    """Return what a guard's state is kept under, where it looks at several metrics."""
    return name if key is None else f"{name}/{key}"


def current_names(by_guard: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping by guard, as a checkpoint holds it, under the names that the guards have
    today.
    """
    return {current_name(name): value for name, value in by_guard.items()}
