"""`rlhf collect sample`: put pairs of answers, from one or two policies or files, into the store to
be judged.

With one source every two of its answers to a prompt that differ become a comparison; with two
sources one answer of each. `runs` are policies that votes are to decide between: every two of them
meet at each prompt, and equal answers are kept, as they count as ties. Control pairs, whose better
answer is known, come from a file.
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf.collect.pairs import (
    Answers,
    add_budget,
    answers_of_file,
    is_file,
    pair_up,
    store_controls,
    store_pairs,
)
from rlhf.collect.select import Rule, check_selection, select_pairs
from rlhf.config import SEED, option
from rlhf.data.encode import decode_response, encode_prompts
from rlhf.data.load import read_table, unique_prompts
from rlhf.data.records import Preference, Prompt, Scorer
from rlhf.data.store import Store
from rlhf.data.store_contents import FEWEST, MOST
from rlhf.errors import UserError


@dataclass(kw_only=True)
class SampleConfig:
    """Answers to prompts, paired and stored to be judged: of one policy to train on, or of several
    runs to decide between.
    """

    model_name_or_path: str | None = option(
        None,
        "the policy: a Hub name, a folder of weights, a GGUF file, or an adapter; or a file with answers or pairs",
    )
    other: str | None = option(None, "a second policy or file; pairs then have one answer of each")
    runs: list[str] = option(
        [], "instead: policies (or files) that votes are to decide between; every two are compared"
    )
    data: list[str] = option(help="prompts: files or Hub names")
    split: Literal["train", "test"] = option(
        "train", "whose prompts: train (and validation), or test, to decide between runs"
    )
    store: str = option(help="the preference store (SQLite) to write to; made when missing")
    controls: str | None = option(
        None, "a file of pairs whose better answer is known: judged among the rest as a check"
    )
    select: Rule | None = option(
        None, "which pairs to store: those that a vote on teaches most, by this rule. Default: all"
    )
    select_by: list[str] = option(
        [], "the reward models that `select` asks; or one policy, with `select_reference`"
    )
    select_reference: str | None = option(
        None, "the policy that the one of `select_by` was trained from, by DPO or PPO"
    )
    pairs: int | None = option(
        None, "pairs to put to a vote by `select`; default: one of each prompt", low=1
    )
    rank: bool = option(
        False,
        f"order the answers of each prompt at once, {FEWEST} to {MOST}, instead of two by two",
    )
    prompts: int | None = option(None, "number of prompts, drawn by the seed; default: all", low=1)
    samples_per_prompt: int | None = option(
        None, "responses to each with each sampling setting; default: 2, of each of `runs` 1", low=1
    )
    temperature: list[float] = option(
        [1.0], "of sampling; several values make several settings: 0.7,1.0", above=0
    )
    top_p: list[float] = option(
        [1.0],
        "sample from the smallest set of tokens that reaches this probability; as many values",
        above=0,
        high=1,
    )
    max_prompt_length: int = option(512, "tokens; longer prompts are dropped and counted", low=1)
    max_response_length: int = option(512, "tokens with EOS", low=1)
    batch_size: int = option(64, "responses generated together", low=1)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "dtype of the base; auto is bfloat16 on a GPU and float32 elsewhere"
    )
    seed: int = option(0, "of the choice of prompts and of sampling", **SEED)
    validation_fraction: float = option(0.05, "as in the stages", low=0, high=1)
    test_fraction: float = option(0.1, "as in the stages", low=0, high=1)
    on_error: Literal["stop", "skip"] = option(
        "stop", "what to do with rows that cannot be used", old_name="on_bad"
    )

    def validate(self) -> None:
        if self.runs and (len(set(self.runs)) < 2 or self.other):
            raise UserError(
                f"'runs' is {', '.join(self.runs)}: expected at least two different policies, and no 'other'"
            )
        if self.split == "test" and not self.runs:
            raise UserError(
                "'split' is test, and pairs of one policy are trained on; give 'runs' to decide between"
            )
        check_selection(self)
        counts = {len(self.temperature), len(self.top_p)}
        if len(counts - {1}) > 1:
            raise UserError(
                f"'temperature' has {len(self.temperature)} values and 'top_p' {len(self.top_p)}; a setting is one of "
                "each: give as many, or one for all"
            )
        from_file = self.model_name_or_path is not None and is_file(self.model_name_or_path)
        alone = not self.runs and self.other is None and not from_file
        if alone and self.samples() * len(self.settings()) < 2:
            raise UserError(
                f"'samples_per_prompt' is {self.samples_per_prompt}, a comparison needs at least 2"
            )
        answers = self.samples() * len(self.settings()) * max(1, len(self.runs))
        is_known = alone or self.runs
        if self.rank and (self.select or (is_known and not FEWEST <= answers <= MOST)):
            raise UserError(
                f"'rank' orders {FEWEST} to {MOST} answers of each prompt, found {answers}: give 'samples_per_prompt', "
                "and no 'select', which keeps pairs"
            )

    def samples(self) -> int:
        """Return the responses of a policy to each prompt with each sampling setting."""
        return self.samples_per_prompt or (1 if self.runs else 2)

    def sources(self) -> list[str]:
        """Return the policies and files that answers come from."""
        # not checked by `validate`: a file of options may leave the policy to the command line
        if bool(self.runs) == (self.model_name_or_path is not None):
            raise UserError(
                "give either 'model_name_or_path' (pairs to train on) or 'runs' (policies to decide between)"
            )
        if self.runs:
            return self.runs
        return [source for source in (self.model_name_or_path, self.other) if source]

    def settings(self) -> list[tuple[float, float]]:
        """Return (temperature, top_p) of each setting."""
        temperatures, top_ps = self.temperature, self.top_p
        if len(temperatures) == 1:
            temperatures = temperatures * len(top_ps)
        if len(top_ps) == 1:
            top_ps = top_ps * len(temperatures)
        return list(zip(temperatures, top_ps, strict=True))


def sample(config: SampleConfig, scorer: Scorer | None = None) -> dict[str, int]:
    """Write prompts, responses and comparisons; returns their counts. Repeating the call adds
    nothing new, unless `select` finds pairs with votes, which it leaves out.

    scorer: that of `select_by`, with the scores of each member in its breakdown.
    """
    sources = config.sources()
    for source in sources:
        if not is_file(source):
            check_policy(source)
    records, named = prompts_of(config)
    # so that the first `prompts` of them are a random choice
    random.Random(config.seed).shuffle(records)
    controls, control_names = controls_of(config)
    if config.prompts is not None:
        # prompts that are too long for a policy do not count among the wanted ones
        for source in sources:
            if not is_file(source):
                records = fitting(records, source, config.max_prompt_length)
    records = records[: config.prompts]

    budget: dict[str, float] = {}
    answers = []
    for number, source in enumerate(sources):
        if is_file(source):
            answers.append(answers_of_file(source, records, config.on_error))
        else:
            answers.append(answers_of_policy(source, records, config, budget, number))
    pairs, counts = pair_up(records, answers, keep_equal=bool(config.runs))
    # before the store is touched: an empty one would look like a collection
    if not counts["comparisons"]:
        raise UserError(
            f"{config.store}: no prompt got two answers that differ, so there is nothing to judge"
        )

    Path(config.store).parent.mkdir(parents=True, exist_ok=True)
    if config.select:
        pairs, kept = select_pairs(pairs, config, scorer)
        counts |= kept

    # all or nothing: half a sample would be completed by no later call
    with Store.open(config.store, create=True) as store, store.transaction():
        counts |= store_pairs(store, pairs, named, rank=config.rank)
        add_budget(store, budget)
        counts["controls"] = store_controls(store, controls, control_names)
    _report(config, counts, answers)
    return counts


def _report(config: SampleConfig, counts: dict[str, int], answers: list[Answers]) -> None:
    by_prompt = itertools.chain.from_iterable(own.values() for own in answers)
    # None: the answer comes from a file, and nobody knows whether it was cut off
    ends = [
        answer["ended"]
        for answer in itertools.chain.from_iterable(by_prompt)
        if answer["ended"] is not None
    ]
    ended = f" ({sum(ends) / len(ends):.0%} ended)" if ends else ""
    controls = f"; {counts['controls']} control pairs" if config.controls else ""
    of = f" of {counts['candidates']} by {config.select}" if config.select else ""
    rankings = f"{counts['rankings']} rankings and " if config.rank else ""
    equal = "answers of two runs, which count as ties, " if config.runs else ""
    print(
        f"{config.store}: {counts['prompts']} prompts, {counts['responses']} responses{ended}, {rankings}"
        f"{counts['comparisons']} comparisons{of}; {counts['equal']} equal {equal}and {counts['empty']} empty "
        f"responses left out{controls}"
    )


def fitting(records: list[Prompt], policy: str, max_prompt_length: int) -> list[Prompt]:
    """Return the prompts that are not too long for this policy, in their order."""
    from rlhf.model.tokenizer import load_tokenizer

    return [
        row["record"] for row in encode_prompts(records, load_tokenizer(policy), max_prompt_length)
    ]


def prompts_of(config: SampleConfig) -> tuple[list[Prompt], set[str]]:
    """Return the prompts of the split asked for (training with validation, or test), and the groups
    that the data names itself.

    `split` stays only where the data gives it: a store that wrote down what a hash has decided
    could not join prompts later, over answers that they share.
    """
    from rlhf.data.split import assign

    table = read_table(config.data, Prompt)
    table.check_usable(config.on_error)
    # as the data says, before hashes fill the rest
    given = {record.group: record.split for record in table.records if record.split}
    assign(table.records, config.validation_fraction, config.test_fraction, table.places)
    unique = unique_prompts(table.records)
    records = [record for record in unique if record.split == config.split]
    if not records:
        purpose = "training" if config.split == "train" else "testing"
        raise UserError(
            f"{table.name}: none of the {len(unique)} prompts is for {purpose}; give more data"
        )
    if config.split == "train":
        records += [record for record in unique if record.split == "validation"]
    for record in records:
        record.split = given.get(record.group)
    return records, table.named_groups()


def controls_of(config: SampleConfig) -> tuple[list[Preference], set[str]]:
    """Return the control pairs, and the groups that their file names itself."""
    if not config.controls:
        return [], set()
    table = read_table(config.controls, Preference)
    table.check_usable(config.on_error)
    return table.records, table.named_groups()


def check_policy(source: str) -> None:
    """Raise UserError for a model that is missing or a reward model, before others are sampled."""
    from rlhf.model.files import is_adapter, require_policy

    if is_adapter(source):
        require_policy(source)
    # with torch, which takes seconds to import
    from rlhf.model.tokenizer import load_tokenizer

    load_tokenizer(source)


def answers_of_policy(
    source: str,
    records: list[Prompt],
    config: SampleConfig,
    budget: dict[str, float],
    number: int = 0,
) -> Answers:
    """Sample answers with every setting; prompts that are too long get none.

    The cost is added to `budget`; `number` keeps the noise of two policies apart.
    """
    from tqdm import tqdm

    from rlhf.engines.batched import generate, try_cache
    from rlhf.engines.sampling import Sampling, sample_key
    from rlhf.model.tokenizer import stop_ids
    from rlhf.options.shared import NOISE_VERSION
    from rlhf.runs.budget import Budget

    initial, model, origin = _load_policy(source, config)
    tokenizer = initial.tokenizer
    rows = encode_prompts(records, tokenizer, config.max_prompt_length)
    spent = Budget()
    spent.watch(model)
    # the trial of the cache is not sampling: make it before counting starts
    try_cache(model)

    index = {id(record): i for i, record in enumerate(records)}
    prompt_index = [index[id(row["record"])] for row in rows]
    answers: Answers = {i: [] for i in prompt_index}
    purpose = "collect" if number == 0 else f"collect/{number}"
    samples = config.samples()
    total = len(rows) * samples * len(config.settings())
    with tqdm(total=total, desc="sampling", unit="response", mininterval=5) as bar:
        for setting, (temperature, top_p) in enumerate(config.settings()):
            # samples are numbered on from setting to setting, so that a further setting changes
            # none of them
            numbers = range(setting * samples, (setting + 1) * samples)
            wanted, keys = [], []
            for row, draw in itertools.product(rows, numbers):
                wanted.append(row["prompt_ids"])
                keys.append(sample_key(config.seed, purpose, row["prompt_ids"], draw))
            with spent.counting():
                generated = generate(
                    model,
                    wanted,
                    keys,
                    Sampling(config.max_response_length, temperature, top_p=top_p),
                    stop_ids(tokenizer, initial.model),
                    tokenizer.pad_token_id,
                    config.batch_size,
                    bar.update,
                )
            spent.episodes += len(wanted)
            spent.tokens_generated += sum(map(len, generated.response_ids))
            sampling = {
                "temperature": temperature,
                "top_p": top_p,
                "max_new_tokens": config.max_response_length,
                "seed": config.seed,
                "noise": NOISE_VERSION,
            }
            places = np.repeat(prompt_index, samples)
            for place, ids, ended in zip(
                places.tolist(), generated.response_ids, generated.ended, strict=True
            ):
                answer = {
                    "text": decode_response(tokenizer, ids),
                    "ended": ended,
                    "sampling": sampling,
                }
                answers[place].append(answer | origin)
    for name, value in spent.metrics().items():
        counter = name.removeprefix("budget/")
        budget[counter] = budget.get(counter, 0.0) + value
    return answers


def _load_policy(source: str, config: SampleConfig) -> tuple[Any, Any, dict[str, str | None]]:
    """Return a policy as it was loaded, as it samples, and what the store records of it."""
    from rlhf.model.loading import check_context, load_model, trainable_policy
    from rlhf.model.weights import folder_fingerprint
    from rlhf.ranks.distributed import base_dtype, own_device
    from rlhf.startup import model_loaded

    device = own_device()
    initial = load_model(source, base_dtype(config.dtype, device))
    model_loaded(initial.model)
    check_context(initial.model, source, config.max_prompt_length, config.max_response_length)
    model = trainable_policy(initial, None).to(device)
    adapter = folder_fingerprint(initial.adapter_path) if initial.adapter_path else None
    origin = {"model": source, "model_fingerprint": initial.fingerprint}
    return initial, model, origin | {"adapter_fingerprint": adapter}
