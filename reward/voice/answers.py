"""Answers to score by a brand voice: read from a file or a preference store, or sampled from a model."""

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.load import load
from rlhf.data.records import Instruction, Labelled, Message, Preference, Record, Samples
from rlhf.data.schemas import guess_kind
from rlhf.data.sources import first_rows, is_store, split_event
from rlhf.data.store import Store
from rlhf.errors import UserError


@dataclass(frozen=True)
class Answer:
    """A text, the prompt that it answers, and what is known of both."""

    text: str
    prompt: list[Message] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    ended: bool = True


def read_answers(source: str) -> list[Answer]:
    """Return the answers of a preference store (of all its pairs, voted on or not) or of a file with
    answers or pairs. Raises UserError.
    """
    if is_store(source):
        return _answers_of_store(source)
    kind = guess_kind(first_rows(source, 1)[0])
    if kind not in (Preference, Labelled):
        kind = Instruction
    answers = []
    for record in load(source, kind):
        metadata = _metadata(record)
        if isinstance(record, Preference):
            answers.append(Answer(record.chosen, record.prompt, metadata, record.chosen_ended))
            answers.append(Answer(record.rejected, record.prompt, metadata, record.rejected_ended))
        else:
            answers.append(Answer(record.response, record.prompt, metadata))
    return answers


def _answers_of_store(source: str) -> list[Answer]:
    name, _ = split_event(source)
    found: dict[tuple[int, str], Answer] = {}
    with Store.open(name, readonly=True) as store:
        for pair in store.at().pairs().values():
            # a response may be in several pairs
            for side in ("a", "b") if pair["kind"] == "normal" else ():
                text = pair[f"text_{side}"]
                ended = pair[f"ended_{side}"] != 0
                answer = Answer(text, pair["messages"], pair["metadata"], ended)
                found.setdefault((pair["prompt"], text), answer)
    if not found:
        raise UserError(f"{source}: has no answers; sample some with: rlhf collect sample")
    return list(found.values())


def sample_answers(
    model: str,
    data: list[str],
    *,
    prompts: int,
    samples_per_prompt: int,
    temperature: float,
    max_prompt_length: int,
    max_response_length: int,
    seed: int,
) -> list[Answer]:
    """Return answers of a model or a trained policy to prompts drawn by the seed; those that the data
    calls test are left out.
    """
    from rlhf.collect.sample import SampleConfig, answers_of_policy, fitting, prompts_of

    config = SampleConfig(
        model_name_or_path=model,
        data=data,
        store="",
        samples_per_prompt=samples_per_prompt,
        temperature=[temperature],
        max_prompt_length=max_prompt_length,
        max_response_length=max_response_length,
        seed=seed,
        # nothing is trained here, so nothing is held out but what the data itself calls test
        validation_fraction=0.0,
        test_fraction=0.0,
    )
    records, _ = prompts_of(config)
    random.Random(seed).shuffle(records)
    records = fitting(records, model, config.max_prompt_length)[:prompts]
    sampled = answers_of_policy(model, records, config, budget={})
    answers = []
    for place, own in sampled.items():
        record = records[place]
        for answer in own:
            answers.append(
                Answer(answer["text"], record.prompt, _metadata(record), answer["ended"])
            )
    return answers


def to_samples(answers: list[Answer]) -> Samples:
    """Return answers as a scorer that reads texts receives them; they have no ids."""
    samples = Samples()
    for answer in answers:
        samples.add(answer.prompt, answer.text, answer.metadata, ended=answer.ended)
    return samples


def same_prompt(answers: list[Answer]) -> list[tuple[int, int]]:
    """Return every two answers to one prompt, as places in the list."""
    by_prompt: dict[str, list[int]] = {}
    for place, answer in enumerate(answers):
        by_prompt.setdefault(str(answer.prompt), []).append(place)
    pairs = []
    for own in by_prompt.values():
        pairs += itertools.combinations(own, 2)
    return pairs


def _metadata(record: Record) -> dict[str, Any]:
    voice = {"voice": record.voice} if record.voice else {}
    return {**record.metadata, "group": record.group, **voice}
