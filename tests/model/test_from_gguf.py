"""GGUF files written tensor by tensor, as llama.cpp's converter lays them out, read as a base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rlhf.errors import UserError
from rlhf.files import cache_folder
from rlhf.model import from_gguf
from rlhf.model.adapters import load_adapter
from rlhf.model.files import adapter_base
from rlhf.model.loading import load_model, write_identity
from tests.conftest import random_adapter

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")

SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_model(tokenizer, seed=0, **more):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), **SIZES | dict(tie_word_embeddings=True) | more)
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    return LlamaForCausalLM(config).eval()


def interleaved(weight, heads):
    """Rows of q or k as llama.cpp has them: row i of each half of a head becomes rows 2 i, 2 i + 1."""
    rows = []
    for head in weight.split(len(weight) // heads):
        first, second = head.chunk(2)
        for pair in zip(first, second, strict=True):
            rows += pair
    return torch.stack(rows)


def write_gguf(path, model, tokenizer, arch="llama", pre="gpt-2", pad=None, tensors=None, **more):
    """Write a model as GGUF in float32: more fields as keywords with '__' for '.'."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    else:
        writer.add_key_length(config.head_dim)
    for name, value in more.items():
        writer.add_string(name.replace("__", "."), value)

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {**backend["model"]["vocab"], **tokenizer.get_added_vocab()}
    special = {token["content"] for token in backend["added_tokens"]}
    words = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id if pad is None else pad)
    writer.add_chat_template(tokenizer.chat_template)

    for name, weight in model.named_parameters():
        part, _, end = name.rpartition(".")
        if part.startswith("model.layers."):
            number, _, inner = part.removeprefix("model.layers.").partition(".")
            part = f"blk.{number}.{NAMES[inner]}"
        else:
            part = NAMES[part]
        if arch == "llama" and part.endswith("attn_q"):
            weight = interleaved(weight, config.num_attention_heads)
        if arch == "llama" and part.endswith("attn_k"):
            weight = interleaved(weight, config.num_key_value_heads)
        writer.add_tensor(f"{part}.{end}", weight.detach().numpy())
    for name, weight in (tensors or {}).items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture
def tiny(tokenizer, tmp_path):
    """A tiny Llama and its GGUF file, alone in a folder."""
    model = llama_model(tokenizer)
    (tmp_path / "models").mkdir()
    return model, write_gguf(tmp_path / "models" / "tiny.gguf", model, tokenizer)


IDS = torch.tensor([[5, 17, 200, 3, 44, 90, 7, 7, 310]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_gguf_file_gives_the_logits_and_ids_of_its_original(tiny, tokenizer):
    model, path = tiny
    initial = load_model(path)
    torch.testing.assert_close(logits(initial.model), logits(model), atol=1e-6, rtol=1e-6)
    text = "where is my parcel?  It has 24 parts<|im_end|>"
    assert initial.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert initial.tokenizer.chat_template == tokenizer.chat_template
    assert initial.tokenizer.eos_token == "<|im_end|>"
    # the file says EOS; <|pad|> is free
    assert initial.tokenizer.pad_token == "<|pad|>"
    assert (
        json.loads((Path(initial.model.name_or_path) / "config.json").read_text())["pad_token_id"]
        is None
    )
    assert initial.base_path == path


def test_the_second_load_and_the_folder_use_what_was_converted(tiny, monkeypatch, capfd):
    _, path = tiny
    first = load_model(path)
    assert capfd.readouterr().err.count("converted once") == 1
    monkeypatch.setattr(from_gguf, "read_gguf", lambda file: pytest.fail("converted again"))
    folder = path.removesuffix("/tiny.gguf")
    assert load_model(folder).fingerprint == first.fingerprint
    assert "converted" not in capfd.readouterr().err


def test_a_conversion_that_fails_leaves_nothing(tiny, monkeypatch):
    def stop(self, folder, **options):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            load_model(tiny[1])
    assert [file.name for file in (cache_folder() / "gguf").iterdir()] == ["lock"]

    # of a process that was killed before it could clean up
    rest = cache_folder() / "gguf" / f"{Path(load_model(tiny[1]).model.name_or_path).name}.tmp"
    shutil.rmtree(rest.with_suffix(""))
    rest.mkdir()
    (rest / "rest.json").write_text("{}")
    assert not (Path(load_model(tiny[1]).model.name_or_path) / "rest.json").exists()


def test_another_content_under_the_same_name_is_converted_anew(tiny, tokenizer):
    first = load_model(tiny[1]).fingerprint
    write_gguf(tiny[1], llama_model(tokenizer, seed=1), tokenizer)
    assert load_model(tiny[1]).fingerprint != first


def test_an_adapter_on_a_gguf_base_survives_the_cache(tiny, tmp_path):
    """PEFT finds the converted folder in adapter_config.json; rlhf.json names the file."""
    initial = load_model(tiny[1])
    converted = initial.model.config.name_or_path
    random_adapter(converted, tmp_path / "sft", seed=3, identity=False)
    write_identity(tmp_path / "sft", initial)
    assert adapter_base(str(tmp_path / "sft")) == converted

    with_adapter = logits(load_adapter(initial.model, str(tmp_path / "sft")))
    shutil.rmtree(converted)
    again = load_model(str(tmp_path / "sft"))
    assert again.base_path == tiny[1]
    torch.testing.assert_close(
        logits(load_adapter(again.model, str(tmp_path / "sft"))), with_adapter, atol=0, rtol=0
    )


def test_head_size_of_qwen3_is_read(tokenizer, tmp_path):
    """transformers would take 128, its default."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), head_dim=16, tie_word_embeddings=False, **SIZES)
    model = Qwen3ForCausalLM(config).eval()
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, arch="qwen3", pre="qwen2")
    loaded = load_model(path)
    torch.testing.assert_close(logits(loaded.model), logits(model), atol=1e-6, rtol=1e-6)
    # é as e and an accent; Qwen's tokenizer composes it
    assert loaded.tokenizer("e\u0301").input_ids == loaded.tokenizer("\u00e9").input_ids


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_scaled_positions_of_llama_3_are_restored(tokenizer, tmp_path):
    # heads of 8: frequencies 500000^(-j/4); wavelengths 2 pi 26.6^j = 6.3, 167, 4443, 118143.
    # Below 8192 / 4: as it was; above 8192: divided by 8; between: smooth = (8192 / 4443 - 1) / 3
    # = 0.28128, divided by 1 / (0.71872 / 8 + 0.28128) = 2.6945
    model = llama_model(tokenizer, rope_parameters=LLAMA3)
    factors = torch.tensor([1.0, 1.0, 2.6945, 8.0])
    path = write_gguf(
        tmp_path / "a.gguf",
        model,
        tokenizer,
        tensors={"rope_freqs.weight": factors},
    )
    with pytest.raises(UserError, match="by factors other than Llama 3's"):
        load_model(
            write_gguf(
                tmp_path / "b.gguf", model, tokenizer, tensors={"rope_freqs.weight": factors * 2}
            )
        )
    found = load_model(path).model.config.rope_parameters
    assert found == LLAMA3


def test_digits_are_split_where_the_vocabulary_was_made_so(tokenizer, tmp_path):
    model = llama_model(tokenizer)
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, pre="smollm")
    pieces = load_model(path).tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    # GPT-2's pattern alone would cut "a", " ", " 12"
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]


def test_an_unknown_way_to_split_text_is_said(tokenizer, tmp_path, capfd):
    load_model(write_gguf(tmp_path / "t.gguf", llama_model(tokenizer), tokenizer, pre="strange"))
    assert "('strange') is not known" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "rwkv6"}, "does not read architecture 'rwkv6' from GGUF.*llama"),
        ({"llama__rope__scaling__type": "yarn"}, r"rotary positions are scaled \(yarn\)"),
        ({"tensors": {"blk.0.attn_q.bias": torch.ones(32)}}, "transformers reads only a part"),
    ],
)
def test_what_transformers_would_read_wrongly_is_refused(tokenizer, tmp_path, settings, message):
    model = llama_model(tokenizer)
    path = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, **settings)
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_bad_paths_have_a_remedy(tiny, tmp_path):
    path = tiny[1]
    with pytest.raises(UserError, match=r"tiny2.gguf: no such file. Did you mean .*tiny.gguf"):
        load_model(path.replace("tiny.gguf", "tiny2.gguf"))
    shutil.copy(path, path.replace("tiny.gguf", "other.gguf"))
    with pytest.raises(UserError, match=r"2 GGUF files \(other.gguf, tiny.gguf\). Name one"):
        load_model(str(tmp_path / "models"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUFxyz")
    with pytest.raises(UserError, match=r"cut.gguf: no GGUF file could be loaded"):
        load_model(str(tmp_path / "cut.gguf"))


def test_without_the_library_the_extra_is_named(tiny, monkeypatch):
    import sys

    from rlhf.program import user_error

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError) as raised:
        load_model(tiny[1])
    assert "pip install 'rlhf[gguf]'" in str(user_error(raised.value))
