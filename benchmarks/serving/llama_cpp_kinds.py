"""Tiny random models of every kind that is written as GGUF, in llama.cpp itself.

    python -m benchmarks.serving.llama_cpp_kinds

One line for each kind and way to split text: what `llama_cpp.measure` says of ten prompts, and at
how many texts llama.cpp's tokenizer gives the ids of the original.
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers, pre_tokenizers

from benchmarks.serving import llama_cpp
from rlhf.export.check import PROMPTS, greedy_answers
from rlhf.export.gguf_file import splitting, write_gguf
from rlhf.startup import silence_libraries
from tests.conftest import make_tokenizer
from tests.export.test_gguf_file import KINDS, patterns, split_by
from tests.model.test_from_gguf import LLAMA3

CASES = [
    ("llama", {}, "gpt-2"),
    ("llama", {}, "smollm"),
    ("llama", {"rope_parameters": LLAMA3}, "llama-bpe"),
    ("llama", {"tie_word_embeddings": False}, "smaug-bpe"),
    ("qwen2", {}, "qwen2"),
    ("qwen3", {}, "qwen2"),
]
TEXTS = (
    *PROMPTS,
    "a  12  345\n\n\nx",
    "it's IT'S we'Ll 1234567 éü ¡hola!",
    "  before and after  ",
    "tab\there\r\nnew",
    "def f(x):\n    return x**2  # 100%",
    "日本語のテキスト 123",
    "<|im_start|>user\nhi<|im_end|>",
)


def tokenizer_that_splits(name: str) -> Any:
    """Return a tiny tokenizer that splits text as llama.cpp does under this name."""
    tokenizer = copy.deepcopy(make_tokenizer())
    backend = tokenizer.backend_tokenizer
    qwen2, llama3 = patterns()
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    elif name == "qwen2":
        backend.pre_tokenizer = split_by(qwen2)
        backend.normalizer = normalizers.NFC()
    elif name != "gpt-2":
        backend.pre_tokenizer = split_by(llama3)
        backend.model.ignore_merges = name == "llama-bpe"
    assert splitting(tokenizer) == name
    return tokenizer


def random_model(kind: str, tokenizer: Any, more: dict[str, Any]) -> torch.nn.Module:
    """Return a model whose rows are whole blocks and whose weights float16 holds."""
    config_class, model_class = KINDS[kind]
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, head_dim=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    ids = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    if kind == "qwen2":
        del sizes["head_dim"]
    torch.manual_seed(1)
    rows = len(tokenizer) + 3
    tied = {"tie_word_embeddings": True} | more
    model = model_class(
        config_class(vocab_size=rows, initializer_range=0.15, **sizes, **heads, **ids, **tied)
    ).eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = 0.1 * torch.randn_like(weight) if weight.dim() == 1 else 0.0
            weight.copy_((weight + noise).half().float())
    return model


def main() -> None:
    """Print one line of JSON for each case."""
    silence_libraries()
    llama_cpp.fetch()
    for kind, more, name in CASES:
        tokenizer = tokenizer_that_splits(name)
        model = random_model(kind, tokenizer, more)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{kind}-{name}.gguf"
            write_gguf(file, model, tokenizer, "f16", "tiny")
            found = llama_cpp.measure(file, greedy_answers(model, tokenizer, len(PROMPTS)))
            server = llama_cpp.LlamaCpp(file)
            same = sum(server.ids(text) == tokenizer(text).input_ids for text in TEXTS)
            # it listens on one port
            del server
        print(json.dumps({**found, "texts_equal": same, "texts": len(TEXTS)}), flush=True)


if __name__ == "__main__":
    main()
