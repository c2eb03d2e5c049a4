"""Round trips of a store with simulated votes through the files of other annotation programs.

    pip install --target EXTRA --no-deps argilla==2.8.0 label-studio-sdk jsonschema
    PYTHONPATH=.:EXTRA python benchmarks/roundtrips.py

Prints a row each, and adds it to results/votes.json: the share of votes that came back with every
field as it was. Where their packages are installed, the files go through argilla's `Record` (read
and written again) and label_studio_sdk's `LabelInterface` (each task checked against the project).
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.result_rows import add_rows
from rlhf.data.export import ExportConfig
from rlhf.data.store import Store
from rlhf.data.votes import CHOICES
from rlhf.exchange.commands import ImportConfig, export, import_votes
from rlhf.exchange.pairs import pairs_of_view

RESULTS = Path(__file__).parent / "results" / "votes.json"
COMMAND = "python benchmarks/roundtrips.py"
PAIRS = 300
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
    ids = []
    for run in ("runs/dpo", "runs/ppo"):
        text = f"{run} answers {number}.\n\n- *one*\n- two"
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
        )


def share_that_came_back(store: Path, back: Path) -> tuple[float, float]:
    """Return the shares of pairs and of votes that are in both stores with equal fields."""
    with Store.open(store, readonly=True) as one, Store.open(back, readonly=True) as other:
        expected, found = pairs_of_view(one.at()), pairs_of_view(other.at())
    by_text = {(pair.a.text, pair.b.text): pair for pair in found}
    pairs = votes = cast = 0
    for pair in expected:
        twin = by_text.get((pair.a.text, pair.b.text))
        theirs = {vote.annotator: vote for vote in twin.votes} if twin else {}
        cast += len(pair.votes)
        votes += sum(theirs.get(vote.annotator) == vote for vote in pair.votes)
        if twin:
            own, pair.votes, twin.votes = pair.votes, [], []
            pairs += pair == twin
            pair.votes = own
    return pairs / len(expected), votes / cast


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
            export(ExportConfig(source=[str(store)], output=str(file), form=form))
            through = "its file"
            if form == "argilla" and through_argilla(file):
                through = "its file and argilla's Record"
            import_votes(ImportConfig(source=str(file), store=str(back)))
            for what, share in zip(
                ("pairs", "votes"), share_that_came_back(store, back), strict=True
            ):
                id = f"roundtrip-{form.replace('_', '-')}" + ("-pairs" if what == "pairs" else "")
                text = f"share of {what} that came back equal in every field through {through}, {form}, simulated votes"
                rows.append(
                    {"id": id, "what": text, "value": share, "bound": "== 1", "command": COMMAND}
                )
            accepted = through_label_studio(file) if form == "label_studio" else None
            if accepted is not None:
                text = "share of exported annotations that label_studio_sdk accepts for the exported project"
                id = "roundtrip-label-studio-accepted"
                rows.append(
                    {"id": id, "what": text, "value": accepted, "bound": "== 1", "command": COMMAND}
                )
    for row in rows:
        print(row["id"], row["value"])
    add_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
