"""Does the best of n tell beforehand where RL over-optimises? Five seeds on the sandbox.

    python -m benchmarks.experiments.best_of_n [--seeds 5]        # resumes; about 15 CPU minutes on one thread

Each seed samples its own pairs, has them judged by its own simulated annotators and trains its own
reward model, imperfect on purpose; PPO and DPO start from one SFT policy and are measured along the
way (configs/experiments/best-of-n.yaml). `rlhf reward best-of-n` scores one set of that policy's
answers by each seed's reward model. The page holds the KL at which gold turns down in the best of n
against the KL at which PPO's and DPO's gold is highest, paired by seed, and both laws of Gao et al.
2022.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.experiments.best_of_n_page import write_all
from benchmarks.experiments.published import RUNS, compare, run, shop
from benchmarks.programs import paired
from rlhf.best_of_n.curve import fit_law, fit_with_intervals
from rlhf.compare.results import Results, key
from rlhf.compare.selection import overoptimisation
from rlhf.experiment.results import read_results
from rlhf.experiment.state import load_experiment
from rlhf.stats.choice import halves

CONFIG = "configs/experiments/best-of-n.yaml"
FOLDER = RUNS / "best-of-n"
WORLD = "runs/sandbox"
METHODS = ("ppo", "dpo")
# answers to each prompt, to as many prompts as the policies are measured on
SAMPLES, PROMPTS = 128, 128


@dataclass(frozen=True)
class Curve:
    """The mean scores of one run's policies along its way, the initial policy first: arrays of one
    length.

    d: the root of the KL to the initial policy. gold, proxy: over those of the initial policy.
    """

    d: np.ndarray
    gold: np.ndarray
    proxy: np.ndarray

    @property
    def peak(self) -> int:
        """The place at which gold is highest."""
        return int(np.argmax(self.gold))

    def gold_at(self, d: float) -> float:
        """Return gold where the run first comes to d, between its measured policies by a straight
        line; its last one where it never does.
        """
        beyond = np.flatnonzero(self.d >= d)
        if not len(beyond) or not beyond[0]:
            return float(self.gold[-1] if not len(beyond) else self.gold[0])
        after = beyond[0]
        part = slice(after - 1, after + 1)
        return float(np.interp(d, self.d[part], self.gold[part]))


def curve_of_run(
    results: Results, method: str, seed: int, groups: np.ndarray | None = None
) -> Curve:
    """Return the curve of a method's run with this seed, by all prompts or by these groups; its KL
    is that of all.
    """
    policies = [results.initial_of(seed), *results.of(method, seed=seed)]
    mine = slice(None) if groups is None else groups
    rows = []
    for policy in policies:
        own = results.means[key(policy)]
        scores = [own[name][mine].mean() for name in ("score/gold", "score/proxy")]
        rows.append([own["kl"].mean(), *scores])
    kl, gold, proxy = np.array(rows).T
    # an estimate of a small KL may lie below 0
    return Curve(np.sqrt(np.maximum(kl, 0.0)), gold - gold[0], proxy - proxy[0])


def curve_of_best_of_n(result: dict[str, Any]) -> Curve:
    """Return the curve of `rlhf reward best-of-n`, of its table's sizes."""
    columns = []
    for name in ("gold", "proxy"):
        columns.append([row["scores"][name]["gain"]["estimate"] for row in result["curve"]])
    d = np.sqrt([row["kl"] for row in result["curve"]])
    return Curve(d, *np.array(columns))


def score_best_of_n(seed: int) -> dict[str, Any]:
    """Return what `rlhf reward best-of-n` says of a seed's reward model; the answers are drawn once
    for all seeds.
    """
    place = FOLDER / "best-of-n"
    folder, first = place / f"seed-{seed}", place / "seed-0" / "answers.jsonl"
    if not (folder / "best_of_n.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if seed and first.is_file() and not (folder / first.name).is_file():
            shutil.copyfile(first, folder / first.name)
        run(
            [
                *("rlhf", "reward", "best-of-n", str(FOLDER / f"seed-{seed}" / "reward")),
                *("--prompts", f"{WORLD}/prompts.jsonl", "--output_dir", str(folder)),
                *("--gold", json.dumps([{"voice": f"{WORLD}/voice.yaml"}])),
                *("--samples", str(SAMPLES), "--n_prompts", str(PROMPTS), "--batch_size", "256"),
            ]
        )
    return json.loads((folder / "best_of_n.json").read_text())


def lost_at(d: float, halves_of_run: list[Curve]) -> float:
    """Return a run's gold at d less that at its peak, which the other half of the prompts chose:
    the highest of several noisy means is too high where it chose itself.
    """
    first, second = halves_of_run
    lost = []
    for own, other in ((first, second), (second, first)):
        lost.append(own.gold_at(d) - own.gold[other.peak])
    return float(np.mean(lost))


def measure_seed(
    chosen: Curve,
    result: dict[str, Any],
    curves: dict[str, Curve],
    by_half: dict[str, list[Curve]],
) -> dict[str, Any]:
    """Return where gold is highest in the best of n and in each method, and what a method's gold is
    at the KL of the best of n.

    curves: of all prompts; by_half: of each half of them.
    """
    turning, law = result["turning"]["gold"], result["laws"]["gold"]
    d = float(np.sqrt(turning["kl"]["estimate"]))
    own = {
        "d": d,
        "n": turning["n"]["estimate"],
        "outcome": turning["outcome"],
        "gold": turning["gain"],
        "proxy": float(np.interp(d, chosen.d, chosen.proxy)),
        "law_d": law["peak"]["estimate"],
    }
    seed = {"best_of_n": own}
    for name, curve in curves.items():
        fits = {}
        for form in ("rl", "best_of_n"):
            fits[form] = fit_law(form, curve.d, curve.gold)
        peak = curve.peak
        seed[name] = {
            "d": float(curve.d[peak]),
            "gold": float(curve.gold[peak]),
            "proxy": float(curve.proxy[peak]),
            "last_d": float(curve.d[-1]),
            "last_gold": float(curve.gold[-1]),
            "peak_is_last": peak == len(curve.gold) - 1,
            "law_d": fits["rl"].peak,
            "alpha": fits["rl"].alpha,
            "beta": fits["rl"].beta,
            "rmse": {form: fit.rmse for form, fit in fits.items()},
            # what is lost by stopping at the KL at which the best of n turns down
            "lost": lost_at(d, by_half[name]),
        }
    return seed


def over_seeds(values: list[float | None]) -> dict[str, float | None]:
    """Return the mean over seeds with its t interval; nothing where a seed has no finite value."""
    if any(value is None or not math.isfinite(value) for value in values):
        return {"mean": None, "low": None, "high": None}
    return paired(values)


def compare_peaks(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each method's peak less that of the best of n, paired by seed, with t intervals over
    seeds.
    """
    found = {}
    for name in METHODS:
        pairs = [(seed[name], seed["best_of_n"]) for seed in seeds]
        found[name] = {
            "kl": over_seeds([own["d"] ** 2 - other["d"] ** 2 for own, other in pairs]),
            "d": over_seeds([own["d"] - other["d"] for own, other in pairs]),
            "ratio": over_seeds([own["d"] / other["d"] for own, other in pairs]),
            "law_d": over_seeds([law_gap(own, other) for own, other in pairs]),
            "proxy": over_seeds([own["proxy"] - other["proxy"] for own, other in pairs]),
            "proxy_ratio": over_seeds([own["proxy"] / other["proxy"] for own, other in pairs]),
            "lost": over_seeds([own["lost"] for own, _ in pairs]),
        }
    return found


def falls_of(results: Results) -> dict[str, dict[str, float | None]]:
    """Return each method's gold at the largest KL less that at its peak, the peak chosen on other
    prompts and seeds; prompts and seeds are both random (`selection.overoptimisation`).
    """
    entries = {entry["method"]: entry for entry in overoptimisation(results, 0.95)}
    found = {}
    for name in METHODS:
        judge = entries[name]["judge"]
        found[name] = {"mean": judge["estimate"], "low": judge["low"], "high": judge["high"]}
    return found


def law_gap(own: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the d of a method's peak by its law less that of the best of n; nan without both."""
    return math.nan if other["law_d"] is None else own["law_d"] - other["law_d"]


def fit_laws(curves: dict[str, list[Curve]], seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return alpha, beta and the peak of each law, over seeds: of best of n fitted to the mean, of
    RL to each run.
    """
    chosen = curves["best_of_n"]
    gains = np.array([curve.gold[1:] for curve in chosen])
    laws = {"best_of_n": fit_with_intervals("best_of_n", chosen[0].d[1:], gains)}
    for name in METHODS:
        laws[name] = {"law": "rl"}
        for part in ("alpha", "beta", "law_d"):
            laws[name][part] = over_seeds([seed[name][part] for seed in seeds])
        for form in ("rl", "best_of_n"):
            values = [seed[name]["rmse"][form] for seed in seeds]
            laws[name][f"rmse_{form}"] = float(np.mean(values))
    return laws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    asked = list(range(parser.parse_args().seeds))
    shop()
    compare(CONFIG, "--seeds", ",".join(map(str, asked)))
    results = read_results(load_experiment(str(FOLDER)))
    half = halves(results.groups)
    seeds: list[dict[str, Any]] = []
    curves: dict[str, list[Curve]] = {name: [] for name in ("best_of_n", *METHODS)}
    for seed in asked:
        result = score_best_of_n(seed)
        chosen = curve_of_best_of_n(result)
        own, by_half = {}, {}
        for name in METHODS:
            own[name] = curve_of_run(results, name, seed)
            by_half[name] = [curve_of_run(results, name, seed, half == number) for number in (0, 1)]
        seeds.append(measure_seed(chosen, result, own, by_half))
        for name, curve in {"best_of_n": chosen, **own}.items():
            curves[name].append(curve)
    found = {
        "seeds": seeds,
        "peaks": compare_peaks(seeds),
        "falls": falls_of(results),
        "laws": fit_laws(curves, seeds),
        "repeated": result["repeated"],
    }
    write_all(found, curves)


if __name__ == "__main__":
    main()
