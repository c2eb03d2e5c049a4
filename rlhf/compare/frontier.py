"""Two methods at equal KL: a curve through the points of each run, read where the points of both methods lie.

A run's points are its checkpoints at all strengths. They are not independent (they share the run, and all share the
prompts), and their KL is as noisy as their scores. So a curve is fitted for each seed, the seeds are the unit beside
the groups, and fit and KL are done again in each resample of groups.

With d = sqrt(KL) and the score over the foundation's, a curve is d (a + b log d + c d): 0 at the foundation, and both
forms of Gao, Schulman and Hilton (2210.10760, eq. 1) in one, d (alpha - beta d) of best-of-n and d (alpha - beta log d)
of RL. Either alone is far off under the other (benchmarks/coverage.py). The sensitivity is a line from point to point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf.compare.crossed import Estimate, block_weights, mean_over_seeds
from rlhf.config import UserError

FORM = "d (a + b log d + c d), d = sqrt(KL)"
LINES = "lines from point to point, d = sqrt(KL)"
ENOUGH = 4  # points near the overlap in each seed, for the three terms of a curve
ROWS = 5
LADDER = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)  # times powers of ten
EDGE = 1e-9  # relative: a range's own end lies inside
REACH = 1.4  # times sqrt of the overlap's largest KL: points further out say nothing about it, and would bend the curve


@dataclass(frozen=True)
class Track:
    """One method: all its points (strengths x checkpoints) of each seed, on the same groups.

    kl: for each seed (points, groups), group means of the sequence KL in nats. score: the same of the score MINUS the
    foundation's group means. The number of points may differ between seeds, the groups may not (UserError).
    """

    kl: list[np.ndarray]
    score: list[np.ndarray]

    def __post_init__(self) -> None:
        shapes = [np.shape(x) for x in (*self.kl, *self.score)]
        if not self.kl or len(self.kl) != len(self.score) or shapes[: len(self.kl)] != shapes[len(self.kl) :]:
            raise UserError(f"a frontier: KL and score of shapes {shapes}, expected the same (points, groups) for both")
        if any(len(s) != 2 or not s[0] for s in shapes) or len({s[1] for s in shapes}) > 1:
            raise UserError(f"a frontier: arrays of shapes {shapes}, expected (points, groups) with the same groups")
        if not all(np.all(np.isfinite(x)) for x in (*self.kl, *self.score)):
            raise UserError("a frontier: a KL or score is not a finite number; leave that policy out")

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.kl[0].shape[1]


@dataclass(frozen=True)
class EqualKL:
    """What two methods differ by at the same KL.

    overlap: the KLs that points of every seed of both methods enclose, None if there are none (and then no rows).
    rows: [{"kl", "difference": Estimate of a - b}]. sensitivity: the same rows with lines in place of the form.
    residual: for a and b, how far the points lie from their seed's curve (root mean square, in units of the score).
    disagreement: the largest distance between a difference and its sensitivity. Where a seed has fewer than ENOUGH
    points near by, the rows are those of the lines, and form says so.
    """

    overlap: tuple[float, float] | None
    rows: list[dict]
    form: str
    sensitivity: list[dict]
    residual: dict[str, float]
    disagreement: float


def kl_range(track: Track) -> tuple[float, float]:
    """The KLs that every seed's points enclose: the largest smallest and the smallest largest one.

    The first is above the second where the seeds have no KL in common.
    """
    means = [np.maximum(kl.mean(axis=1), 0.0) for kl in track.kl]
    return float(max(m.min() for m in means)), float(min(m.max() for m in means))


def curve(track: Track, kls, *, level: float = 0.95) -> list[Estimate]:
    """The score over the foundation at each of `kls`, mean over seeds. UserError outside of `kl_range(track)`."""
    kls = np.asarray(kls, dtype=np.float64)
    low, high = kl_range(track)
    if kls.size and not np.all(inside(kls, low, high)):
        raise UserError(
            f"a frontier at KL {kls.min():g} to {kls.max():g}: all seeds have points from {low:g} to {high:g} only, "
            "and nothing is extrapolated"
        )
    weights = block_weights(track.groups)
    fits = _all_seeds(track, kls, weights, _fitted)
    return [mean_over_seeds(fits[:, :, k], weights, level=level) for k in range(len(kls))]


def equal_kl(a: Track, b: Track, kls=None, *, level: float = 0.95) -> EqualKL:
    """The difference a - b at each of `kls` that lies in the overlap (default: up to five round ones).

    Seed i of a meets seed i of b: they share annotators and prompts. UserError if seeds or groups do not match.
    """
    if len(a.kl) != len(b.kl) or a.groups != b.groups:
        raise UserError(
            f"at equal KL: {len(a.kl)} seeds and {a.groups} groups against {len(b.kl)} and {b.groups}; "
            "compare the seeds and groups that both have"
        )
    ranges = kl_range(a), kl_range(b)
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if not low < high:
        return EqualKL(None, [], FORM, [], {"a": _residual(a), "b": _residual(b)}, float("nan"))
    a, b = near(a, high), near(b, high)
    if min(len(kl) for track in (a, b) for kl in track.kl) < ENOUGH:  # nothing to fit: read between the points
        kls = round_kls(low, high) if kls is None else [float(k) for k in kls if inside(k, low, high)]
        rows = _rows(a, b, kls, _lines, level)
        return EqualKL((low, high), rows, LINES, rows, {"a": 0.0, "b": 0.0}, 0.0)
    residual = {"a": _residual(a), "b": _residual(b)}
    kls = round_kls(low, high) if kls is None else [float(k) for k in kls if inside(k, low, high)]
    rows, lines = (_rows(a, b, kls, fit, level) for fit in (_fitted, _lines))
    apart = [abs(x["difference"].estimate - y["difference"].estimate) for x, y in zip(rows, lines, strict=True)]
    return EqualKL((low, high), rows, FORM, lines, residual, max(apart, default=float("nan")))


def near(track: Track, high: float) -> Track:
    """The points up to REACH sqrt(high), and of each seed the first one beyond `high`, so that it stays enclosed.

    Chosen once, by the KL over all groups: a curve of three terms through points that reach 100 nats has no room left
    for what happens at 1.
    """
    kls, scores = [], []
    for kl, score in zip(track.kl, track.score, strict=True):
        means = kl.mean(axis=1)
        beyond = means[means >= high * (1 - EDGE)]
        kept = means <= max(REACH**2 * high, beyond.min() if beyond.size else 0.0)
        kls.append(kl[kept])
        scores.append(score[kept])
    return Track(kls, scores)


def round_kls(low: float, high: float, count: int = ROWS) -> list[float]:
    """Up to `count` round numbers from low (or high / 50) to high, about evenly spaced in sqrt(KL); never none."""
    low = max(low, high / 50)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    found = [k for k in (round(step * 10.0**e, 12) for e in decades for step in LADDER) if low <= k <= high]
    if len(found) < count:  # a narrow overlap needs more digits
        digits = 1 - int(np.floor(np.log10(high - low)))
        found = sorted({round(float(k), digits) for k in np.linspace(low, high, count + 2)[1:-1]})
        found = [k for k in found if low <= k <= high] or [(low + high) / 2]
    targets = np.linspace(np.sqrt(low), np.sqrt(high), min(count, len(found)))
    return sorted({min(found, key=lambda k: abs(np.sqrt(k) - t)) for t in targets})


def inside(kls, low: float, high: float):
    """True where a KL lies from low to high, its ends included."""
    return (low * (1 - EDGE) <= np.asarray(kls)) & (np.asarray(kls) <= high * (1 + EDGE))


def _rows(a: Track, b: Track, kls: list[float], fit, level: float) -> list[dict]:
    weights = block_weights(a.groups)
    at = np.asarray(kls, dtype=np.float64)
    apart = _all_seeds(a, at, weights, fit) - _all_seeds(b, at, weights, fit)
    found = [mean_over_seeds(apart[:, :, k], weights, level=level) for k in range(len(kls))]
    return [{"kl": k, "difference": e} for k, e in zip(kls, found, strict=True)]


def _all_seeds(track: Track, kls: np.ndarray, weights: np.ndarray, fit) -> np.ndarray:
    """(resamples, seeds, KLs): every seed's curve at `kls`, fitted again for each row of `weights`."""
    share = (weights / weights.sum(axis=1, keepdims=True)).T
    pairs = zip(track.kl, track.score, strict=True)
    return np.stack([fit(_root((kl @ share).T), (score @ share).T, _root(kls)) for kl, score in pairs], axis=1)


def _fitted(d: np.ndarray, score: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Least squares of `score` on the terms of d, both (resamples, points), read at `at` (KLs,).

    A seed of n points gets at most n - 1 of the three terms, so that two points do not make a curve.
    """
    scale = max(float(d[0].max()), 1e-12)
    count = min(3, max(1, d.shape[1] - 1))
    coefficients = np.linalg.pinv(_terms(d / scale)[..., :count]) @ score[..., None]
    return (_terms(at / scale)[:, :count] @ coefficients)[..., 0]


def _lines(d: np.ndarray, score: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Straight lines from the foundation through the points in the order of d, read at `at`."""
    order = np.argsort(d, axis=1)
    d, score = (np.pad(np.take_along_axis(x, order, axis=1), ((0, 0), (1, 0))) for x in (d, score))
    return np.stack([np.interp(at, x, y) for x, y in zip(d, score, strict=True)])


def _terms(d: np.ndarray) -> np.ndarray:
    """(..., 3): d, d log d and d^2."""
    return np.stack([d, d * np.log(np.maximum(d, 1e-12)), d * d], axis=-1)


def _residual(track: Track) -> float:
    """Root mean square distance of the points from their seed's curve."""
    squares = []
    for kl, score in zip(track.kl, track.score, strict=True):
        d, y = _root(kl.mean(axis=1))[None], score.mean(axis=1)[None]
        squares.append((_fitted(d, y, d[0]) - y)[0] ** 2)
    return float(np.sqrt(np.mean(np.concatenate(squares))))


def _root(kl: np.ndarray) -> np.ndarray:
    """sqrt(KL); a KL that was estimated below 0 counts as 0."""
    return np.sqrt(np.maximum(kl, 0.0))
