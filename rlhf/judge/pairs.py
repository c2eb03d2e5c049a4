"""Pairs of answers that a judge was asked about in both orders, with what people said of them.

judged.jsonl has one a line: {"prompt", "group", "a", "b", "answer_a", "answer_b", "p_ab", "p_ba",
"people"}.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from rlhf.data import sources
from rlhf.data.records import prompt_group
from rlhf.data.store import Store
from rlhf.data.votes import SHARES, Vote
from rlhf.errors import UserError
from rlhf.files import dumps
from rlhf.judge.judges import Judge, ask_all
from rlhf.judge.prompts import conversation_text

OTHER_SIDE = {"a": "b", "b": "a"}


@dataclass
class JudgedPair:
    """Two policies' answers to a prompt (text or messages).

    a, b: the policies' names; one name where one policy gave both. p_ab, p_ba: the judge's P(first
    better) with A's answer first and with B's; nan without a verdict, or before it is asked.
    people: annotator -> a, b, tie or both_bad.
    """

    prompt: Any
    group: str
    a: str
    b: str
    answer_a: str
    answer_b: str
    p_ab: float = math.nan
    p_ba: float = math.nan
    people: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share that A's answer wins by the judge; nan without a verdict in one of the orders."""
        return float(share_of_both_orders(np.array([self.p_ab]), np.array([self.p_ba]))[0])

    @property
    def votes(self) -> float:
        """The share that A's answer wins by the people; nan where nobody chose."""
        shares = [SHARES[choice] for choice in self.people.values()]
        return sum(shares) / len(shares) if shares else math.nan

    @property
    def length_difference(self) -> int:
        """Words of A's answer less those of B's."""
        return len(self.answer_a.split()) - len(self.answer_b.split())

    def turned(self) -> Self:
        """Return the same pair with a and b exchanged."""
        people = {name: OTHER_SIDE.get(choice, choice) for name, choice in self.people.items()}
        return JudgedPair(
            prompt=self.prompt,
            group=self.group,
            a=self.b,
            b=self.a,
            answer_a=self.answer_b,
            answer_b=self.answer_a,
            p_ab=self.p_ba,
            p_ba=self.p_ab,
            people=people,
        )


def ordered(pairs: Iterable[JudgedPair], policies: Sequence[str] = ()) -> list[JudgedPair]:
    """Return the pairs so that the policies of each two stand in one order: the later one of
    `policies` (or of the alphabet) is a.
    """
    # so that all pairs of two policies count for one side of them
    place = {name: number for number, name in enumerate(policies)}

    def rank(name: str) -> tuple[int, str]:
        return place.get(name, len(place)), name

    return [pair.turned() if rank(pair.a) < rank(pair.b) else pair for pair in pairs]


def share_of_both_orders(p1: np.ndarray, p2: np.ndarray) -> np.ndarray:
    """Return (n,) A's share from P(first better) with A first (p1) and with B first (p2); see
    `ask`.
    """
    # both orders prefer the same position
    contradiction = (p1 - 0.5) * (p2 - 0.5) > 0
    return np.where(contradiction, 0.5, (p1 + 1 - p2) / 2)


def ask(judge: Judge, pairs: Sequence[JudgedPair], cache: str | Path) -> None:
    """Ask the judge about each pair in both orders, and keep what it says in the pairs.

        p_ab = P(first better) with A's answer first,    p_ba = P(first better) with B's answer first
        share of A = (p_ab + 1 - p_ba) / 2,    or 1/2 where both orders prefer the same position

    Judges favour a position (Zheng et al. 2023, arXiv 2306.05685, section 3.3). Equal answers are a
    tie and not asked about. `cache`: a JSONL file with every answer, so that nothing is asked
    twice; delete it when the judge behind a name has changed.
    """
    questions = []
    for pair in pairs:
        if pair.answer_a != pair.answer_b:
            questions.append((pair.prompt, pair.answer_a, pair.answer_b))
            questions.append((pair.prompt, pair.answer_b, pair.answer_a))
    answers = iter(ask_all(judge, questions, cache))
    for pair in pairs:
        pair.p_ab = pair.p_ba = 0.5
        if pair.answer_a != pair.answer_b:
            pair.p_ab, pair.p_ba = next(answers), next(answers)


def orders(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Return what the two orders of judged pairs say of the judge.

    asked: pairs whose two answers differ. no_verdict: of these, pairs without one. consistency:
    share of the rest with the same winner, or a tie, in both orders. prefers_first: mean
    probability given to the answer shown first. Both None where nothing was told.
    """
    asked = [pair for pair in pairs if pair.answer_a != pair.answer_b]
    told = [pair for pair in asked if not math.isnan(pair.share)]
    same = [np.sign(p.p_ab - 0.5) == -np.sign(p.p_ba - 0.5) for p in told]
    first = [(p.p_ab + p.p_ba) / 2 for p in told]
    return {
        "asked": len(asked),
        "no_verdict": len(asked) - len(told),
        "ties": sum(pair.share == 0.5 for pair in told),
        "consistency": float(np.mean(same)) if told else None,
        "prefers_first": float(np.mean(first)) if told else None,
    }


def store_pairs(name: str) -> list[JudgedPair]:
    """Return the pairs of a store ("votes.db", "votes.db@118") with their standing votes; control
    pairs, whose answer is known, are left out. Raises UserError where it has none.
    """
    path, event = sources.split_event(name)
    with Store.open(path, readonly=True) as store:
        view = store.at(event)
        rows, votes = view.pairs(), view.votes()
    people = choices(votes)
    pairs = []
    for id, row in rows.items():
        if row["kind"] == "control":
            continue
        pairs.append(
            JudgedPair(
                prompt=row["messages"],
                group=row["metadata"].get("group") or prompt_group(row["messages"]),
                a=row["model_a"] or "a",
                b=row["model_b"] or "b",
                answer_a=row["text_a"],
                answer_b=row["text_b"],
                people=people.get(id, {}),
            )
        )
    if not pairs:
        raise UserError(f"{name}: holds no pairs. Sample some: rlhf collect sample --help")
    return pairs


def choices(votes: Iterable[Vote]) -> dict[int, dict[str, str]]:
    """Return comparison -> annotator -> choice, without skips."""
    found: dict[int, dict[str, str]] = {}
    for vote in votes:
        if vote.choice in SHARES:
            found.setdefault(vote.comparison, {})[vote.annotator] = vote.choice
    return found


def add_votes(pairs: Sequence[JudgedPair], voted: Iterable[JudgedPair]) -> int:
    """Give pairs the votes that `voted` has on the same prompt and the same two answers, in
    whichever order; return how many pairs have votes then.
    """
    # whichever of the two answers the store calls a
    known = {}
    for pair in voted:
        if pair.people:
            for way in (pair, pair.turned()):
                known[conversation_text(way.prompt), way.answer_a, way.answer_b] = way.people
    for pair in pairs:
        found = known.get((conversation_text(pair.prompt), pair.answer_a, pair.answer_b), {})
        pair.people = pair.people | found
    return sum(bool(pair.people) for pair in pairs)


def write_pairs(path: Path, pairs: Iterable[JudgedPair]) -> None:
    """Write judged.jsonl; a missing verdict is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for pair in pairs:
            row = asdict(pair)
            for name in ("p_ab", "p_ba"):
                row[name] = None if math.isnan(row[name]) else row[name]
            file.write(dumps(row) + "\n")


def read_pairs(path: str | Path) -> list[JudgedPair]:
    """Return the pairs of a judged.jsonl. Raises UserError with the place of one that is
    none."""
    pairs = []
    for place, row in sources.sound_rows(str(path)):
        try:
            for name in ("p_ab", "p_ba"):
                row[name] = math.nan if row.get(name) is None else float(row[name])
            pairs.append(JudgedPair(**row))
        except (ValueError, TypeError):
            raise UserError(
                f"{place}: not a judged pair, expected "
                '{"prompt", "group", "a", "b", "answer_a", "answer_b", "p_ab", "p_ba"}'
            ) from None
    return pairs
