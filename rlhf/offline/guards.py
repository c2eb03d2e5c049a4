"""What warns of, or stops, a run of SFT, a reward model or DPO that diverges.

Numbers in, decisions out, as in rlhf/ppo/guards.py: every rank hands in the same numbers, the mean
loss over all ranks and the metrics that TRL has gathered.
"""

import copy
import itertools
import statistics
from typing import Any

from rlhf.guards import Decision, Decisions
from rlhf.options.guards import OFFLINE_GUARDS, check_guards

# of the losses of single steps: so many above the mean are no chance, however small the batches
DEVIATIONS = 8.0
# standard deviation of a normal over the median distance of two draws: 1 / (sqrt(2) 0.6745)
NORMAL = 1.0483
# programs whose loss is that of pairs, which begin at chance
ON_PAIRS = ("reward", "dpo")
_MEMORY = ("recent", "least", "start", "first_logprobs")


class OfflineGuards:
    """Decide, by the loss of each step and by logged metrics, whether a run has diverged.

    A loss is compared with the least mean of `window` steps that the run has had, and with the
    scatter of its steps. Pairs whose loss has come near 0 vary by more than that mean, so a loss of
    pairs is also compared with that of the first step, which is chance.
    """

    def __init__(self, program: str, overrides: dict[str, Any] | None = None):
        self.guards = check_guards(overrides or {}, OFFLINE_GUARDS[program])
        self.decisions = Decisions(self.guards)
        self.is_on_pairs = program in ON_PAIRS
        # losses of the last steps that were no fault
        self.recent: list[float] = []
        self.least: float | None = None
        self.start: float | None = None
        # of the first log lines that were no fault
        self.first_logprobs: list[float] = []

    def loss(self, step: int, loss: float) -> list[Decision]:
        """Check the loss of a step, the mean over its rows; return what is to be done."""
        if self.start is None:
            self.start = loss
        found = [self._divergence(step, loss), self._spike(step, loss)]
        if loss <= self._bound():
            self.recent.append(loss)
            del self.recent[: -self._longest]
        window = self.guards["divergence"].window
        if len(self.recent) >= window:
            mean = statistics.fmean(self.recent[-window:])
            self.least = mean if self.least is None else min(self.least, mean)
        return [decision for decision in found if decision]

    def logged(self, step: int, metrics: dict[str, float]) -> list[Decision]:
        """Check metrics of a log line, those that this program's guards look at."""
        found = []
        if "max_kl" in self.guards and "eval/kl/sequence" in metrics:
            kl, bound = metrics["eval/kl/sequence"], self.guards["max_kl"].threshold
            what = f"eval/kl/sequence is {kl:.3g}, above {bound:g}"
            found.append(self.decisions.sustained("max_kl", step, kl > bound, kl, bound, what))
        if "chosen_logprob" in self.guards and "dpo/logprob_chosen" in metrics:
            found.append(self._chosen_logprob(step, metrics["dpo/logprob_chosen"]))
        return [decision for decision in found if decision]

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, for JSON."""
        memory = {name: getattr(self, name) for name in _MEMORY}
        return self.decisions.state_dict() | copy.deepcopy(memory)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.decisions.load_state_dict(state)
        for name in _MEMORY:
            # an earlier version kept other numbers
            setattr(self, name, copy.deepcopy(state.get(name, getattr(self, name))))

    @property
    def _longest(self) -> int:
        return max(self.guards[name].window for name in ("divergence", "loss_spike"))

    def _reference(self) -> float:
        """Return the loss that a healthy step is not far above."""
        so_far = statistics.fmean(self.recent) if self.recent else self.start
        least = so_far if self.least is None else self.least
        return max(least, self.start) if self.is_on_pairs else least

    def _bound(self) -> float:
        """Return the loss above which a step is far: by a share, and by the scatter of steps, which with
        a row or two for each is nearly as large as the loss.
        """
        reference = self._reference()
        # by differences, which a loss that falls, or one odd step, makes no larger
        changes = [abs(b - a) for a, b in itertools.pairwise(self.recent)]
        deviation = NORMAL * statistics.median(changes) if changes else 0.0
        share = self.guards["divergence"].threshold * reference
        return max(share, reference + DEVIATIONS * deviation)

    def _divergence(self, step: int, loss: float) -> Decision | None:
        bound = self._bound()
        what = f"loss/total of a step is {loss:.3g}, above {bound:.3g} (its least was {self._reference():.3g})"
        return self.decisions.sustained("divergence", step, loss > bound, loss, bound, what)

    def _spike(self, step: int, loss: float) -> Decision | None:
        """Check one step against those before it: by a share and by their scatter, since a share alone
        is reached by small batches, and the scatter alone by a loss that hardly varies.
        """
        guard = self.guards["loss_spike"]
        before = self.recent[-guard.window :]
        if len(before) < guard.window:
            return None
        mean, deviation = statistics.fmean(before), statistics.stdev(before)
        level = max(mean, self.start) if self.is_on_pairs else mean
        bound = max(guard.threshold * level, mean + DEVIATIONS * deviation)
        what = f"loss/total of a step is {loss:.3g}, above {bound:.3g} (the {guard.window} before had {mean:.3g})"
        return self.decisions.sustained(
            "loss_spike", step, loss > bound, loss, bound, what, window=1
        )

    def _chosen_logprob(self, step: int, logprob: float) -> Decision | None:
        """Check that the chosen responses have not lost much of their probability since the first
        log lines, whose mean over `window` of them a few short or long rows hardly move.
        """
        guard = self.guards["chosen_logprob"]
        begun = statistics.fmean(self.first_logprobs or [logprob])
        bound = guard.threshold * begun
        is_far = logprob < bound
        if not is_far and len(self.first_logprobs) < guard.window:
            self.first_logprobs.append(logprob)
        what = f"dpo/logprob_chosen is {logprob:.3g}, below {bound:.3g} (it began at {begun:.3g})"
        return self.decisions.sustained("chosen_logprob", step, is_far, logprob, bound, what)
