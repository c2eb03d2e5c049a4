"""`rlhf collect sample`: pairs of answers, from one or two policies or files, put into the store to be judged.

With one source every two of its answers to a prompt that differ become a comparison; with two sources one answer of
each. Control pairs, whose better answer is known, come from a file.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.config import SEED, UserError, option
from rlhf.data.records import Instruction, Labelled, Message, Preference, Prompt, digest
from rlhf.data.store import Store

Answers = dict[int, list[dict[str, Any]]]  # index of the prompt -> arguments of Store.add_response
Paired = tuple[Prompt, list[list[dict[str, Any]]]]  # a prompt and its answers by source


@dataclass(kw_only=True)
class SampleConfig:
    """Answers to prompts of the training and validation splits, paired and stored to be judged."""

    model_name_or_path: str = option(
        help="the policy: a Hub name, a folder of weights, or an adapter (runs/sft); or a file with answers or pairs"
    )
    other: str | None = option(None, "a second policy or file; pairs then have one answer of each")
    data: list[str] = option(help="prompts: files or Hub names; the test split is left out")
    store: str = option(help="the preference store (SQLite) to write to; made when missing")
    controls: str | None = option(
        None, "a file of pairs whose better answer is known: judged among the rest as a check"
    )
    prompts: int | None = option(None, "so many prompts, drawn by the seed; default: all", low=1)
    samples_per_prompt: int = option(2, "responses to each with each sampling setting", low=1)
    temperature: list[float] = option([1.0], "of sampling; several make several settings: 0.7,1.0", above=0)
    top_p: list[float] = option(
        [1.0], "sample from the smallest set of tokens that reaches this probability; as many", above=0, high=1
    )
    max_prompt_length: int = option(512, "tokens; longer prompts are dropped and counted", low=1)
    max_response_length: int = option(512, "tokens with EOS", low=1)
    batch_size: int = option(64, "responses generated together", low=1)
    seed: int = option(0, "of the choice of prompts and of sampling", **SEED)
    validation_fraction: float = option(0.05, "as in the stages", low=0, high=1)
    test_fraction: float = option(0.1, "as in the stages", low=0, high=1)
    on_error: Literal["stop", "skip"] = option("stop", "what to do with rows that cannot be used", old_name="on_bad")

    def validate(self) -> None:
        if len({len(self.temperature), len(self.top_p)} - {1}) > 1:
            raise UserError(
                f"'temperature' has {len(self.temperature)} values and 'top_p' {len(self.top_p)}; a setting is one of "
                "each: give as many, or one for all"
            )
        alone = self.other is None and not _is_file(self.model_name_or_path)
        if alone and self.samples_per_prompt * len(self.settings()) < 2:
            raise UserError(f"'samples_per_prompt' is {self.samples_per_prompt}, a comparison needs at least 2")

    def settings(self) -> list[tuple[float, float]]:
        """(temperature, top_p) of each setting."""
        count = max(len(self.temperature), len(self.top_p))
        one, other = (values * count if len(values) == 1 else values for values in (self.temperature, self.top_p))
        return list(zip(one, other, strict=True))


def sample(config: SampleConfig) -> dict[str, int]:
    """Write prompts, responses and comparisons; returns their counts. Repeating the call adds nothing new."""
    import random

    records, named = prompts_of(config)
    random.Random(config.seed).shuffle(records)
    controls, their_named = controls_of(config)
    sources = [config.model_name_or_path, *([config.other] if config.other else [])]
    if config.prompts is not None:  # counted without those that are too long
        for policy in (source for source in sources if not _is_file(source)):
            records = fitting(records, policy, config.max_prompt_length)
    records = records[: config.prompts]
    budget: dict[str, float] = {}
    answers = [
        answers_of_file(source, records, config.on_error)
        if _is_file(source)
        else answers_of_policy(source, records, config, budget, number)
        for number, source in enumerate(sources)
    ]
    plan, counts = pair_up(records, answers)
    if not counts["comparisons"]:
        raise UserError(f"{config.store}: no prompt got two answers that differ, so there is nothing to judge")
    Path(config.store).parent.mkdir(parents=True, exist_ok=True)
    with Store.open(config.store, create=True) as store, store.transaction():
        put(store, plan, named)
        if budget:  # what the store's responses have cost, so that a comparison of methods can count it
            before = json.loads(store.setting("budget", "{}"))
            spent = {name: before.get(name, 0.0) + value for name, value in budget.items()}
            store.set_setting("budget", json.dumps(spent))
        counts["controls"] = put_controls(store, controls, their_named)
    ended = [a["ended"] for own in answers for given in own.values() for a in given if a["ended"] is not None]
    share = f" ({sum(ended) / len(ended):.0%} ended)" if ended else ""
    print(
        f"{config.store}: {counts['prompts']} prompts, {counts['responses']} responses{share}, {counts['comparisons']} "
        f"comparisons; {counts['equal']} equal and {counts['empty']} empty responses left out"
        + (f"; {counts['controls']} control pairs" if config.controls else "")
    )
    return counts


def fitting(records: list[Prompt], policy: str, max_prompt_length: int) -> list[Prompt]:
    """The prompts that are not too long for this policy, in their order."""
    from rlhf.data.encode import encode_prompts
    from rlhf.tokenizer import load_tokenizer

    return [row["record"] for row in encode_prompts(records, load_tokenizer(policy), max_prompt_length)]


def prompts_of(config: SampleConfig) -> tuple[list[Prompt], set[str]]:
    """The prompts of the training and validation splits, and the groups that the data names itself.

    Of `split` only what the data gives is left: a store that wrote down what a hash has decided could join no prompts
    later, over answers that they share.
    """
    from rlhf.data.load import collect, unique_prompts
    from rlhf.data.split import assign

    table = collect(config.data, Prompt)
    table.complain(config.on_error)
    given = {r.group: r.split for r in table.records if r.split}
    assign(table.records, config.validation_fraction, config.test_fraction, table.places)
    unique = unique_prompts(table.records)
    records = [r for split in ("train", "validation") for r in unique if r.split == split]
    if not any(r.split == "train" for r in records):
        raise UserError(f"{table.name}: none of the {len(unique)} prompts is for training; give more data")
    for record in records:
        record.split = given.get(record.group)
    return records, table.named_groups()


def controls_of(config: SampleConfig) -> tuple[list[Preference], set[str]]:
    """The control pairs, and the groups that their file names itself."""
    from rlhf.data.load import collect

    if not config.controls:
        return [], set()
    table = collect(config.controls, Preference)
    table.complain(config.on_error)
    return table.records, table.named_groups()


def answers_of_policy(
    source: str, records: list[Prompt], config: SampleConfig, budget: dict[str, float], number: int = 0
) -> Answers:
    """Sample every setting; prompts that are too long have no answers. What it costs is added to `budget`; `number`
    keeps two policies' noise apart."""
    import torch
    from tqdm import tqdm

    from rlhf.data.encode import decode_response, encode_prompts
    from rlhf.engines.hf import Sampling, cache_is_exact, generate, sample_key
    from rlhf.models import check_context, load_model, trainable_policy
    from rlhf.runs.budget import Budget
    from rlhf.tokenizer import stop_ids
    from rlhf.weights import folder_fingerprint

    cuda = torch.cuda.is_available()
    initial = load_model(source, "bfloat16" if cuda else "float32")
    check_context(initial.model, source, config.max_prompt_length, config.max_response_length)
    tokenizer = initial.tokenizer
    rows = encode_prompts(records, tokenizer, config.max_prompt_length)
    index = {id(record): i for i, record in enumerate(records)}
    model = trainable_policy(initial, None).to("cuda" if cuda else "cpu")
    spent = Budget()
    spent.watch(model)
    cache_is_exact(model)  # tried once, by passes that are no sampling
    origin = {
        "model": source,
        "model_fingerprint": initial.fingerprint,
        "adapter_fingerprint": folder_fingerprint(initial.adapter_path) if initial.adapter_path else None,
    }
    answers: Answers = {index[id(row["record"])]: [] for row in rows}
    purpose, each = "collect" if number == 0 else f"collect/{number}", config.samples_per_prompt
    with tqdm(total=len(rows) * each * len(config.settings()), desc="sampling", unit="response", mininterval=5) as bar:
        for setting, (temperature, top_p) in enumerate(config.settings()):
            wanted = [(row, setting * each + s) for row in rows for s in range(each)]
            with spent.counting():
                done = generate(
                    model,
                    [row["prompt_ids"] for row, _ in wanted],
                    [sample_key(config.seed, purpose, row["prompt_ids"], s) for row, s in wanted],
                    Sampling(config.max_response_length, temperature, top_p=top_p),
                    stop_ids(tokenizer, initial.model),
                    tokenizer.pad_token_id,
                    config.batch_size,
                    bar.update,
                )
            spent.episodes += len(wanted)
            spent.tokens_generated += sum(map(len, done.response_ids))
            sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": config.max_response_length}
            about = origin | {"sampling": sampling | {"seed": config.seed}}
            for (row, _), ids, ended in zip(wanted, done.response_ids, done.ended, strict=True):
                text = decode_response(tokenizer, ids)
                answers[index[id(row["record"])]].append({"text": text, "ended": ended} | about)
    for name, value in spent.metrics().items():
        name = name.removeprefix("budget/")
        budget[name] = budget.get(name, 0.0) + value
    return answers


def answers_of_file(source: str, records: list[Prompt], on_error: Literal["stop", "skip"] = "stop") -> Answers:
    """The file's answers to these prompts: one a row, or both of a pair, of which no verdict is kept."""
    from rlhf.data.load import load
    from rlhf.data.schemas import guess_kind
    from rlhf.data.sources import first_rows

    rows = first_rows(source, 1)
    kind = guess_kind(rows[0]) if rows else Instruction
    kind = kind if kind in (Preference, Labelled) else Instruction
    found: dict[str, list[dict[str, Any]]] = {}
    for record in load(source, kind, on_error=on_error):
        own = found.setdefault(_key(record.prompt), [])
        if isinstance(record, Preference):
            both = ((record.chosen, record.chosen_ended), (record.rejected, record.rejected_ended))
            # by text: the better one first would be no secret to whoever reads the store
            own += [{"text": text, "ended": ended, "model": Path(source).name} for text, ended in sorted(both)]
        else:
            own.append({"text": record.response, "ended": None, "model": Path(source).name})
    answers = {i: found[_key(record.prompt)] for i, record in enumerate(records) if _key(record.prompt) in found}
    if not answers:
        raise UserError(f"{source}: answers none of the {len(records)} prompts; a row's prompt must be the same text")
    return answers


def pair_up(records: list[Prompt], answers: list[Answers]) -> tuple[list[Paired], dict[str, int]]:
    """Each prompt that every source answers with the answers to store, of one source or of two; and counts."""
    counts = {"prompts": 0, "responses": 0, "comparisons": 0, "equal": 0, "empty": 0}
    plan: list[Paired] = []
    for i, record in enumerate(records):
        if not all(i in own for own in answers):
            continue
        known: set[str] = set()
        sides: list[list[dict[str, Any]]] = []
        # what is added first is called a: in a fixed order of two sources, a would tell which, and bend the agreement
        swapped = len(answers) == 2 and int(digest(record.group + _key(record.prompt)), 16) % 2
        for own in reversed(answers) if swapped else answers:
            sides.append([])
            for answer in own[i]:
                text = answer["text"].strip()
                if not text or text in known:
                    counts["equal" if text else "empty"] += 1
                    continue
                known.add(text)
                sides[-1].append(answer)
        plan.append((record, sides))
        counts["prompts"] += 1
        counts["responses"] += len(known)
        counts["comparisons"] += len(_pairs(sides))
    return plan, counts


def put(store: Store, plan: list[Paired], named: set[str]) -> None:
    """Store prompts, answers and comparisons. A group not in `named` stays one that prompts may be joined over."""
    for record, sides in plan:
        prompt = _put_prompt(store, record, named, split=record.split)
        for one, other in _pairs([[store.add_response(prompt, **answer) for answer in side] for side in sides]):
            store.add_comparison(one, other)


def put_controls(store: Store, records: list[Preference], named: set[str]) -> int:
    """Store pairs whose better answer is known as control comparisons, which are never trained on; returns how many."""
    for record in records:
        prompt = _put_prompt(store, record, named)
        texts = {record.chosen: record.chosen_ended, record.rejected: record.rejected_ended}
        ids = {text: store.add_response(prompt, text, ended=texts[text]) for text in sorted(texts)}
        store.add_comparison(*ids.values(), kind="control", expected=ids[record.chosen])
    return len(records)


def _put_prompt(store: Store, record: Prompt | Preference, named: set[str], split: str | None = None) -> int:
    group = {"group" if record.group in named else "default_group": record.group}
    return store.add_prompt(record.prompt, **group, voice=record.voice, split=split, metadata=record.metadata)


def _pairs(sides: list[list[Any]]) -> list[tuple[Any, Any]]:
    """Every two of one side, or one of each of two."""
    return list(itertools.combinations(sides[0], 2) if len(sides) == 1 else itertools.product(*sides))


def _is_file(source: str) -> bool:
    from rlhf.data.sources import READABLE, is_store

    return source.lower().endswith(READABLE) and not is_store(source)


def _key(prompt: list[Message]) -> str:
    return digest("\n".join(f"{m['role']}: {m['content'].strip()}" for m in prompt))
