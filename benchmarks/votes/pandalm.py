"""Three people's votes on 894 pairs, through the store: agreement, preparation, and what the labels
are worth.

    RLHF_DATA=FOLDER python -m benchmarks.votes.pandalm import RUNS      # votes.db, majority.jsonl, skill.jsonl
    RLHF_DATA=FOLDER python -m benchmarks.votes.pandalm report RUNS      # after pandalm.sh has trained on them

The pairs are PandaLM's (`pref_pandalm_human.jsonl`): `votes` holds each person's choice, 0 for a
tie, 1 or 2 for the better answer of the raw pair; the file's `chosen` is the one with more votes.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from reward.model import load_reward
from rlhf.data.agreement import agreement_summary
from rlhf.data.encode import encode
from rlhf.data.load import load
from rlhf.data.prepare.run import PrepareConfig, prepare
from rlhf.data.records import Preference
from rlhf.data.store import Store
from rlhf.stats.crossed import crossed_mean

PEOPLE = ("person 1", "person 2", "person 3")
CHOICES = {0: "tie", 1: "a", 2: "b"}
FRACTIONS = {"validation_fraction": 0.1, "test_fraction": 0.25}


def read_rows(source: Path) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield each row of PandaLM's file with the first and the second answer of the raw pair."""
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        said = Counter(row["votes"])
        # `chosen` is the answer with more votes
        sides = ("chosen", "rejected") if said[1] > said[2] else ("rejected", "chosen")
        yield row, row[sides[0]], row[sides[1]]


def import_votes(source: Path, store_path: Path) -> Counter:
    """Put every pair with two answers and its three votes into a new store; count the rest."""
    counts = Counter()
    with Store.open(store_path, create=True) as store, store.transaction():
        people = [store.add_annotator(name) for name in PEOPLE]
        for row, *texts in read_rows(source):
            if not all(text.strip() for text in texts):
                counts["with an empty answer"] += 1
                continue
            prompt = store.add_prompt([{"role": "user", "content": row["prompt"]}])
            # the row is part of the response: two models may have said the same, and a pair is
            # voted on once
            a, b = (
                store.add_response(prompt, text, model=f"row {row['id']} {n}")
                for n, text in zip("12", texts, strict=True)
            )
            if texts[0].strip() == texts[1].strip():
                counts["with identical answers"] += 1
                continue
            pair = store.add_comparison(a, b)
            for person, choice in zip(people, row["votes"], strict=True):
                store.vote(pair, person, CHOICES[choice])
            counts["imported"] += 1
    return counts


def prepare_both(runs: Path) -> None:
    """Import the votes, and prepare them by majority and by the annotators' skill."""
    source = Path(os.environ["RLHF_DATA"]) / "pref_pandalm_human.jsonl"
    store_path = runs / "votes.db"
    store_path.unlink(missing_ok=True)
    print("rows:", dict(import_votes(source, store_path)))
    with Store.open(store_path) as store:
        votes, pairs = store.at().votes(), store.at().pairs()
    words = {id: len(f"{pair['text_a']} {pair['text_b']}".split()) for id, pair in pairs.items()}
    summary = agreement_summary(votes, {}, words)
    (runs / "agreement.json").write_text(json.dumps(summary, indent=2) + "\n")
    for aggregate in ("majority", "skill"):
        print(f"\n== prepared by {aggregate}")
        output = str(runs / f"{aggregate}.jsonl")
        prepare(
            PrepareConfig(
                source=[str(store_path)], output=output, aggregate=aggregate, licence=["Apache-2.0"]
            )
        )
    both = [
        {_key(r): r for r in load(str(runs / f"{kind}.jsonl"), Preference)}
        for kind in ("majority", "skill")
    ]
    common = both[0].keys() & both[1].keys()
    turned = sum(both[0][key].chosen != both[1][key].chosen for key in common)
    print(f"\npairs in both: {len(common)}; with another winner by skill: {turned}")
    for name, rows in zip(("majority", "skill"), both, strict=True):
        print(
            f"label_prob by {name}:",
            dict(Counter(round(r.label_prob, 2) for r in rows.values()).most_common(8)),
        )


def _key(record: Preference) -> tuple:
    return (record.prompt[0]["content"], *sorted((record.chosen, record.rejected)))


def report(runs: Path) -> None:
    """Accuracy and log-likelihood on the majority-labelled test pairs, 95 % over groups; and the
    paired difference.
    """
    test = load(str(runs / "majority.jsonl"), Preference, split="test", **FRACTIONS)
    right: dict[str, dict[int, float]] = {}
    likely: dict[str, dict[int, float]] = {}
    kept: list[Preference] = []
    for name in ("majority", "skill"):
        seeds = sorted(path for path in runs.glob(f"{name}-seed*") if path.is_dir())
        gaps = []
        for seed in seeds:
            reward = load_reward(str(seed))
            rows, _ = encode(test, reward.tokenizer, 192, 320)
            kept = [row["record"] for row in rows]
            scores = [
                reward.score_ids([r["prompt_ids"] + r[s] for r in rows])
                for s in ("chosen_ids", "rejected_ids")
            ]
            gaps.append(torch.tensor(scores[0]) - torch.tensor(scores[1]))
        gap = torch.stack(gaps)
        right[name] = dict(
            zip(
                map(id, kept),
                ((gap > 0).float() + 0.5 * (gap == 0)).mean(dim=0).tolist(),
                strict=True,
            )
        )
        p = torch.tensor([r.label_prob for r in kept])
        loss = -(p * logsigmoid(gap) + (1 - p) * logsigmoid(-gap)).mean(dim=0)
        likely[name] = dict(zip(map(id, kept), loss.tolist(), strict=True))
        for seed, row in zip(seeds, gap, strict=True):
            print(f"{name} {seed.name}: accuracy {(row > 0).float().mean():.3f}")
    longer = {
        id(r): float(len(r.chosen) > len(r.rejected)) + 0.5 * (len(r.chosen) == len(r.rejected))
        for r in kept
    }
    print(f"{len(kept)} test pairs in {len({r.group for r in kept})} groups, mean over the seeds")
    _line("the longer answer", kept, longer)
    for name in right:
        _line(f"{name}: accuracy", kept, right[name])
        _line(f"{name}: loss at the majority's shares (log 2 = 0.693)", kept, likely[name])
    _line(
        "skill - majority: accuracy",
        kept,
        {k: right["skill"][k] - v for k, v in right["majority"].items()},
    )
    _line(
        "skill - majority: loss",
        kept,
        {k: likely["skill"][k] - v for k, v in likely["majority"].items()},
    )


def _line(label: str, rows: list[Preference], values: dict[int, float]) -> None:
    of_groups: dict[str, list[float]] = {}
    for row in rows:
        of_groups.setdefault(row.group, []).append(values[id(row)])
    interval = crossed_mean(np.array([[np.mean(own) for own in of_groups.values()]]))
    print(f"  {label:<60}{interval.estimate:+.3f}   {interval.low:+.3f} to {interval.high:+.3f}")


if __name__ == "__main__":
    {"import": prepare_both, "report": report}[sys.argv[1]](Path(sys.argv[2]))
