"""`rlhf brand measure`: what an adapter forgets, beside its base: perplexity of other text, and a
small task.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.brand.gates import Measured, mean_of_groups, ratio_of_groups
from rlhf.compare.text_metrics import encode_texts, text_losses
from rlhf.config import SEED, option
from rlhf.errors import UserError
from rlhf.files import dumps, write_atomic

# answers of a question of the task, the right one among them
CHOICES = 4


@dataclass(kw_only=True)
class MeasureConfig:
    """Perplexity of given answers, and choosing the right answer among four, of two policies."""

    model_name_or_path: str = option(help="the policy that training started from")
    run: str = option(help="the trained policy")
    texts: list[str] = option(
        [], "exchanges of another kind, whose answers are predicted after their first token"
    )
    task: list[str] = option(
        [],
        "exchanges that are questions: the right answer is to be likelier, per token, than three of other rows",
    )
    output: str = option(help="the file to write, .json")
    limit: int = option(200, "rows of each, chosen by a hash", low=1)
    max_prompt_length: int = option(512, "tokens; longer prompts are left out", low=1)
    max_response_length: int = option(512, "tokens with EOS; longer answers are left out", low=1)
    batch_size: int = option(64, "answers read together", low=1)
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "dtype of the base; auto is bfloat16 on a GPU and float32 elsewhere"
    )
    seed: int = option(0, "of the wrong answers", **SEED)


def measure(config: MeasureConfig) -> dict[str, Any]:
    """Write and return {"texts": [{group, tokens, base, run}], "task": [{group, base, run}]}: nats of
    each answer, and whether each question was answered rightly.
    """
    # torch comes with it, and the options are read before
    from rlhf.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model_name_or_path)
    texts = begun(held_out_rows(config, config.texts, tokenizer))
    task = held_out_rows(config, config.task, tokenizer)
    # before the models are loaded: too few answers to choose among ends it here
    questions = choices_of(task, config.seed)
    # one base in memory, with the adapter and without
    base, run = losses_of(config, texts, questions, tokenizer.pad_token_id)
    found = {"texts": [], "task": []}
    # both read the same rows in the same order, which joins them
    for one, other in zip(base["texts"], run["texts"], strict=True):
        row = {"group": one.group, "tokens": one.tokens, "base": one.nll, "run": other.nll}
        found["texts"].append(row)
    right = chosen_rightly(base["task"]), chosen_rightly(run["task"])
    for row, one, other in zip(task, *right, strict=True):
        found["task"].append({"group": row["group"], "base": one, "run": other})
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(config.output), dumps(found, indent=1) + "\n")
    print(f"{config.output}: {len(found['texts'])} texts, {len(found['task'])} questions")
    return found


def losses_of(
    config: MeasureConfig, texts: list[dict], questions: list[dict], pad_id: int
) -> list[dict[str, list]]:
    """Return {"texts", "task"}: the losses of these rows, first the base's, then the run's.

    questions: CHOICES rows for each.
    """
    from rlhf.compare.runs import load_policies
    from rlhf.model.packing import head_is_plain
    from rlhf.ranks.distributed import DistributedContext, own_device

    world = DistributedContext(device=own_device())
    policies = load_policies(
        [config.model_name_or_path, config.run],
        world.device,
        config.max_prompt_length,
        config.max_response_length,
        config.dtype,
    )
    losses = []
    for name, (model, context) in zip(("base", "run"), policies, strict=True):
        count = len(questions) // CHOICES
        print(f"{name}: {len(texts)} texts, {count} questions", flush=True)
        own = {}
        for kind, rows in (("texts", texts), ("task", questions)):
            own[kind] = text_losses(
                model,
                context,
                rows,
                pad_id,
                world,
                batch_size=config.batch_size,
                plain_head=head_is_plain(model),
            )
        losses.append(own)
    return losses


def held_out_rows(config: MeasureConfig, sources: list[str], tokenizer: Any) -> list[dict]:
    """Return encoded exchanges, at most `limit`; none without a source. Raises UserError where none
    is left.
    """
    from rlhf.data.load import load
    from rlhf.data.records import Instruction

    if not sources:
        return []
    records = load(sources, Instruction, limit=config.limit)
    limits = config.max_prompt_length, config.max_response_length
    return encode_texts(records, tokenizer, *limits)


def begun(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the first token of the answer given, as the end of the prompt.

    An adapter that greets begins other answers with the greeting too. That alone is several nats at
    the first token, which is the brand's style and not what it forgot.
    """
    found = []
    for row in rows:
        first, rest = row["response_ids"][:1], row["response_ids"][1:]
        # with EOS there are two or more, unless the answer is empty
        if rest:
            found.append({**row, "prompt_ids": [*row["prompt_ids"], *first], "response_ids": rest})
    return found


def choices_of(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return for each row CHOICES rows: it, then the same prompt with answers of other rows.

    Raises UserError where there are too few different answers.
    """
    # answers that differ, each once
    by_ids = {tuple(row["response_ids"]): row["response_ids"] for row in rows}
    different = list(by_ids.values())
    if rows and len(different) < CHOICES:
        raise UserError(
            f"task: has {len(different)} different answers, expected at least {CHOICES} to choose among"
        )
    found = []
    for place, row in enumerate(rows):
        wrong = [ids for ids in different if ids != row["response_ids"]]
        # by the place: a row keeps its wrong answers where others are added
        drawn = random.Random(f"choices {seed} {place}").sample(wrong, CHOICES - 1)
        found.append(row)
        found += [{**row, "response_ids": ids} for ids in drawn]
    return found


def chosen_rightly(losses: Sequence[Any]) -> list[bool]:
    """Return for each CHOICES losses whether the first is the smallest per token; a tie is wrong."""
    right = []
    for start in range(0, len(losses), CHOICES):
        # per token, or the shortest answer would win
        per_token = [loss.nll / loss.tokens for loss in losses[start : start + CHOICES]]
        right.append(per_token[0] < min(per_token[1:]))
    return right


def forgotten(found: dict[str, Any]) -> dict[str, Measured]:
    """Return what `measure` has found for the gates: perplexity (a ratio) and task (a difference);
    what was not measured is left out.

        perplexity = exp( sum of (nats of the run - nats of the base) / sum of tokens )
    """
    result = {}
    if found["texts"]:
        sums: dict[str, list[float]] = {}
        for row in found["texts"]:
            own = sums.setdefault(row["group"], [0.0, 0.0])
            own[0] += row["run"] - row["base"]
            own[1] += row["tokens"]
        nats, tokens = zip(*sums.values(), strict=True)
        # in logs the interval is symmetric; its ends are taken to ratios afterwards
        log = ratio_of_groups(nats, tokens)
        ratios = map(math.exp, (log.estimate, log.low, log.high))
        result["perplexity"] = Measured(*ratios, log.groups)
    if found["task"]:
        changes = [(row["group"], float(row["run"]) - row["base"]) for row in found["task"]]
        result["task"] = mean_of_groups(changes)
    return result


def read_measures(file: str) -> dict[str, Any]:
    """Return what `measure` has written. Raises UserError."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{file}: no measures; make them with: rlhf brand measure") from None
