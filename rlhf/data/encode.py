"""Text to token ids, the same for every stage: prompt ids, then response ids that end in EOS, and nothing after.

What SFT imitates, what DPO compares and what the reward model learns from are encoded here, in the form in which the
policy samples; scorers of a running policy read its ids as they are. A model without a chat template gets
`PLAIN_TEMPLATE`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rlhf.config import UserError
from rlhf.data.records import Instruction, Message, Preference, Prompt, digest

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


def encode_prompt(tokenizer: Any, prompt: list[Message]) -> list[int]:
    """Ids of the prompt up to where the assistant begins; special tokens typed by a user stay plain text."""
    return list(
        tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False, tokenize=True, sanitize_control_tokens=True
        )
    )


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


def encode_instructions(records: list[Instruction], tokenizer: Any, max_prompt_length: int, max_response_length: int):
    """Rows {"input_ids", "labels"} for SFT: the loss is on the response and its EOS alone (labels -100 before)."""
    rows, dropped = [], 0
    for record in records:
        prompt, response = encode_prompt(tokenizer, record.prompt), encode_response(tokenizer, record.response)
        if len(prompt) > max_prompt_length or len(response) > max_response_length:
            dropped += 1
            continue
        rows.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    return _kept(rows, dropped, "instructions", max_prompt_length, max_response_length)


def encode_preferences(records: list[Preference], tokenizer: Any, max_prompt_length: int, max_response_length: int):
    """Rows {"prompt_ids", "chosen_ids", "rejected_ids", "record"}; chosen and rejected are responses with EOS."""
    rows, dropped = [], 0
    for record in records:
        prompt = encode_prompt(tokenizer, record.prompt)
        chosen = encode_response(tokenizer, record.chosen, record.chosen_ended)
        rejected = encode_response(tokenizer, record.rejected, record.rejected_ended)
        if len(prompt) > max_prompt_length or max(len(chosen), len(rejected)) > max_response_length:
            dropped += 1
            continue
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "record": record})
    return _kept(rows, dropped, "preferences", max_prompt_length, max_response_length)


def encode_prompts(records: list[Prompt], tokenizer: Any, max_prompt_length: int):
    """Rows {"prompt_ids", "record"}, without those that are too long."""
    rows, dropped = [], 0
    for record in records:
        prompt = encode_prompt(tokenizer, record.prompt)
        if len(prompt) > max_prompt_length:
            dropped += 1
            continue
        rows.append({"prompt_ids": prompt, "record": record})
    return _kept(rows, dropped, "prompts", max_prompt_length, None)


def _kept(rows: list, dropped: int, what: str, max_prompt_length: int, max_response_length: int | None) -> list:
    limits = f"max_prompt_length {max_prompt_length}"
    limits += f" and max_response_length {max_response_length}" if max_response_length else ""
    if not rows and dropped:
        raise UserError(f"all {dropped} {what} are longer than {limits} tokens: raise the limit")
    if dropped:
        print(f"{dropped} of {dropped + len(rows)} {what} dropped: longer than {limits} tokens", file=sys.stderr)
    return rows
