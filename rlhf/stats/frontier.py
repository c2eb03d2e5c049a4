"""Two methods at equal KL: a curve through the points of each run, read where the points of both
methods lie.

A run's points are its checkpoints at all swept values. They are not independent (they share the
run, and all share the prompts), and their KL is as noisy as their scores. So a curve is fitted for
each seed, the seeds are the unit beside the groups, and fit and KL are done again in each resample
of groups.

With d = sqrt(KL) and the score over the initial policy's, a curve is d (a + b log d + c d): 0 at
the initial policy, and both forms of Gao, Schulman and Hilton (2210.10760, eq. 1) in one, d (alpha
- beta d) of best-of-n and d (alpha - beta log d) of RL. Either alone is far off under the other
(benchmarks/statistics/coverage.py). The sensitivity is a line from point to point.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rlhf.stats.crossed import Estimate, block_weights, mean_over_seeds

FORM = "d (a + b log d + c d), d = sqrt(KL)"
LINES = "lines from point to point, d = sqrt(KL)"

# points near the overlap in each seed, for the three terms of a curve
ENOUGH = 4
ROWS = 5
# round numbers, times powers of ten
LADDER = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
# relative: a range's own end lies inside
EDGE = 1e-9
# times sqrt of the overlap's largest KL: points further out say nothing about it, and would bend
# the curve
REACH = 1.4


@dataclass(frozen=True)
class Track:
    """One method: all its points (swept values x checkpoints) of each seed, on the same groups.

    kl: for each seed (points, groups), group means of the sequence KL in nats. score: the same of
    the score MINUS the initial policy's group means. The number of points may differ between seeds,
    the groups may not.
    """

    kl: list[np.ndarray]
    score: list[np.ndarray]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.kl[0].shape[1]


@dataclass(frozen=True)
class EqualKL:
    """Difference of two methods at the same KL.

    overlap: the KLs that points of every seed of both methods enclose, None if there are none (and
    then no rows).
    rows: [{"kl", "difference": Estimate of a - b}]. sensitivity: the same rows with lines in place
    of the form.
    residual: for a and b, how far the points lie from their seed's curve (root mean square, in
    units of the score).
    disagreement: the largest distance between a difference and its sensitivity. Where a seed has
    fewer than ENOUGH points near by, the rows are those of the lines, and form says so.
    """

    overlap: tuple[float, float] | None
    rows: list[dict]
    form: str
    sensitivity: list[dict]
    residual: dict[str, float]
    disagreement: float


def kl_range(track: Track) -> tuple[float, float]:
    """Return the KLs that every seed's points enclose: the largest smallest and the smallest
    largest one.

    The first is above the second where the seeds have no KL in common.
    """
    smallest, largest = [], []
    for kl in track.kl:
        means = np.maximum(kl.mean(axis=1), 0.0)
        smallest.append(float(means.min()))
        largest.append(float(means.max()))
    return max(smallest), min(largest)


def curve(track: Track, kls, *, level: float = 0.95) -> list[Estimate]:
    """Return the score over the initial policy at each of `kls`, mean over seeds.

    Give KLs within `kl_range(track)`: beyond it the curve would be extrapolated.
    """
    kls = np.asarray(kls, dtype=np.float64)
    weights = block_weights(track.groups)
    fits = _all_seeds(track, kls, weights, _fitted)
    return [
        mean_over_seeds(at_one_kl, weights, level=level) for at_one_kl in np.moveaxis(fits, 2, 0)
    ]


def equal_kl(a: Track, b: Track, kls=None, *, level: float = 0.95) -> EqualKL:
    """Return the difference a - b at each of `kls` that lies in the overlap (default: up to five
    round ones).

    Seed i of a is compared with seed i of b: they share annotators and prompts. Both have the same seeds and
    groups.
    """
    low_a, high_a = kl_range(a)
    low_b, high_b = kl_range(b)
    overlap = low, high = max(low_a, low_b), min(high_a, high_b)
    if not low < high:
        return EqualKL(None, [], FORM, [], {"a": _residual(a), "b": _residual(b)}, float("nan"))

    a, b = near(a, high), near(b, high)
    if kls is None:
        kls = round_kls(low, high)
    else:
        kls = [float(kl) for kl in kls if inside(kl, low, high)]
    lines = list(_rows(a, b, kls, _lines, level))
    if min(map(len, (*a.kl, *b.kl))) < ENOUGH:
        # nothing to fit: the differences are read between the points
        return EqualKL(overlap, lines, LINES, lines, {"a": 0.0, "b": 0.0}, 0.0)
    rows = list(_rows(a, b, kls, _fitted, level))
    # how much depends on the form of the curve
    apart = []
    for row, by_lines in zip(rows, lines, strict=True):
        apart.append(abs(row["difference"].estimate - by_lines["difference"].estimate))
    residual = {"a": _residual(a), "b": _residual(b)}
    return EqualKL(overlap, rows, FORM, lines, residual, max(apart, default=float("nan")))


def near(track: Track, high: float) -> Track:
    """Return the points up to REACH sqrt(high), and of each seed the first one beyond `high`, which
    encloses it.

    Chosen once, by the KL over all groups: a curve of three terms through points that reach 100
    nats has no room left for what happens at 1.
    """
    kls, scores = [], []
    for kl, score in zip(track.kl, track.score, strict=True):
        means = kl.mean(axis=1)
        furthest = REACH**2 * high
        beyond = means[means >= high * (1 - EDGE)]
        if beyond.size:
            furthest = max(furthest, beyond.min())
        kept = means <= furthest
        kls.append(kl[kept])
        scores.append(score[kept])
    return Track(kls, scores)


def round_kls(low: float, high: float, count: int = ROWS) -> list[float]:
    """Return up to `count` round numbers from low (or high / 50) to high, about evenly spaced in
    sqrt(KL).
    """
    low = max(low, high / 50)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    found = []
    for decade in decades:
        numbers = [round(step * 10.0**decade, 12) for step in LADDER]
        found += [kl for kl in numbers if low <= kl <= high]
    if len(found) < count:
        # a narrow overlap needs more digits
        digits = 1 - int(np.floor(np.log10(high - low)))
        numbers = {round(float(kl), digits) for kl in np.linspace(low, high, count + 2)[1:-1]}
        found = sorted(kl for kl in numbers if low <= kl <= high) or [(low + high) / 2]
    # of these the one next to each of the evenly spaced roots; two may share one
    roots = np.sqrt(found)
    targets = np.linspace(np.sqrt(low), np.sqrt(high), min(count, len(found)))
    return sorted({found[np.abs(roots - target).argmin()] for target in targets})


def inside(kls, low: float, high: float):
    """Return True where a KL lies from low to high, its ends included."""
    return (low * (1 - EDGE) <= np.asarray(kls)) & (np.asarray(kls) <= high * (1 + EDGE))


def _rows(a: Track, b: Track, kls: list[float], fit, level: float) -> Iterator[dict]:
    """Yield the rows of `EqualKL`, read from the curves that `fit` makes."""
    weights = block_weights(a.groups)
    at = np.asarray(kls, dtype=np.float64)
    apart = _all_seeds(a, at, weights, fit) - _all_seeds(b, at, weights, fit)
    for kl, at_one_kl in zip(kls, np.moveaxis(apart, 2, 0), strict=True):
        yield {"kl": kl, "difference": mean_over_seeds(at_one_kl, weights, level=level)}


def _all_seeds(track: Track, kls: np.ndarray, weights: np.ndarray, fit) -> np.ndarray:
    """Return (resamples, seeds, KLs): every seed's curve at `kls`, fitted again for each row of
    `weights`.
    """
    share = (weights / weights.sum(axis=1, keepdims=True)).T
    curves = []
    for kl, score in zip(track.kl, track.score, strict=True):
        curves.append(fit(_root((kl @ share).T), (score @ share).T, _root(kls)))
    return np.stack(curves, axis=1)


def _fitted(d: np.ndarray, score: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Fit `score` to the terms of d by least squares, both (resamples, points), and read it at `at`
    (KLs,).

    A seed of n points gets at most n - 1 of the three terms, so that two points do not make a
    curve.
    """
    scale = max(float(d[0].max()), 1e-12)
    count = min(3, max(1, d.shape[1] - 1))
    coefficients = np.linalg.pinv(_terms(d / scale)[..., :count]) @ score[..., None]
    return (_terms(at / scale)[:, :count] @ coefficients)[..., 0]


def _lines(d: np.ndarray, score: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Draw straight lines from the initial policy through the points in the order of d, and read
    them at `at`.
    """
    order = np.argsort(d, axis=1)
    # the initial policy is at (0, 0)
    first = ((0, 0), (1, 0))
    d = np.pad(np.take_along_axis(d, order, axis=1), first)
    score = np.pad(np.take_along_axis(score, order, axis=1), first)
    return np.stack([np.interp(at, x, y) for x, y in zip(d, score, strict=True)])


def _terms(d: np.ndarray) -> np.ndarray:
    """Return (..., 3): d, d log d and d^2."""
    return np.stack([d, d * np.log(np.maximum(d, 1e-12)), d * d], axis=-1)


def _residual(track: Track) -> float:
    """Return the root mean square distance of the points from their seed's curve."""
    squares = []
    for kl, score in zip(track.kl, track.score, strict=True):
        d, y = _root(kl.mean(axis=1))[None], score.mean(axis=1)[None]
        squares.append((_fitted(d, y, d[0]) - y)[0] ** 2)
    return float(np.sqrt(np.mean(np.concatenate(squares))))


def _root(kl: np.ndarray) -> np.ndarray:
    """Return sqrt(KL); a KL that was estimated below 0 counts as 0."""
    return np.sqrt(np.maximum(kl, 0.0))
