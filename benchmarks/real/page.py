"""The page and the result rows of `make real`: docs/experiments/real.md, benchmarks/results/real.json.

Both hold what is measured by now and nothing else.
"""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.paths import RESULTS, ROOT
from benchmarks.real import plan
from benchmarks.result_rows import add_rows, row_of, write_page
from rlhf.compare.summary import samples
from rlhf.errors import UserError
from rlhf.experiment.config import ExperimentConfig
from rlhf.experiment.report import write_report
from rlhf.experiment.results import read_results
from rlhf.experiment.state import load_experiment, load_state
from rlhf.jobs.state import read_json
from rlhf.report.format import Report, number, policy_name
from rlhf.report.markdown import fence
from rlhf.report.sentences import headline, report_sentences, verdict_sentence
from rlhf.report.tables import Table, cost, equal_kl, policies, win_rates
from rlhf.runs.tracking import read_metrics

PAGE = ROOT / "docs" / "experiments" / "real.md"
IMAGES = ROOT / "docs" / "images" / "experiments"
COMMAND = "make real"
# prompts whose answers are shown, those whose hash comes first
SHOWN = 10
# what the voice's score is called in SFT's evaluation
SFT_GOLD = "eval/score/outdoor"
# the perplexity of text that no stage has shown
NEUTRAL = "perplexity/neutral"

# a row before its bound is checked: id, what it is, value, bound (">= 40" or alike)
Measured = tuple[str, str, float, str]


def write(folder: Path) -> None:
    """Write report, page and rows of an experiment, where a method is measured; else say so."""
    if not (folder / "experiment.yaml").is_file():
        print(f"{folder}: nothing is measured yet, no page is written")
        return
    config = load_experiment(folder)
    try:
        report = write_report(config, folder / "report", "none", None)
    except UserError as error:
        print(f"no page is written: {error}")
        return
    shown = samples(read_results(config), report["tuned"]["methods"], SHOWN)
    write_page(PAGE, page(config, report, shown))
    picture = folder / "report" / "frontier.png"
    if picture.is_file():
        IMAGES.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, IMAGES / "real-frontier.png")
    add_rows(RESULTS / "real.json", result_rows(config, report))
    print(f"{PAGE}: {headline(report)}")


def page(config: ExperimentConfig, report: Report, shown: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the page."""
    lines = [*opening(report), "", "## SFT", "", *sft_lines(Path(config.initial_policy))]
    lines += [
        "## Policies",
        "",
        "Scores are those over SFT's. Perplexity is that of encyclopaedic sentences, which no stage has shown: what it "
        "rises by is forgotten.",
        "",
        *ends(report).markdown(),
        "The parts of the gold score, of 1 each:",
        "",
        *parts(report).markdown(),
    ]
    if (Path(config.output_dir) / "report" / "frontier.png").is_file():
        lines += [
            "![gold over SFT against the root of the KL](../images/experiments/real-frontier.png)",
            "",
        ]
    lines += [*equal_kl(report).markdown(), *win_rates(report).markdown()]
    lines += ["## Reward models", "", *reward_lines(config), "## Cost", ""]
    lines += [
        *stage_costs(config).markdown(),
        *cost(report).markdown(),
        "Planned before the first start (`python -m benchmarks.real.pipeline --plan`):",
        "",
        *plan.table(plan.planned()),
        "",
        "## Ten questions",
        "",
        "The test questions whose hash comes first, and each policy's first answer: nobody chose them.",
        "",
    ]
    for sample in shown:
        lines += sample_lines(sample)
    return [*lines, "## How", "", *how_lines(report), ""]


def opening(report: Report) -> list[str]:
    """Return what was done, and what came out in sentences."""
    lines = [
        "# A real model in a brand's voice",
        "",
        "SmolLM2-135M-Instruct from a brand's answers to PPO and DPO on two CPU cores: `make real`. The questions, "
        "answers and dialogues were written for this project; the votes are those of simulated annotators, who "
        "judge by the brand's specification with noise and habits. The specification itself is the gold score, "
        "which decides.",
        "",
        f"**Here:** {headline(report)}",
        "",
    ]
    missing = report["meta"]["missing"]
    if missing:
        lines += [f"Not finished: {len(missing)} jobs of the experiment are missing.", ""]
    sentences = [verdict_sentence(verdict, report) for verdict in report["verdicts"]]
    sentences += report_sentences(report)
    # the headline may be one of them
    return lines + [f"- {sentence}" for sentence in sentences if sentence != headline(report)]


def ends(report: Report) -> Table:
    """Return the initial policy and the end of each method: whole scores, shape, forgetting."""
    kinds = {name: kind for name, kind in report["score_kinds"].items() if "/" not in name}
    last = [point for point in report["points"] if point["last"]]
    shown = {**report, "score_kinds": kinds, "points": list(map(forgetting_alone, last))}
    shown["initial_policy"] = forgetting_alone(report["initial_policy"])
    return policies(shown)


def forgetting_alone(point: dict[str, Any]) -> dict[str, Any]:
    """Return a point whose only numbers are the perplexities."""
    numbers = point["numbers"]
    kept = {name: value for name, value in numbers.items() if name.startswith("perplexity/")}
    return {**point, "numbers": kept}


def parts(report: Report) -> Table:
    """Return the mean of each part of the gold score: what the policies have learnt."""
    names = [name for name in report["score_kinds"] if name.startswith("gold/")]
    last = [point for point in report["points"] if point["last"]]
    rows = []
    for point in [report["initial_policy"], *last]:
        means = [number(point["scores"][name]["mean"]["estimate"]) for name in names]
        rows.append([policy_name(point["method"], point.get("swept"), report), *means])
    return Table(["policy", *(name.removeprefix("gold/") for name in names)], rows)


def sft_lines(folder: Path) -> list[str]:
    """Return what SFT changed, by its own evaluation on validation questions."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if SFT_GOLD in row]
    cells = [
        (
            "untrained" if row["step"] == 0 else f"step {row['step']}",
            f"{row[SFT_GOLD]:.3f}",
            f"{row['eval/response/length']:.1f}",
            f"{row['eval/response/ended']:.2f}",
        )
        for row in rows
    ]
    return Table(["policy", "gold", "tokens", "share that ends"], cells).markdown()


def reward_lines(config: ExperimentConfig) -> list[str]:
    """Return the accuracy of each seed's reward model on pairs that it has not seen."""
    cells = []
    for seed, card in reward_cards(config).items():
        accuracy, low, high = (
            number(card["accuracy"][part]) for part in ("accuracy", "low", "high")
        )
        cells.append((str(seed), f"{accuracy} [{low}, {high}]", str(card["pairs"])))
    return Table(["seed", "accuracy on held-out votes [95 %]", "pairs"], cells).markdown()


def reward_cards(config: ExperimentConfig) -> dict[int, dict[str, Any]]:
    """Return the report cards of the reward models that are there, by seed."""
    folder = Path(config.output_dir)
    cards = {seed: read_json(folder / f"seed-{seed}/reward/card.json") for seed in config.seeds}
    return {seed: card for seed, card in cards.items() if card}


def stage_costs(config: ExperimentConfig) -> Table:
    """Return programs, time on the clock and time of a core, by kind of job."""
    state = load_state(config)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for job in state.jobs:
        record = state.record(job.name)
        if job.name in state.done and "seconds" in record:
            kinds.setdefault(job.method or job.kind, []).append(record)
    cells = []
    for kind, records in kinds.items():
        seconds = sum(record["seconds"] for record in records)
        cpu = sum(record.get("cpu_seconds", 0.0) for record in records)
        cells.append([kind, str(len(records)), f"{seconds / 3600:.2f}", f"{cpu / 3600:.2f}"])
    return Table(["stage", "programs", "hours", "CPU hours"], cells)


def sample_lines(sample: dict[str, Any]) -> list[str]:
    """Return one question with the answers of all policies."""
    prompt = sample["prompt"]
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    lines = [f"**{question}**", ""]
    for policy, answer in sample["responses"].items():
        gold = number(answer["scores"].get("gold"))
        lines += [f"{policy}, gold {gold}:", "", *fence(answer["response"].strip())]
    return lines


def how_lines(report: Report) -> list[str]:
    unit, meta = report["unit"], report["meta"]
    lengths = ", ".join(f"{name} {steps} steps" for name, steps in (meta["lengths"] or {}).items())
    versions = ", ".join(
        f"{name} {version}" for name, version in meta["versions"].items() if version
    )
    return [
        f"- {len(unit['seeds'])} run seeds x {unit['groups']} groups of test questions, "
        f"{unit['samples_per_prompt']} samples each; `configs/experiments/real.yaml`, commit {commits(report)}.",
        f"- Lengths: {lengths}. {meta['hardware']}.",
        f"- {versions}.",
        f"- Written {date.today().isoformat()}.",
    ]


def commits(report: Report) -> str:
    found = [json.loads(code) for code in report["meta"]["code"] if code != "null"]
    return ", ".join(sorted({code["commit"] or "?" for code in found}))


def result_rows(config: ExperimentConfig, report: Report) -> list[dict[str, Any]]:
    """Return what the page shows as rows with a bound each."""
    measured = [*sft_rows(config), *reward_rows(config)]
    for point in report["points"]:
        if point["last"] and point["method"] in config.trained:
            measured += method_rows(point, report)
    hours = sum(filter(None, report["meta"]["seconds"].values())) / 3600 / config.processes
    measured.append(("real-hours", "hours of what is done of the experiment", hours, "<= 8"))
    commit = commits(report)
    return [row_of(*row, COMMAND) | {"commit": commit} for row in measured]


def sft_rows(config: ExperimentConfig) -> list[Measured]:
    metrics = read_metrics(Path(config.initial_policy) / "metrics.jsonl")
    scores = [row[SFT_GOLD] for row in metrics if SFT_GOLD in row]
    if len(scores) < 2:
        return []
    what = "gold of SFT over the untrained model, validation questions"
    return [("real-sft-gold", what, scores[-1] - scores[0], "> 0")]


def reward_rows(config: ExperimentConfig) -> list[Measured]:
    lows = [card["accuracy"]["low"] for card in reward_cards(config).values()]
    # pairs of few groups have no interval
    if not lows or None in lows:
        return []
    worst = min(lows)
    what = "accuracy of the reward model on held-out votes, low end of 95 %, worst seed"
    return [("real-reward-accuracy", what, worst, "> 0.5")]


def method_rows(point: dict[str, Any], report: Report) -> list[Measured]:
    """Return what the end of a method's runs shows; `point` is over its seeds."""
    method = point["method"]
    name = policy_name(method, point["swept"], report)
    gain = point["scores"]["gold"]["difference"]["low"]
    rows = [
        (f"real-{method}-gold", f"gold of {name} over SFT, low end of 95 %", gain, "> 0"),
        (f"real-{method}-seeds", f"run seeds of {name}", len(point["seeds"]), ">= 3"),
    ]
    if NEUTRAL in point["numbers"]:
        ratio = point["numbers"][NEUTRAL] / report["initial_policy"]["numbers"][NEUTRAL]
        what = f"perplexity of neutral text, {name} over SFT"
        rows.append((f"real-{method}-forgetting", what, ratio, "<= 1.2"))
    if method == "ppo":
        rows.append(("real-ppo-updates", "updates in a run of PPO", point["step"], ">= 40"))
    return rows
