"""The page of benchmarks/experiments/best_of_n.py: Markdown, figure, JSON and rows of results."""

from __future__ import annotations

import math
import textwrap
from datetime import date
from typing import Any

import numpy as np

from benchmarks.paths import RESULTS, ROOT
from benchmarks.result_rows import add_rows, made_with, write_page
from rlhf.best_of_n.curve import Fit
from rlhf.files import dumps, write_atomic
from rlhf.report.figure_style import NATS, NEUTRAL, SETTINGS, STYLES, new_figure
from rlhf.text import markdown_table

PAGE = RESULTS / "2026-11-29-best-of-n.md"
FIGURE = ROOT / "docs" / "images" / "best-of-n.png"
COMMAND = "python -m benchmarks.experiments.best_of_n"
NAMES = {"best_of_n": "best of n", "ppo": "PPO", "dpo": "DPO"}
# the best of n tells a peak where it is within this share of its √KL, decided before the five seeds
NEAR = 0.25
# and stopping at its KL is harmless where no more gold than this is lost
HARMLESS = 0.02


def write_all(found: dict[str, Any], curves: dict[str, list]) -> None:
    """Write what the seeds have in common: page, figure, JSON and rows."""
    write_atomic(RESULTS / "best-of-n.json", dumps(found, indent=1) + "\n")
    draw(curves, found["seeds"])
    lines = [
        "# Best of n before RL, against the peaks of PPO and DPO",
        "",
        *introduction(found),
        "",
        f"![gold over SFT against the root of the KL, and against the proxy](../../docs/images/{FIGURE.name})",
        "",
        "## Where gold is highest",
        "",
        *peak_tables(found),
        "",
        "## The laws of 2210.10760",
        "",
        *law_table(found),
    ]
    write_page(PAGE, lines)
    add_rows(RESULTS / "reward.json", rows_of(found))
    print(PAGE.read_text())


def introduction(found: dict[str, Any]) -> list[str]:
    """Return how it was measured."""
    text = f"""{date.today()}. `{COMMAND}` (resumes). {len(found["seeds"])} run seeds on the sandbox; each samples
400 pairs of the same SFT policy, has them judged by its own simulated annotators (noise 0.3) and
trains its own reward model, imperfect on purpose. PPO (`kl_coef` 0, 28 steps of 128) and DPO (`beta`
0.03, 112 steps) are measured every 2 and 8 steps on 128 unseen test prompts, twice sampled. `rlhf
reward best-of-n` scores 128 answers of the SFT policy to each of the same prompts, drawn once, by
each seed's reward model. Gold is the true score. The KL of the best of n is log n - (n - 1)/n, an
upper bound; {found["repeated"]:.1%} of the answers repeat another one. Intervals are 95 % t intervals
over the seeds. All seeds share the test prompts, whose luck the intervals do not hold. PPO's and
DPO's peaks are the highest of several measured means, so that gold there is a little too high; what
is lost beside and after them is measured on other prompts than chose the peak. {made_with("trl")}"""
    return textwrap.fill(" ".join(text.split()), 130).splitlines()


def peak_tables(found: dict[str, Any]) -> list[str]:
    """Return the peaks by seed, and their differences to the best of n."""
    rows = []
    for number, seed in enumerate(found["seeds"]):
        own = seed["best_of_n"]
        cells = [number, f"{own['n']} ({own['outcome']})", own["d"] ** 2]
        for name in ("ppo", "dpo"):
            cells += [f"{seed[name]['d'] ** 2:.2f}" + " (its end)" * seed[name]["peak_is_last"]]
        cells += [own["gold"], seed["ppo"]["gold"], seed["dpo"]["gold"]]
        rows.append([cell if not isinstance(cell, float) else f"{cell:.3f}" for cell in cells])
    header = [
        *("seed", "n of best of n", "its KL", "KL at PPO's peak", "KL at DPO's peak"),
        *("gold over SFT there: best of n", "PPO", "DPO"),
    ]
    lines = [*markdown_table(header, rows, right=range(2, 8)), ""]
    measures = {
        "KL at the peak, less best of n's, nats": "kl",
        "√KL at the peak, less best of n's": "d",
        "√KL at the peak over best of n's": "ratio",
        "√KL at the peak by the fitted laws, less best of n's": "law_d",
        "gain of the proxy at the peak, less best of n's": "proxy",
        "gain of the proxy at the peak over best of n's": "proxy_ratio",
        "gold lost by stopping at best of n's KL": "lost",
    }
    table = []
    for title, part in measures.items():
        table.append([title, *(interval(found["peaks"][name][part]) for name in ("ppo", "dpo"))])
    falls = [interval(found["falls"][name]) for name in ("ppo", "dpo")]
    table.append(["gold at the largest KL, less the peak's (seeds and prompts random)", *falls])
    return lines + markdown_table(["mean over seeds", "PPO", "DPO"], table, right=(1, 2))


def law_table(found: dict[str, Any]) -> list[str]:
    """Return alpha, beta and the peak of each fitted law."""
    own = found["laws"]["best_of_n"]
    rows = [
        [
            "best of n: d (α - β d)",
            *(interval(estimate(own[part])) for part in ("alpha", "beta", "peak")),
            f"{own['rmse']:.3f}",
            "–",
        ]
    ]
    for name in ("ppo", "dpo"):
        law = found["laws"][name]
        cells = [interval(law[part]) for part in ("alpha", "beta", "law_d")]
        rmse = [f"{law['rmse_rl']:.3f}", f"{law['rmse_best_of_n']:.3f}"]
        rows.append([f"{NAMES[name]}: d (α - β log d)", *cells, *rmse])
    header = ["law, d = √KL", "α", "β", "d at its peak", "rmse", "rmse of d (α - β d)"]
    return markdown_table(header, rows, right=range(1, 6))


def estimate(numbers: dict[str, Any]) -> dict[str, Any]:
    return {"mean": numbers["estimate"], "low": numbers["low"], "high": numbers["high"]}


def interval(numbers: dict[str, float | None]) -> str:
    """Return "0.52 [0.41, 0.63]"."""
    if numbers["mean"] is None or not math.isfinite(numbers["mean"]):
        return "not in every seed"
    if numbers["low"] is None:
        return f"{numbers['mean']:+.3f}"
    return f"{numbers['mean']:+.3f} [{numbers['low']:+.3f}, {numbers['high']:+.3f}]"


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of reward.json; those that fall short stay."""
    seeds = found["seeds"]
    turned = sum(seed["best_of_n"]["outcome"] == "turns down" for seed in seeds)
    rows = [
        {
            "id": "best-of-n/turns-down",
            "what": f"seeds of {len(seeds)} in which gold turns down within n = 128 of the best of n, beyond chance",
            "value": turned,
            "bound": "== 5",
        }
    ]
    for name in ("ppo", "dpo"):
        peaks, shown = found["peaks"][name], NAMES[name]
        fall = found["falls"][name]
        rows += [
            {
                "id": f"best-of-n/{name}-falls",
                "what": f"{shown}'s gold from its peak to its largest KL, the upper end of {interval(fall)}",
                "value": fall["high"],
                "bound": "< 0",
            },
            {
                "id": f"best-of-n/{name}-distance",
                "what": f"√KL at {shown}'s peak against √KL where best of n turns down: how far their "
                f"ratio, {interval(peaks['ratio'])}, is from 1",
                "value": abs(peaks["ratio"]["mean"] - 1),
                "bound": f"<= {NEAR}",
            },
            {
                "id": f"best-of-n/{name}-stopped",
                "what": f"gold lost by stopping {shown} at the KL where best of n turns down, "
                f"mean of {len(seeds)} seeds",
                "value": -peaks["lost"]["mean"],
                "bound": f"<= {HARMLESS}",
            },
        ]
    return [row | {"command": COMMAND} for row in rows]


def draw(curves: dict[str, list], seeds: list[dict[str, Any]]) -> None:
    """Draw gold against √KL and against the proxy: a thin line a seed, their peaks as dots."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        figure, axes = new_figure(10.0, 4.0, 1, 2, sharey=True)
        by_kl, by_proxy = axes[0]
        for (name, own), style in zip(curves.items(), STYLES, strict=False):
            label = NAMES[name]
            for number, (curve, seed) in enumerate(zip(own, seeds, strict=True)):
                look = {"color": style.color, "lw": 1.1, "alpha": 0.75}
                look["label"] = label if number == 0 else None
                peak = seed[name]
                by_kl.plot(curve.d, curve.gold, **look)
                by_kl.plot(peak["d"], peak["gold"], style.marker, color=style.color, ms=6)
                if name == "dpo":
                    # DPO does not optimise the proxy
                    continue
                by_proxy.plot(curve.proxy, curve.gold, **look)
                by_proxy.plot(peak["proxy"], peak["gold"], style.marker, color=style.color, ms=6)
        # DPO goes on far beyond, which would leave no room for the peaks
        near = [*curves["best_of_n"], *curves["ppo"]]
        reach = 1.3 * max(float(curve.d.max()) for curve in near)
        by_kl.set_xlim(-0.05 * reach, reach)
        by_kl.set_ylim(min(float(curve.gold.min()) for curve in near) - 0.05, None)
        draw_laws(by_kl, seeds)
        ticks = [
            kl for kl in NATS if math.sqrt(kl) <= reach and kl in (0, 0.25, 1, 2, 4, 9, 16, 25)
        ]
        by_kl.set_xticks(np.sqrt(ticks), [f"{kl:g}" for kl in ticks])
        by_kl.set_xlabel("KL to SFT, nats (drawn in √KL)")
        by_proxy.set_xlabel("the seed's reward model, over SFT")
        by_kl.set_ylabel("gold, over SFT")
        for axis in axes[0]:
            axis.axhline(0, color=NEUTRAL, lw=1, zorder=1)
        by_kl.legend()
        FIGURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(FIGURE, dpi=140, facecolor="white")


def draw_laws(axis, seeds: list[dict[str, Any]]) -> None:
    """Draw RL's law at the mean alpha and beta of the seeds, dashed."""
    for name in ("ppo", "dpo"):
        alpha, beta = (
            float(np.mean([seed[name][part] for seed in seeds])) for part in ("alpha", "beta")
        )
        d = np.linspace(0, min(seed[name]["last_d"] for seed in seeds), 100)
        color = STYLES[list(NAMES).index(name)].color
        axis.plot(d, Fit("rl", alpha, beta, 0.0)(d), "--", color=color, lw=1.6)
