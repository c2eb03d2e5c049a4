"""What a preference store says after an event: votes that stand, pairs, prompts with their groups, counts.

Reading only, on an open connection; `Store` (store.py) is the way in and explains each of these.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from typing import Any

from rlhf.data.split import answer_pair, join_groups
from rlhf.data.votes import CHOICES, Aggregate, Vote, majority, verdicts


def votes(db: sqlite3.Connection, upto: int) -> list[Vote]:
    """The votes that stand after event `upto`, by event id; controls included."""
    found = db.execute(
        "SELECT e.*, n.name FROM events e JOIN annotators n ON n.id = e.annotator WHERE e.kind = 'vote' "
        "AND e.id <= :n AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id AND u.id <= :n) ORDER BY e.id",
        {"n": upto},
    )
    names = ("comparison", "choice", "left", "strength", "reason", "duration_ms", "created")
    return [
        Vote(event=r["id"], annotator=r["name"], tags=json.loads(r["tags"]), **{n: r[n] for n in names}) for r in found
    ]


def pairs(db: sqlite3.Connection, one: int | None = None) -> dict[int, dict[str, Any]]:
    """Every comparison, or one, by id: {id, kind, expected, prompt, messages, text_a, ended_a, model_a, ...}."""
    found = db.execute(
        "SELECT c.id, c.kind, c.expected, c.prompt, p.messages, a.text AS text_a, b.text AS text_b, "
        "a.ended AS ended_a, b.ended AS ended_b, a.model AS model_a, b.model AS model_b FROM comparisons c "
        "JOIN prompts p ON p.id = c.prompt JOIN responses a ON a.id = c.a JOIN responses b ON b.id = c.b"
        + ("" if one is None else " WHERE c.id = ?"),
        () if one is None else (one,),
    )
    return {row["id"]: dict(row) | {"messages": json.loads(row["messages"])} for row in found}


def comparisons(db: sqlite3.Connection, kind: str) -> list[dict[str, Any]]:
    """Every comparison of a kind by id: {id, prompt, metadata, text_a, text_b, ended_a, ended_b}."""
    found = db.execute(
        "SELECT c.id, p.messages, p.metadata, p.own_group, p.default_group, p.voice, a.text AS text_a, "
        "b.text AS text_b, a.ended AS ended_a, b.ended AS ended_b FROM comparisons c "
        "JOIN prompts p ON p.id = c.prompt JOIN responses a ON a.id = c.a JOIN responses b ON b.id = c.b "
        "WHERE c.kind = ? ORDER BY c.id",
        (kind,),
    )
    rows = []
    for row in found:
        metadata = json.loads(row["metadata"]) | {"group": row["own_group"] or row["default_group"]}
        if row["voice"] is not None:
            metadata["voice"] = row["voice"]
        pair = {"id": row["id"], "prompt": json.loads(row["messages"]), "metadata": metadata}
        for side in "ab":
            pair[f"text_{side}"] = row[f"text_{side}"]
            pair[f"ended_{side}"] = row[f"ended_{side}"] is None or bool(row[f"ended_{side}"])
        rows.append(pair)
    return rows


def rows(db: sqlite3.Connection, upto: int, aggregate: Aggregate, source: str) -> list[dict[str, Any]]:
    """The pairs to train on as rows for a JSONL file that `load` reads; `source` is the store's name."""
    known = pairs(db)
    controls = {id: pair["expected"] for id, pair in known.items() if pair["kind"] == "control"}
    prompts = {row.pop("id"): row for row in prompt_rows(db, upto, source)}
    found = []
    for verdict in verdicts(votes(db, upto), aggregate, controls):
        pair = known[verdict.comparison]
        row = dict(prompts[pair["prompt"]])
        row["chosen"] = pair["text_a" if verdict.winner == "a" else "text_b"]
        row["rejected"] = pair["text_b" if verdict.winner == "a" else "text_a"]
        for name, side in (("chosen_ended", verdict.winner), ("rejected_ended", "ab".replace(verdict.winner, ""))):
            if pair[f"ended_{side}"] == 0:  # cut off; NULL is not known to be
                row[name] = False
        row |= {"annotator": verdict.annotator, "label_prob": verdict.label_prob, "margin": verdict.margin}
        row["metadata"] = row["metadata"] | {"vote": {"comparison": verdict.comparison} | verdict.about}
        found.append({name: value for name, value in row.items() if value is not None})
    return found


def prompt_rows(db: sqlite3.Connection, upto: int, source: str) -> list[dict[str, Any]]:
    """All prompts; default groups are joined over the answer pairs that were voted on up to event `upto`.

    Votes count here even if undone or a tie, so that groups do not depend on `aggregate` and only ever grow.
    """
    found = db.execute("SELECT * FROM prompts ORDER BY id").fetchall()
    voted = {r[0] for r in db.execute("SELECT comparison FROM events WHERE kind = 'vote' AND id <= ?", (upto,))}
    links: dict[int, list] = {row["id"]: [] for row in found}
    for id, pair in pairs(db).items():
        if id in voted:
            links[pair["prompt"]].append(answer_pair(pair["text_a"], pair["text_b"]))
    free = [row for row in found if row["own_group"] is None]
    joint = join_groups([row["default_group"] for row in free], [links[row["id"]] for row in free])
    groups = dict(zip((row["id"] for row in free), joint, strict=True))
    result = []
    for row in found:
        own = row["own_group"]
        new = {"id": row["id"], "prompt": json.loads(row["messages"]), "source": source}
        new |= {"group": own} if own is not None else {"default_group": groups[row["id"]]}
        new |= {name: row[name] for name in ("voice", "split") if row[name] is not None}
        result.append(new | {"metadata": json.loads(row["metadata"])})
    return result


def fingerprint(db: sqlite3.Connection, upto: int) -> str:
    """16 hex digits of the events up to `upto` and all they refer to."""
    events = db.execute(
        "SELECT e.*, n.name, c.kind, c.expected, p.key AS prompt_key, a.key AS key_a, b.key AS key_b FROM events e "
        "JOIN annotators n ON n.id = e.annotator JOIN comparisons c ON c.id = e.comparison "
        "JOIN prompts p ON p.id = c.prompt JOIN responses a ON a.id = c.a JOIN responses b ON b.id = c.b "
        "WHERE e.id <= ? ORDER BY e.id",
        (upto,),
    )
    whole = hashlib.sha256()
    for event in events:
        whole.update(json.dumps(list(event), sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return whole.hexdigest()[:16]


def stats(db: sqlite3.Connection, upto: int) -> dict[str, Any]:
    """Counts: what is in the store, the standing votes by choice and annotator, and what became of the pairs."""
    count = {t: db.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("prompts", "responses", "annotators")}
    kinds = dict(map(tuple, db.execute("SELECT id, kind FROM comparisons")))
    total = Counter(kinds.values())
    standing = votes(db, upto)
    normal = [v for v in standing if kinds[v.comparison] == "normal"]
    cast = db.execute("SELECT count(*) FROM events WHERE kind = 'vote' AND id <= ?", (upto,)).fetchone()[0]
    return count | {
        "comparisons": total["normal"],
        "controls": total["control"],
        "last_event": upto,
        "votes": len(standing),
        "undone": cast - len(standing),
        "choices": dict.fromkeys(CHOICES, 0) | Counter(v.choice for v in standing),
        "by_annotator": dict(Counter(v.annotator for v in standing)),
        "comparisons_with_votes": len({v.comparison for v in normal}),
        "comparisons_with_winner": len(majority(normal)),
    }
