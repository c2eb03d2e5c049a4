"""Pairs with everybody's votes, as they pass between a preference store and other programs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from rlhf.data.records import Message, Preference, RecordError, normalise
from rlhf.data.spans import Span, renamed
from rlhf.data.store import Store
from rlhf.data.store_queries import StoreView
from rlhf.data.votes import MARGINS, renamed_criteria
from rlhf.errors import UserError

Kind = Literal["person", "model", "rule"]
# fields of a vote that another program may change: where one differs, it is another answer
CHANGEABLE = ("choice", "strength", "reason", "tags", "corrected", "spans")


@dataclass
class Answer:
    """An answer to a prompt; ended is False where it was cut off, None where that is not known."""

    text: str
    model: str | None = None
    ended: bool | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, Any], end: str = "") -> Self:
        """Return an answer of the store's view; end: that of the columns, "_a" or "_b" in a pair."""
        # SQLite has numbers for it
        ended = row[f"ended{end}"]
        return cls(row[f"text{end}"], row[f"model{end}"], None if ended is None else bool(ended))


@dataclass(kw_only=True)
class Cast:
    """What a vote on a pair and an order of more answers have in common."""

    kind: Kind = "person"
    reason: str | None = None
    tags: list[str] = field(default_factory=list)
    duration_ms: int | None = None
    created: str | None = None
    # marked passages (rlhf/data/spans.py)
    spans: list[Span] = field(default_factory=list)


@dataclass
class CastVote(Cast):
    """One annotator's vote on a pair; the fields are those of `Store.vote`."""

    annotator: str
    choice: str
    left: str | None = None
    strength: int | None = None
    corrected: str | None = None
    criteria: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(kw_only=True)
class About:
    """What is known of a prompt, of pairs and rankings alike."""

    # as the data names it; default_group may still be joined with others
    group: str | None = None
    default_group: str | None = None
    split: str | None = None
    voice: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class JudgedPair(About):
    """Two answers to a prompt and the votes on them; expected: the right answer of a control pair."""

    prompt: list[Message]
    a: Answer
    b: Answer
    votes: list[CastVote] = field(default_factory=list)
    expected: str | None = None

    @property
    def answers(self) -> list[Answer]:
        return [self.a, self.b]

    @property
    def casts(self) -> list[CastVote]:
        return self.votes


def pairs_of_view(view: StoreView) -> list[JudgedPair]:
    """Return every pair of a store after an event, with the votes that stand; pairs of rankings only
    where somebody has voted on one by itself (`rankings_of_view`).
    """
    prompts, kinds = view.prompts_by_id(), view.annotator_kinds()
    votes: dict[int, list[CastVote]] = {}
    for vote in view.votes():
        # the order that says it goes out as a whole
        if vote.ranking is None:
            given = fields_of(vote, CastVote)
            cast = CastVote(kind=kinds[vote.annotator], **given)
            votes.setdefault(vote.comparison, []).append(cast)
    found = []
    for id, row in view.pairs().items():
        cast = votes.get(id, [])
        if row["ranking"] is not None and not cast:
            continue
        pair = JudgedPair(
            row["messages"],
            Answer.of_row(row, "_a"),
            Answer.of_row(row, "_b"),
            cast,
            expected=row["expected"],
            **about_of(prompts[row["prompt"]]),
        )
        found.append(pair)
    return found


def fields_of(given: Any, kind: type[Cast]) -> dict[str, Any]:
    """Return what a vote or an order of the store says, as arguments of `kind`."""
    return {name: getattr(given, name) for name in kind.__dataclass_fields__ if name != "kind"}


def about_of(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a prompt, as arguments of a pair or ranking."""
    return {name: known[name] for name in About.__dataclass_fields__ if name in known}


def pairs_of_preferences(
    records: Sequence[Preference], own_groups: Sequence[bool], annotator: str, kind: Kind | None
) -> list[JudgedPair]:
    """Return labelled pairs as pairs with a vote each; rows of one pair are joined.

    Which answer is called a does not depend on the label. own_groups: whether the data names each
    record's group. annotator: whose vote the label is where the row names nobody, a rule's then.
    kind: what all annotators are; default: people where a row names one. The strength is the one
    whose margin the row has.
    """
    found: dict[tuple, JudgedPair] = {}
    for record, own in zip(records, own_groups, strict=True):
        chosen = Answer(record.chosen, ended=None if record.chosen_ended else False)
        rejected = Answer(record.rejected, ended=None if record.rejected_ended else False)
        # by the texts, so that the side tells nothing about the label
        a, b = sorted((chosen, rejected), key=lambda answer: (normalise(answer.text), answer.text))
        is_a = a is chosen
        metadata = dict(record.metadata)
        vote = _vote_of(record, metadata, "a" if is_a else "b", annotator, kind)
        # rows of one pair are its votes
        key = (repr(record.prompt), record.voice, a.text, b.text)
        pair = JudgedPair(record.prompt, a, b, split=record.split, voice=record.voice)
        if own:
            pair.group = record.group
        else:
            pair.default_group = record.group
        pair.metadata = metadata
        found.setdefault(key, pair).votes.append(vote)
    return list(found.values())


def fault_of(answers: Iterable[Answer]) -> str | None:
    """Return why nobody can compare these answers, None if they can be."""
    texts = [answer.text.strip() for answer in answers]
    if not all(texts):
        return "an answer is empty"
    return "two answers are the same text" if len(set(texts)) < len(texts) else None


@dataclass
class Added:
    """What an import has added to a store, and what was left out."""

    pairs: int = 0
    rankings: int = 0
    votes: int = 0
    # of an annotator who has voted on the pair already
    known_votes: int = 0
    annotators: set[str] = field(default_factory=set)


def add_pairs(store: Store, pairs: Iterable[JudgedPair], added: Added) -> None:
    """Add pairs and votes to a store in one transaction; the same again adds nothing.

    An annotator who has voted on a pair already keeps that vote, and theirs from `pairs` is left
    out. Counts in `added`. Raises UserError, naming the pair, where the store refuses it.
    """
    before = store.last_comparison()
    add_each(store, pairs, added, _add_pair, "pair")
    added.pairs = len(store.comparisons_after(before))


def add_each(
    store: Store,
    judged: Iterable[Any],
    added: Added,
    add: Callable[[Store, Any, Added], None],
    what: str,
) -> None:
    """Add pairs or rankings to a store, all or none. Raises UserError, naming the one it refuses."""
    with store.transaction():
        for number, one in enumerate(judged, 1):
            try:
                add(store, one, added)
            except (UserError, RecordError) as error:
                raise UserError(f"{what} {number}: {error}") from None


def _add_pair(store: Store, pair: JudgedPair, added: Added) -> None:
    a, b = add_answers(store, pair)
    ids = {"a": a, "b": b}
    kind = "control" if pair.expected else "normal"
    comparison = store.add_comparison(a, b, kind=kind, expected=ids.get(pair.expected))
    # the store may know the answers already, the other one first
    names = {"a": "b", "b": "a"} if a > b else {"a": "a", "b": "b"}
    for vote in pair.votes:
        annotator = store.add_annotator(vote.annotator, vote.kind)
        # nobody votes twice, and which of both is the newer one is not known
        if store.standing_vote(comparison, annotator):
            added.known_votes += 1
            continue
        store.vote(
            comparison,
            annotator,
            ids.get(vote.choice, vote.choice),
            left=names.get(vote.left),
            strength=vote.strength,
            reason=vote.reason,
            tags=vote.tags,
            duration_ms=vote.duration_ms,
            corrected=vote.corrected,
            criteria=renamed_criteria(vote.criteria, names),
            spans=renamed(vote.spans, names),
            created=vote.created,
        )
        added.votes += 1
        added.annotators.add(vote.annotator)


def add_answers(store: Store, judged: Any) -> list[int]:
    """Add the prompt of a pair or ranking, and its answers, to a store; return the answers' ids."""
    prompt = store.add_prompt(judged.prompt, **about_of(vars(judged)))
    ids = []
    for answer in judged.answers:
        # one that was sampled into this store, judged elsewhere and comes back without its sampling
        id = store.find_response(prompt, answer.text, answer.model)
        if id is None:
            about = {"model": answer.model, "ended": answer.ended}
            id = store.add_response(prompt, answer.text, **about)
        ids.append(id)
    return ids


def extras_of(pair: JudgedPair) -> dict[str, Any]:
    """Return all of a pair but its texts, for a place that another program keeps and does not show."""
    extras = asdict(pair)
    del extras["prompt"]
    for side in ("a", "b"):
        del extras[side]["text"]
    return extras


def with_extras(pair: JudgedPair, extras: dict[str, Any], known: Sequence[str]) -> JudgedPair:
    """Return a pair that another program gave back, with what only `extras` (from `extras_of`) has.

    known: the fields of a vote that the other program keeps itself. A vote that it has changed gets
    nothing of the earlier one, since time and side were those of another answer.
    """
    # what was exported, to tell whether the other program has changed it
    exported = {cast["annotator"]: CastVote(**cast) for cast in extras.get("votes", ())}
    votes = []
    for vote in pair.votes:
        then = exported.get(vote.annotator)
        if then is not None and _is_same(vote, then, known):
            for name in known:
                given = getattr(vote, name)
                # a field that the other program left out says nothing of it
                if given is not None:
                    setattr(then, name, given)
            vote = then
        votes.append(vote)
    a = Answer(pair.a.text, **extras.get("a", {}))
    b = Answer(pair.b.text, **extras.get("b", {}))
    expected = extras.get("expected")
    return JudgedPair(pair.prompt, a, b, votes, expected=expected, **about_of(extras))


def _is_same(vote: CastVote, exported: CastVote, known: Sequence[str]) -> bool:
    """Return whether a vote that came back says what it said when it was exported."""
    for name in CHANGEABLE:
        now, then = getattr(vote, name), getattr(exported, name)
        if name == "spans" and name not in known:
            # the other program has kept the passages, but has no place for remarks
            now, then = without_remarks(now), without_remarks(then)
        if now != then:
            return False
    return True


def without_remarks(spans: Sequence[Span]) -> list[Span]:
    """Return marked passages without their remarks."""
    found = []
    for span in spans:
        found.append({name: value for name, value in span.items() if name != "remark"})
    return found


def _vote_of(
    record: Preference, metadata: dict[str, Any], choice: str, annotator: str, kind: Kind | None
) -> CastVote:
    """Return the label of a row as a vote; what rows of a store say of it is taken out of `metadata`."""
    details = metadata.pop("vote", {}) if isinstance(metadata.get("vote"), dict) else {}
    vote = CastVote(record.annotator or annotator, choice)
    vote.kind = kind or ("person" if record.annotator else "rule")
    if record.label_prob == 0.5 and record.tie_prob:
        vote.choice = "tie"
    other = "b" if choice == "a" else "a"
    vote.left = {"left": choice, "right": other}.get(details.get("shown"))
    vote.strength = details.get("strength")
    if vote.strength is None and record.margin is not None:
        for strength, margin in MARGINS.items():
            if abs(record.margin - margin) < 1e-6:
                vote.strength = strength
    vote.reason = details.get("reason")
    vote.tags = details.get("tags", [])
    sides = {"chosen": choice, "rejected": other}
    vote.criteria = renamed_criteria(details.get("criteria", {}), sides)
    vote.spans = renamed(details.get("spans", []), sides)
    return vote
