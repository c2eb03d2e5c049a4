"""Text to token ids, the same for every stage: prompt ids, then response ids that end in EOS, and nothing after.

What SFT imitates, what DPO compares and what the reward model learns from are encoded here, in the form in which the
policy samples; scorers of a running policy read its ids as they are. A model without a chat template gets
`PLAIN_TEMPLATE`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jinja2

from rlhf.data.records import Instruction, Message, Preference, Prompt, Record, RecordError, digest, tools_of
from rlhf.errors import UserError

# "User: ...\nAssistant:" with the tokenizer's own bos and eos; saved with the tokenizer, so later stages find it there.
PLAIN_TEMPLATE = (
    "{{- bos_token if bos_token else '' }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{ 'Assistant:' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{%- elif message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{%- else %}{{ 'User: ' + message['content'] + '\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'Assistant:' }}{%- endif %}"
)


def encode_prompt(tokenizer: Any, prompt: list[Message], tools: list[dict] | None = None) -> list[int]:
    """Ids of the prompt up to where the assistant begins; special tokens typed by a user stay plain text.

    Raises RecordError where the chat template refuses the prompt (a system turn, two turns of one role), or leaves out
    what it holds beside text: tools, calls, results.
    """
    try:
        _check_tools(tokenizer, prompt, tools)
        ids = tokenizer.apply_chat_template(
            prompt,
            tools=tools,
            add_generation_prompt=True,
            return_dict=False,
            tokenize=True,
            sanitize_control_tokens=True,
        )
    except RecordError:
        raise
    except Exception as error:  # a template is a program: jinja2's errors, and those of what it computes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecordError("prompt", f"is refused by the chat template ({reason})") from None
    return list(ids)


def _check_tools(tokenizer: Any, prompt: list[Message], tools: list[dict] | None) -> None:
    """Raise RecordError if the prompt reads the same without its tools, tool calls or tool results."""

    def text(messages: list[Message], tools: list[dict] | None = tools) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)

    without: dict[str, Callable[[], str]] = {}
    if tools:
        without["tools"] = lambda: text(prompt, None)
    if any("tool_calls" in message for message in prompt):
        bare = [{name: value for name, value in m.items() if name != "tool_calls"} for m in prompt]
        without["tool calls"] = lambda: text(bare)
    if any(message["role"] == "tool" for message in prompt):
        asked = [{**m, "role": "user"} if m["role"] == "tool" else m for m in prompt]
        without["tool results"] = lambda: text(asked)
    whole = text(prompt) if without else ""
    for what, rendered in without.items():
        try:
            same = rendered() == whole
        except jinja2.TemplateError:  # refused without: so it does read them
            same = False
        if same:
            raise RecordError("prompt", f"has {what}, for which this model's chat template has no place")


def encode_response(tokenizer: Any, response: str, ended: bool = True) -> list[int]:
    """Ids of the response and the EOS that ends it (none when it was cut off); special tokens inside the text stay
    plain text. A byte-level vocabulary can spell some texts in several ways, so these need not be the very ids that
    a policy sampled."""
    ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True).input_ids
    return [*ids, tokenizer.eos_token_id] if ended else list(ids)


def decode_response(tokenizer: Any, ids: Iterable[int]) -> str:
    """The response's text without special tokens and surrounding white space."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Names what decides ids: vocabulary, special tokens, chat template. Adapters of one base must share it."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return digest(f"{vocabulary}{special}{tokenizer.chat_template}")


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    max_prompt_length: int,
    max_response_length: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
) -> tuple[list[dict[str, Any]], Counter]:
    """Encode records of one kind; return their rows and, of the records that have none, how many by reason.

    Rows hold "record" and "prompt_ids"; an Instruction's also "response_ids", a Preference's "chosen_ids" and
    "rejected_ids", responses with EOS. A record that the chat template has no place for is dropped, or with `on_error`
    "stop" raises UserError.
    """
    rows, dropped = [], Counter()
    for record in records:
        try:
            row = {"prompt_ids": encode_prompt(tokenizer, record.prompt, tools_of(record))}
        except RecordError as error:
            if on_error == "skip":
                dropped[str(error)] += 1
                continue
            where = record.place or f"{record.source or 'data'}, the row whose prompt begins {_beginning(record)!r}"
            raise UserError(f"{where}: {error}. Drop it and its like with: --on_error skip") from None
        if isinstance(record, Instruction):
            row["response_ids"] = encode_response(tokenizer, record.response)
        elif isinstance(record, Preference):
            row["chosen_ids"] = encode_response(tokenizer, record.chosen, record.chosen_ended)
            row["rejected_ids"] = encode_response(tokenizer, record.rejected, record.rejected_ended)
        longest = max((len(ids) for name, ids in row.items() if name != "prompt_ids"), default=0)
        if len(row["prompt_ids"]) > max_prompt_length:
            dropped[f"prompt longer than max_prompt_length {max_prompt_length} tokens"] += 1
        elif max_response_length is not None and longest > max_response_length:
            dropped[f"response longer than max_response_length {max_response_length} tokens"] += 1
        else:
            rows.append({**row, "record": record})
    say_unknown(rows, tokenizer)
    return rows, dropped


def say_unknown(rows: list[dict[str, Any]], tokenizer: Any) -> None:
    """Say of which share of the rows' tokens the tokenizer knows nothing; a byte-level one can write anything."""
    unknown, count, total = tokenizer.unk_token_id, 0, 0
    if unknown is None:
        return
    for row in rows:
        for name, ids in row.items():
            if name != "record":
                count += ids.count(unknown)
                total += len(ids)
    if count:
        what = f"{len(rows)} {type(rows[0]['record']).__name__.lower()} rows"
        print(
            f"{100 * count / total:.2g} % of the tokens of {what} are unknown to the tokenizer "
            f"({tokenizer.unk_token}): the model does not see what is written there",
            file=sys.stderr,
        )


def sft_rows(encoded: Sequence[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """Rows {"input_ids", "labels"} for SFT: the loss is on the response and its EOS alone (labels -100 before)."""
    return [
        {
            "input_ids": row["prompt_ids"] + row["response_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["response_ids"],
        }
        for row in encoded
    ]


def encode_preferences(records: list[Preference], tokenizer: Any, max_prompt_length: int, max_response_length: int):
    """Rows of `encode`; what is dropped is counted on stderr. Raises UserError if all are."""
    return kept(encode(records, tokenizer, max_prompt_length, max_response_length), "preferences")


def encode_prompts(records: list[Prompt], tokenizer: Any, max_prompt_length: int):
    """Rows {"prompt_ids", "record"}, without those that are too long; counted and refused as above."""
    return kept(encode(records, tokenizer, max_prompt_length), "prompts")


def kept(encoded: tuple[list[dict], Counter], what: str) -> list[dict[str, Any]]:
    """The rows of `encode`; what was dropped is counted on stderr. Raises UserError if all were."""
    rows, dropped = encoded
    reasons = "; ".join(f"{count}: {reason}" for reason, count in dropped.items())
    if dropped and not rows:
        raise UserError(f"all {dropped.total()} {what} are dropped ({reasons}): raise the limit")
    if dropped:
        print(f"{dropped.total()} of {dropped.total() + len(rows)} {what} dropped ({reasons})", file=sys.stderr)
    return rows


def _beginning(record: Record) -> str:
    text = " ".join(record.prompt[0]["content"].split())
    return text if len(text) <= 60 else f"{text[:57]}..."
