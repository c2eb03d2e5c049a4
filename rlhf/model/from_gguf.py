"""Read a model from a GGUF file, the format of llama.cpp, and keep it as a folder that every
program loads.

    RLHF_CACHE/gguf/<hash of the file>/    config.json, model.safetensors, tokenizer.json, ...

transformers does the reading; what it leaves out without a word is put right here, or refused.
"""

import copy
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.files import cache_folder
from rlhf.model.files import gguf_file, loading
from rlhf.model.weight_files import check_gguf

# counted up when a file is converted in another way than before
CONVERSION = 1
# vocabularies whose digits are cut apart before GPT-2's pattern (llama.cpp, llama-vocab.cpp)
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
PLAIN_GPT2 = ("gpt-2", "gpt2", "phi-2", "jais", "mpt", "olmo", "trillion")
# these take a word that is a token as it is, without merging its parts
IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3")


def as_folder(path: str) -> str:
    """Return the folder to load for a model's path: the path itself, unless it is a GGUF file, or a
    folder with one and no other model; then the folder that the file was converted to.

    Converts it at the first call. Raises UserError where the file is missing or cannot be read.
    """
    file = gguf_file(path)
    if file is None:
        return path
    folder = _folder_of(file)
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # one process converts, the others wait for it; the lock goes with the process that holds it
    with open(folder.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            print(f"{file}: converted once, into {folder}", file=sys.stderr, flush=True)
            _convert(file, folder)
    return str(folder)


def is_unconverted(path: str) -> bool:
    """Return whether `as_folder` would convert a file first, all of it in memory."""
    file = gguf_file(path)
    return file is not None and not _folder_of(file).is_dir()


def _folder_of(file: Path) -> Path:
    """Return where a file is converted to."""
    status = file.stat()
    content = _hash(file.resolve(), status.st_size, status.st_mtime_ns)
    return cache_folder() / "gguf" / f"{content}-{CONVERSION}"


# a start asks for tokenizer and weights; the file is read for it once
@functools.lru_cache
def _hash(file: Path, size: int, changed: int) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


def _convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file into a folder, whole or not at all. The weights are float32,
    since a block of quantised ones has values that no shorter type holds.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    # of a process that was killed
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model, tokenizer = read_gguf(file)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for written in temporary.iterdir():
            with open(written, "rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_gguf(file: Path) -> tuple[Any, Any]:
    """Return the causal language model of a GGUF file, in float32 on the CPU, and its tokenizer.

    A pad token that is EOS is taken away. Raises UserError where the architecture, the positions or
    the tensors are such that transformers would refuse the file or load another model than it holds.
    """
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    check_gguf(file)
    with loading(str(file), "GGUF file"):
        reader = gguf.GGUFReader(file)
        metadata = {name: field for name, field in reader.fields.items() if "." in name}
        architecture = metadata["general.architecture"].contents()
    _check_architecture(file, architecture)
    if "split.count" in metadata and metadata["split.count"].contents() > 1:
        raise UserError(f"{file}: one of several parts. Join them with: llama-gguf-split --merge")

    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with loading(str(file), "settings"):
        config = AutoConfig.from_pretrained(**place)
    head_size = metadata.get(f"{architecture}.attention.key_length")
    # transformers would take its default for Qwen3
    if head_size is not None and hasattr(config, "head_dim"):
        config.head_dim = head_size.contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _restore_rope(file, config, tensors.pop("rope_freqs.weight", None), metadata)

    with loading(str(file), "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            **place, config=config, dtype=torch.float32, output_loading_info=True
        )
    held = sum(int(tensor.n_elements) for tensor in tensors.values())
    expected = sum(weight.numel() for weight in model.parameters())
    if held != expected or info["missing_keys"]:
        raise UserError(
            f"{file}: {held} weights, but {type(model).__name__} of these settings has {expected}. transformers reads "
            "only a part of this kind of model from GGUF. Take its safetensors"
        )
    # save_pretrained refuses a model that says it is quantised
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)

    with loading(str(file), "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**place)
    if metadata["tokenizer.ggml.model"].contents() == "gpt2":
        tokenizer = _byte_level(file, tokenizer, metadata)
    # such files name EOS, for want of a better one; a pad token is chosen when it is loaded
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = None
        for settings in (model.config, model.generation_config):
            settings.pad_token_id = None
    return model.eval(), tokenizer


def _check_architecture(file: Path, architecture: str) -> None:
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = sorted({*GGUF_CONFIG_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"})
    # their names in GGUF files
    spelled = {name.replace("_", ""): name for name in known}
    if architecture.replace("-", "").replace("_", "") not in spelled:
        raise UserError(
            f"{file}: transformers does not read architecture '{architecture}' from GGUF. Take the model's "
            f"safetensors. It reads: {', '.join(known)}"
        )


def _restore_rope(file: Path, config: Any, factors: Any, metadata: dict[str, Any]) -> None:
    """Put the scaling of rotary positions into a config: transformers reads none from GGUF.

    factors: what the frequencies are divided by, (head size / 2,), as the models of Llama 3.1 to
    3.3 have it, or None. Raises UserError for any other scaling.
    """
    # gpt-oss is the one whose scaling transformers reads
    kinds = [field for name, field in metadata.items() if name.endswith(".rope.scaling.type")]
    kind = kinds[0].contents() if kinds and config.model_type != "gpt_oss" else "none"
    if factors is None and kind == "none":
        return
    if factors is not None and kind == "none":
        scaling = {
            "rope_type": "llama3",
            "rope_theta": config.rope_parameters["rope_theta"],
            "factor": float(factors.data.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config.rope_parameters = scaling
        found = torch.from_numpy(factors.data.copy())
        if torch.allclose(llama3_divisors(config), found, rtol=1e-4):
            return
        kind = "by factors other than Llama 3's"
    raise UserError(
        f"{file}: its rotary positions are scaled ({kind}), which cannot be read from GGUF. Take its safetensors"
    )


def llama3_divisors(config: Any) -> Tensor:
    """Return what a config with rope type llama3 divides the frequencies by, (head size / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies = ROPE_INIT_FUNCTIONS["llama3"]
    scaled, _ = frequencies(config, "cpu")
    plain_config = copy.deepcopy(config)
    # a factor of 1 scales nothing
    plain_config.rope_parameters = {**config.rope_parameters, "factor": 1.0}
    plain, _ = frequencies(plain_config, "cpu")
    return plain / scaled


def _byte_level(file: Path, tokenizer: Any, metadata: dict[str, Any]) -> Any:
    """Return a byte-level tokenizer with the tokens of the file alone, which splits text before it
    merges bytes as the vocabulary expects. transformers adds tokens of GPT-2, and splits as GPT-2.

    Says so where the file names a way to split that is not known.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    field = metadata.get("tokenizer.ggml.pre")
    pre = field.contents() if field else "none"
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = set(metadata["tokenizer.ggml.tokens"].contents())
    added = [token for token in state["added_tokens"] if token["content"] in vocabulary]
    backend = Tokenizer.from_str(json.dumps({**state, "added_tokens": added}))
    if pre in SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    elif pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    elif pre in IGNORE_MERGES:
        backend.model.ignore_merges = True
    elif pre not in (*PLAIN_GPT2, *GGUF_PRE_TOKENIZER_SPLITS):
        print(
            f"warning: {file}: its way to split text ('{pre}') is not known; text is split as GPT-2 does, which may "
            "give other tokens than the model was trained on",
            file=sys.stderr,
        )

    special = tokenizer.special_tokens_map
    kept = {name: token for name, token in special.items() if token in vocabulary}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **kept,
    )
