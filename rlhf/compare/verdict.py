"""The claims of a report and what limits it, as records: `summary.py` makes them, the renderer has a template a kind.

A difference is claimed where its p, adjusted for all claims of the report (Holm 1979), is below 1 - level. A claim
about methods needs MIN_SEEDS run seeds and MIN_CLUSTERS groups; a comparison of runs claims something about those runs
alone and needs the groups only. Everything else has its interval and `sign` None: it is shown without a verdict.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

VerdictKind = Literal["equal_kl", "tuned", "over_optimisation", "exploited_proxy"]
Reservation = Literal["form", "contradicted", "correction", "win_rate"]
NoteKind = Literal[
    "judge",  # score, score_kind, proxies: what decides, and what methods learnt from and so does not
    "no_judge",  # proxies: nothing decides
    "not_measured",  # method: nothing of it has been measured yet
    "missing_trials",  # trials: [{method, swept, seed}] that have not ended
    "stopped",  # run, reason: a guard ended it
    "missing_measurements",  # names: the experiment is not finished
    "left_out",  # method, swept_values: lack seeds, so that they could not be chosen
    "outlier",  # method, swept, seed, score, others: [lowest, highest], p_adjusted
    "no_common_seed",  # a, b: not compared at equal KL
    "no_overlap",  # a, b, ranges: {method: [lowest, highest KL]}: nothing can be said at equal KL
    "few_groups",  # groups, needed: no verdict on anything
    "no_win_rate",  # one sample a prompt: no two answers with independent noise
]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One comparison by the judge, and what may be said of it.

    kind:
      equal_kl: `a` over `b` at the same `kl`.
      tuned: `a` over `b`, each at its best swept value (at its end, where nothing is swept), at KLs of their own.
      over_optimisation: `a` from the judge's peak to the largest KL; sign 1 reproduced, -1 not reproduced, 0 undecided.
      exploited_proxy: run `a` raised the scores named in `evidence["proxies"]` over `b` while the judge fell.
    reservation, why the numbers allow to say less than they seem to:
      form: the fitted curve shows the difference, lines from point to point do not (equal_kl).
      contradicted: lines from point to point lie on the other side, so that `sign` is 0 (equal_kl).
      correction: the interval alone leaves out 0, the adjusted p does not, so that `sign` is 0.
      win_rate: the win rate is on the other side: a few comparisons decide the mean (tuned).
    """

    kind: VerdictKind
    a: str
    b: str
    difference: dict[str, Any]  # Estimate.to_dict() of a - b by the judge
    sign: int | None  # 1: a is ahead, -1: behind, 0: no difference can be shown, None: no verdict
    p_adjusted: float | None = None
    minimum_detectable_effect: float | None = None  # in the judge's units, shown in 4 of 5 repeats
    kl: float | None = None  # nats; None: each at its own
    reservation: Reservation | None = None
    evidence: dict[str, Any] | None = None  # the row of the report it was read from: ranges, chosen values, peak, end

    def to_dict(self) -> dict[str, Any]:
        """Return the record for report.json."""
        return asdict(self)


def note(kind: NoteKind, **fields: Any) -> dict[str, Any]:
    """Return one limit of a report for report.json; the fields of each kind stand at `NoteKind`."""
    return {"kind": kind, **fields}
