"""Write a causal language model and its tokenizer as a GGUF file of llama.cpp, and Ollama's Modelfile
beside it.

Names of tensors and fields are those of the `gguf` package. What a file of each architecture holds
beyond names: rows of q and k of Llama are interleaved, those of Qwen are not; norms stay float32.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.model.from_gguf import llama3_divisors

# transformers' model_type, which is llama.cpp's name too
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# GGML's type: weights in one block, bytes of a block
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "Q8_0": (32, 34)}
ROLES = ("system", "user", "assistant")
# dialogues on which both templates have to give the same text
DIALOGUES = [
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    [*ROLES, *ROLES[1:], "user"],
]


def check_writable(config: Any, tokenizer: Any) -> None:
    """Raise UserError unless a model of this config, and this tokenizer, can be written as GGUF."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"a model of type '{kind}' is not written as GGUF, only: {', '.join(ARCHITECTURES)}. "
            "Take --to merged, and llama.cpp's convert_hf_to_gguf.py"
        )
    rope = config.rope_parameters
    faults = {
        f"rotary positions '{rope['rope_type']}'": rope["rope_type"] not in ("default", "llama3"),
        "positions in a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "biases in attention": getattr(config, "attention_bias", False),
        "biases in the MLP": getattr(config, "mlp_bias", False),
        "a sliding window": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        f"activation '{config.hidden_act}'": config.hidden_act != "silu",
    }
    found = [fault for fault, is_there in faults.items() if is_there]
    if found:
        raise UserError(f"a {kind} with {found[0]} is not written as GGUF. Take --to merged")
    splitting(tokenizer)


def write_gguf(path: Path, model: Any, tokenizer: Any, kind: str, name: str) -> None:
    """Write `model` to `path`, one tensor at a time; `kind` is f16 or q8_0, of the weights that are
    matrices.

    Raises UserError for numbers that float16 cannot hold; `check_writable` has been asked before.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    _add_settings(writer, config, kind, name)
    _add_tokenizer(writer, tokenizer, config.vocab_size)

    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, config.model_type.upper()), config.num_hidden_layers
    )
    # tied embeddings come once; llama.cpp takes them where the output head is missing
    weights: dict[str, Tensor] = {}
    for own, weight in model.named_parameters():
        weights[names.get_name(own, try_suffixes=(".weight", ".bias"))] = weight
    if config.rope_parameters["rope_type"] == "llama3":
        weights["rope_freqs.weight"] = llama3_divisors(config)

    # sizes are written before the numbers, so that one tensor at a time is held
    types = {given: _storage(weight, kind) for given, weight in weights.items()}
    for given, weight in weights.items():
        per_block, size = BLOCKS[types[given].name]
        count = weight.numel() // per_block * size
        writer.add_tensor_info(given, weight.shape, np.float32, count, raw_dtype=types[given])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for given, weight in weights.items():
        values = _layout(given, weight.detach().float().cpu(), config)
        if values.abs().max() > torch.finfo(torch.float16).max:
            raise UserError(f"{given}: numbers beyond float16, which GGUF stores. Take --to merged")
        writer.write_tensor_data(gguf.quants.quantize(values.numpy(), types[given]))
    writer.close()


def _storage(weight: Tensor, kind: str) -> Any:
    """Return GGML's type for a tensor: float32 for vectors, float16 for rows that are no whole
    number of blocks.
    """
    from gguf import GGMLQuantizationType

    if weight.dim() == 1:
        return GGMLQuantizationType.F32
    blocks, _ = BLOCKS["Q8_0"]
    is_whole = weight.shape[-1] % blocks == 0
    return GGMLQuantizationType["Q8_0" if kind == "q8_0" and is_whole else "F16"]


def _layout(name: str, weight: Tensor, config: Any) -> Tensor:
    """Return a tensor with its rows in llama.cpp's order.

    Its rotation of Llama turns neighbouring rows of a head together, transformers' row i and row
    i + size / 2.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = name.split(".")[-2]
    if config.model_type != "llama" or part not in heads:
        return weight
    halves = weight.reshape(heads[part], 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add_settings(writer: Any, config: Any, kind: str, name: str) -> None:
    import gguf

    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    file_types = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    settings = {
        "type": "model",
        "name": name,
        "file_type": gguf.LlamaFileType[file_types[kind]],
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head_size,
        "value_length": head_size,
        "rope_dimension_count": head_size,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    _add(writer, settings)


def _add(writer: Any, fields: dict[str, Any]) -> None:
    """Write fields of the head of a file by their names in the `gguf` package, in order."""
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)


def _add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Add vocabulary, merges, special tokens and chat template; the model has `rows` embeddings."""
    from gguf import TokenType

    # as the tokenizers library writes it: no public interface tells all of it
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = dict(state["model"]["vocab"])
    types = dict.fromkeys(words.values(), TokenType.NORMAL)
    for token in state["added_tokens"]:
        words[token["content"]] = token["id"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    by_id = {number: word for word, number in words.items()}
    # models round their vocabulary up
    listed, listed_types = [], []
    for number in range(rows):
        listed.append(by_id.get(number, f"[PAD{number}]"))
        listed_types.append(types.get(number, TokenType.UNUSED))
    # older tokenizer files have a merge as one text, newer ones as a pair
    merges = []
    for pair in state["model"]["merges"]:
        merges.append(pair if isinstance(pair, str) else " ".join(pair))

    fields = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": splitting(tokenizer),
        "token_list": listed,
        "token_types": listed_types,
        "token_merges": merges,
    }
    for role in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None:
            fields[f"{role}_token_id"] = number
    fields |= {
        "add_space_prefix": False,
        "add_bos_token": adds_bos(tokenizer),
        "chat_template": plain_template(tokenizer),
    }
    _add(writer, fields)


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts a BOS token before every text."""
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def plain_template(tokenizer: Any) -> str:
    """Return the chat template without the marks of what the assistant says, which transformers
    alone knows; white space around them is cut as before.
    """
    text = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", tokenizer.chat_template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", text)


def splitting(tokenizer: Any) -> str:
    """Return llama.cpp's name for how a byte-level BPE tokenizer splits text before it merges bytes.

    Raises UserError for other tokenizers: with a wrong name llama.cpp would read other tokens.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    step = state["pre_tokenizer"] or {"type": "none"}
    steps = list(map(_step, step.get("pretokenizers", [step])))
    whole_words = state["model"].get("ignore_merges")
    # patterns that end where bytes begin
    by_pattern = {
        GGUF_PRE_TOKENIZER_SPLITS["qwen2"]: "qwen2",
        GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]: "llama-bpe" if whole_words else "smaug-bpe",
    }
    found = None
    if steps == ["bytes of words"]:
        found = "gpt-2"
    elif steps == ["single digits", "bytes of words"]:
        found = "smollm"
    elif len(steps) == 2 and steps[1] == "bytes":
        found = by_pattern.get(steps[0])
    normalizer = (state["normalizer"] or {"type": "NFC"})["type"]
    # only llama-bpe takes whole words
    if whole_words and found != "llama-bpe":
        found = None
    if state["model"]["type"] != "BPE" or normalizer != "NFC" or found is None:
        steps_text = ", then ".join(steps)
        raise UserError(
            f"its tokenizer ({state['model']['type']}, split by {steps_text}, normalised by {normalizer}) cannot be "
            "written as GGUF. That takes byte-level BPE split as GPT-2, SmolLM, Qwen2 or Llama 3 do. Take --to merged"
        )
    return found


def _step(part: dict[str, Any]) -> str:
    """Return a name for one step of a pre-tokenizer: for a split its pattern."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return "bytes of words" if part["use_regex"] else "bytes"
    if part["type"] == "Digits" and part["individual_digits"]:
        return "single digits"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return part["pattern"].get("Regex", "a text")
    return part["type"]


def modelfile(file_name: str, tokenizer: Any, stops: list[int]) -> str:
    """Return a Modelfile for the GGUF file beside it. A chat template that cannot be said in Go's
    language is left out, with a warning: Ollama then goes by the one in the GGUF file, if it knows it.
    """
    lines = [f"FROM ./{file_name}"]
    template = go_template(tokenizer)
    if template is None:
        print(
            "warning: the chat template is not one that a Modelfile can say; check what Ollama makes of it with: "
            "ollama show --template",
            file=sys.stderr,
        )
    else:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{tokenizer.decode([token])}"' for token in stops]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Any) -> str | None:
    """Return the chat template as a Go template over .Messages, or None where it is not a text
    before and after each message.

    The texts are found by rendering dialogues; the result is compared with the original on others.
    """
    try:
        parts = _parts(tokenizer)
        for roles in DIALOGUES:
            dialogue = _dialogue(roles)
            if _written(parts, dialogue) != _rendered(tokenizer, dialogue, prompt=True):
                return None
    # a template may refuse a role, or begin with what was not rendered before
    except Exception:
        return None

    # llama.cpp writes it itself
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    parts["head"] = parts["head"].removeprefix(bos)
    before, after = parts["system"]
    parts["system"] = (before.removeprefix(bos), after)
    cases = []
    for role in ROLES:
        before, after = parts[role]
        cases.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ ')
    each = "{{ " + "else ".join(cases) + "end }}"
    head = '{{ if ne (index .Messages 0).Role "system" }}' + parts["head"] + "{{ end }}"
    template = head + "{{ range .Messages }}" + each + "{{ end }}" + parts["end"]
    for text in (
        parts["head"],
        parts["end"],
        *parts["system"],
        *parts["user"],
        *parts["assistant"],
    ):
        # what would end the template, or begin an action in it
        if "{{" in text or '"""' in text:
            return None
    return template


def _dialogue(roles: list[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": f"Text{number}"} for number, role in enumerate(roles)]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)


def _parts(tokenizer: Any) -> dict[str, Any]:
    """Return the text before and after a message of each role; "head" before a dialogue without a
    system message, "end" where the answer begins.
    """
    user, answer = {"role": "user", "content": "USER"}, {"role": "assistant", "content": "ANSWER"}
    system = {"role": "system", "content": "SYSTEM"}
    # what a further message adds is what stands around it
    once = _rendered(tokenizer, [user])
    answered = _rendered(tokenizer, [user, answer])
    twice = _rendered(tokenizer, [user, answer, user])
    parts: dict[str, Any] = {}
    parts["user"] = tuple(twice.removeprefix(answered).split("USER"))
    parts["assistant"] = tuple(answered.removeprefix(once).split("ANSWER"))
    as_user = "USER".join(parts["user"])
    parts["head"] = once.removesuffix(as_user)
    with_system = _rendered(tokenizer, [system, user]).removesuffix(as_user)
    parts["system"] = tuple(with_system.split("SYSTEM"))
    parts["end"] = _rendered(tokenizer, [user], prompt=True).removeprefix(once)
    return parts


def _written(parts: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """Return what the Go template of these parts writes."""
    text = "" if messages[0]["role"] == "system" else parts["head"]
    for message in messages:
        before, after = parts[message["role"]]
        text += before + message["content"] + after
    return text + parts["end"]
