"""Models and tokenizers written as GGUF, read back by transformers."""

import copy
import json

import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf.errors import UserError
from rlhf.export import gguf_file
from rlhf.export.gguf_file import check_writable, plain_template, splitting, write_gguf
from rlhf.model.from_gguf import read_gguf
from tests.model.test_from_gguf import LLAMA3, SIZES, interleaved

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
IDS = torch.tensor([[5, 17, 200, 3, 44, 90, 7, 7, 310, 12]])
TEXT = "Where is  my 12th parcel?\n\n<|im_start|>It's caf\u00e9 time!"


def model_of(kind, tokenizer, **more):
    """A tiny model with more rows than tokens, whose weights float16 can hold."""
    config_class, model_class = KINDS[kind]
    settings = SIZES | {"vocab_size": len(tokenizer) + 3, "tie_word_embeddings": True} | more
    if kind == "qwen3":
        settings["head_dim"] = 16
    torch.manual_seed(0)
    model = model_class(config_class(**settings)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # norms and biases too
            noise = 0.1 * torch.randn_like(weight) if weight.dim() == 1 else 0.0
            weight.copy_((weight + noise).half().float())
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "head_dim": 16}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {}),
    ],
)
def test_float16_gives_the_same_logits_and_ids(kind, more, tokenizer, tmp_path):
    model = model_of(kind, tokenizer, **more)
    write_gguf(tmp_path / "a.gguf", model, tokenizer, "f16", "tiny")
    again, its_tokenizer = read_gguf(tmp_path / "a.gguf")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    assert again.config.rope_parameters == model.config.rope_parameters
    assert again.config.max_position_embeddings == 256

    assert its_tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert its_tokenizer.eos_token_id == tokenizer.eos_token_id
    assert its_tokenizer.pad_token_id == tokenizer.pad_token_id
    # rows without a token have a name
    assert its_tokenizer.convert_ids_to_tokens(len(tokenizer) + 2) == f"[PAD{len(tokenizer) + 2}]"


def test_blocks_of_8_bits_are_within_half_a_step(tokenizer, tmp_path):
    model = model_of("qwen3", tokenizer)
    write_gguf(tmp_path / "a.gguf", model, tokenizer, "q8_0", "tiny")
    again, _ = read_gguf(tmp_path / "a.gguf")
    for (name, weight), (_, found) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        if weight.dim() == 1:
            assert torch.equal(weight, found), name
            continue
        blocks = weight.detach().reshape(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        gaps = (blocks - found.detach().reshape(-1, 32)).abs()
        # the step itself is rounded to float16: 127 steps times 2^-11 more
        assert (gaps <= step * (0.5 + 127 / 2048) + 1e-7).all(), name
        assert gaps.max() > 0


def test_rows_of_llama_are_interleaved_and_those_of_qwen_are_not(tokenizer, tmp_path):
    for kind in ("llama", "qwen2"):
        model = model_of(kind, tokenizer)
        write_gguf(tmp_path / f"{kind}.gguf", model, tokenizer, "f16", "tiny")
        tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}
        own = model.model.layers[1].self_attn.k_proj.weight.detach()
        expected = interleaved(own, heads=2) if kind == "llama" else own
        assert torch.equal(torch.tensor(tensors["blk.1.attn_k.weight"]).float(), expected)


def test_fields_that_llama_cpp_requires_are_there(tokenizer, tmp_path):
    write_gguf(tmp_path / "a.gguf", model_of("qwen3", tokenizer), tokenizer, "q8_0", "tiny")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    found = {name: field.contents() for name, field in fields.items()}
    assert found["general.architecture"] == "qwen3"
    assert found["general.file_type"] == 7
    assert found["qwen3.attention.key_length"] == found["qwen3.attention.value_length"] == 16
    assert found["qwen3.attention.head_count"] == 4 and found["qwen3.attention.head_count_kv"] == 2
    assert found["qwen3.rope.freq_base"] == 10000.0
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    # control for special tokens, normal, unused
    types = found["tokenizer.ggml.token_type"]
    assert types[: len(special(tokenizer))] == [3] * 3 and types[3] == 1 and types[-3:] == [5] * 3
    assert "generation %}" not in found["tokenizer.chat_template"]


def special(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]


def test_a_template_without_the_marks_of_the_assistant_renders_the_same(tokenizer):
    turns = [{"role": role, "content": f"{role} text"} for role in ("user", "assistant", "user")]
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = plain_template(tokenizer)
    assert plain.chat_template != tokenizer.chat_template
    for prompt in (False, True):
        texts = [
            made.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
            for made in (plain, tokenizer)
        ]
        assert texts[0] == texts[1]


def test_numbers_beyond_float16_are_refused(tokenizer, tmp_path):
    model = model_of("llama", tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 70000.0
    with pytest.raises(UserError, match=r"blk.0.ffn_up.weight: numbers beyond float16"):
        write_gguf(tmp_path / "a.gguf", model, tokenizer, "f16", "tiny")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(), "a model of type 'mistral' is not written as GGUF, only: llama, qwen2"),
        (LlamaConfig(attention_bias=True), "a llama with biases in attention"),
        (LlamaConfig(mlp_bias=True), "a llama with biases in the MLP"),
        (LlamaConfig(hidden_act="gelu"), "activation 'gelu'"),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0}), "'linear'"),
        (Qwen2Config(use_sliding_window=True, max_window_layers=1), "a sliding window"),
    ],
)
def test_other_models_are_refused_by_name(config, message, tokenizer):
    with pytest.raises(UserError, match=message):
        check_writable(config, tokenizer)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split_by(pattern):
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, BYTES])


def patterns():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return PRETOKENIZE_REGEX, llama3


def test_how_text_is_split_has_the_names_of_llama_cpp(tokenizer):
    made = copy.deepcopy(tokenizer)
    backend = made.backend_tokenizer
    assert splitting(made) == "gpt-2"
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    assert splitting(made) == "smollm"
    qwen2, llama3 = patterns()
    backend.pre_tokenizer = split_by(qwen2)
    backend.normalizer = normalizers.NFC()
    assert splitting(made) == "qwen2"
    backend.pre_tokenizer = split_by(llama3)
    assert splitting(made) == "smaug-bpe"
    backend.model.ignore_merges = True
    assert splitting(made) == "llama-bpe"


def test_a_way_to_split_text_without_a_name_is_refused(tokenizer):
    made = copy.deepcopy(tokenizer)
    backend = made.backend_tokenizer
    backend.pre_tokenizer = split_by(r"\p{N}{1,2}")
    with pytest.raises(UserError, match="split as GPT-2, SmolLM, Qwen2 or Llama 3 do"):
        splitting(made)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(UserError, match="split by Metaspace"):
        splitting(made)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="normalised by Lowercase"):
        splitting(made)


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe"])
def test_splitting_survives_the_file(kind, tokenizer, tmp_path):
    made = copy.deepcopy(tokenizer)
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    else:
        made.backend_tokenizer.pre_tokenizer = split_by(patterns()[1])
        made.backend_tokenizer.model.ignore_merges = True
    write_gguf(tmp_path / "a.gguf", model_of("llama", made), made, "f16", "tiny")
    _, again = read_gguf(tmp_path / "a.gguf")
    assert again(TEXT).input_ids == made(TEXT).input_ids
    assert gguf_file.splitting(again) == kind
