"""Do the intervals of a comparison, a report card and agreement hold the truth as often as they
say? Simulated.

    nice -n 10 python -m benchmarks.statistics.coverage                    # all tables, about 10 minutes of one core
    nice -n 10 python -m benchmarks.statistics.coverage --repeats 0.05     # a look at them
    nice -n 10 python -m benchmarks.statistics.coverage --only groups      # some of them

Each cell simulates whole experiments with a known truth, lets the functions that the report calls
make a 95 % interval, and counts how often it holds the truth, in percent. What is said in words is
benchmarks/statistics/verdicts.py's question.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable

import numpy as np
from scipy.special import ndtr, stdtrit

from reward.cards.accuracy import accuracy_with_interval
from reward.cards.calibration import calibration
from rlhf.data.alpha import alpha_interval
from rlhf.stats import MIN_CLUSTERS, frontier
from rlhf.stats.crossed import crossed_mean, crossed_statistic, share
from rlhf.stats.frontier import Track, equal_kl

SEEDS, GROUPS = (3, 5, 10), (40, 100, 300)
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with 4 degrees of freedom, variance 1."""
    return rng.standard_t(4, shape) / math.sqrt(2)


def lognormal(sigma: float) -> Draw:
    """exp(sigma z), shifted and scaled to mean 0 and variance 1."""
    mean, sd = math.exp(sigma**2 / 2), math.sqrt((math.exp(sigma**2) - 1) * math.exp(sigma**2))
    return lambda rng, shape: (np.exp(sigma * rng.standard_normal(shape)) - mean) / sd


def world(
    rng, seeds: int, groups: int, ratio: float, noise: float, *, a=normal, b=normal, e=normal
) -> np.ndarray:
    """Values (seeds, groups) with mean 0: prompts of variance 1, an error of variance `noise`.

    Seeds add `ratio` times as much to the variance of the mean as prompts and error together.
    """
    part = 1 / groups + noise / (seeds * groups)
    return (
        math.sqrt(ratio * part * seeds) * a(rng, (seeds, 1))
        + b(rng, (1, groups))
        + math.sqrt(noise) * e(rng, (seeds, groups))
    )


WORLDS = [
    ("normal", {}, 1.0, (0, 0.1, 0.3, 1, 3, 10)),
    ("normal", {}, 10.0, (0, 0.1, 0.3, 1, 3, 10)),
    ("error heavy-tailed (t4)", {"e": heavy}, 10.0, (0, 1)),
    ("seeds heavy-tailed (t4)", {"a": heavy}, 1.0, (1, 10)),
    ("prompts lognormal, sigma 0.5", {"b": lognormal(0.5)}, 1.0, (0, 1)),
    ("prompts lognormal, sigma 1", {"b": lognormal(1.0)}, 1.0, (0, 1)),
]


def mean_table(repeats: int) -> str:
    """crossed_mean over the grid."""
    lines = [
        head(
            [
                "world",
                "error / prompts",
                "seeds' part",
                *(f"{s} x {g}" for s in SEEDS for g in GROUPS),
            ]
        )
    ]
    for name, draws, noise, ratios in WORLDS:
        for ratio in ratios:
            cells = [name, f"{noise:g}", f"{ratio:g}"]
            for seeds in SEEDS:
                for groups in GROUPS:
                    rng = np.random.default_rng([seeds, groups, int(10 * ratio), int(noise)])
                    hits = sum(
                        holds(crossed_mean(world(rng, seeds, groups, ratio, noise, **draws)), 0.0)
                        for _ in range(repeats)
                    )
                    cells.append(marked(100 * hits / repeats))
            lines.append(row(cells))
    return "\n".join(lines)


def naive_table(repeats: int) -> str:
    """Beside it, what one gets who takes the seeds as fixed, or forgets the prompts."""
    lines = [
        head(
            [
                "seeds' part",
                *(f"{s} seeds: {k}" for s in SEEDS for k in ("crossed", "prompts", "seeds")),
            ]
        )
    ]
    for ratio in (0, 0.3, 1, 3, 10):
        cells = [f"{ratio:g}"]
        for seeds in SEEDS:
            rng = np.random.default_rng([7, seeds, int(10 * ratio)])
            hits = np.zeros(3)
            for _ in range(repeats):
                values = world(rng, seeds, 100, ratio, 1.0)
                alone = [one_way(values.mean(axis=axis)) for axis in (0, 1)]
                hits += [holds(crossed_mean(values), 0.0), *alone]
            cells += [f"{100 * h / repeats:.1f}" for h in hits]
        lines.append(row(cells))
    return "\n".join(lines)


def one_way(means: np.ndarray) -> bool:
    """Whether Student's interval of independent `means` holds 0."""
    half = stdtrit(len(means) - 1, 0.975) * means.std(ddof=1) / math.sqrt(len(means))
    return bool(abs(means.mean()) <= half)


def ratio_table(repeats: int) -> str:
    """crossed_statistic for a ratio of two means that share seeds and prompts; 20 blocks of 5
    groups, 50 of 2.
    """
    lines = [head(["seeds", "groups", "20 blocks", "50 blocks"])]
    for seeds in SEEDS:
        cells = [str(seeds), "100"]
        for blocks in (20, 50):
            rng = np.random.default_rng([seeds, blocks])
            hits = 0
            for _ in range(repeats):
                x = 10 + world(rng, seeds, 100, 1.0, 1.0) * 2
                y = 5 + 0.5 * world(rng, seeds, 100, 1.0, 1.0) + 0.5 * (x - 10)

                def ratio(s, g, x=x, y=y):
                    return (s @ y @ g) / (s @ x @ g)

                found = crossed_statistic(ratio, seeds, 100, blocks=blocks)
                hits += holds(found, 0.5)
            cells.append(marked(100 * hits / repeats))
        lines.append(row(cells))
    return "\n".join(lines)


SHAPES = {
    "quadratic": lambda d: 0.9 * d - 0.08 * d * d,
    "slow": lambda d: 0.7 * d - 0.05 * d * d,
    "saturating": lambda d: 2.2 * (1 - np.exp(-d / 1.6)),
    "over-optimised": lambda d: d * (1.5 - 0.75 * np.log(np.maximum(d, 1e-9))),
    "late": lambda d: 2 * d**2 / (d**2 + 4),
    "collapse": lambda d: 0.9 * d * np.exp(-d / 1.5) - 0.25 * np.clip(d - 1.2, 0, None),
    "near": lambda d: 0.45 * d - 0.12 * d * d,
}
NEAR = [0.5, 0.8, 1.2, 2.0, 2.5]
KLS = [1.0, 2.0, 4.0, 8.0, 12.0]
PAIRS = [
    ("quadratic", "slow"),
    ("saturating", "slow"),
    ("over-optimised", "slow"),
    ("late", "saturating"),
]


def runs(
    rng, shape: str, seeds: int, groups: int, *, stretch: float = 1.0, split: float = 0.0, blur=1.0
) -> Track:
    """The points of a method, 4 strengths x 4 checkpoints a seed.

    Off the curve by, times d / 3: the run 0.15, its strength 0.08, the prompt 0.8 (and each
    response 0.7), plus 0.04 each point. KL: a strength's is off by 15 %, a prompt's by 35 %, a
    prompt's at one point by 40 %. The weakest strength lies `split` d / 3 below the curve, the
    strongest as much above. `blur` scales what prompts add.
    """
    d_of = (
        np.array([2.0, 5.0, 10.0, 20.0])[:, None]
        * stretch
        * np.array([0.25, 0.5, 0.75, 1.0]) ** 1.2
    )
    prompt, far = (
        0.8 * blur * rng.standard_normal(groups),
        0.35 * blur * rng.standard_normal(groups),
    )
    kls, scores = [], []
    for _ in range(seeds):
        own = 0.15 * rng.standard_normal((4, 1)) + 0.05 * rng.standard_normal((4, 4))
        kl = (d_of * np.exp(own)).ravel()[:, None]
        d = np.sqrt(kl)
        off = (
            0.15 * rng.standard_normal()
            + 0.08 * rng.standard_normal((4, 1))
            + split * np.linspace(-1, 1, 4)[:, None]
        )
        level = (
            SHAPES[shape](d)
            + np.repeat(off, 4, axis=0) * d / 3
            + 0.04 * rng.standard_normal((16, 1))
        )
        off_kl = far + 0.4 * blur * rng.standard_normal((16, groups))
        kls.append(kl * np.exp(off_kl - (0.35**2 + 0.4**2) * blur**2 / 2))
        scores.append(
            level
            + prompt * d / 3
            + 0.7 * blur * np.minimum(1, d) * rng.standard_normal((16, groups))
        )
    return Track(kls, scores)


def form_of(terms: Callable[[np.ndarray], list[np.ndarray]]):
    """Least squares on other terms of d, to be put in the place of the project's form."""

    def fitted(d: np.ndarray, score: np.ndarray, at: np.ndarray) -> np.ndarray:
        return (
            np.stack(terms(at), -1) @ np.linalg.pinv(np.stack(terms(d), -1)) @ score[..., None]
        )[..., 0]

    return fitted


FORMS = {
    "d (a + b d)": form_of(lambda d: [d, d * d]),
    "d (a + b log d)": form_of(lambda d: [d, d * np.log(d)]),
    "d (a + b log d + c d)": frontier._fitted,
    "lines": frontier._lines,
}


def frontier_table(repeats: int) -> str:
    """equal_kl at 3, 5 and 10 seeds: coverage at each KL, where it lies in the overlap, and the
    largest mean error.
    """
    lines = [
        head(
            [
                "methods",
                "seeds",
                *(f"KL {k:g}" for k in KLS),
                "largest bias / se",
                "lines: lowest, highest",
            ]
        )
    ]
    for first, second, split in [(*pair, 0.0) for pair in PAIRS] + [("quadratic", "slow", 0.3)]:
        name = f"{first} - {second}" + (", strengths apart" if split else "")
        truth = SHAPES[first](np.sqrt(KLS)) - SHAPES[second](np.sqrt(KLS))
        if split:  # what is estimated, the curve through all points, then has no formula
            truth = far_truth(first, second, split)
        for seeds in SEEDS:
            rng = np.random.default_rng([seeds, len(first), len(second), int(10 * split)])
            hits, of_lines, errors, ses, count = np.zeros((5, len(KLS)))
            for _ in range(repeats):
                a, b = (
                    runs(rng, first, seeds, 100, split=split),
                    runs(rng, second, seeds, 100, stretch=1.2),
                )
                found = equal_kl(a, b, KLS)
                for line, rough in zip(found.rows, found.sensitivity, strict=True):
                    k, e = KLS.index(line["kl"]), line["difference"]
                    hits[k] += holds(e, truth[k])
                    of_lines[k] += holds(rough["difference"], truth[k])
                    errors[k], ses[k], count[k] = (
                        errors[k] + e.estimate - truth[k],
                        ses[k] + e.se,
                        count[k] + 1,
                    )
            cover, rough = [[marked(100 * x) for x in h / count] for h in (hits, of_lines)]
            worst, span = (
                np.max(np.abs(errors / ses)),
                sorted(rough, key=lambda x: float(x.strip("*"))),
            )
            lines.append(row([name, str(seeds), *cover, f"{worst:.2f}", f"{span[0]}, {span[-1]}"]))
    return "\n".join(lines)


def reach_table(repeats: int) -> str:
    """A method that went far beyond the other and collapsed there: with all its points, and with
    those of `near`.
    """
    lines = [head(["points", "seeds", *(f"KL {k:g}" for k in NEAR), "largest bias / se"])]
    truth, kept = SHAPES["collapse"](np.sqrt(NEAR)) - SHAPES["near"](np.sqrt(NEAR)), frontier.REACH
    for reach, name in ((1e9, "all"), (kept, f"up to {kept:g} √KL")):
        frontier.REACH = reach
        for seeds in SEEDS:
            rng = np.random.default_rng([seeds, 7])
            hits, errors, ses, count = np.zeros((4, len(NEAR)))
            for _ in range(repeats):
                a, b = (
                    runs(rng, "collapse", seeds, 100),
                    runs(rng, "near", seeds, 100, stretch=0.17),
                )
                for line in equal_kl(a, b, NEAR).rows:
                    k, e = NEAR.index(line["kl"]), line["difference"]
                    hits[k], count[k] = hits[k] + holds(e, truth[k]), count[k] + 1
                    errors[k], ses[k] = errors[k] + e.estimate - truth[k], ses[k] + e.se
            worst = np.max(np.abs(errors / ses))
            lines.append(
                row([name, str(seeds), *(marked(100 * x) for x in hits / count), f"{worst:.2f}"])
            )
    frontier.REACH = kept
    return "\n".join(lines)


def ends_table(repeats: int) -> str:
    """Through the ends of trials alone: 4 points a seed."""
    kls = [4.0, 8.0, 12.0]
    lines = [head(["methods", "seeds", *(f"KL {k:g}" for k in kls)])]
    for first, second in (
        ("quadratic", "slow"),
        ("over-optimised", "slow"),
        ("late", "saturating"),
    ):
        truth = SHAPES[first](np.sqrt(kls)) - SHAPES[second](np.sqrt(kls))
        for seeds in (3, 5):
            rng = np.random.default_rng(seeds)
            hits, count = np.zeros((2, len(kls)))
            for _ in range(repeats):
                pair = runs(rng, first, seeds, 100), runs(rng, second, seeds, 100, stretch=1.2)
                a, b = (
                    Track([kl[3::4] for kl in t.kl], [score[3::4] for score in t.score])
                    for t in pair
                )
                for line in equal_kl(a, b, kls).rows:
                    k = kls.index(line["kl"])
                    hits[k], count[k] = hits[k] + holds(line["difference"], truth[k]), count[k] + 1
            lines.append(
                row([f"{first} - {second}", str(seeds), *(marked(100 * x) for x in hits / count)])
            )
    return "\n".join(lines)


def far_truth(first: str, second: str, split: float) -> np.ndarray:
    """Where the differences end up with many seeds and prompts."""
    rng, total, count = np.random.default_rng(0), np.zeros(len(KLS)), np.zeros(len(KLS))
    for _ in range(400):
        a, b = (
            runs(rng, first, 10, 2, split=split, blur=0.0),
            runs(rng, second, 10, 2, stretch=1.2, blur=0.0),
        )
        for line in equal_kl(a, b, KLS).rows:
            k = KLS.index(line["kl"])
            total[k], count[k] = total[k] + line["difference"].estimate, count[k] + 1
    return total / count


def form_table(repeats: int) -> str:
    """Which form of the curve: coverage at 5 seeds, lowest over the KLs and mean."""
    lines = [head(["methods", *FORMS])]
    for first, second in PAIRS:
        truth = SHAPES[first](np.sqrt(KLS)) - SHAPES[second](np.sqrt(KLS))
        hits = {form: np.zeros(len(KLS)) for form in FORMS}
        rng = np.random.default_rng([11, len(first), len(second)])
        for _ in range(repeats):
            a, b = runs(rng, first, 5, 100), runs(rng, second, 5, 100, stretch=1.2)
            for form, fit in FORMS.items():
                rows = frontier._rows(a, b, KLS, fit, 0.95)
                hits[form] += [holds(r["difference"], t) for r, t in zip(rows, truth, strict=True)]
        cells = [
            f"{100 * h.min() / repeats:.0f} (mean {100 * h.mean() / repeats:.0f})"
            for h in hits.values()
        ]
        lines.append(row([f"{first} - {second}", *cells]))
    return "\n".join(lines)


FEW = (2, 3, 4, 5, 6, 8, 10, 20, 40)


def percentiles(
    values: np.ndarray,
    rng: np.random.Generator,
    *,
    expanded: bool,
    counts: np.ndarray | None = None,
):
    """(worlds,) ends of percentile intervals of the bootstrap over groups, as they were used
    before: all resamples up to 5 groups, else 1000. values (worlds, groups); with `counts` their
    sums over sums of these.
    """
    worlds, n = values.shape
    tail = float(ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975))) if expanded else 0.025
    low, high = np.empty(worlds), np.empty(worlds)
    every = np.array(list(itertools.product(range(n), repeat=n))) if n <= 5 else None
    for w in range(worlds):
        draws = every if every is not None else rng.integers(0, n, (1000, n))
        below = n if counts is None else counts[w][draws].sum(axis=1)
        means = values[w][draws].sum(axis=1) / below
        low[w], high[w] = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    return low, high


def verdict_table(repeats: int) -> str:
    """`rlhf compare` under the null: how often a policy is called better or worse, before and now."""
    worlds: list[tuple[str, Draw]] = [
        ("normal", normal),
        ("heavy-tailed (t3)", lambda rng, shape: rng.standard_t(3, shape)),
        ("lognormal, sigma 1", lognormal(1.0)),
        (
            "right or wrong, both 70 %",
            lambda rng, shape: (rng.random(shape) < 0.7) * 1.0 - (rng.random(shape) < 0.7),
        ),
    ]
    lines = [head(["differences", "interval", *map(str, FEW)])]
    for name, draw in worlds:
        before, now, said = [], [], []
        for n in FEW:
            rng = np.random.default_rng([n, len(name)])
            values = draw(rng, (repeats, n))
            low, high = percentiles(values, rng, expanded=True)
            before.append(f"{100 * np.mean((low > 0) | (high < 0)):.1f}")
            wrong = np.mean([not holds(crossed_mean(row[None]), 0.0) for row in values])
            now.append(f"{100 * wrong:.1f}")
            said.append(f"{100 * wrong:.1f}" if n >= MIN_CLUSTERS else "–")
        lines += [
            row([name, "expanded percentile (before)", *before]),
            row([name, "Student's t", *now]),
        ]
        lines.append(row([name, "verdicts that are given", *said]))
    return "\n".join(lines)


def share_table(repeats: int) -> str:
    """The accuracy of a report card and a win rate: percentiles as the card had them, and what both
    have now.
    """
    lines = [head(["groups of", "truth", "interval", *map(str, FEW)])]
    for kind, (truth, correlation) in itertools.product(
        ("1 pair", "4 pairs", "1 + Poisson(2) pairs"), SHARES
    ):
        before, now = [], []
        for n in FEW:
            rng = np.random.default_rng([n, len(kind), int(100 * truth)])
            counts = {
                "1 pair": np.ones((repeats, n), int),
                "4 pairs": np.full((repeats, n), 4),
            }.get(kind)
            counts = 1 + rng.poisson(2, (repeats, n)) if counts is None else counts
            a = 1 / correlation - 1
            right = rng.binomial(counts, rng.beta(a * truth, a * (1 - truth), (repeats, n)))
            low, high = percentiles(right, rng, expanded=False, counts=counts)
            before.append(marked(100 * np.mean((low <= truth) & (truth <= high))))
            held = [holds_share(r, c, truth) for r, c in zip(right, counts, strict=True)]
            now.append(marked(100 * np.mean(held)))
        lines.append(row([kind, f"{truth:g}", "percentile (before)", *before]))
        lines.append(row([kind, f"{truth:g}", "now", *now]))
    return "\n".join(lines)


SHARES = [(0.5, 0.3), (0.75, 0.3), (0.9, 0.3), (0.97, 0.3)]  # truth, correlation within a group


def holds_share(right: np.ndarray, counts: np.ndarray, truth: float) -> bool:
    pairs = np.repeat(np.arange(len(counts)), counts)
    flags = np.concatenate([np.arange(c) < r for r, c in zip(right, counts, strict=True)])
    found = accuracy_with_interval(flags, pairs)
    return found["low"] <= truth <= found["high"]


def crossed_share_table(repeats: int) -> str:
    """Win rates of an experiment, groups with 2 pairs each: estimate +- t se within 0 and 1, and
    now.
    """
    lines = [head(["truth", "interval", *(f"{s} x {g}" for s in (1, 3, 5) for g in (10, 40, 100))])]
    for truth in (0.5, 0.75, 0.9, 0.97):
        before, now = [], []
        for seeds, groups in itertools.product((1, 3, 5), (10, 40, 100)):
            rng, hits = np.random.default_rng([seeds, groups, int(100 * truth)]), np.zeros(2)
            for _ in range(repeats):
                # of a prompt, the same for all seeds
                easy = rng.beta(3 * truth, 3 * (1 - truth), (1, groups))
                values = rng.binomial(2, np.broadcast_to(easy, (seeds, groups))) / 2
                found = crossed_mean(values, null=0.5)
                hits += [holds(found, truth), holds(share(found, 0.95), truth)]
            before.append(marked(100 * hits[0] / repeats))
            now.append(marked(100 * hits[1] / repeats))
        lines += [
            row([f"{truth:g}", "estimate +- t se", *before]),
            row([f"{truth:g}", "now", *now]),
        ]
    return "\n".join(lines)


def alpha_table(repeats: int) -> str:
    """Krippendorff's alpha of two people who see the truth or toss a coin: percentiles as before,
    and now.
    """
    lines = [
        head(["choices", "right", "alpha", "interval", *(f"{n} items" for n in (5, 10, 20, 40))])
    ]
    for (name, odds), sure in itertools.product(
        (("even", (1, 1)), ("85 % one side", (17, 3))), (0.6, 0.8, 0.95)
    ):
        p = np.array(odds) / sum(odds)
        truth = sure**2  # both saw it; else their choices are independent
        before, now = [], []
        for n in (5, 10, 20, 40):
            rng, hits = np.random.default_rng([n, int(100 * sure), odds[0]]), np.zeros(3)
            for _ in range(repeats):
                seen = rng.choice(2, (n, 1), p=p)
                said = np.where(rng.random((n, 2)) < sure, seen, rng.choice(2, (n, 2), p=p))
                _, low, high = alpha_interval(
                    {i: {"x": int(x), "y": int(y)} for i, (x, y) in enumerate(said)}
                )
                if math.isfinite(low):
                    old_low, old_high = alpha_percentiles(said, rng)
                    hits += [1, old_low <= truth <= old_high, low <= truth <= high]
            before.append(marked(100 * hits[1] / hits[0]))
            now.append(marked(100 * hits[2] / hits[0]))
        lines.append(row([name, f"{sure:g}", f"{truth:.2f}", "percentile (before)", *before]))
        lines.append(row([name, f"{sure:g}", f"{truth:.2f}", "now", *now]))
    return "\n".join(lines)


def alpha_percentiles(said: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The 95 % interval of resampled items; of two choices by two people alpha is 1 - (2 n - 1) D /
    (n1 n0).
    """
    n = len(said)
    times = rng.multinomial(n, np.full(n, 1 / n), size=500)
    ones, different = times @ said.sum(axis=1), times @ (said[:, 0] != said[:, 1])
    known = (ones > 0) & (ones < 2 * n)
    values = 1 - (2 * n - 1) * different[known] / (ones * (2 * n - ones))[known]
    return tuple(np.quantile(values, [0.025, 0.975])) if len(values) else (math.nan, math.nan)


def ece_table(repeats: int) -> str:
    """The calibration error of a calibrated model (gaps of sd 2): its mean, its 95th percentile,
    the mean we expect.
    """
    lines = [head(["pairs", "mean ECE", "95 % below", "expected, as the card says", "off by"])]
    for pairs in (50, 200, 1000):
        rng, seen, expected = np.random.default_rng(pairs), [], []
        for _ in range(repeats):
            gaps = 2 * rng.standard_normal(pairs)
            found = calibration(gaps * np.where(rng.random(pairs) < 1 / (1 + np.exp(-gaps)), 1, -1))
            seen.append(found["ece"])
            expected.append(found["ece_expected"])
        numbers = [
            np.mean(seen),
            np.quantile(seen, 0.95),
            np.mean(expected),
            np.mean(expected) - np.mean(seen),
        ]
        lines.append(row([str(pairs), *(f"{x:.4f}" for x in numbers)]))
    return "\n".join(lines)


def holds(estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def marked(percent: float) -> str:
    """Bold where it lies below 94."""
    return f"{percent:.1f}" if percent >= 94 else f"**{percent:.1f}**"


def head(cells: list[str]) -> str:
    return f"{row(cells)}\n{row(['---'] * len(cells))}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


TABLES = {
    "Means over seeds and prompts (crossed_mean)": (mean_table, 5000),
    "Beside prompts alone and seeds alone, 100 groups": (naive_table, 5000),
    "A ratio of means (crossed_statistic)": (ratio_table, 1000),
    "Differences at equal KL (equal_kl), 100 groups": (frontier_table, 800),
    "The form of the curve, 5 seeds, 100 groups": (form_table, 400),
    "One method far beyond the other, 100 groups": (reach_table, 600),
    "The ends of four strengths alone, 100 groups": (ends_table, 250),
    "False verdicts of rlhf compare under the null, %, by groups": (verdict_table, 4000),
    "Shares: accuracies and win rates, by groups": (share_table, 2000),
    "Win rates of an experiment, seeds x groups": (crossed_share_table, 2000),
    "Krippendorff's alpha, by items": (alpha_table, 1000),
    "The calibration error of a calibrated model": (ece_table, 2000),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=float, default=1.0, help="share of the experiments a cell"
    )
    parser.add_argument("--only", default="", help="a word of the titles of the tables to make")
    options = parser.parse_args()
    share = options.repeats
    for title, (table, count) in TABLES.items():
        if options.only not in title:
            continue
        start, repeats = time.perf_counter(), max(1, int(share * count))
        text = table(repeats)
        wide = 100 * math.sqrt(0.95 * 0.05 / repeats)
        print(f"## {title}\n\n{text}\n\n{repeats} experiments a cell (standard error {wide:.1f}), "
              f"{time.perf_counter() - start:.0f} s.\n", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
