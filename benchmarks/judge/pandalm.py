"""Cheap judges beside three people on PandaLM's 999 pairs: agreement, what they favour, corrected win rates.

    RLHF_DATA=FOLDER python -m benchmarks.judge.pandalm [OUT]       # OUT/judge_pandalm.json; default runs/judge

The pairs are of five models' answers (`pref_pandalm_human.jsonl`), each judged by the same three people.
Judges: the longer answer; one of the people, the other two being the people; a stand-in that turns
the majority's word in a quarter of the pairs and follows length where people tie; and one that gives
its own kind, llama-7b, half of the pairs that it loses. Corrected win rates
see the votes on half of the prompts. Their coverage: prompts are drawn again with replacement, so that
the people's mean over all prompts is the truth.
"""

import os
import random
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.judge.coverage import intervals
from benchmarks.votes.pandalm import read_rows
from rlhf.data.records import prompt_group
from rlhf.files import dumps, write_atomic
from rlhf.judge.correct import corrected_win_rate, prediction_powered
from rlhf.judge.pairs import JudgedPair, ordered
from rlhf.judge.report import judge_report, markdown, percent

CHOICES = {0: "tie", 1: "a", 2: "b"}
REPEATS = 4000
# of the stand-in's verdicts, those turned
ERRORS = 0.25
# the family that the last judge is of
OWN = "llama-7b"


def read_pairs(source: Path) -> list[JudgedPair]:
    """Return the pairs with two different answers, in the order in which people saw them."""
    pairs = []
    for row, first, second in read_rows(source):
        if not first.strip() or not second.strip() or first.strip() == second.strip():
            continue
        a, b = row["pair"].split("_")
        messages = [{"role": "user", "content": row["prompt"]}]
        people = {f"person {i}": CHOICES[vote] for i, vote in enumerate(row["votes"], 1)}
        pair = JudgedPair(
            prompt=messages,
            group=prompt_group(messages),
            a=a,
            b=b,
            answer_a=first,
            answer_b=second,
            people=people,
        )
        pairs.append(pair)
    return ordered(pairs)


def longer(pair: JudgedPair, rng: random.Random) -> float:
    return 0.5 + 0.5 * np.sign(pair.length_difference)


def person(pair: JudgedPair, rng: random.Random) -> float:
    """The first person's word, which is no vote any more."""
    return {"a": 1.0, "b": 0.0}.get(pair.people.pop("person 1"), 0.5)


def stand_in(pair: JudgedPair, rng: random.Random) -> float:
    share = pair.votes
    if share == 0.5:
        return longer(pair, rng)
    right = float(share > 0.5)
    return 1 - right if rng.random() < ERRORS else right


def partial(pair: JudgedPair, rng: random.Random) -> float:
    share = pair.votes
    own = {pair.a: 1.0, pair.b: 0.0}.get(OWN)
    if own is None or rng.random() < 0.5:
        return 0.5 + 0.5 * float(np.sign(share - 0.5))
    return own


JUDGES = {
    "longer answer": longer,
    "person 1": person,
    "stand-in, 25 % wrong": stand_in,
    "likes llama-7b": partial,
}


def judged(pairs: list[JudgedPair], judge) -> list[JudgedPair]:
    rng = random.Random(0)
    for pair in pairs:
        pair.p_ab = judge(pair, rng)
        pair.p_ba = 1 - pair.p_ab
    return pairs


def by_models(pairs: list[JudgedPair]) -> dict[str, list[JudgedPair]]:
    found = defaultdict(list)
    for pair in pairs:
        found[f"{pair.a} over {pair.b}"].append(pair)
    return dict(sorted(found.items()))


def calibration(pairs: list[JudgedPair], rng) -> list[dict]:
    """Return a row for each two models: people, judge, corrected with half the votes, coverage."""
    rows = []
    for models, own in by_models(pairs).items():
        groups = [pair.group for pair in own]
        shares, votes = (np.array([getattr(p, name) for p in own]) for name in ("share", "votes"))
        names, index = np.unique(groups, return_inverse=True)
        size = np.bincount(index)
        f, y = (np.bincount(index, weights=values) / size for values in (shares, votes))
        half = set(rng.permutation(names)[: len(names) // 2])
        seen = np.where([group in half for group in groups], votes, np.nan)
        found = corrected_win_rate(seen, shares, groups)
        row = {"models": models, "prompts": len(names), "people": y.mean(), "judge": f.mean()}
        row["corrected"] = found.to_dict()
        row |= resampled(y, f, rng)
        rows.append(row)
    return rows


def resampled(y: np.ndarray, f: np.ndarray, rng) -> dict:
    """Return the coverage of corrected intervals, of the judge's alone, and widths over those of the
    same votes alone.
    """
    total = len(y)
    n = total // 2
    drawn = rng.integers(0, total, (REPEATS, total))
    ys, fs = y[drawn], f[drawn]
    theta, se, _ = prediction_powered(ys[:, :n], fs[:, :n], fs[:, :n], fs[:, n:])
    alone = ys[:, :n].mean(axis=1), ys[:, :n].std(axis=1, ddof=1) / np.sqrt(n), n
    judge = fs.mean(axis=1), fs.std(axis=1, ddof=1) / np.sqrt(total), total
    found = {}
    for name, interval in (("corrected", (theta, se, n)), ("votes", alone), ("judge", judge)):
        low, high = intervals(*interval)
        found[f"{name} coverage"] = float(np.mean((low <= y.mean()) & (y.mean() <= high)))
        found[f"{name} width"] = float(np.mean(high - low))
    return found


def show(name: str, report: dict, rows: list[dict]) -> None:
    print(f"\n# {name}\n")
    print("\n".join(markdown(report)))
    print(
        "\n| models | prompts | people | judge | corrected, half the votes | coverage | judge's | width |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['models']} | {row['prompts']} | {row['people']:.1%} | {row['judge']:.1%} "
            f"| {percent(row['corrected'])} | {row['corrected coverage']:.1%} "
            f"| {row['judge coverage']:.1%} | {row['corrected width'] / row['votes width']:.2f} |"
        )


def main(out: Path) -> dict:
    source = Path(os.environ["RLHF_DATA"]) / "pref_pandalm_human.jsonl"
    results = {}
    for name, judge in JUDGES.items():
        pairs = judged(read_pairs(source), judge)
        report = judge_report(pairs, name, own=[OWN] if judge is partial else [])
        rows = calibration(pairs, np.random.default_rng(0))
        results[name] = {"report": report, "rows": rows}
        show(name, report, rows)
        coverage = [row["corrected coverage"] for row in rows]
        errors = [abs(row["judge"] - row["people"]) for row in rows]
        print(f"\ncoverage {min(coverage):.1%} to {max(coverage):.1%}, mean {np.mean(coverage):.1%}; "
              f"judge off by {np.mean(errors):.1%} in the mean, {max(errors):.1%} at most")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "judge_pandalm.json", dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/judge"))
