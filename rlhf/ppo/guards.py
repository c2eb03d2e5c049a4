"""What skips, stops or rolls back a PPO run, and says why.

Numbers in, decisions out: no tensors and no ranks. Every rank calls `Guards` with the same numbers
and so decides the same. Their thresholds and actions stand in rlhf/options/guards.py;
docs/guards.md explains them.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

from rlhf.errors import UserError, did_you_mean
from rlhf.guards import Decision, Decisions, current_names, keyed
from rlhf.options.guards import check_guards
from rlhf.runs.metrics import METRICS, is_known

BASELINE = 5  # healthy steps whose mean is a run's own measure of entropy, length and spread
IN_A_ROW = 2  # steps that the test for reward hacking must hold
ENOUGH = 32  # responses, for a correlation
TRUNCATED = "the share of responses without end"  # 1 - response/ended
NOTHING = 1e-8  # an entropy or a spread of scores that is none at all, whatever it began with
ROUNDING = 0.01  # nats: a KL nearer to 0 is not called negative


def check_watched(overrides: dict[str, Any], scorers: Iterable[str]) -> None:
    """Raise UserError where the guard `hacking` is to watch a score that none of these scorers
    gives.

    Whether a scorer has a part of that name (`scorer/part`) is known only after its first scores.
    """
    known = [*scorers]
    for name in check_guards(overrides)["hacking"].watch or ():
        metric = watched_metric(name)
        if (
            metric.startswith("score/")
            and metric not in METRICS
            and metric.split("/")[1] not in known
        ):
            hint = did_you_mean(name, known)
            raise UserError(
                f"guards.hacking.watch: '{name}' is not a score of this run.{hint} Scorers: {', '.join(known)}"
            )


def watched_metric(name: str) -> str:
    """Return the metric that a name under hacking's `watch` stands for: itself, or that of a
    scorer.
    """
    return name if is_known(name) else f"score/{name}"


class Guards:
    """The guards of one run with their state: baselines, streaks, events.

    They are asked at four points: `scores` after scoring, `first` before the run's first update,
    `update` before each optimizer step, `step` after each PPO step. A check ends in `Decisions.sustained` (a
    fault must last some steps) or `_fault` (it acts at once).
    """

    def __init__(
        self,
        overrides: dict[str, Any] | None = None,
        monitored: Iterable[str] = (),
        spreads: Iterable[str] = (),
    ):
        """`monitored`: scores that should not fall while score/raw rises, unless hacking's `watch`
        names some. `spreads`: the scores that say how far the members of an ensemble differ.
        """
        self.guards = check_guards(overrides or {})
        names = self.guards["hacking"].watch or tuple(monitored)
        self.monitored = [watched_metric(name) for name in names]
        self.spreads = [watched_metric(name) for name in spreads]
        counts = ("skipped_updates", "skipped_rollouts", "shortened_rollouts")
        self.decisions = Decisions(self.guards, counts)
        self._remember({})

    def update(self, step: int, numbers: dict[str, float]) -> Decision | None:
        """Check an update before its optimizer step: loss, grad/norm, ppo/ratio and ppo/approx_kl,
        as far as known.
        """
        self.updates += 1
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        if bad:
            what = f"{bad[0]} of an update is {numbers[bad[0]]}"
            return self._fault(
                "not_finite", "updates", self.updates, step, numbers[bad[0]], None, what
            )
        approx_kl = numbers.get("ppo/approx_kl")
        found = [
            self._ratio(step, numbers.get("ppo/ratio"), approx_kl),
            self._target_kl(step, approx_kl),
        ]
        return _most_severe(found)

    def scores(self, step: int, message: str | None) -> Decision | None:
        """Judge the message of a scorer that gave NaN or inf, naming it and the prompt; None if all
        is well.

        A skip means that nothing is learnt from this rollout.
        """
        if message is None:
            return None
        return self._fault("not_finite", "rollouts", step, step, math.nan, None, message)

    def first(
        self, step: int, metrics: dict[str, float], difference: float, responses: int
    ) -> Decision | None:
        """Check the metrics of the rollout before the run's first update; return the most severe
        decision.

        difference: the largest one between scores that are compared, all or those of one prompt's
        samples.
        """
        found, ended = [], metrics["response/ended"]
        if ended == 0 and self.guards["truncation"].action != "off":
            what = "before the first update no response has ended"
            found.append(
                self.decisions.decide(
                    "truncation", "warn", step, 1.0, self.guards["truncation"].threshold, what, step
                )
            )
        action = self.guards["no_signal"].action
        if difference <= NOTHING and responses > 1 and action != "off":
            what = f"before the first update the scores that are compared are all alike, {metrics['score/total']:.3g}"
            found.append(
                self.decisions.decide("no_signal", action, step, difference, NOTHING, what, step)
            )
        guard, r = self.guards["length_detector"], metrics.get("score/length_correlation", 0.0)
        if abs(r) > guard.threshold and responses >= ENOUGH and guard.action != "off":
            what = f"the correlation of score/raw with length over the first {responses} responses is {r:+.2f}"
            found.append(
                self.decisions.decide(
                    "length_detector", guard.action, step, r, guard.threshold, what, step
                )
            )
        return _most_severe(found)

    def step(self, step: int, metrics: dict[str, float]) -> Decision | None:
        """Check the metrics of a PPO step, but for those that are missing or NaN; return the most
        severe decision.
        """
        values = {name: float(value) for name, value in metrics.items() if not math.isnan(value)}
        if "response/ended" in values:
            values[TRUNCATED] = 1 - values["response/ended"]
        found = [
            self._check_value("max_kl", step, "kl/sequence", values),
            self._check_negative_kl(step, values),
            self._check_against_baseline("entropy", step, "response/entropy", values),
            self._check_against_baseline("length", step, "response/length", values),
            self._check_value("repetition", step, "response/repetition", values),
            self._check_value("truncation", step, TRUNCATED, values),
            self._check_against_baseline("score_collapse", step, "score/std", values),
        ]
        for name in self.spreads:
            found.append(self._check_against_baseline("disagreement", step, name, values, name))
        if self.guards["hacking"].action != "off":
            # a skipped rollout has no scores
            known = [name for name in metrics if name.startswith("score/")]
            unknown = [
                name for name in self.monitored if name not in metrics and name not in self.series
            ]
            if known and unknown:
                raise UserError(
                    f"guards.hacking watches '{unknown[0]}', which is not a score of this run. "
                    f"Scores: {', '.join(known)}"
                )
            found += [self._check_hacking(step, name, values) for name in self.monitored]
        return _most_severe(found)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, for JSON."""
        memory = {name: getattr(self, name) for name in _MEMORY}
        return self.decisions.state_dict() | copy.deepcopy(memory)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decisions.load_state_dict(state)
        self._remember(state)

    def rolled_back(self, state: dict[str, Any] | None) -> None:
        """Restore windows and baselines after a rollback; `state` None is the run's start.

        Events, counts and the number of rollbacks stay, and the step sizes are halved once more.
        """
        self.decisions.restore_streaks(state or {})
        self._remember(state or {})
        self.decisions.rollbacks += 1
        self.decisions.rate_scale /= 2

    def _remember(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        self.updates: int = state.get("updates", 0)  # optimizer steps asked about
        # when it struck lately: updates or steps
        self.faults: dict[str, list[int]] = state.get("faults", {})
        self.baselines: dict[str, list[float]] = current_names(state.get("baselines", {}))
        # (score/raw, watched score)
        self.series: dict[str, list[list[float]]] = state.get("series", {})

    # single updates

    def _ratio(self, step: int, ratio: float | None, approx_kl: float | None) -> Decision | None:
        """Check that the mean ratio is not above the threshold, nor its geometric mean below 1 /
        threshold.

        A policy that diverges gives its old tokens no probability: ratios go to 0, which their mean
        does not show. From approx_kl = E[r - 1 - log r] follows E[log r] = E[r] - 1 - approx_kl.
        """
        bound = self.guards["ratio"].threshold
        if ratio is None or self.guards["ratio"].action == "off":
            return None
        geometric = math.exp(min(0.0, ratio - 1 - approx_kl)) if approx_kl is not None else 1.0
        if ratio > bound:
            what = f"the mean probability ratio of an update is {ratio:.3g}, above {bound:g}"
            return self._fault("ratio", "ratio", step, step, ratio, bound, what)
        if geometric < 1 / bound:
            what = f"the geometric mean of an update's probability ratios is {geometric:.3g}, below {1 / bound:.3g}"
            return self._fault("ratio", "ratio", step, step, geometric, 1 / bound, what)
        return None

    def _target_kl(self, step: int, approx_kl: float | None) -> Decision | None:
        guard = self.guards["target_kl"]
        if guard.action == "off" or approx_kl is None or approx_kl <= guard.threshold:
            return None
        what = f"ppo/approx_kl of an update is {approx_kl:.3g}, above {guard.threshold:g}"
        return self._fault("target_kl", "target_kl", step, step, approx_kl, guard.threshold, what)

    def _fault(self, name, kind, now, step, value, bound, what) -> Decision | None:
        """Decide about a fault that acts at once; more than `limit` skips within the window become
        a stop.

        `kind` names the window, and `now` is the position in it: an update or a step.
        """
        guard = self.guards[name]
        window = guard.window or 2  # target_kl: this rollout or the one before
        known = [t for t in self.faults.get(kind, []) if now - window < t <= now]
        self.faults[kind] = known if now in known else [*known, now]
        action = guard.action
        if action == "warn" and known:
            return None
        if action == "skip" and guard.limit is not None and len(self.faults[kind]) > guard.limit:
            action, of = "stop", "updates" if kind == "updates" else "rollouts"
            what += f", and {len(self.faults[kind])} of the last {window} {of} had to be skipped"
        if action == "skip":
            self.decisions.counts[
                "skipped_rollouts" if kind == "rollouts" else "skipped_updates"
            ] += 1
        if action == "end":
            self.decisions.counts["shortened_rollouts"] += 1
        return self.decisions.decide(name, action, step, value, bound, what, step)

    # whole steps

    def _check_value(
        self, name: str, step: int, metric: str, values: dict[str, float]
    ) -> Decision | None:
        """Check that a metric is not above the threshold."""
        if metric not in values:
            return None
        value, bound = values[metric], self.guards[name].threshold
        what = f"{metric} is {value:.3g}, above {bound:g}"
        return self.decisions.sustained(name, step, value > bound, value, bound, what)

    def _check_negative_kl(self, step: int, values: dict[str, float]) -> Decision | None:
        """Check that kl/sequence + threshold * its standard error is not below 0."""
        if not {"kl/sequence", "kl/sequence_se"} <= values.keys():
            return None
        mean, error = values["kl/sequence"], values["kl/sequence_se"]
        most = mean + self.guards["negative_kl"].threshold * error
        what = f"kl/sequence is {mean:.3g} with a standard error of {error:.2g}"
        return self.decisions.sustained("negative_kl", step, most < -ROUNDING, most, 0.0, what)

    def _check_against_baseline(
        self, name: str, step: int, metric: str, values: dict[str, float], key: str | None = None
    ) -> Decision | None:
        """Check a metric against its mean over the run's first healthy steps.

        It must stay in `_healthy_range`. `key` tells apart the metrics that one guard looks at.
        """
        if metric not in values:
            return None
        value, first = values[metric], self.baselines.setdefault(keyed(name, key), [])
        mean = sum(first) / len(first) if first else value
        low, high = _healthy_range(name, mean, self.guards[name].threshold)
        bad = value > high or value <= low
        # a value beyond the threshold does not become part of the baseline
        if not bad and len(first) < BASELINE:
            first.append(value)
        bound = high if value > high else low
        side = "above" if value > high else "below"
        what = f"{metric} is {value:.3g}, {side} {bound:.3g} (it began at {mean:.3g})"
        return self.decisions.sustained(name, step, bad, value, bound, what, key)

    def _check_hacking(self, step: int, name: str, values: dict[str, float]) -> Decision | None:
        """Check that score/raw does not rise while the monitored score falls, between the halves of
        the window.
        """
        guard, series = self.guards["hacking"], self.series.setdefault(name, [])
        pair = [values.get("score/raw", math.nan), values.get(name, math.nan)]
        if not math.isfinite(sum(pair)):
            return None
        series.append(pair)
        del series[: -guard.window]
        if len(series) < guard.window:
            return None
        rise, fall = trend([a for a, _ in series]), -trend([b for _, b in series])
        bad = fall > guard.threshold and rise > guard.threshold / 2
        what = f"over {guard.window} steps {name} fell by {fall:.1f} standard errors while score/raw rose by {rise:.1f}"
        return self.decisions.sustained(
            "hacking", step, bad, fall, guard.threshold, what, name, IN_A_ROW
        )


def _healthy_range(name: str, mean: float, factor: float) -> tuple[float, float]:
    """Return the bounds (low, high) of a metric whose baseline is `mean`: not below a share of it;
    for `length` not off by a factor in either direction, for `disagreement` not above a multiple.
    """
    if name == "length":
        return mean / factor, mean * factor
    if name == "disagreement":
        return -math.inf, max(mean * factor, NOTHING)
    return max(factor * mean, NOTHING), math.inf


_MEMORY = ("updates", "faults", "baselines", "series")


def trend(values: list[float]) -> float:
    """Return how far the mean of the second half is above that of the first, in standard errors; 0
    if nothing moves.

        t = (m2 - m1) / (s sqrt(2 / h)),    s² = sum of squared residuals / (2h - 4)

    h is half the number of values (a middle one is left out), at least 4. The noise s is the
    scatter around a straight line through each half, so that a steady slope and a sudden step are
    both seen and neither is taken for noise.
    """
    half = len(values) // 2
    halves = values[:half], values[-half:]
    means = [sum(part) / half for part in halves]
    squares = sum(r * r for part in halves for r in _residuals(part))
    scatter = max(math.sqrt(squares / (2 * half - 4)), 1e-6 * max(map(abs, means)), 1e-12)
    return (means[1] - means[0]) / (scatter * math.sqrt(2 / half))


def _residuals(values: list[float]) -> list[float]:
    """Return the residuals of a straight line fitted by least squares."""
    middle = (len(values) - 1) / 2
    mean = sum(values) / len(values)
    slope = sum((i - middle) * v for i, v in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )
    return [v - mean - slope * (i - middle) for i, v in enumerate(values)]


def _most_severe(found: list[Decision | None]) -> Decision | None:
    order = ("warn", "skip", "end", "rollback", "stop")
    return max((d for d in found if d), key=lambda d: order.index(d.action), default=None)
