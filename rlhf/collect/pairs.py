"""Pairs of answers to be judged: which answers to a prompt are compared, and how they are stored."""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.data.records import Instruction, Labelled, Message, Preference, Prompt, digest
from rlhf.data.sources import READABLE, first_rows, is_store
from rlhf.data.store import Store
from rlhf.data.store_contents import FEWEST
from rlhf.errors import UserError

# index of the prompt -> arguments of Store.add_response
Answers = dict[int, list[dict[str, Any]]]


@dataclass
class Paired:
    """A prompt and its answers, one list for each source; an answer is the arguments of
    Store.add_response.
    """

    prompt: Prompt
    sides: list[list[dict[str, Any]]]


def pair_up(
    records: list[Prompt], answers: list[Answers], *, keep_equal: bool = False
) -> tuple[list[Paired], dict[str, int]]:
    """Return each prompt that every source answers, with the answers to store of each source; and
    counts.

    keep_equal: an answer that another source gives too is stored all the same. It makes no
    comparison, and is counted as "equal".
    """
    counts = {"prompts": 0, "responses": 0, "comparisons": 0, "equal": 0, "empty": 0}
    pairs: list[Paired] = []
    for i, record in enumerate(records):
        # too long for one policy, or not in one file
        if not all(i in own for own in answers):
            continue
        known: set[str] = set()
        sides = []
        # The response stored first is called a. In a fixed order of sources, a would reveal the
        # source, and bend the agreement beyond chance: let the prompt's hash decide.
        shown = list(answers)
        random.Random(digest(record.group + prompt_digest(record.prompt))).shuffle(shown)
        for own in shown:
            sides.append(_new_answers(own[i], set() if keep_equal else known, counts))
        pairs.append(Paired(record, sides))
        counts["prompts"] += 1
        counts["responses"] += sum(map(len, sides))
        compared = all_pairs(sides)
        different = [pair for pair in compared if is_different(*pair)]
        counts["comparisons"] += len(different)
        counts["equal"] += len(compared) - len(different)
    return pairs, counts


def _new_answers(
    answers: list[dict[str, Any]], known: set[str], counts: dict[str, int]
) -> list[dict[str, Any]]:
    """Return the answers with text that is not among `known` yet, to which they are added; count
    the others.
    """
    new = []
    for answer in answers:
        text = answer["text"].strip()
        if not text:
            counts["empty"] += 1
        elif text in known:
            counts["equal"] += 1
        else:
            known.add(text)
            new.append(answer)
    return new


def store_pairs(
    store: Store, pairs: list[Paired], named: set[str], *, rank: bool = False
) -> dict[str, int]:
    """Store prompts, answers and comparisons; with `rank`, rankings where there are answers enough.
    Returns how many. A group not in `named` stays one that prompts may be joined over.
    """
    counts = {"comparisons": 0, "rankings": 0}
    for paired in pairs:
        prompt = _store_prompt(store, paired.prompt, named, split=paired.prompt.split)
        # stored side by side, since the response that is stored first is called a
        answers = list(itertools.chain.from_iterable(paired.sides))
        ids = {id(answer): store.add_response(prompt, **answer) for answer in answers}
        texts = {answer["text"].strip() for answer in answers}
        # where two runs gave the same answer, each of them is compared with the others
        if rank and FEWEST <= len(answers) == len(texts):
            store.add_ranking(list(ids.values()))
            counts["rankings"] += 1
            continue
        for one, other in all_pairs(paired.sides):
            if is_different(one, other):
                store.add_comparison(ids[id(one)], ids[id(other)])
                counts["comparisons"] += 1
    return counts


def add_budget(store: Store, budget: dict[str, float]) -> None:
    """Add what the responses have cost to the store, so that a comparison of methods can count it."""
    # answers that were read cost nothing
    if not budget:
        return
    # a store may be filled by several calls
    total = json.loads(store.setting("budget", "{}"))
    for name, value in budget.items():
        total[name] = total.get(name, 0.0) + value
    store.set_setting("budget", json.dumps(total))


def check_pairs(store: Store) -> None:
    """Raise UserError for a store without anything to judge; the pairs of a ranking are something."""
    rows = store.comparisons_after(0)
    # without normal pairs the site could only show its last page
    if not any(row["kind"] == "normal" for row in rows):
        raise UserError(f"{store.path}: has no pairs to judge; make some with: rlhf collect sample")


def store_controls(store: Store, records: list[Preference], named: set[str]) -> int:
    """Store pairs whose better answer is known as control comparisons, which are never trained on;
    returns how many.
    """
    for record in records:
        prompt = _store_prompt(store, record, named)
        # sorted by text below: with the better one first, its letter would give it away
        ended = {record.chosen: record.chosen_ended, record.rejected: record.rejected_ended}
        responses = {
            text: store.add_response(prompt, text, ended=ended[text]) for text in sorted(ended)
        }
        store.add_comparison(*responses.values(), kind="control", expected=responses[record.chosen])
    return len(records)


def _store_prompt(
    store: Store, record: Prompt | Preference, named: set[str], split: str | None = None
) -> int:
    is_named = record.group in named
    return store.add_prompt(
        record.prompt,
        group=record.group if is_named else None,
        default_group=None if is_named else record.group,
        voice=record.voice,
        split=split,
        metadata=record.metadata,
    )


def all_pairs(sides: list[list[dict[str, Any]]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return every two answers of one side, or one of each of every two sides."""
    if len(sides) == 1:
        return list(itertools.combinations(sides[0], 2))
    # of several sources, answers of one are not compared with each other
    pairs = []
    for one, other in itertools.combinations(sides, 2):
        pairs += itertools.product(one, other)
    return pairs


def is_different(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["text"].strip() != other["text"].strip()


def prompt_digest(prompt: list[Message]) -> str:
    turns = [f"{message['role']}: {message['content'].strip()}" for message in prompt]
    return digest("\n".join(turns))


def answers_of_file(
    source: str, records: list[Prompt], on_error: Literal["stop", "skip"] = "stop"
) -> Answers:
    """Return the file's answers to these prompts: one a row, or both of a pair, whose verdict is
    not kept.
    """
    from rlhf.data.load import load
    from rlhf.data.schemas import guess_kind

    rows = first_rows(source, 1)
    kind = guess_kind(rows[0]) if rows else Instruction
    if kind not in (Preference, Labelled):
        kind = Instruction

    name = Path(source).name
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for record in load(source, kind, on_error=on_error):
        own = by_prompt.setdefault(prompt_digest(record.prompt), [])
        if isinstance(record, Preference):
            both = [(record.chosen, record.chosen_ended), (record.rejected, record.rejected_ended)]
            # sorted by text: with the better one first, whoever reads the store would know it
            own += [{"text": text, "ended": ended, "model": name} for text, ended in sorted(both)]
        else:
            own.append({"text": record.response, "ended": None, "model": name})

    keys = {i: prompt_digest(record.prompt) for i, record in enumerate(records)}
    answers = {i: by_prompt[key] for i, key in keys.items() if key in by_prompt}
    if not answers:
        raise UserError(
            f"{source}: answers none of the {len(records)} prompts; a row's prompt must be the same text"
        )
    return answers


def is_file(source: str) -> bool:
    return source.lower().endswith(READABLE) and not is_store(source)
