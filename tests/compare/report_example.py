"""A report of realistic size, made up: 2 methods x 4 strengths x 4 checkpoints x 5 seeds, best of
n, the foundation.

The gold score follows d (a - b d), d = sqrt(KL), and the proxy d (a - c d) with a smaller c (Gao et
al. 2022), so that the weakest constraint over-optimises.
"""

import math

import numpy as np
from scipy.stats import t

SEEDS = 5
GROUPS = 256
STEPS = (25, 50, 75, 100)
KINDS = {"gold": "gold", "reward_model": "proxy", "tone": "other", "facts": "other"}
STRENGTHS = {
    "ppo": (0.02, 0.05, 0.1, 0.2),
    "dpo": (0.05, 0.1, 0.3, 1.0),
    "best_of_n": (2, 4, 8, 16),
}
OPTIONS = {"ppo": "kl_coef", "dpo": "beta", "best_of_n": "n"}
# sqrt KL at the end of training
FURTHEST = {"ppo": (5.0, 3.6, 2.6, 1.8), "dpo": (4.6, 3.5, 2.4, 1.4)}
HOSTILE = '<script>alert(1)</script> **bold** & "quoted" $x_1$ <img src=http://evil.example/x onerror=alert(2)>'
COUNTERS = ("episodes", "tokens_generated", "tokens_trained", "flops", "seconds")


def interval(values, null: float = 0.0) -> dict:
    """Estimate.to_dict() of the mean over seeds; one number, or one seed, has no interval."""
    values = np.atleast_1d(np.asarray(values, dtype=float))
    mean, n = float(values.mean()), len(values)
    if n < 2:
        none = dict.fromkeys(("low", "high", "se", "p"))
        return {"estimate": mean, **none, "seeds": n, "groups": GROUPS}
    se = float(values.std(ddof=1) / math.sqrt(n)) + 1e-9
    half = float(t.ppf(0.975, n - 1)) * se
    p = float(2 * t.sf(abs(mean - null) / se, n - 1))
    return {
        "estimate": mean, "low": mean - half, "high": mean + half, "se": se, "p": p, "seeds": n, "groups": GROUPS,
    }  # fmt: skip


def example(seeds: int = SEEDS, judge: str | None = "gold", seed: int = 0) -> dict:
    """report.json as `summarise` makes it, with everything in it; `judge=None` leaves out what
    needs one.
    """
    rng = np.random.default_rng(seed)
    initial = _initial(rng)
    points = [p for method in STRENGTHS for p in _method(method, seeds, rng)]
    report = {
        "kind": "experiment",
        "name": "shop-voice",
        "judge": judge,
        "score_kinds": dict(KINDS),
        "scope": "method" if seeds >= 3 else "models",
        "unit": {
            "seeds": list(range(seeds)), "groups": GROUPS, "prompts": 300, "samples_per_prompt": 4, "level": 0.95,
        },
        "methods": {
            m: {"program": m, "swept": option, "swept_values": list(STRENGTHS[m]), "baseline": m == "best_of_n",
                "trials": 4, "seeds": list(range(seeds))}
            for m, option in OPTIONS.items()
        },
        "initial_policy": initial,
        "points": points,
        "budget": _budget(),
        "missing": [{"method": "dpo", "swept": 0.05, "seed": 4}],
        "curves": {}, "frontier": [], "wins": None, "overoptimisation": [], "power": None,
        "tuned": {"methods": {}, "rows": []},
        "samples": _samples(),
        "annotators": None, "outliers": [], "claims": {"count": 5, "method": "Holm 1979", "alpha": 0.05},
        "verdicts": [],
        "notes": [{"kind": "no_judge", "proxies": ["reward_model"]}],
        "meta": _meta(),
    }  # fmt: skip
    if judge is not None:
        report |= _judged(seeds, rng)
        report["verdicts"] = _verdicts(report)
        report["notes"] = [
            {
                "kind": "judge",
                "score": judge,
                "score_kind": KINDS[judge],
                "proxies": ["reward_model"],
            },
            {"kind": "missing_trials", "trials": report["missing"]},
        ]
    return report


def _verdicts(report: dict) -> list[dict]:
    """One record a row at equal KL and a tuned row, and one for each method along all its points."""
    rows = [("equal_kl", pair, row) for pair in report["frontier"] for row in pair["rows"]]
    rows += [("tuned", row, row) for row in report["tuned"]["rows"]]
    verdicts = []
    for kind, sides, row in rows:
        verdicts.append(
            _verdict(kind, sides["a"], sides["b"], row["difference"], row["p_adjusted"], row)
        )
    for entry in report["overoptimisation"]:
        if entry["swept"] is None:
            verdict = _verdict(
                "over_optimisation",
                entry["method"],
                "sft",
                entry["judge"],
                entry["p_adjusted"],
                entry,
            )
            verdicts.append(verdict | {"sign": entry["sign"]})
    return verdicts


def _verdict(kind: str, a: str, b: str, difference: dict, p: float, row: dict) -> dict:
    shown = p < 0.05 and difference["low"] is not None
    return {
        "kind": kind, "a": a, "b": b, "difference": difference, "p_adjusted": p, "kl": row.get("kl"),
        "sign": int(np.sign(difference["estimate"])) if shown else None if difference["low"] is None else 0,
        "minimum_detectable_effect": row.get("minimum_detectable_effect"), "reservation": None, "evidence": row,
    }  # fmt: skip


def _gold(method: str, d: np.ndarray) -> np.ndarray:
    return (
        d * {"ppo": 0.40 - 0.052 * d, "dpo": 0.40 - 0.066 * d, "best_of_n": 0.42 - 0.05 * d}[method]
    )


def _proxy(d: np.ndarray) -> np.ndarray:
    return d * (0.62 - 0.03 * d)


def _initial(rng) -> dict:
    scores = {
        n: {"mean": interval(rng.normal(0.1, 0.01, SEEDS)), "difference": None}
        for n in KINDS
        if n != "reward_model"
    }
    return {
        "method": "sft", "budget": {}, "kl": interval(0.0),
        "length": interval([31.0, 31.2]), "words": interval([24.0, 24.1]),
        "scores": scores,
        "ended": interval([0.97, 0.98]), "repetition": interval([0.01, 0.012]),
        "numbers": {"distinct_1": 0.21, "distinct_2": 0.55, "perplexity/sft": 8.1, "perplexity/wiki": 31.0},
    }  # fmt: skip


def _method(method: str, seeds: int, rng) -> list[dict]:
    points = []
    for i, swept in enumerate(STRENGTHS[method]):
        if method == "best_of_n":
            kls = [math.log(swept) - (swept - 1) / swept]
            steps = (swept,)
        else:
            kls = [
                (FURTHEST[method][i] * (1 - math.exp(-2.2 * s / 100)) / (1 - math.exp(-2.2))) ** 2
                for s in STEPS
            ]
            steps = STEPS
        luck = rng.normal(0, 0.03, seeds)
        for step, kl in zip(steps, kls, strict=True):
            points.append(_point(method, swept, step, kl, luck, rng))
    return points


def _point(method: str, swept: float, step: int, kl: float, luck: np.ndarray, rng) -> dict:
    seeds = len(luck)
    kl = kl * (1 + rng.normal(0, 0.05, seeds))
    d = np.sqrt(np.maximum(kl, 0.0))
    gold = _gold(method, d) + luck + rng.normal(0, 0.01, seeds)
    differences = {
        "gold": gold,
        "reward_model": _proxy(d) + luck,
        "tone": 0.6 * gold,
        "facts": 0.4 * gold - 0.02 * d,
    }
    scores = {
        n: {"mean": interval(0.1 + v), "difference": interval(v)} for n, v in differences.items()
    }
    ended = np.clip(0.975 - 0.01 * d**1.5 * (2 if method == "dpo" else 1), 0, 1)
    return {
        "method": method, "swept": swept, "step": step, "last": step == STEPS[-1] or method == "best_of_n",
        "seeds": list(range(seeds)), "kl": interval(kl), "scores": scores,
        "length": interval(31 + (4 if method == "dpo" else 1.5) * d + rng.normal(0, 0.5, seeds)),
        "words": interval(24 + 2 * d), "ended": interval(ended + rng.normal(0, 0.004, seeds)),
        "repetition": interval(0.01 + 0.01 * d),
        "numbers": {
            "distinct_1": 0.21 - 0.01 * float(d.mean()), "distinct_2": 0.55 - 0.03 * float(d.mean()),
            "perplexity/sft": 8.1 + 0.4 * float(d.mean()), "perplexity/wiki": 31.0 + 1.2 * float(d.mean()),
        },
        "budget": {"flops": 1.1e13 * step, "seconds": 3.1 * step, "tokens_generated": 9000.0 * step},
        "per_seed": [
            {"seed": s, "kl": float(kl[s]), "scores": {n: 0.1 + float(v[s]) for n, v in differences.items()}}
            for s in range(seeds)
        ],
    }  # fmt: skip


def _judged(seeds: int, rng) -> dict:
    curves = {}
    for method in ("ppo", "dpo"):
        kls = np.linspace(0.6, FURTHEST[method][0] ** 2, 24)
        luck = rng.normal(0, 0.02, seeds)
        scores = [
            interval(_gold(method, np.sqrt(k)) + luck * (0.4 + abs(np.sqrt(k) - 2.5))) for k in kls
        ]
        curves[method] = {"kl": kls.tolist(), "score": scores}
    rows = []
    for kl in (1.0, 4.0, 9.0, 16.0):
        gap = _gold("ppo", math.sqrt(kl)) - _gold("dpo", math.sqrt(kl)) + rng.normal(0, 0.03, seeds)
        difference = interval(gap)
        rows.append(
            {
                "kl": kl,
                "difference": difference,
                "minimum_detectable_effect": 0.06,
                "minimum_detectable_effect_range": [0.04, 0.1],
                "p_adjusted": min(1.0, 4 * (difference["p"] or 1.0)),
            }
        )
    frontier = [{
        "a": "ppo", "b": "dpo", "seeds": list(range(seeds)), "overlap": [0.8, 20.0], "rows": rows,
        "form": "a d + b d^2",
        "ranges": {"ppo": [0.6, 25.0], "dpo": [0.5, 21.0]}, "residual": {"ppo": 0.02, "dpo": 0.03},
        "sensitivity": [{"kl": row["kl"], "difference": row["difference"]} for row in rows], "disagreement": 0.004,
    }]  # fmt: skip
    return {
        "curves": curves, "frontier": frontier, "wins": _wins(seeds, rng), "tuned": _tuned(seeds, rng),
        "overoptimisation": [
            _signs("ppo", None, 0.04, rng), _signs("dpo", None, -0.11, rng), _signs("dpo", 0.05, -0.2, rng),
        ],
        "power": {"win_rate": 0.55, "pairs_needed": 783, "power": 0.8},
    }  # fmt: skip


def _signs(method: str, swept: float | None, fall: float, rng) -> dict:
    return {
        "method": method, "swept": swept,
        "proxy": {"name": "reward_model", "change": interval(0.4 + rng.normal(0, 0.02, SEEDS)), "optimised": True},
        "judge": interval(fall + rng.normal(0, 0.02, SEEDS)), "peak": {"swept": 0.1, "step": 75, "kl": 9.4},
        "end": {"kl": 21.2}, "ends_at_peak": 0.0, "seeds": list(range(SEEDS)), "points": 17,
        "p_adjusted": None if swept else 0.004,
        "sign": None if swept else 1 if fall < 0 else -1,
    }  # fmt: skip


def _wins(seeds: int, rng) -> dict:
    policies = [{"label": "sft", "method": "sft", "swept": None}]
    quality = [0.0]
    for method, swept_values in STRENGTHS.items():
        for i, swept in enumerate(swept_values):
            policies.append(
                {"label": f"{method} {OPTIONS[method]} {swept:g}", "method": method, "swept": swept}
            )
            d = (
                FURTHEST[method][i]
                if method in FURTHEST
                else math.sqrt(math.log(swept) - 1 + 1 / swept)
            )
            quality.append(float(_gold(method, np.float64(d))))
    n = len(policies)
    raw, controlled = ([[None] * n for _ in range(n)] for _ in range(2))
    for i in range(n):
        for j in range(i):
            share = 1 / (1 + math.exp(-1.5 * (quality[i] - quality[j])))
            values = share + rng.normal(0, 0.02, seeds)
            for matrix, shift in ((raw, 0.0), (controlled, -0.01)):
                matrix[i][j] = interval(values + shift, 0.5)
                matrix[j][i] = interval(1 - values - shift, 0.5)
    return {"policies": policies, "raw": raw, "controlled": controlled}


def _tuned(seeds: int, rng) -> dict:
    rows = [
        {
            "a": "ppo",
            "b": "dpo",
            "difference": interval(0.08 + rng.normal(0, 0.03, seeds)),
            "p_adjusted": 0.01,
        }
    ]
    rows[0] |= {
        "minimum_detectable_effect": 0.07,
        "minimum_detectable_effect_range": [0.05, 0.1],
        "seeds_for_half": 14,
    }
    rows[0] |= {"seeds_for_half_range": [8, 30]}
    methods = {
        m: {"chosen": [chosen, chosen], "usual": chosen, "shares": {str(chosen): 1.0},
            "swept_values": list(STRENGTHS[m]),
            "seeds": list(range(seeds)), "score": interval(0.8 + rng.normal(0, 0.02, seeds)),
            "kl": interval(9 + rng.normal(0, 0.3, seeds))}
        for m, chosen in (("ppo", 0.05), ("dpo", 0.1))
    }  # fmt: skip
    return {"methods": methods, "rows": rows}


def _budget() -> dict:
    rows = []
    own = {"ppo": (12_800, 480_000, 1_500_000, 1.1e15, 310.0), "dpo": (0, 0, 900_000, 3.4e14, 80.0),
           "best_of_n": (0, 0, 0, 0.0, 0.0)}  # fmt: skip
    reward = dict(zip(COUNTERS, (0, 0, 240_000, 0.9e14, 21.0), strict=True))
    pairs = dict(zip(COUNTERS, (2_000, 64_000, 0, 0.3e14, 14.0), strict=True))
    for method, swept_values in STRENGTHS.items():
        for swept in swept_values:
            mine = dict(zip(COUNTERS, own[method], strict=True))
            needed = reward if method != "dpo" else dict.fromkeys(COUNTERS, 0)
            total = {c: mine[c] + needed[c] + pairs[c] for c in COUNTERS}
            rows.append({
                "method": method, "swept": swept, "baseline": method == "best_of_n", "own": mine,
                "reward": needed,
                "pairs": pairs, "total": total, "ratio": total["flops"] / 1.22e15, "ratio_own": mine["flops"] / 1.22e15,
            })  # fmt: skip
    return {
        "match": {"match": "flops", "total": 1.22e15, "tolerance": 0.1},
        "rows": rows,
        "matched": False,
    }


def _samples() -> list[dict]:
    result = []
    for i, prompt in enumerate(
        ["Where is my parcel?", [{"role": "user", "content": "I want <b>my</b> money back"}]]
    ):
        responses = {
            label: {
                "response": f"{label}: We are sorry to hear that. " + (HOSTILE if i else "It is on its way.\nRegards"),
                "ended": "dpo" not in label, "kl": 0.0 if label == "sft" else 3.2, "length": 21.0,
                "scores": {"gold": 0.4, "reward_model": 1.2},
            }
            for label in ("sft", "ppo kl_coef 0.05", "dpo beta 0.05")
        }  # fmt: skip
        result.append({"prompt": prompt, "responses": responses})
    return result


def _meta() -> dict:
    return {
        "config": {
            "name": "shop-voice",
            "seeds": [0, 1, 2, 3, 4],
            "methods": {"ppo": {"swept": {"kl_coef": [0.02]}}},
        },
        "configs": {"ppo/kl_coef=0.02/seed=0": {"kl_coef": 0.02, "learning_rate": 1e-4}},
        "commits": ["0123abc"],
        "versions": {"python": "3.12.3", "torch": "2.13.0"},
        "fingerprints": {"prompts": "f00dfeed", "foundation": "cafe0123"},
        "hardware": "2 CPU cores",
        "command": "rlhf experiment run configs/experiments/shop.yaml",
    }


def judged_pairs() -> dict:
    """What a judge of pairs said; the lengths and the methods could not be told apart."""
    row = {
        "a": "ppo", "b": "dpo", "seeds": [0], "raw": interval(0.6) | {"low": 0.5, "high": 0.7}, "ties": 0.25,
        "controlled": interval(0.5) | {"estimate": None}, "length_difference": 1.0, "ridge": False,
        "consistency": 0.875,
    }  # fmt: skip
    return {"name": "a judge", "rows": [row]}
