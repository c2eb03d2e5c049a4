"""How often does a report claim what is false, and does it see what it says it would? Simulated.

    nice -n 10 python -m benchmarks.statistics.verdicts                       # all tables, about 12 minutes of one core
    nice -n 10 python -m benchmarks.statistics.verdicts --repeats 0.05        # a look at them
    nice -n 10 python -m benchmarks.statistics.verdicts --tables reports --worlds "5x100"

Whether the intervals hold the truth is benchmarks/statistics/coverage.py's question; here it is what reports
claim.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from benchmarks.statistics.coverage import head, row, world
from rlhf.compare import wins
from rlhf.compare.results import Point, Results
from rlhf.compare.summary import summarise
from rlhf.stats.choice import choose, chosen_mean, halves, take
from rlhf.stats.crossed import Variances, crossed_mean, half_width, outlying
from rlhf.stats.power import detectable, needed_seeds

LEVELS = (0.05, 0.0125, 0.005, 0.05 / 36)


def mean_squares_of(
    rng, seeds: int, groups: int, noise: float, ratio: float, count: int
) -> tuple[np.ndarray, Variances]:
    """`count` means and their mean squares over S x G, as `coverage.world` with normal effects has
    them.
    """
    part, squares = 1 / groups + noise / (seeds * groups), []
    of_seeds = noise + groups * ratio * part * seeds
    for expected, df in (
        (of_seeds, seeds - 1),
        (noise + seeds, groups - 1),
        (noise, (seeds - 1) * (groups - 1)),
    ):
        squares.append(expected * rng.chisquare(df, count) / df / (seeds * groups))
    return rng.standard_normal(count) * math.sqrt(part * (1 + ratio)), Variances(*squares)


def tail_table(repeats: int) -> str:
    """How often p is below a level, over the level, beside one t whose degrees of freedom were
    tuned at 95 %.
    """
    kinds = [f"p < {level:.4g}: {kind}" for level in LEVELS for kind in ("one t", "ours")]
    lines = [head(["seeds", "error / prompts", "seeds' part", *kinds])]
    for seeds in (3, 5, 10):
        for noise, ratio in ((1, 0), (1, 1), (1, 3), (10, 0), (10, 1), (10, 3), (10, 10)):
            rng = np.random.default_rng([seeds, noise, ratio])
            mean, v = mean_squares_of(rng, seeds, 100, noise, ratio, repeats)
            variance = np.maximum(v.seeds, v.error) + np.maximum(v.groups, v.error) - v.error
            of_seeds = np.maximum(0, v.seeds - 0.4 * v.error) ** 2 / (seeds - 2)
            df = np.maximum(
                variance**2 / (of_seeds + np.maximum(v.groups, v.error) ** 2 / 99), seeds - 1
            )
            cells = [str(seeds), str(noise), str(ratio)]
            for level in LEVELS:
                one = -stdtrit(df, level / 2) * np.sqrt(variance)
                for half in (one, half_width(v, seeds, 100, level)):
                    cells.append(f"{np.mean(np.abs(mean) > half) / level:.2f}")
            lines.append(row(cells))
    return "\n".join(lines)


def skewed_table(repeats: int) -> str:
    """Coverage of 95 % intervals, in percent, where seeds are skewed or one run in ten or twenty
    fails.
    """
    kinds = {
        "exponential": lambda rng, shape: rng.exponential(size=shape) - 1,
        "1 in 10 collapses": lambda rng, shape: failing(rng, shape, 0.1),
        "1 in 20 collapses": lambda rng, shape: failing(rng, shape, 0.05),
    }
    lines = [head(["seeds are", "3 x 100", "5 x 100", "10 x 100"])]
    for name, draw in kinds.items():
        cells = [name]
        for seeds in (3, 5, 10):
            rng = np.random.default_rng([seeds, len(name)])
            found = [
                crossed_mean(world(rng, seeds, 100, 10.0, 1.0, a=draw)) for _ in range(repeats)
            ]
            cells.append(f"{100 * np.mean([e.low <= 0 <= e.high for e in found]):.1f}")
        lines.append(row(cells))
    return "\n".join(lines)


def failing(rng, shape, share: float) -> np.ndarray:
    """Normal of sd 0.03, of which a share is 1 lower; mean 0 and variance 1 after scaling."""
    values = 0.03 * rng.standard_normal(shape) - (rng.random(shape) < share)
    return (values + share) / math.sqrt(0.03**2 + share * (1 - share))


def choice_table(repeats: int) -> str:
    """False "ahead", in percent, of two methods at the best of four strengths, without and with
    what a choice adds.
    """
    lines = [head(["seeds x groups", "varies by strength", "choice as given", "with the choice"])]
    kinds = {
        "prompts and error": (0.0, 1.0, 1.0),
        "seeds, prompts and error": (0.02, 1.0, 1.0),
        "seeds alone": (1.0, 0.0, 1e-3),
        "prompts and error, one is best": (0.0, 1.0, 1.0),
    }
    for seeds, groups in ((2, 100), (3, 30), (3, 100), (5, 12), (5, 100), (10, 100)):
        half = halves(map(str, range(groups)))
        for name, (a, b, e) in kinds.items():
            rng, shown = np.random.default_rng([seeds, groups, len(name)]), np.zeros(2)
            best = np.array([0, 0, 0, 2.0 if "best" in name else 0])[None, :, None]
            for _ in range(repeats):
                of_seeds = math.sqrt(a) * rng.standard_normal((2, seeds, 4, 1)) * (seeds > 2)
                of_groups = math.sqrt(b) * rng.standard_normal((2, 1, 4, groups))
                both = (
                    of_seeds
                    + of_groups
                    + math.sqrt(e) * rng.standard_normal((2, seeds, 4, groups))
                    + best
                )
                first, second = (take(values, choose(values, half)) for values in both)
                found = crossed_mean(first - second), chosen_mean(first - second, 4, 0.95)
                shown += [estimate.p < 0.05 for estimate in found]
            lines.append(
                row([f"{seeds} x {groups}", name, *(f"{100 * x / repeats:.1f}" for x in shown)])
            )
    return "\n".join(lines)


def power_table(repeats: int) -> str:
    """The real power at the difference that a report calls detectable in 4 of 5 repeats, prompts
    and error 1.

    "one t": (t_0.975 + t_0.8) se with the degrees of freedom that were tuned at 95 %, at that
    rule's own power.
    """
    titles = [
        "really seen in 80 %",
        "stated, median",
        "power, mean",
        "5 to 95 %",
        "range holds it",
        "one t: mean",
    ]
    lines = [
        head(
            [
                "seeds x groups",
                "sd of seeds",
                *titles,
                "seeds for 3/4 of it",
                "stated, median",
                "5 to 95 %",
            ]
        )
    ]
    for seeds, groups, sd in (
        (3, 100, 0.05),
        (3, 100, 0.2),
        (3, 100, 1.0),
        (5, 100, 0.05),
        (5, 100, 0.2),
        (5, 100, 1),
    ):
        rng, part = np.random.default_rng([seeds, int(100 * sd)]), 1 / groups + 1 / seeds / groups
        ratio = sd**2 / seeds / part
        mean, v = mean_squares_of(rng, seeds, groups, 1.0, ratio, 200_000)
        # seen where the difference is larger
        lacking = np.sort(half_width(v, seeds, groups, 0.05) - mean)
        true = float(np.quantile(lacking, 0.8))
        of_seeds = np.maximum(0, v.seeds - 0.4 * v.error) ** 2 / (seeds - 2)
        variance = np.maximum(v.seeds, v.error) + np.maximum(v.groups, v.error) - v.error
        df = np.maximum(
            variance**2 / (of_seeds + np.maximum(v.groups, v.error) ** 2 / (groups - 1)), seeds - 1
        )
        old = np.sort(stdtrit(df, 0.975) * np.sqrt(variance) - mean)
        said = (stdtrit(df, 0.975) + stdtrit(df, 0.8)) * np.sqrt(variance)
        values = [world(rng, seeds, groups, ratio, 1.0) for _ in range(repeats)]
        found = np.array([detectable(crossed_mean(x)) for x in values])
        power = np.searchsorted(lacking, found[:, 0]) / len(lacking)
        holds = np.mean((found[:, 1] <= true) & (true <= found[:, 2]))
        many = world(rng, 400, groups, sd**2 / 400 / (1 / groups + 1 / 400 / groups), 1.0)
        right = needed_seeds(many, 0.75 * true)[0]
        need = np.array(
            [
                math.inf if (n := needed_seeds(x, 0.75 * true)[0]) is None else n
                for x in values[:300]
            ]
        )
        low, high = np.quantile(power, [0.05, 0.95])
        least, median, most = (
            "none" if math.isinf(x) else f"{x:.0f}"
            for x in np.quantile(need, [0.05, 0.5, 0.95], method="nearest")
        )
        lines.append(row([
            f"{seeds} x {groups}", f"{sd:g}", f"{true:.2f}", f"{np.median(found[:, 0]):.2f}", f"{power.mean():.2f}",
            f"{low:.2f} to {high:.2f}", f"{100 * holds:.0f} %", f"{np.mean(np.searchsorted(old, said)) / len(old):.2f}",
            str(right or "none"), median, f"{least} to {most}",
        ]))  # fmt: skip
    return "\n".join(lines)


def outlier_table(repeats: int) -> str:
    """How often a run is named an outlier among 8 strengths, in percent: of normal seeds, and one
    that is so many of their standard deviations below at 4 of the strengths.
    """
    sizes = (0, 8, 12, 20, 40)
    lines = [head(["seeds", *("no outlier" if not size else f"{size} sd" for size in sizes)])]
    for seeds in (3, 5, 10):
        cells = [str(seeds)]
        for size in sizes:
            rng, named = np.random.default_rng([seeds, size]), 0
            for _ in range(repeats):
                scores = rng.standard_normal((8, seeds))
                scores[:4, 1] -= size
                ps = np.array([outlying(values) for values in scores]) * scores.size
                named += np.any((ps if not size else ps[:4, 1]) < 0.05)
            cells.append(f"{100 * named / repeats:.1f}")
        lines.append(row(cells))
    return "\n".join(lines)


STRENGTHS = {"ppo": (0.4, 0.1, 0.03, 0.01), "dpo": (1.0, 0.3, 0.1, 0.03)}
METHODS = {
    "sft": {"program": "sft", "swept": None, "baseline": True},
    "ppo": {"program": "ppo", "swept": "kl_coef", "baseline": False},
    "dpo": {"program": "dpo", "swept": "beta", "baseline": False},
}
ENDS = (2.0, 5.0, 10.0, 20.0)  # KL of each strength's end, nats
STEPS = (25, 50, 75, 100)


@dataclass(frozen=True)
class World:
    """An experiment on two identical methods."""

    seeds: int
    prompts: int
    samples: int = 2
    # of the seeds of ppo and of dpo, times d / 3, d = sqrt(KL)
    spread: tuple[float, float] = (0.15, 0.15)
    heavy: bool = False  # prompts by Student's t with 2.5 degrees of freedom
    collapse: float = 0.0  # share of the seeds of a method that lose 2 d / 3
    gain: float = 2.0  # over SFT, at most


WORLDS = {
    "3x100": World(3, 100),
    "5x100": World(5, 100),
    "3x30, 1 sample, heavy-tailed prompts": World(3, 30, samples=1, heavy=True),
    "5x12": World(5, 12),
    "3x100, 1 seed in 10 collapses": World(3, 100, collapse=0.1),
    "5x100, 1 seed in 10 collapses": World(5, 100, collapse=0.1),
    "3x100, PPO's seeds 10 times as spread": World(3, 100, spread=(0.5, 0.05)),
    "3x100, seeds alike": World(3, 100, spread=(0.0, 0.0)),
    "5x100, seeds alike": World(5, 100, spread=(0.0, 0.0)),
    "3x100, no gain over SFT": World(3, 100, gain=0.0),
    "5x100, no gain over SFT": World(5, 100, gain=0.0),
    "1x100": World(1, 100),
    "2x100": World(2, 100),
}


def results(rng: np.random.Generator, given: World) -> Results:
    """PPO and DPO on one curve over SFT, gain (1 - exp(-d)), the proxy rising; off it as
    `coverage.runs` has it.
    """
    shape = (given.prompts, given.samples)
    base = rng.standard_normal((given.prompts, 1))

    def prompts() -> np.ndarray:
        if given.heavy:
            return rng.standard_t(2.5, (given.prompts, 1)) / math.sqrt(5)
        return rng.standard_normal((given.prompts, 1))

    def cells(kl, level, proxy: float | None) -> dict[str, np.ndarray]:
        own = {"kl": np.broadcast_to(kl, shape), "length": np.full(shape, 20.0)}
        own["score/gold"] = base + level + 0.7 * rng.standard_normal(shape)
        return own | (
            {}
            if proxy is None
            else {"score/reward": base + proxy + 0.5 * rng.standard_normal(shape)}
        )

    points = [
        Point(method="sft", swept=None, seed=None, step=0, last=True, values=cells(0.0, 0.0, None))
    ]
    gold = {"score/gold": points[0].values["score/gold"]}
    for seed in range(given.seeds):
        values = cells(0.0, 0.0, 0.0) | gold
        points.append(Point(method="sft", swept=None, seed=seed, step=0, last=True, values=values))
    for (method, swept_values), spread in zip(STRENGTHS.items(), given.spread, strict=True):
        hard, far = 0.8 * prompts(), 0.35 * rng.standard_normal((given.prompts, 1))
        for seed in range(given.seeds):
            luck = spread * rng.standard_normal() - 2.0 * (rng.random() < given.collapse)
            for swept, end in zip(swept_values, ENDS, strict=True):
                off, off_kl = (
                    luck + 0.5 * spread * rng.standard_normal(),
                    0.15 * rng.standard_normal(),
                )
                for step in STEPS:
                    mean = (
                        end * (step / 100) ** 1.2 * math.exp(off_kl + 0.05 * rng.standard_normal())
                    )
                    kl = mean * np.exp(
                        far + 0.4 * rng.standard_normal((given.prompts, 1)) - (0.35**2 + 0.4**2) / 2
                    )
                    d = math.sqrt(mean)
                    level = given.gain * (1 - math.exp(-d)) + (off + hard) * d / 3
                    values = cells(kl, level, 0.5 * d)
                    last = step == STEPS[-1]
                    points.append(
                        Point(
                            method=method,
                            swept=swept,
                            seed=seed,
                            step=step,
                            last=last,
                            values=values,
                            responses=[["a"] * given.samples] * given.prompts,
                        )
                    )
    names = [f"g{i:03}" for i in range(given.prompts)]
    return Results(
        points=points, groups=names, prompts=names, score_kinds={"gold": "gold", "reward": "proxy"},
        judge="gold", methods=METHODS, shared_budget={}, meta={},
    )  # fmt: skip


def false_claims(report: dict, gain: bool) -> set[str]:
    """What a report of two equal methods says that is false: at equal KL, at tuned strengths, of
    over-optimisation.

    Ahead of SFT is false where there is no gain. Win rates and checkpoints on the way claim
    nothing.
    """
    found = set()
    names = {"equal_kl": "equal KL", "tuned": "tuned", "over_optimisation": "over-optimisation"}
    for verdict in report["verdicts"]:
        sign, over_initial = verdict["sign"], verdict["b"] == report["initial_policy"]["method"]
        if verdict["kind"] == "over_optimisation":
            false = sign == 1
        else:
            false = bool(sign) and not (gain and over_initial)
        if false:
            found.add(names[verdict["kind"]])
    if report["outliers"]:
        found.add("names an outlier")
    return found


def reports_table(repeats: int, worlds: list[str]) -> str:
    """Whole reports of two identical methods: share with a false claim, in percent (standard
    error).
    """
    # the share at equal length is slow and nothing is claimed of it
    wins.crossed_statistic = lambda fit, seeds, groups, **_: crossed_mean(
        np.full((seeds, groups), 0.5)
    )
    kinds = ["equal KL", "tuned", "over-optimisation", "any claim", "names an outlier"]
    lines = [head(["world", "reports", *kinds])]
    for name in worlds:
        given = WORLDS[name]
        rng, count = np.random.default_rng([13, len(name), given.prompts]), Counter()
        for _ in range(repeats):
            found = false_claims(summarise(results(rng, given)), given.gain > 0)
            count.update(found | ({"any claim"} if found - {"names an outlier"} else set()))
        shares = [count[kind] / repeats for kind in kinds]
        cells = [f"{100 * x:.1f} ({100 * math.sqrt(x * (1 - x) / repeats):.1f})" for x in shares]
        lines.append(row([name, str(repeats), *cells]))
    return "\n".join(lines)


TABLES = {
    "tail": ("Small p, 100 groups: how often over how often promised", tail_table, 400_000),
    "skewed": ("Skewed seeds, seeds' part 10", skewed_table, 3000),
    "choice": (
        "Tuned strengths, two methods of four strengths that are equal in truth",
        choice_table,
        1000,
    ),
    "power": ("Power", power_table, 400),
    "outlier": ("Naming an outlier", outlier_table, 1000),
    "reports": ("Whole reports of two identical methods", reports_table, 500),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=float, default=1.0, help="share of the experiments a cell"
    )
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=TABLES)
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), choices=WORLDS)
    asked = parser.parse_args()
    for name in asked.tables:
        title, table, count = TABLES[name]
        start, repeats = time.process_time(), max(1, int(asked.repeats * count))
        text = table(repeats, asked.worlds) if name == "reports" else table(repeats)
        print(
            f"## {title}\n\n{text}\n\n{repeats} a cell, {time.process_time() - start:.0f} s.\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
