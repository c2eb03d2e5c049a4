"""Round trips of a store with simulated votes through the files of other annotation programs.

    pip install --target EXTRA --no-deps argilla==2.8.0 label-studio-sdk jsonschema
    PYTHONPATH=EXTRA python -m benchmarks.votes.roundtrips

Prints a row each, and adds it to results/votes.json: the share of votes that came back with every
field as it was. Where their packages are installed, the files go through argilla's `Record` (read
and written again) and label_studio_sdk's `LabelInterface` (each task checked against the project).
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.paths import RESULTS
from benchmarks.result_rows import add_rows, row_of
from rlhf.data.export import ExportConfig
from rlhf.data.store import Store
from rlhf.data.votes import CHOICES
from rlhf.exchange.commands import ImportConfig, export, import_votes
from rlhf.exchange.pairs import pairs_of_view
from rlhf.exchange.rankings import rankings_of_view

COMMAND = "python -m benchmarks.votes.roundtrips"
PAIRS, RANKINGS = 300, 100
ENDS = {"pairs": "-pairs", "votes": "", "rankings": "-rankings", "marks": "-marks"}
TEXTS = {name: name for name in ENDS}
TEXTS |= {"rankings": "orders of three to eight answers", "marks": "marked passages"}
ANNOTATORS = {
    "sim-ann": "person",
    "sim-bob": "person",
    "sim-cem": "person",
    "m": "model",
    "r": "rule",
}


def fill(path: Path, seed: int = 0) -> None:
    """Make pairs with every kind of prompt, answer and vote, drawn at random."""
    rng = random.Random(seed)
    with Store.open(path, create=True) as store, store.transaction():
        people = [store.add_annotator(name, kind) for name, kind in ANNOTATORS.items()]
        for number in range(PAIRS):
            _add_pair(store, rng, number, people)
        for number in range(RANKINGS):
            _add_ranking(store, rng, PAIRS + number, people)


def _add_pair(store: Store, rng: random.Random, number: int, people: list[int]) -> None:
    messages = [{"role": "user", "content": f'Frage {number}: <b>☂</b>\n\n& "so"'}]
    if rng.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    prompt = store.add_prompt(
        messages,
        group=rng.choice((None, f"g{number // 2}")),
        voice=rng.choice((None, "shop")),
        split=rng.choice((None, "test", "train")),
        metadata={"n": number, "deep": {"x": [1, None]}},
    )
    ids, texts = [], []
    for run in ("runs/dpo", "runs/ppo"):
        text = f"{run} ☂ answers {number}.\n\n- *one*\n- two"
        texts.append(text)
        ended = rng.choice((None, True, False))
        ids.append(store.add_response(prompt, text, model=rng.choice((None, run)), ended=ended))
    control = rng.random() < 0.1
    expected = rng.choice(ids) if control else None
    pair = store.add_comparison(*ids, kind="control" if control else "normal", expected=expected)
    for person in people:
        if rng.random() < 0.3:
            continue
        choice = rng.choice(CHOICES)
        store.vote(
            pair,
            person,
            choice,
            left=rng.choice((None, "a", "b")),
            strength=rng.choice((None, 1, 2, 3)) if choice in "ab" else None,
            reason=rng.choice((None, "Says what\nhappens next.")),
            tags=rng.choice(([], ["wrong"], ["off tone", "too long"])),
            duration_ms=rng.choice((None, rng.randrange(100_000))),
            corrected=rng.choice((None, None, f"A better answer {number}.")),
            criteria=rng.choice((None, {"clear": {"a": 4, "b": 2}})),
            spans=_spans(rng, dict(zip("ab", texts, strict=True))),
        )


def _spans(rng: random.Random, texts: dict[Any, str]) -> list[dict[str, Any]]:
    """Return none to three passages, drawn at random, some with a remark."""
    spans = []
    for _ in range(rng.choice((0, 0, 1, 3))):
        answer = rng.choice(list(texts))
        start, end = sorted(rng.sample(range(len(texts[answer]) + 1), 2))
        span = {"answer": answer, "start": start, "end": end, "label": rng.choice(("good", "bad"))}
        spans.append(span | {"remark": rng.choice((None, "Says\nmore.", "<b>☂</b>"))})
    return spans


def _add_ranking(store: Store, rng: random.Random, number: int, people: list[int]) -> None:
    prompt = store.add_prompt([{"role": "user", "content": f"Frage {number}"}], voice="shop")
    texts = {}
    for i in range(rng.randint(3, 8)):
        text = f"\nAnswer {number}.{i} 👍\n\n- *one*"
        texts[store.add_response(prompt, text, model=rng.choice((None, f"runs/{i}")))] = text
    ranking = store.add_ranking(list(texts))
    for person in people:
        if rng.random() < 0.3:
            continue
        order: list[list[int]] = []
        for id in rng.sample(list(texts), len(texts)):
            # a third of them as good as the one before
            if order and rng.random() < 1 / 3:
                order[-1].append(id)
            else:
                order.append([id])
        store.rank(
            ranking,
            person,
            order if rng.random() < 0.9 else [],
            shown=rng.sample(list(texts), len(texts)),
            reason=rng.choice((None, "Says what\nhappens next.")),
            tags=rng.choice(([], ["wrong"], ["off tone", "too long"])),
            duration_ms=rng.choice((None, rng.randrange(100_000))),
            spans=_spans(rng, texts),
        )


def shares_that_came_back(store: Path, back: Path) -> dict[str, float]:
    """Return the shares of pairs, votes, orders of rankings and marked passages that are in both
    stores with equal fields.
    """
    with Store.open(store, readonly=True) as one, Store.open(back, readonly=True) as other:
        expected, found = pairs_of_view(one.at()), pairs_of_view(other.at())
        ranked, found_ranked = rankings_of_view(one.at()), rankings_of_view(other.at())
    counts = {name: [0, 0] for name in ("pairs", "votes", "rankings", "marks")}

    def count(name: str, is_equal: bool, times: int = 1) -> None:
        counts[name][0] += is_equal * times
        counts[name][1] += times

    by_text = {(pair.a.text, pair.b.text): pair for pair in found}
    for pair in expected:
        twin = by_text.get((pair.a.text, pair.b.text))
        theirs = by_annotator(twin.votes if twin else [])
        for vote in pair.votes:
            count("votes", theirs.get(vote.annotator) == vote)
            kept = theirs.get(vote.annotator)
            count("marks", kept is not None and kept.spans == vote.spans, len(vote.spans))
        count("pairs", twin is not None and replace(pair, votes=[]) == replace(twin, votes=[]))
    twins = {ranking.answers[0].text: ranking for ranking in found_ranked}
    for ranking in ranked:
        twin = twins.get(ranking.answers[0].text)
        is_equal = twin is not None and replace(ranking, orders=[]) == replace(twin, orders=[])
        theirs = by_annotator(twin.orders if twin else [])
        for cast in ranking.orders:
            kept = theirs.get(cast.annotator)
            count("rankings", is_equal and kept == cast)
            count("marks", kept is not None and kept.spans == cast.spans, len(cast.spans))
    return {name: equal / of for name, (equal, of) in counts.items()}


def by_annotator(given: list[Any]) -> dict[str, Any]:
    return {cast.annotator: cast for cast in given}


def through_argilla(path: Path) -> bool:
    """Read and write the file again with argilla's own classes; False where it is not installed."""
    with contextlib.suppress(ImportError):
        from argilla import Record

        rows = [Record.from_dict(row).to_dict() for row in json.loads(path.read_text())]
        path.write_text(json.dumps(rows))
        return True
    return False


def through_label_studio(path: Path) -> float | None:
    """Return the share of annotations and predictions that Label Studio's own check accepts."""
    with contextlib.suppress(ImportError):
        from label_studio_sdk.label_interface import LabelInterface

        project = LabelInterface(path.with_suffix(".xml").read_text())
        good = seen = 0
        for task in json.loads(path.read_text()):
            for kind in ("annotations", "predictions"):
                for item in task[kind]:
                    seen += 1
                    good += all(_is_accepted(project, region) for region in item["result"])
        return good / seen
    return None


def _is_accepted(project: Any, region: dict[str, Any]) -> bool:
    if region["type"] != "pairwise":
        return project.validate_region(region)
    # its check knows no Pairwise tag, so the region is held against the one that it makes itself
    made = project.get_control("comparison").label(region["value"]["selected"])._dict()
    return all(made[name] == region[name] for name in ("from_name", "to_name", "type", "value"))


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "votes.db"
        fill(store)
        for form in ("argilla", "label_studio"):
            file, back = Path(folder) / f"{form}.json", Path(folder) / f"{form}.db"
            files = [file.with_suffix(".rankings.json"), file]
            export(ExportConfig(source=[str(store)], output=str(file), form=form))
            through = "its file"
            for one in files:
                if form == "argilla" and through_argilla(one):
                    through = "its file and argilla's Record"
                import_votes(ImportConfig(source=str(one), store=str(back)))
            for what, share in shares_that_came_back(store, back).items():
                id = f"roundtrip-{form.replace('_', '-')}" + ENDS[what]
                text = (
                    f"share of {TEXTS[what]} that came back equal in every field through {through}, {form}, "
                    "simulated votes"
                )
                rows.append(row_of(id, text, share, "== 1", COMMAND))
            if form == "argilla":
                continue
            accepted = [through_label_studio(one) for one in files]
            if None not in accepted:
                text = "share of exported annotations that label_studio_sdk accepts for the exported project"
                id = "roundtrip-label-studio-accepted"
                rows.append(row_of(id, text, min(accepted), "== 1", COMMAND))
    for row in rows:
        print(row["id"], row["value"])
    add_rows(RESULTS / "votes.json", rows)


if __name__ == "__main__":
    main()
