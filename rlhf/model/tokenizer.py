"""Load a tokenizer with a pad token and a chat template; the token ids that end a response."""

from pathlib import Path
from typing import Any

from torch import nn

from rlhf.data.encode import PLAIN_TEMPLATE
from rlhf.errors import UserError
from rlhf.model.files import check_hub_name, check_tokenizer, loading
from rlhf.model.from_gguf import as_folder


def load_tokenizer(path: str) -> Any:
    """Return the tokenizer at `path`, with a pad token and a chat template. Raises UserError.

    Without a spare token in the vocabulary EOS pads: padding is known by the mask alone, never by
    its id.
    """
    from transformers import AutoTokenizer

    path = as_folder(path)
    if Path(path).is_dir():
        check_tokenizer(path)
    else:
        check_hub_name(path)
    with loading(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if len(tokenizer) <= 1:
        raise UserError(f"{path}: the tokenizer is empty")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so that no response could end")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _unused_token(tokenizer) or tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE

    # a template is a program: one that fails would fail at the first prompt of the run
    with loading(path, "chat template"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False
        )
    return tokenizer


def _unused_token(tokenizer: Any) -> str | None:
    # usual pad tokens first, then tokens that texts hold rarely or never
    vocabulary = tokenizer.get_vocab()
    names = [
        "<|pad|>",
        "<pad>",
        "[PAD]",
        "<|padding|>",
        "<|endoftext|>",
        "<|finetune_right_pad_id|>",
        "<|fim_pad|>",
    ]
    names += ["<unk>", *sorted(t for t in vocabulary if "reserved" in t or "unused" in t)]
    return next(
        (name for name in names if name in vocabulary and name != tokenizer.eos_token), None
    )


def stop_ids(tokenizer: Any, model: nn.Module | None = None) -> list[int]:
    """Return the token ids that end a response: the tokenizer's EOS and those the model's
    generation config adds.
    """
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    # one id, a list of them, or None
    more = more if isinstance(more, list) else [more]
    return sorted({tokenizer.eos_token_id, *more} - {None})
