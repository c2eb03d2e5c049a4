"""The claims of a report and what limits it, as records: `summary.py` makes them, the renderer has
a template a kind.

A difference is claimed where its p, adjusted for all claims of the report (Holm 1979), is below 1 -
level. A claim about methods needs MIN_SEEDS run seeds and MIN_CLUSTERS groups; a comparison of runs
claims something about those runs alone and needs the groups only. Everything else has its interval
and `sign` None: it is shown without a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

VerdictKind = Literal["equal_kl", "tuned", "over_optimisation", "exploited_proxy"]
Reservation = Literal["form", "contradicted", "correction", "win_rate"]
NoteKind = Literal[
    # score, score_kind, proxies: what decides, and what methods learnt from and so does not
    "judge",
    # proxies: nothing decides
    "no_judge",
    # method: nothing of it has been measured yet
    "not_measured",
    # trials: [{method, swept, seed}] that have not ended
    "missing_trials",
    # run, reason: a guard ended it
    "stopped",
    # names: the experiment is not finished
    "missing_measurements",
    # method, swept_values: lack seeds, so that they could not be chosen
    "left_out",
    # method, swept, seed, score, others: [lowest, highest], p_adjusted
    "outlier",
    # a, b: not compared at equal KL
    "no_common_seed",
    # a, b, ranges: {method: [lowest, highest KL]}: nothing can be said at equal KL
    "no_overlap",
    # groups, needed: no verdict on anything
    "few_groups",
    # one sample a prompt: no two answers with independent noise
    "no_win_rate",
]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One comparison by the judge, and what may be said of it.

    kind:
      equal_kl: `a` over `b` at the same `kl`.
      tuned: `a` over `b`, each at its best swept value (at its end, where nothing is swept), at KLs
          of their own.
      over_optimisation: `a` from the judge's peak to the largest KL; sign 1 reproduced, -1 not
          reproduced, 0 undecided.
      exploited_proxy: run `a` raised the scores named in `evidence["proxies"]` over `b` while the
          judge fell.
    reservation, why the numbers allow to say less than they seem to:
      form: the fitted curve shows the difference, lines from point to point do not (equal_kl).
      contradicted: lines from point to point lie on the other side, so that `sign` is 0 (equal_kl).
      correction: the interval alone leaves out 0, the adjusted p does not, so that `sign` is 0.
      win_rate: the win rate is on the other side: a few comparisons decide the mean (tuned).
    """

    kind: VerdictKind
    a: str
    b: str
    # Estimate.to_dict() of a - b by the judge
    difference: dict[str, Any]
    # 1: a is ahead, -1: behind, 0: no difference can be shown, None: no verdict
    sign: int | None
    p_adjusted: float | None = None
    # in the judge's units, shown in 4 of 5 repeats
    minimum_detectable_effect: float | None = None
    # nats; None: each at its own
    kl: float | None = None
    reservation: Reservation | None = None
    # the row of the report it was read from: ranges, chosen values, peak, end
    evidence: dict[str, Any] | None = None


def note(kind: NoteKind, **fields: Any) -> dict[str, Any]:
    """Return one limit of a report for report.json; the fields of each kind are listed at `NoteKind`."""
    return {"kind": kind, **fields}


# Where a comparison was made, for each kind of verdict that has a sign, and what its sign says
PLACES = {
    "equal_kl": "at KL {kl}",
    "tuned": "each at the swept value that did best on other prompts",
    "end": "at the end of training",
}
SIGNS: dict[int | None, str] = {
    1: "{a} is ahead of {b} by {gain} by {judge} ({basis}), {place}.",
    -1: "{a} is behind {b} by {loss} by {judge} ({basis}), {place}.",
    0: "No difference can be shown between {a} and {b} by {judge}, {place}: {size} ({basis}). "
    "The interval leaves room for {bound}.",
    None: "{a} differs from {b} by {size} by {judge} ({basis}), {place}. There are too few seeds or prompts for a "
    "verdict.",
}
HEADLINE: dict[int | None, str] = {
    1: "ahead of {b}",
    -1: "behind {b}",
    0: "not shown to differ from {b}",
    None: "shown beside {b} without a verdict",
}
OVER_OPTIMISATION = (
    "Over-optimisation of {a}: {outcome}. From the peak of {judge} (KL {peak}) to the largest KL ({end}) it "
    "changes by {size} ({basis}){proxy}."
)
OUTCOMES = {1: "reproduced", -1: "not reproduced", 0: "undecided", None: "no verdict"}
EXPLOITED_PROXY = (
    "{a} raised {proxies} over {b} while {judge} fell by {loss}: the proxy was over-optimised."
)
RESERVATIONS = {
    "form": "This rests on the form of the fitted curve: straight lines from point to point do not show it.",
    "contradicted": "The fitted curve shows a difference that straight lines from point to point contradict.",
    "correction": "The interval alone excludes 0, the p adjusted for all claims of this report does not.",
    "win_rate": "Mean and win rate disagree: a few comparisons decide the mean.",
}
NOTES: dict[str, str] = {
    "judge": "What decides is {judge}, which no method was trained on.{proxies}",
    "no_judge": "No gold or referee score was given, so this report cannot judge which policy is better. A score that "
    "a method was trained on shows what was optimised and decides nothing.{proxies}",
    "not_measured": "Nothing of {method} has been measured yet.",
    "missing_trials": "Trials that have not ended: {trials}. The report uses the seeds that are there.",
    "stopped": "{run} was stopped by a guard ({reason}): its end is where it stopped.",
    "missing_measurements": "The experiment is not finished; measurements missing: {names}.",
    "left_out": "{method} at {swept_values} lacks seeds and cannot be chosen, so it had fewer tuning trials.",
    "outlier": "Seed {seed} of {method} is an outlier by {judge}: {score:.3g}, the other seeds {others}. Intervals "
    "assume that seeds are alike and hold less often than stated where single runs fail.",
    "no_common_seed": "{a} and {b} have no run seed in common whose trials have ended, so they are not compared.",
    "no_overlap": "The KL ranges of {a} and {b} do not overlap ({ranges}), so there is no comparison at equal KL.",
    "few_groups": "{groups} groups are too few, a verdict needs {needed}: intervals are shown without one.",
    "no_win_rate": "No win rate is given: it takes two answers of each policy to each prompt with independent "
    "sampling noise (samples_per_prompt: 2).",
}
BUDGETS: dict[bool | None, str] = {
    True: "Budgets are matched: {counter} within {tolerance:g} %.",
    False: "Budgets are not matched in {counter} within {tolerance:g} %, so a difference may come from what was spent.",
    None: "Budgets were to be matched in {counter}, but nothing is known of them yet.",
}
UNMATCHED = "Budgets were not matched, so a difference may come from what was spent."
UNEQUAL_TRIALS = (
    " The numbers of tuning trials differ ({trials}): more tries find a better value by luck."
)
POWER = "To show a win rate of {rate:g} % in 4 of 5 repeats takes {pairs} independent comparisons."
DETECTABLE = (
    " {a} over {b}: a difference of {least} would be shown that often before the correction for all "
    "claims{more}."
)
SCOPES = {
    "models": "All of this holds for these trained models, not for the methods. Intervals are {level:g} % over {over}; "
    "they do not hold the spread between training runs.",
    "method": "Intervals are {level:g} % over {seeds} and {over}, both drawn at random: they speak of the methods on "
    "this initial policy, these data and prompts like these.",
}
FEW_SEEDS = " So few seeds can hardly show that one of them is an outlier."
