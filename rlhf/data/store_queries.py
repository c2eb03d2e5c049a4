"""What a preference store holds after an event: votes that stand, pairs, prompts with their groups,
counts, and the rows to train on.
"""

import hashlib
import itertools
import json
import sqlite3
from collections import Counter
from typing import Any

from rlhf.data.rankings import Ranked, pair_weight, votes_of
from rlhf.data.records import Preference, Prompt, Record
from rlhf.data.split import answer_pair, join_groups
from rlhf.data.votes import CHOICES, Aggregate, Vote, after_adjudication, verdicts

STANDING_VOTES = """
    SELECT e.*, n.name, n.source, n.role, r.text AS corrected_text
    FROM events e JOIN annotators n ON n.id = e.annotator LEFT JOIN responses r ON r.id = e.corrected
    WHERE e.kind = 'vote' AND e.id <= :upto
        AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id AND u.id <= :upto)
    ORDER BY e.id"""

# the newest word on each annotator who was ever excluded
EXCLUSIONS = """
    SELECT n.name, e.kind, max(e.id) AS event FROM events e JOIN annotators n ON n.id = e.annotator
    WHERE e.kind IN ('exclude', 'include') AND e.id <= ? GROUP BY n.id"""

MODEL_VOTES = """
    SELECT e.choice, n.name FROM events e JOIN annotators n ON n.id = e.annotator
    WHERE e.comparison = ? AND e.kind = 'vote' AND n.kind = 'model' AND e.id <= ?
        AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id) ORDER BY e.id DESC"""

COMPARISONS = """
    SELECT c.id, c.kind, c.expected, c.prompt, p.messages, p.metadata,
        coalesce(p.own_group, p.default_group) AS group_name, p.voice,
        a.text AS text_a, b.text AS text_b, a.ended AS ended_a, b.ended AS ended_b,
        a.model AS model_a, b.model AS model_b, c.ranking, json_array_length(k.responses) AS ranked, c.a, c.b
    FROM comparisons c
        JOIN prompts p ON p.id = c.prompt JOIN responses a ON a.id = c.a JOIN responses b ON b.id = c.b
        LEFT JOIN rankings k ON k.id = c.ranking"""

ANSWERS = """
    SELECT r.prompt, r.text, r.model, r.ended, p.messages, p.metadata, p.voice, p.split,
        coalesce(p.own_group, p.default_group) AS group_name
    FROM responses r JOIN prompts p ON p.id = r.prompt WHERE r.model IS NOT NULL"""

# rankings, with the texts of their responses
RANKINGS = """
    SELECT k.id AS ranking, k.prompt, p.messages, r.id, r.text, r.model, r.ended
    FROM rankings k JOIN prompts p ON p.id = k.prompt JOIN json_each(k.responses) j JOIN responses r ON r.id = j.value
    WHERE :ranking IS NULL OR k.id = :ranking ORDER BY k.id, r.id"""

# comparisons on which somebody has voted, whether it stands or not
VOTED = """
    SELECT comparison FROM events WHERE kind = 'vote' AND comparison IS NOT NULL AND id <= :upto
    UNION SELECT id FROM comparisons WHERE ranking IN
        (SELECT ranking FROM events WHERE kind = 'vote' AND id <= :upto)"""

# columns that came later stand at the end: where they are empty, a fingerprint stays what it was
EVENTS_WITH_CONTENT = """
    SELECT e.id, e.comparison, e.annotator, e.kind, e.choice, e."left", e.strength, e.reason, e.tags,
        e.duration_ms, e.undoes, e.request, e.created, n.name, c.kind, c.expected, p.key, a.key, b.key,
        r.key, e.criteria, k.key, e.placed, e.shown, e.spans
    FROM events e
        JOIN annotators n ON n.id = e.annotator LEFT JOIN comparisons c ON c.id = e.comparison
        LEFT JOIN prompts p ON p.id = c.prompt LEFT JOIN responses a ON a.id = c.a
        LEFT JOIN responses b ON b.id = c.b LEFT JOIN responses r ON r.id = e.corrected
        LEFT JOIN rankings k ON k.id = e.ranking
    WHERE e.id <= ? ORDER BY e.id"""
# of each earlier version of these columns, the newest first
OLD_COLUMNS = (21, 19)


class StoreView:
    """The content of an open store after event `event`; made by `Store.at`. Reads only."""

    def __init__(self, db: sqlite3.Connection, event: int, name: str):
        self._db = db
        self.event = event
        # the file's name, which becomes the records' source
        self.name = name

    def votes(self) -> list[Vote]:
        """Return the votes that stand, by event id; those on control pairs included, those of
        excluded annotators not. A ranking gives one for each of its pairs.
        """
        pairs: dict[int, list[tuple[int, int, int]]] = {}
        sql = "SELECT id, a, b, ranking FROM comparisons WHERE ranking IS NOT NULL ORDER BY id"
        for id, a, b, ranking in self._db.execute(sql):
            pairs.setdefault(ranking, []).append((id, a, b))
        votes = []
        for row in self._standing():
            if row["ranking"] is None:
                votes.append(_vote(row))
            else:
                votes += votes_of(_ranked(row), pairs[row["ranking"]])
        return votes

    def ranked(self) -> list[Ranked]:
        """Return the rankings that stand, by event id, skipped ones included, without those of
        excluded annotators.
        """
        return [_ranked(row) for row in self._standing() if row["ranking"] is not None]

    def rankings(self, id: int | None = None) -> dict[int, dict[str, Any]]:
        """Return every ranking, or one, by id: {prompt (its id), messages, responses: [{id, text, model,
        ended}]}, the responses by id.
        """
        found: dict[int, dict[str, Any]] = {}
        for row in map(dict, self._db.execute(RANKINGS, {"ranking": id})):
            about = {name: row.pop(name) for name in ("ranking", "prompt", "messages")}
            if about["ranking"] not in found:
                messages = json.loads(about["messages"])
                own = {"prompt": about["prompt"], "messages": messages, "responses": []}
                found[about["ranking"]] = own
            found[about["ranking"]]["responses"].append(row)
        return found

    def excluded(self) -> dict[str, int]:
        """Return the annotators whose votes do not count, and the event from which on."""
        found = self._db.execute(EXCLUSIONS, (self.event,))
        return {row["name"]: row["event"] for row in found if row["kind"] == "exclude"}

    def model_choice(self, comparison: int) -> str | None:
        """Return the choice of the model that judged a comparison last; None without one."""
        excluded = self.excluded()
        for row in self._db.execute(MODEL_VOTES, (comparison, self.event)):
            if row["name"] not in excluded:
                return row["choice"]
        return None

    def _standing(self) -> list[sqlite3.Row]:
        """Return the events of `votes`, of a ranking one."""
        excluded = self.excluded()
        rows = self._db.execute(STANDING_VOTES, {"upto": self.event})
        return [row for row in rows if row["name"] not in excluded]

    def preferences(
        self, aggregate: Aggregate = "each", *, keep_ties: bool = False
    ) -> list[Preference]:
        """Return the pairs to train on. Control pairs are left out; `split` is None unless the
        prompt has one.

        "each": one record for each standing vote for a or b, with its annotator; ties, both_bad and
        skips give none. "majority", "skill": one record for each comparison with a winner, with
        label_prob and, where votes gave their strength, margin (votes.py). `keep_ties`: what has no
        winner too, with tie_prob.

        Where an annotator wrote a better answer, a record has it as `chosen`, over the answer they
        preferred, or over each of the two; `metadata["vote"]["corrected"]` is then true.
        """
        return [_record(Preference, row) for row in self.rows(aggregate, keep_ties=keep_ties)]

    def prompts(self) -> list[Prompt]:
        """Return every prompt, with the same groups as in `preferences`."""
        return [_record(Prompt, row) for row in self.prompt_rows()]

    def rows(
        self, aggregate: Aggregate = "each", *, keep_ties: bool = False
    ) -> list[dict[str, Any]]:
        """Return `preferences` as rows for a JSONL file that `load` reads."""
        return training_rows(
            self.votes(),
            self.pairs(),
            # with groups joined over all votes, whatever `aggregate` is
            self.prompts_by_id(),
            self.controls(),
            aggregate,
            keep_ties=keep_ties,
        )

    def prompt_rows(self) -> list[dict[str, Any]]:
        """Return `prompts` as rows."""
        return list(self.prompts_by_id().values())

    def prompts_by_id(self) -> dict[int, dict[str, Any]]:
        """Return `prompt_rows` by the prompts' ids, default groups joined over the answer pairs that
        were voted on.

        Votes count here even if undone or a tie, so that groups do not depend on `aggregate` and
        only ever grow.
        """
        prompts = self._db.execute("SELECT * FROM prompts ORDER BY id").fetchall()
        groups = self._default_groups(prompts)
        rows = {}
        for prompt in prompts:
            row = {"prompt": json.loads(prompt["messages"]), "source": self.name}
            if prompt["own_group"] is not None:
                row["group"] = prompt["own_group"]
            else:
                row["default_group"] = groups[prompt["id"]]
            for name in ("voice", "split"):
                if prompt[name] is not None:
                    row[name] = prompt[name]
            row["metadata"] = json.loads(prompt["metadata"])
            rows[prompt["id"]] = row
        return rows

    def annotator_kinds(self) -> dict[str, str]:
        """Return what each annotator is: person, model or rule."""
        return dict(map(tuple, self._db.execute("SELECT name, kind FROM annotators")))

    def controls(self) -> dict[int, str]:
        """Return {control comparison: the side known to be better, "a" or "b"}."""
        found = self._db.execute("SELECT id, expected FROM comparisons WHERE kind = 'control'")
        return dict(map(tuple, found))

    def pairs(self) -> dict[int, dict[str, Any]]:
        """Return every comparison by id, in their order.

        {id, kind, expected, prompt (its id), messages, metadata, ranking (whose pair it is, or None),
        ranked (its answers)} and, of each side, {text, ended, model} as text_a, text_b, ... `ended`
        is 1, 0 (cut off) or None (not known); metadata holds the prompt's group and, where known,
        its voice.
        """
        rows = self._db.execute(f"{COMPARISONS} ORDER BY c.id")
        return {row["id"]: _with_prompt(row) for row in rows}

    def response(self, id: int) -> dict[str, Any]:
        """Return one response: {text, model, ended}."""
        sql = "SELECT text, model, ended FROM responses WHERE id = ?"
        return dict(self._db.execute(sql, (id,)).fetchone())

    def pair(self, comparison: int) -> dict[str, Any]:
        """Return one comparison, as in `pairs`."""
        found = self._db.execute(f"{COMPARISONS} WHERE c.id = ?", (comparison,))
        return _with_prompt(found.fetchone())

    def equal_answers(self) -> list[tuple[str, str, str]]:
        """Return (model, other model, group of the prompt) of every two equal answers of two models."""
        by_text: dict[tuple[int, str], list[sqlite3.Row]] = {}
        for row in self._db.execute(f"{ANSWERS} ORDER BY r.id"):
            by_text.setdefault((row["prompt"], row["text"].strip()), []).append(row)
        found = []
        for same in by_text.values():
            for one, other in itertools.combinations(same, 2):
                if one["model"] != other["model"]:
                    found.append((one["model"], other["model"], one["group_name"]))
        return found

    def answers(self) -> list[dict[str, Any]]:
        """Return every answer of a known model: {prompt (its id), messages, metadata, split, text,
        model, ended}; `ended` and metadata are as in `pairs`, split is None unless the prompt has one.
        """
        return list(map(_with_prompt, self._db.execute(f"{ANSWERS} ORDER BY r.id")))

    def fingerprint(self) -> str:
        """Return 16 hex digits of the events up to this one and all they refer to."""
        digest = hashlib.sha256()
        for event in self._db.execute(EVENTS_WITH_CONTENT, (self.event,)):
            values = list(event)
            for count in OLD_COLUMNS:
                if not any(value is not None for value in values[count:]):
                    del values[count:]
            digest.update(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()[:16]

    def stats(self) -> dict[str, Any]:
        """Return counts: what is in the store, standing votes by choice and annotator, pairs with
        votes and winners.
        """
        kinds = dict(map(tuple, self._db.execute("SELECT id, kind FROM comparisons")))
        of_kind = Counter(kinds.values())
        standing, answers = self.votes(), self._standing()
        # control pairs are never trained on, so they count nowhere here
        normal = [vote for vote in standing if kinds[vote.comparison] == "normal"]
        choices = Counter(row["choice"] for row in answers)
        ranked = choices.pop("rank", 0)
        cast = self._count("events WHERE kind = 'vote' AND id <= ?", self.event)
        kept = sum(1 for _ in self._db.execute(STANDING_VOTES, {"upto": self.event}))
        rankings = self._count("rankings")
        of_rankings = self._count("comparisons WHERE ranking IS NOT NULL")
        return {
            "prompts": self._count("prompts"),
            "responses": self._count("responses"),
            "annotators": self._count("annotators"),
            # asked about one by one
            "comparisons": of_kind["normal"] - of_rankings,
            "rankings": rankings,
            "controls": of_kind["control"],
            "last_event": self.event,
            # a ranking is one answer
            "votes": len(answers),
            "ranked": ranked,
            "undone": cast - kept,
            # of all answers but orders
            "choices": dict.fromkeys(CHOICES, 0) | choices,
            # without those on control pairs, with those of rankings
            "normal_choices": dict.fromkeys(CHOICES, 0) | Counter(vote.choice for vote in normal),
            "by_annotator": dict(Counter(row["name"] for row in answers)),
            "comparisons_with_votes": len({vote.comparison for vote in normal}),
            "comparisons_with_winner": len(verdicts(normal, "majority")),
        }

    def _count(self, table: str, *values: Any) -> int:
        return self._db.execute(f"SELECT count(*) FROM {table}", values).fetchone()[0]

    def _default_groups(self, prompts: list[sqlite3.Row]) -> dict[int, str]:
        """Return groups for the prompts without one of their own, joined where they share voted
        answers.
        """
        voted = self._db.execute(VOTED, {"upto": self.event})
        pairs = self.pairs()
        links: dict[int, list] = {prompt["id"]: [] for prompt in prompts}
        for (comparison,) in voted:
            pair = pairs[comparison]
            links[pair["prompt"]].append(answer_pair(pair["text_a"], pair["text_b"]))
        # a group that the data names is not joined with others
        free = {row["id"]: row["default_group"] for row in prompts if row["own_group"] is None}
        joined = join_groups(list(free.values()), [links[prompt] for prompt in free])
        return dict(zip(free, joined, strict=True))


def training_rows(
    votes: list[Vote],
    pairs: dict[int, dict[str, Any]],
    prompts: dict[int, dict[str, Any]],
    controls: dict[int, str],
    aggregate: Aggregate,
    *,
    keep_ties: bool,
) -> list[dict[str, Any]]:
    """Return votes as rows to train on: one for each verdict, and for each answer that an annotator
    wrote. The arguments are what a StoreView gives under these names.
    """
    rows = []
    for verdict in verdicts(votes, aggregate, controls, keep_ties=keep_ties):
        pair = pairs[verdict.comparison]
        winner, loser = ("a", "b") if verdict.winner == "a" else ("b", "a")
        row = _pair_row(prompts[pair["prompt"]], pair, pair[f"text_{winner}"], loser)
        # 0: the response was cut off; NULL: not known, which counts as ended
        if pair[f"ended_{winner}"] == 0:
            row["chosen_ended"] = False
        row["annotator"] = verdict.annotator
        row["label_prob"] = verdict.label_prob
        row["tie_prob"] = verdict.tie_prob
        row["margin"] = verdict.margin
        row["metadata"]["vote"] |= verdict.metadata
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows + _corrections(after_adjudication(votes), pairs, prompts, controls)


def _pair_row(
    prompt: dict[str, Any], pair: dict[str, Any], chosen: str, loser: str
) -> dict[str, Any]:
    """Return the row of a pair in which `chosen` is better than the response "a" or "b"."""
    row = prompt | {"chosen": chosen, "rejected": pair[f"text_{loser}"]}
    if pair[f"ended_{loser}"] == 0:
        row["rejected_ended"] = False
    about = {"comparison": pair["id"]}
    if pair["ranking"] is not None:
        about["ranking"] = pair["ranking"]
        row["weight"] = pair_weight(pair["ranked"])
    row["metadata"] = prompt["metadata"] | {"vote": about}
    return row


def _corrections(
    votes: list[Vote],
    pairs: dict[int, dict[str, Any]],
    prompts: dict[int, dict[str, Any]],
    controls: dict[int, str],
) -> list[dict[str, Any]]:
    """Return a row for each answer that an annotator wrote over one that they were shown."""
    rows = []
    for vote in votes:
        if vote.corrected is None or vote.comparison in controls:
            continue
        pair = pairs[vote.comparison]
        # better than the preferred answer says more than better than the other
        losers = [vote.choice] if vote.choice in ("a", "b") else ["a", "b"]
        for loser in losers:
            # written without a change
            if pair[f"text_{loser}"].strip() == vote.corrected.strip():
                continue
            row = _pair_row(prompts[pair["prompt"]], pair, vote.corrected, loser)
            row["annotator"] = vote.annotator
            about = {"event": vote.event, "corrected": True}
            about |= {"reason": vote.reason} if vote.reason else {}
            row["metadata"]["vote"] |= about
            rows.append(row)
    return rows


def _vote(row: sqlite3.Row) -> Vote:
    return Vote(
        comparison=row["comparison"],
        choice=row["choice"],
        left=row["left"],
        strength=row["strength"],
        is_final=row["role"] == "adjudicator",
        corrected=row["corrected_text"],
        criteria=json.loads(row["criteria"] or "{}"),
        **_said(row),
    )


def _ranked(row: sqlite3.Row) -> Ranked:
    return Ranked(
        ranking=row["ranking"],
        order=json.loads(row["placed"] or "[]"),
        shown=json.loads(row["shown"] or "null"),
        **_said(row),
    )


def _said(row: sqlite3.Row) -> dict[str, Any]:
    """Return what a vote and a ranking have in common."""
    return {
        "event": row["id"],
        "annotator": row["name"],
        "reason": row["reason"],
        "tags": json.loads(row["tags"]),
        "duration_ms": row["duration_ms"],
        "created": row["created"],
        "source": row["source"],
        "spans": json.loads(row["spans"] or "[]"),
    }


def _with_prompt(row: sqlite3.Row) -> dict[str, Any]:
    """Return a row of COMPARISONS or ANSWERS, with the prompt's group and voice in its metadata."""
    found = dict(row)
    group, voice = found.pop("group_name"), found.pop("voice")
    found["messages"] = json.loads(found["messages"])
    found["metadata"] = json.loads(found["metadata"]) | {"group": group}
    if voice is not None:
        found["metadata"]["voice"] = voice
    return found


def _record(kind: type[Record], row: dict[str, Any]) -> Any:
    default = row.pop("default_group", None)
    row["group"] = row.get("group") or default
    return kind(**row)
