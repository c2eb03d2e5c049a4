"""Rows for SFT in which all turns of the assistant are learnt.

Each turn has the targets that it would have if its conversation ended there: after the prompt that
a policy sees, what it says and EOS (`encode.py`). Where the whole conversation shows the same tokens,
the turn is learnt in its place, so that one pass learns all turns, and with causal attention the
loss is the same. Where it does not, the turn gets a row of its own: a chat template may show a turn
otherwise once the conversation goes on (Qwen3 drops its reasoning), and tokens may merge.

This is the mask of a template's `{% generation %}` marks where they hold a turn and its EOS. The
marks are not read: transformers does not give them where special tokens typed by a user stay text.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf.data.conversation import assistant_turns, is_text
from rlhf.data.encode import encode_prompt, encode_response, sft_rows, too_long
from rlhf.data.records import Record, RecordError, tools_of


@dataclass
class TurnRows:
    """Rows {"input_ids", "labels"}, and what became of the turns of the assistant in them."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    learnt: int = 0
    # of those, in rows of their own
    apart: int = 0
    # turns that are not learnt, by reason
    left_out: Counter = field(default_factory=Counter)
    # rows that are the beginning of another one, where the same turns are learnt again
    repeated: int = 0


def turn_rows(
    encoded: Sequence[dict[str, Any]],
    tokenizer: Any,
    max_prompt_length: int,
    max_response_length: int,
    train_on: Literal["all", "last"] = "all",
) -> TurnRows:
    """Return the rows of encoded instructions (see `encode`), with all turns learnt or the last ones.

    Where a turn ends, EOS is learnt, whatever token the template writes there. Turns that cannot be
    encoded, and those that are too long, are counted.
    """
    result = TurnRows(sft_rows(encoded), learnt=len(encoded))
    wholes = list(result.rows)
    earlier: set[int] = set()
    for row, whole in zip(encoded, wholes, strict=True):
        numbers = assistant_turns(row["record"].prompt)
        if train_on == "last" and numbers:
            result.left_out["train_on is last"] += len(numbers)
            continue
        for number in numbers:
            try:
                turn = encode_turn(tokenizer, row["record"], number)
            except RecordError as error:
                result.left_out[str(error)] += 1
                continue
            reason = too_long(turn, max_prompt_length, max_response_length)
            if reason:
                result.left_out[reason] += 1
                continue

            result.learnt += 1
            (alone,) = sft_rows([turn])
            earlier.add(hash(tuple(alone["input_ids"])))
            start, end = len(turn["prompt_ids"]), len(alone["input_ids"])
            # the template may end a turn with another token than EOS
            if whole["input_ids"][: end - 1] == alone["input_ids"][:-1]:
                whole["labels"][start:end] = turn["response_ids"]
            else:
                result.apart += 1
                result.rows.append(alone)
    result.repeated = sum(hash(tuple(whole["input_ids"])) in earlier for whole in wholes)
    return result


def encode_turn(tokenizer: Any, record: Record, number: int) -> dict[str, list[int]]:
    """Return {"prompt_ids", "response_ids"} of message `number` of a record's prompt, as if it came
    last. Raises RecordError.

    Tool calls and reasoning have no text of their own: their ids are what the chat template writes.
    """
    before, message = record.prompt[:number], record.prompt[number]
    tools = tools_of(record)
    if not before:
        raise RecordError("messages", "begins with the assistant, which has no prompt to answer")
    prompt_ids = encode_prompt(tokenizer, before, tools)
    if is_text(message):
        response_ids = encode_response(tokenizer, message["content"])
        return {"prompt_ids": prompt_ids, "response_ids": response_ids}

    whole = encode_prompt(tokenizer, [*before, message], tools, generation_prompt=False)
    written = whole[len(prompt_ids) :]
    if whole[: len(prompt_ids)] != prompt_ids or tokenizer.eos_token_id not in written:
        raise RecordError(
            "messages", "has a tool call that the chat template does not end with EOS"
        )
    end = written.index(tokenizer.eos_token_id) + 1
    return {"prompt_ids": prompt_ids, "response_ids": written[:end]}
