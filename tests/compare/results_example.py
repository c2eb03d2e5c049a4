"""Results made by hand, whose answers are known beforehand."""

from dataclasses import replace

import numpy as np

from rlhf.compare.results import Point, Results

KINDS = {"gold": "gold", "reward": "proxy"}
METHODS = {
    "sft": {"program": "sft", "swept": None, "baseline": True},
    "ppo": {"program": "ppo", "swept": "kl_coef", "baseline": False},
    "dpo": {"program": "dpo", "swept": "beta", "baseline": False},
}
# further and further from the foundation
STRENGTHS = {"ppo": (0.4, 0.1, 0.02), "dpo": (1.0, 0.3, 0.05)}
KLS = ((0.8, 1.5), (2.5, 4.0), (6.0, 9.0))  # of each strength at its two checkpoints
STEPS = (10, 20)


def flat(d):
    return 0.0 * d


def make(
    gold,
    proxy=lambda d: 0.5 * d,
    *,
    seeds=5,
    groups=24,
    noise=0.1,
    kls=None,
    judge="gold",
    without=(),
    budget=None,
    spent=None,
    seed=0,
):
    """Results of `gold`: {method: function of d = sqrt(KL)} (over the foundation), and one proxy
    for all.

    kls: {method: as KLS}; without: (method, strength, seed) trials that are not there; spent:
    {method: counters}. The foundation's score of each group is its number over 10; each seed's
    proxy has a scale of its own, 10 x seed.
    """
    rng = np.random.default_rng(seed)
    base = np.arange(groups) / 10

    def values(kl, score, proxies, run):
        kl = np.full((groups, 2), float(kl))
        cells = {
            "kl": kl,
            "score/gold": base[:, None] + score + noise * rng.normal(size=(groups, 2)),
        }
        if run is not None:
            cells["score/reward"] = (
                10 * run + base[:, None] + proxies + noise * rng.normal(size=(groups, 2))
            )
        return cells | {
            "length": np.full((groups, 2), 20.0) + rng.integers(0, 9, (groups, 2)),
            "ended": np.ones((groups, 2)),
        }

    points = [
        Point(method="sft", swept=None, seed=None, step=0, last=True, values=values(0, 0, 0, None))
    ]
    for s in range(seeds):
        same = {n: v for n, v in points[0].values.items()}
        same["score/reward"] = 10 * s + base[:, None] + noise * rng.normal(size=(groups, 2))
        points.append(Point(method="sft", swept=None, seed=s, step=0, last=True, values=same))
        for method, curve in gold.items():
            luck = 0.2 * noise * rng.normal()
            for i, swept in enumerate(STRENGTHS[method]):
                for step, kl in zip(STEPS, (kls or {}).get(method, KLS)[i], strict=True):
                    if (method, swept, s) in without:
                        continue
                    d = np.sqrt(kl)
                    points.append(
                        Point(
                            method=method,
                            swept=swept,
                            seed=s,
                            step=step,
                            last=step == STEPS[-1],
                            values=values(kl, curve(d) + luck, proxy(d), s),
                            numbers={"distinct_2": 0.5},
                            budget=(spent or {}).get(method, {"flops": 90.0}),
                        )
                    )
    names = [f"g{g:02}" for g in range(groups)]
    return Results(
        points=[replace(p, responses=[[f"{p.method} a", "b"]] * groups) for p in points],
        groups=names,
        prompts=[f"question {n}?" for n in names],
        score_kinds=dict(KINDS),
        judge=judge,
        methods={m: dict(METHODS[m]) for m in ("sft", *gold)},
        shared_budget={"pairs": {"flops": 3.0}, "reward": {"flops": 7.0}},
        meta={"name": "hand-made", "budget": budget or {"match": "none"}},
    )


def apart_at_six(d):
    """What ppo has over dpo: 0 at KL 2, 0.3 at KL 6, in the span of the fitted curve."""
    return 0.3 * d * (d - np.sqrt(2)) / (np.sqrt(6) * (np.sqrt(6) - np.sqrt(2)))
