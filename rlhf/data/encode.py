"""Text to token ids, the same for every stage: prompt ids, then response ids that end in EOS, and
nothing after.

What SFT imitates, what DPO compares and what the reward model learns from are encoded here, in the
form in which the policy samples; scorers of a running policy read its ids as they are. A model
without a chat template gets `PLAIN_TEMPLATE`.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import jinja2

from rlhf.data.conversation import assistant_turns, is_text
from rlhf.data.records import (
    Instruction,
    Message,
    Preference,
    Prompt,
    Record,
    RecordError,
    digest,
    tools_of,
)
from rlhf.errors import UserError
from rlhf.text import clip, reasons_of

# "User: ...\nAssistant:" with the tokenizer's own bos and eos; saved with the tokenizer, so later
# stages find it there.
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


def encode_prompt(
    tokenizer: Any,
    prompt: list[Message],
    tools: list[dict] | None = None,
    *,
    generation_prompt: bool = True,
) -> list[int]:
    """Return the ids of the prompt up to where the assistant begins; special tokens typed by a user
    stay plain text. Without `generation_prompt` they end with the last message.

    Raises RecordError where the chat template refuses the prompt (a system turn, two turns of one
    role), or leaves out what it holds beside text: tools, calls, results.
    """
    try:
        _check_tools(tokenizer, prompt, tools)
        ids = tokenizer.apply_chat_template(
            prompt,
            tools=tools,
            add_generation_prompt=generation_prompt,
            return_dict=False,
            tokenize=True,
            sanitize_control_tokens=True,
        )
    except RecordError:
        raise
    except Exception as error:
        # a template is a program: jinja2's errors, and those of what it computes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RecordError("prompt", f"is refused by the chat template ({reason})") from None
    return list(ids)


def _check_tools(tokenizer: Any, prompt: list[Message], tools: list[dict] | None) -> None:
    """Raise RecordError if the prompt reads the same without its tools, tool calls or tool results."""

    def text(messages: list[Message], tools: list[dict] | None) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False
        )

    # the prompt without each of the three
    variants: dict[str, tuple[list[Message], list[dict] | None]] = {}
    if tools:
        variants["tools"] = prompt, None
    if any("tool_calls" in message for message in prompt):
        variants["tool calls"] = list(map(_without_calls, prompt)), tools
    if any(message["role"] == "tool" for message in prompt):
        variants["tool results"] = list(map(_as_user, prompt)), tools

    # most prompts have none of them, and rendering takes time
    whole = text(prompt, tools) if variants else ""
    for what, (messages, tools_left) in variants.items():
        try:
            same = text(messages, tools_left) == whole
        except jinja2.TemplateError:
            # the template refuses the prompt without them, so it reads them
            same = False
        if same:
            raise RecordError(
                "prompt", f"has {what}, for which this model's chat template has no place"
            )


def _without_calls(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "tool_calls"}


def _as_user(message: Message) -> Message:
    return {**message, "role": "user"} if message["role"] == "tool" else message


def encode_response(tokenizer: Any, response: str, ended: bool = True) -> list[int]:
    """Return the ids of the response and the EOS that ends it (none when it was cut off).

    Special tokens inside the text stay plain text. A byte-level vocabulary can spell some texts in
    several ways, so these need not be the very ids that a policy sampled.
    """
    # text that spells a special token must not become one
    ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True).input_ids
    return [*ids, tokenizer.eos_token_id] if ended else list(ids)


def decode_response(tokenizer: Any, ids: Iterable[int]) -> str:
    """Return the response's text without special tokens and surrounding white space."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of what decides ids (vocabulary, special tokens, chat template). Adapters of
    one base share it.
    """
    # in a fixed order: dicts of two versions list it differently
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return digest(f"{vocabulary}{special}{tokenizer.chat_template}")


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    max_prompt_length: int,
    max_response_length: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    train_on: Literal["all", "last"] = "last",
) -> tuple[list[dict[str, Any]], Counter]:
    """Encode records of one kind; return their rows and, of the records that have none, how many by
    reason.

    Rows hold "record" and "prompt_ids"; an Instruction's also "response_ids", a Preference's
    "chosen_ids" and "rejected_ids", responses with EOS. A record that the chat template has no
    place for is dropped, or with `on_error` "stop" raises UserError. With `train_on` "all" an
    Instruction that is too long ends with the last turn of the assistant up to which it fits.
    """
    rows, dropped = [], Counter()
    for record in records:
        is_cut = train_on == "all" and isinstance(record, Instruction)
        reasons = []
        try:
            shorter = beginnings(record) if is_cut else ()
            for part in (record, *shorter):
                row = encode_record(part, tokenizer)
                reasons.append(too_long(row, max_prompt_length, max_response_length))
                if not reasons[-1]:
                    rows.append(row)
                    break
            else:
                dropped[reasons[0]] += 1
        except RecordError as error:
            if on_error == "skip":
                dropped[str(error)] += 1
                continue
            # records made in Python have no place
            beginning = clip(record.prompt[0]["content"], 60)
            where = (
                record.place
                or f"{record.source or 'data'}, the row whose prompt begins {beginning!r}"
            )
            raise UserError(
                f"{where}: {error}. Drop it and its like with: --on_error skip"
            ) from None
    warn_of_unknown_tokens(rows, tokenizer)
    return rows, dropped


def encode_record(record: Record, tokenizer: Any) -> dict[str, Any]:
    """Return the row of one record: "record", "prompt_ids", and the responses that its kind has (see
    `encode`). Raises RecordError.
    """
    row: dict[str, Any] = {
        "prompt_ids": encode_prompt(tokenizer, record.prompt, tools_of(record)),
        "record": record,
    }
    if isinstance(record, Instruction):
        row["response_ids"] = encode_response(tokenizer, record.response)
    elif isinstance(record, Preference):
        row["chosen_ids"] = encode_response(tokenizer, record.chosen, record.chosen_ended)
        row["rejected_ids"] = encode_response(tokenizer, record.rejected, record.rejected_ended)
    return row


def too_long(
    row: dict[str, Any], max_prompt_length: int, max_response_length: int | None
) -> str | None:
    """Return what of a row is longer than it may be; both answers of a pair have to fit."""
    responses = [len(ids) for name, ids in row.items() if name not in ("prompt_ids", "record")]
    if len(row["prompt_ids"]) > max_prompt_length:
        return f"prompt longer than max_prompt_length {max_prompt_length} tokens"
    if max_response_length is not None and max(responses, default=0) > max_response_length:
        return f"response longer than max_response_length {max_response_length} tokens"
    return None


def beginnings(record: Instruction) -> Iterator[Instruction]:
    """Yield the conversation up to each earlier answer of the assistant, the longest first."""
    for number in reversed(assistant_turns(record.prompt)):
        before, message = record.prompt[:number], record.prompt[number]
        if is_text(message) and before and before[-1]["role"] in ("user", "tool"):
            yield replace(record, prompt=before, response=message["content"])


def warn_of_unknown_tokens(rows: list[dict[str, Any]], tokenizer: Any) -> None:
    """Print the share of the rows' tokens that the tokenizer does not know; a byte-level one knows
    all.
    """
    if tokenizer.unk_token_id is None:
        return
    unknown, total = 0, 0
    for row in rows:
        for name, ids in row.items():
            if name != "record":
                unknown += ids.count(tokenizer.unk_token_id)
                total += len(ids)
    if unknown:
        kind = type(rows[0]["record"]).__name__.lower()
        print(
            f"{100 * unknown / total:.2g} % of the tokens of {len(rows)} {kind} rows are unknown to the tokenizer "
            f"({tokenizer.unk_token}): the model does not see what is written there",
            file=sys.stderr,
        )


def sft_rows(encoded: Sequence[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """Return rows {"input_ids", "labels"} for SFT, with loss on the response and its EOS alone
    (labels -100 before).
    """
    return [
        {
            "input_ids": row["prompt_ids"] + row["response_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["response_ids"],
        }
        for row in encoded
    ]


def encode_prompts(records: list[Prompt], tokenizer: Any, max_prompt_length: int):
    """Return rows {"prompt_ids", "record"}, without those that are too long; counted and refused as
    in `kept`.
    """
    return kept(encode(records, tokenizer, max_prompt_length), "prompts")


def kept(encoded: tuple[list[dict], Counter], what: str) -> list[dict[str, Any]]:
    """Return the rows of `encode`; what was dropped is counted on stderr. Raises UserError if all
    were.
    """
    rows, dropped = encoded
    reasons = reasons_of(dropped)
    if dropped and not rows:
        raise UserError(f"all {dropped.total()} {what} are dropped ({reasons}): raise the limit")
    if dropped:
        print(
            f"{dropped.total()} of {dropped.total() + len(rows)} {what} dropped ({reasons})",
            file=sys.stderr,
        )
    return rows
