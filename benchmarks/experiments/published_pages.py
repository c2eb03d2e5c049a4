"""The pages of the experiments: what was published, what came out here, and how sure it is."""

from __future__ import annotations

import json
import os
import shutil
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.paths import RESULTS, ROOT
from rlhf.compare.results import Point, Results
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.results import read_results
from rlhf.experiment.state import load_experiment
from rlhf.files import dumps, write_atomic
from rlhf.jobs.state import read_json
from rlhf.report.sentences import report_sentences, verdict_sentence
from rlhf.report.tables import equal_kl
from rlhf.runs.tracking import read_metrics
from rlhf.stats.crossed import Estimate, crossed_mean, crossed_statistic, holm

PAGES = ROOT / "docs" / "experiments"
IMAGES = ROOT / "docs" / "images" / "experiments"
EARLY = 2  # steps of PPO at which the critic is looked at: before it has learnt much itself


def write_sandbox(folder: Path) -> None:
    """frontier.md, overoptimisation.md and ladder.md."""
    config, results, report = read(folder)
    about = method_lines(config, report)
    copy_figures(folder, "sandbox")
    rows = [row for pair in report["frontier"] for row in pair["rows"]]
    flipped = bool(report["frontier"]) and report["frontier"][0]["a"] == "ppo"
    signs = [sign(row, flipped) for row in rows]
    verdict = (
        "undecided" if not signs or all(s == 0 for s in signs)
        else "reproduced" if all(s > 0 for s in signs)
        else "not reproduced"
    )  # fmt: skip
    page(
        "frontier",
        "The frontier of PPO and DPO",
        "Rafailov et al. 2023 (2305.18290), figure 2: at every KL, DPO's reward is the higher one.",
        f"{verdict}. Of {len(rows)} KLs in the range of both, DPO is ahead at {sum(s > 0 for s in signs)}, PPO at "
        f"{sum(s < 0 for s in signs)}, and at {sum(s == 0 for s in signs)} no difference can be shown "
        "(Holm, 5 %).",
        [
            *sentences_of(report, "equal_kl"),
            "",
            "![gold score over SFT against the root of the sequence KL](../images/experiments/sandbox-frontier.png)",
            "",
            *frontier_table(report),
            "",
            "The paper's task is another one (IMDb sentiment, gpt2-large), and its PPO learns from the true reward or "
            "a reward model fitted to it; here both learn from the same noisy votes.",
        ],
        about,
    )
    entries = [entry for entry in report["overoptimisation"] if entry["swept"] is None]
    page(
        "overoptimisation",
        "The true reward peaks and falls",
        "Gao, Schulman and Hilton 2022 (2210.10760): in RL and best of n the proxy goes on rising where the true "
        "reward falls; Rafailov et al. 2024 (2406.02900): DPO's true reward rises and then falls against KL.",
        "; ".join(f"{e['method']}: {e['verdict']}" for e in entries) + ".",
        [
            *sentences_of(report, "over_optimisation"),
            "",
            "![proxy and gold score against the root of the sequence KL](../images/experiments/sandbox-proxy_gold.png)",
            "",
            "The proxy is each seed's reward model. DPO learns from the same votes without it: it is shown there, not "
            "optimised. The peak is chosen on one part of the prompts and measured on the others.",
        ],
        about,
    )
    ladders = {name: ladder(results, name) for name in ("ppo", "dpo")}
    lines = [
        "| method | option | KL of the ends, nats | KL for ten times the option | gold for ten times |",
        "|---|---|---|---:|---:|",
    ]
    for name, found in ladders.items():
        ends = ", ".join(f"{s:g}: {kl:.2f}" for s, kl in found["ends"].items())
        kl, gold = found["kl"], found["judge"]
        lines.append(
            f"| {name} | {results.methods[name]['swept']} | {ends} | {shown(kl)} | {shown(gold)} |"
        )
    falls = dict(zip(ladders, verdicts_of([(f["kl"], -1) for f in ladders.values()]), strict=True))
    page(
        "ladder",
        "A stronger pull to the reference keeps the policy nearer",
        "The ladders of KL coefficients in 2403.17031 and of beta in 2305.18290: KL falls as the coefficient rises.",
        "; ".join(f"{name}: {word}" for name, word in falls.items()) + ".",
        [
            *lines,
            "",
            "The slope is that of the sequence KL at the end of a run (and of the gold score) on log10 of the option, "
            "by least squares, with the interval of seeds and prompts crossed and the fit redone in each resample.",
        ],
        about,
    )
    save(
        "sandbox",
        report,
        {
            "ladder": {
                n: {k: e.to_dict() if isinstance(e, Estimate) else e for k, e in f.items()}
                for n, f in ladders.items()
            }
        },
    )


def write_ablations(folder: Path) -> None:
    """details.md: what each detail of PPO does, with its sign."""
    config, results, report = read(folder)
    lines, found, asked = [], {}, {}
    for name, measure in (
        ("ppo_without_eos_rule", "ended"),
        ("ppo_critic_from_policy", f"score/{results.judge}"),
    ):
        own = {
            m: end_difference(results, "ppo", name, m)
            for m in (measure, f"score/{results.judge}", "length", "kl")
        }
        found[name] = {m: e.to_dict() for m, e in own.items()}
        asked[name] = (own[measure], 1)
        if name == "ppo_critic_from_policy":
            early = explained(folder, results, name)
            found[name]["explained_variance"] = early.to_dict()
            asked[name] = (early, 1)
            lines.append(
                f"| explained variance of the critic, mean of its first {EARLY} steps | {shown(early)} |"
            )
        lines += [
            f"| {label_of(m)}: PPO as published over {name} | {shown(e)} |" for m, e in own.items()
        ]
    verdicts = [
        f"{name.removeprefix('ppo_').replace('_', ' ')}: {word}"
        for name, word in zip(asked, verdicts_of(list(asked.values())), strict=True)
    ]
    page(
        "details",
        "Two details of PPO, taken away one at a time",
        "Huang et al. 2024 (2403.17031): a response without EOS gets a fixed low score, so that the policy learns to "
        "end; the critic starts as the reward model, so that it knows something from the first step.",
        "; ".join(verdicts) + ".",
        [
            "| PPO with the detail minus PPO without it | difference [95 %] |",
            "|---|---:|",
            *lines,
            "",
            "Responses may have 30 tokens, so that some are cut off. The verdict on the EOS rule is by the share that "
            "ends, that on the critic by its explained variance (seeds alone, Student's t), both at 5 % together "
            "(Holm). One strength, the ends of the runs; of the other rows nothing is claimed.",
        ],
        method_lines(config, report),
    )
    save("ablations", report, {"details": found})


def write_polite(folder: Path) -> None:
    """polite.md: the real model, by the referee."""
    config, _, report = read(folder)
    copy_figures(folder, "polite")
    referee = read_json(folder / "referee" / "result.json")["headline"]
    accuracy = [referee[f"eval/reward/accuracy{end}"] for end in ("", "_low", "_high")]
    page(
        "polite",
        "PPO and DPO on a real model",
        "No published result: stories260K (260,032 parameters) on `pref_rasbt_polite`, judged by a referee that learnt "
        "from the other half of the groups.",
        sentences_of(report)[0].removeprefix("- "),
        [
            *sentences_of(report),
            *[f"- {sentence}" for sentence in report_sentences(report)],
            "",
            "The referee orders {:.3f} [{:.3f}, {:.3f}] of its validation pairs rightly.".format(
                *accuracy
            ),
            "",
            "![referee's score over SFT against the root of the KL](../images/experiments/polite-frontier.png)",
            "",
            *frontier_table(report),
        ],
        method_lines(config, report),
    )
    save("polite", report, {"referee": referee})


def read(folder: Path) -> tuple[ExperimentConfig, Results, dict]:
    config = load_experiment(folder)
    return config, read_results(config), json.loads((folder / "report" / "report.json").read_text())


def sign(row: dict, flipped: bool) -> int:
    """1 where DPO is ahead, -1 where PPO is, 0 where Holm's p leaves it open."""
    if row["p_adjusted"] is None or row["p_adjusted"] >= 0.05:
        return 0
    return (1 if row["difference"]["estimate"] > 0 else -1) * (-1 if flipped else 1)


def ladder(results: Results, method: str) -> dict:
    """Slopes of KL and judge at the ends of the runs on log10 of the strength."""
    ends = {}
    for point in results.of(method):
        if point.last:
            ends.setdefault(point.swept, {})[point.seed] = point
    swept_values = sorted(s for s in ends if s > 0)
    seeds = sorted(set.intersection(*(set(ends[s]) for s in swept_values)))
    x = np.log10(swept_values)
    x = (x - x.mean()) / np.sum((x - x.mean()) ** 2)

    def table(measure: str) -> np.ndarray:  # (strengths, seeds, groups)
        return np.array(
            [
                [results.group_means(ends[s][seed].values[measure]) for seed in seeds]
                for s in swept_values
            ]
        )

    def slope(values: np.ndarray) -> Estimate:
        def statistic(seed_weights: np.ndarray, group_weights: np.ndarray) -> float:
            means = np.average(
                np.average(values, axis=2, weights=group_weights), axis=1, weights=seed_weights
            )
            return float(x @ means)

        return crossed_statistic(statistic, *values.shape[1:])

    kl = table("kl")
    return {
        "ends": dict(zip(swept_values, kl.mean(axis=(1, 2)).tolist(), strict=True)),
        "kl": slope(kl),
        "judge": slope(table(f"score/{results.judge}")),
    }


def end_difference(results: Results, a: str, b: str, measure: str) -> Estimate:
    """a - b at the ends of their runs, by the seeds that both have."""
    ends: list[dict[int, Point]] = []
    for name in (a, b):
        ends.append({point.seed: point for point in results.of(name) if point.last})
    seeds = sorted(set(ends[0]) & set(ends[1]))
    values = [[results.group_means(end[seed].values[measure]) for seed in seeds] for end in ends]
    return crossed_mean(np.array(values[0]) - np.array(values[1]))


def explained(folder: Path, results: Results, other: str) -> Estimate:
    """Explained variance of the critic in its first steps, ppo's less the other's; the seeds are
    the unit.
    """

    def early(method: str) -> dict[int, float]:
        found = {}
        for path in folder.glob(f"seed-*/{method}-kl_coef-*"):
            rows = [
                r
                for r in read_metrics(path / "metrics.jsonl")
                if "value/explained_variance" in r and r["step"] <= EARLY
            ]
            found[int(path.parent.name.removeprefix("seed-"))] = float(
                np.mean([r["value/explained_variance"] for r in rows])
            )
        return found

    a, b = early("ppo"), early(other)
    differences = np.array([a[seed] - b[seed] for seed in sorted(set(a) & set(b))])
    # one row, its columns random: Student's t over the seeds
    return crossed_mean(differences[None, :])


def verdicts_of(asked: list[tuple[Estimate, int]]) -> list[str]:
    """The verdict on each (difference, expected sign); the claims of a page are one family (Holm, 5
    %).
    """
    words = []
    for (difference, expected), p in zip(asked, holm([d.p for d, _ in asked]), strict=True):
        as_expected = (difference.estimate > 0) == (expected > 0)
        if not p < 0.05:
            words.append("undecided")
        else:
            words.append("reproduced" if as_expected else "not reproduced")
    return words


def sentences_of(report: dict, kind: str | None = None) -> list[str]:
    """Return the verdicts of one kind, or all, as the items of a list."""
    verdicts = [verdict for verdict in report["verdicts"] if kind in (None, verdict["kind"])]
    return [f"- {verdict_sentence(verdict, report)}" for verdict in verdicts]


def frontier_table(report: dict) -> list[str]:
    return equal_kl(report).markdown()


def method_lines(config: ExperimentConfig, report: dict) -> list[str]:
    """How it was measured: what a page ends with."""
    unit, meta = report["unit"], report["meta"]
    hours = sum(filter(None, meta["seconds"].values())) / 3600
    versions = ", ".join(f"{k} {v}" for k, v in meta["versions"].items() if v)
    commits = ", ".join(
        sorted({json.loads(code)["commit"] or "?" for code in meta["code"] if code != "null"})
    )
    lines = [
        f"- {len(unit['seeds'])} run seeds x {unit['groups']} groups of prompts, {unit['samples_per_prompt']} samples "
        f"each; `configs/experiments/{Path(config.output_dir).name}.yaml`, commit {commits}.",
        f"- {hours:.1f} hours of programs, {config.processes} at a time, on {meta['hardware']}, shared with others.",
        f"- Lengths: {', '.join(f'{name} {steps} steps' for name, steps in (meta['lengths'] or {}).items())}.",
        f"- {versions}.",
    ]
    if meta["missing"]:
        lines.append(f"- Not finished when this was written: {len(meta['missing'])} of its jobs.")
    return lines


def page(
    name: str, title: str, claim: str, verdict: str, body: list[str], about: list[str]
) -> None:
    lines = [
        f"# {title}",
        "",
        f"**Published:** {claim}",
        "",
        f"**Here:** {verdict}",
        "",
        *body,
        "",
        "## How",
        "",
        *about,
    ]
    PAGES.mkdir(parents=True, exist_ok=True)
    write_atomic(
        PAGES / f"{name}.md", "\n".join([*lines, f"- Written {date.today().isoformat()}.", ""])
    )
    print(f"docs/experiments/{name}.md: {verdict}")
    write_index()


def write_index() -> None:
    """README.md of the pages: what each repeats, and what came out."""
    rows = ["| experiment | published | here |", "|---|---|---|"]
    for file in sorted(PAGES.glob("*.md")):
        # real.md repeats no published result
        if file.name in ("README.md", "real.md"):
            continue
        lines = file.read_text().splitlines()
        found = {
            key: next(
                (
                    line.removeprefix(f"**{key}:** ")
                    for line in lines
                    if line.startswith(f"**{key}:**")
                ),
                "",
            )
            for key in ("Published", "Here")
        }
        title = lines[0].removeprefix("# ")
        rows.append(f"| [{title}]({file.name}) | {found['Published']} | {found['Here']} |")
    head = [
        "# Published results, repeated here",
        "",
        "`make experiments` makes them all, and resumes.",
        "",
    ]
    tail = [
        "",
        "A result is *reproduced* or *not reproduced* where that holds at 5 % for all claims of its page together "
        "(Holm), and else *undecided*. All are about the sandbox: half a million parameters, an invented shop, "
        "simulated annotators with habits. What does not come out here may well come out elsewhere.",
        "",
    ]
    write_atomic(PAGES / "README.md", "\n".join([*head, *rows, *tail]))


def copy_figures(folder: Path, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    for figure in ("frontier", "proxy_gold"):
        if (folder / "report" / f"{figure}.png").is_file():
            shutil.copy(folder / "report" / f"{figure}.png", IMAGES / f"{name}-{figure}.png")


def save(name: str, report: dict, more: dict) -> None:
    """The numbers without samples and single seeds, small enough to be kept."""
    points = [
        {k: v for k, v in p.items() if k not in ("per_seed", "scores")}
        | {"scores": {n: p["scores"][n] for n in p["scores"] if "/" not in n}}
        for p in report["points"]
    ]
    kept = {
        k: report[k]
        for k in (
            "name",
            "judge",
            "scope",
            "unit",
            "methods",
            "frontier",
            "tuned",
            "overoptimisation",
            "budget",
            "power",
            "verdicts",
            "notes",
        )
    }
    meta = {
        k: report["meta"][k]
        for k in (
            "config",
            "lengths",
            "code",
            "versions",
            "hardware",
            "stopped",
            "missing",
            "left_out",
        )
    }
    file = RESULTS / f"{date.today().isoformat()}-experiment-{name}.json"
    text = dumps(kept | {"points": points, "meta": meta} | more)
    if data := os.environ.get("RLHF_DATA"):
        text = text.replace(data, "RLHF_DATA")  # where the data lies is this machine's affair
    write_atomic(file, text + "\n")


def label_of(measure: str) -> str:
    return {"ended": "share that ends", "kl": "sequence KL, nats", "length": "length, tokens"}.get(
        measure, measure.removeprefix("score/")
    )


def shown(e: Estimate) -> str:
    return f"{e.estimate:+.3f} [{e.low:.3f}, {e.high:.3f}]"
