"""Tokenizer, base model and adapters: loading, naming by fingerprint, saving.

A path is one of three things, and every stage takes any of them as `model_name_or_path`:
a Hub name or folder with whole weights; a folder with an adapter (its base is read from it); a finished run of ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import UserError, near_file, read_yaml
from rlhf.data.encode import PLAIN_TEMPLATE, tokenizer_fingerprint
from rlhf.tensors import selected_logprobs

IDENTITY_FILE = "rlhf.json"  # beside every adapter: what it was trained on, checked when it is loaded
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Foundation:
    """A base model without adapters, its tokenizer, and the adapter folder (if any) that stands on it."""

    model: nn.Module  # a causal language model, on the CPU, in eval mode
    tokenizer: Any
    path: str
    base_path: str
    adapter_path: str | None
    fingerprint: str


def load_foundation(path: str, dtype: str = "float32", attn_implementation: str | None = None) -> Foundation:
    """Load what stands at `path`; an adapter's base is checked against the fingerprint the adapter carries.

    Raises UserError when there is nothing to load, the tokenizer is missing or unusable, or the base is another one.
    """
    from transformers import AutoModelForCausalLM

    adapter_path = path if (Path(path) / "adapter_config.json").is_file() else None
    base_path = adapter_base(adapter_path) if adapter_path else path
    tokenizer = load_tokenizer(path)
    named = f" It is the 'base_model_name_or_path' of {adapter_path}/adapter_config.json." if adapter_path else ""
    model = load_weights(AutoModelForCausalLM, base_path, dtype, attn_implementation, path, named)
    print_fingerprint = fingerprint(model)
    if adapter_path:
        expected = read_identity(adapter_path).get("base_fingerprint")
        if expected and expected != print_fingerprint:
            raise UserError(
                f"{adapter_path}: this adapter was trained on a base with fingerprint {expected}, but {base_path} has "
                f"{print_fingerprint}. Point 'base_model_name_or_path' in its adapter_config.json to the right base."
            )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{model.get_input_embeddings().num_embeddings} embeddings; they do not belong together"
        )
    return Foundation(model, tokenizer, path, base_path, adapter_path, print_fingerprint)


def load_weights(
    cls: Any, path: str, dtype: str, attn_implementation: str | None, run: str | None = None, more: str = ""
) -> nn.Module:
    """Load a whole model by one of transformers' Auto classes, on the CPU and in eval mode.

    attn_implementation: None takes what the run in the folder `run` was given, where this machine has it, else
    transformers' own choice: sdpa where the model has it, eager elsewhere.

    Raises UserError, with `more` at its end, when nothing can be loaded, and when tensors of the files and of the model
    do not fit: transformers would draw the missing ones at random and leave out the others.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    wanted = attn_implementation or (attention_of(run) if run else None)
    try:
        model, info = cls.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            attn_implementation=wanted,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except ImportError as error:
        found = f"attn_implementation {wanted} cannot be used here ({_first_line(error)})"
        if attn_implementation or not wanted:
            raise UserError(f"{path}: {found}. Choose another, for example: --attn_implementation sdpa") from None
        print(f"{run}: {found}; taking transformers' own choice", file=sys.stderr)
        return load_weights(cls, path, dtype, None, more=more)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no model could be loaded ({_first_line(error)}).{more}") from None
    faults = {
        "missing": info["missing_keys"],
        "without a place": info["unexpected_keys"],
        "of another shape": [f"{name} {tuple(had)} for {tuple(own)}" for name, had, own in info["mismatched_keys"]],
    }
    said = [f"{len(names)} {what} ({_some(names)})" for what, names in faults.items() if names]
    if said:
        raise UserError(
            f"{path}: its tensors do not fit {type(model).__name__}: {'; '.join(said)}. They belong to another "
            f"config.json or kind of model, or were saved through a wrapper (torch.compile, DDP).{more}"
        )
    return model.eval()


def _some(names: Iterable[str], count: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def attention_of(path: str) -> str | None:
    """The attn_implementation that the run at `path` (or the run of this checkpoint) was given; None for any other."""
    folder = Path(path)
    for place in (folder, folder.parent.parent):
        if (place / "config.yaml").is_file():
            return read_yaml(place / "config.yaml").get("attn_implementation")
    return None


def context_length(config: Any) -> int | None:
    """Tokens that a model's positions reach, prompt and response together; None where nothing limits them.

    Learned positions end there, and rotary ones were not trained beyond. The factor of a scaling of the rotary
    positions counts, unless max_position_embeddings holds it already (always with llama3 and longrope). A sliding
    window is no limit.
    """
    config = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")
    limit = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    if limit is None or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    by_type_of_layer = [part for part in rope.values() if isinstance(part, dict)]
    lengths = [limit]
    for scaling in by_type_of_layer or [rope]:
        if scaling.get("rope_type") in ("linear", "dynamic", "yarn"):
            lengths.append(int(scaling["factor"] * (scaling.get("original_max_position_embeddings") or limit)))
    return max(lengths)


def check_context(model: nn.Module, path: str, max_prompt_length: int, max_response_length: int) -> None:
    """Raise UserError where a prompt and a response of the greatest lengths go beyond the model's positions."""
    limit, asked = context_length(model.config), max_prompt_length + max_response_length
    if limit is not None and asked > limit:
        raise UserError(
            f"max_prompt_length {max_prompt_length} + max_response_length {max_response_length} = {asked} tokens, but "
            f"{path} has positions for {limit}. Lower one of them"
        )


def adapter_base(adapter_path: str) -> str:
    """The base an adapter folder names; a relative path is tried from here, from the folder and from those above it, so
    that a run loads from wherever it is called."""
    config = json.loads((Path(adapter_path) / "adapter_config.json").read_text())
    base = config.get("base_model_name_or_path") or ""
    if not base:
        raise UserError(f"{adapter_path}/adapter_config.json names no 'base_model_name_or_path'")
    if Path(base).exists():
        return base
    folder = Path(adapter_path).resolve()
    return next((str(above / base) for above in (folder, *folder.parents) if (above / base).is_dir()), base)


def load_tokenizer(path: str) -> Any:
    """The tokenizer at `path`, with a pad token and a chat template. Raises UserError.

    Where the vocabulary has no spare token, EOS fills: padding is known by the mask alone, never by its id.
    """
    from transformers import AutoTokenizer

    local = Path(path)
    if not local.exists() and (local.is_absolute() or path.startswith(("./", "../", "runs/"))):
        raise UserError(f"{path}: no such folder{near_file(path)}")
    if local.is_dir() and not any((local / name).is_file() for name in TOKENIZER_FILES):
        # transformers would hand back an empty tokenizer here and say nothing
        raise UserError(f"{path}: no tokenizer files; save the tokenizer beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer could be loaded ({_first_line(error)})") from None
    if len(tokenizer) <= 1:
        raise UserError(f"{path}: the tokenizer is empty")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so that no response could end")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _unused_token(tokenizer) or tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def _unused_token(tokenizer: Any) -> str | None:
    vocabulary = tokenizer.get_vocab()
    names = ["<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|endoftext|>", "<|finetune_right_pad_id|>", "<|fim_pad|>"]
    names += ["<unk>", *sorted(t for t in vocabulary if "reserved" in t or "unused" in t)]
    return next((name for name in names if name in vocabulary and name != tokenizer.eos_token), None)


def stop_ids(tokenizer: Any, model: nn.Module | None = None) -> list[int]:
    """Token ids that end a response: the tokenizer's EOS and those the model's generation config adds."""
    ids = {tokenizer.eos_token_id}
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    ids.update(more if isinstance(more, list) else [more] if more is not None else [])
    return sorted(ids)


def fingerprint(model: nn.Module, sample: int = 4096) -> str:
    """16 hex digits that name a model's weights, whatever dtype they were loaded in.

    Hashes names, shapes and an even sample of each tensor, read as bfloat16, in sorted order: seconds for billions of
    parameters. Adapter weights that PEFT injected are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" in name or "modules_to_save" in name:
            continue
        name = name.replace(".base_layer", "").removeprefix("base_model.model.")
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // sample)
        values = flat[::step][:sample].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def folder_fingerprint(path: str | Path) -> str:
    """Names the weights in a folder by the hash of its safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        with open(file, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()[:16]


def write_identity(path: str | Path, foundation: Foundation, **more: Any) -> None:
    """Write rlhf.json: which base and tokenizer the weights in this folder belong to."""
    identity = {
        "base_fingerprint": foundation.fingerprint,
        "base_model_name_or_path": foundation.base_path,
        "tokenizer_fingerprint": tokenizer_fingerprint(foundation.tokenizer),
        **more,
    }
    (Path(path) / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")


def read_identity(path: str | Path) -> dict[str, Any]:
    file = Path(path) / IDENTITY_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def check_same_base(path: str, foundation: Foundation) -> None:
    """Raise UserError unless the adapter at `path` belongs to this base and this tokenizer with its template."""
    identity = read_identity(path)
    if identity.get("base_fingerprint") not in (None, foundation.fingerprint):
        raise UserError(
            f"{path}: trained on base {identity['base_fingerprint']}, but this run stands on {foundation.base_path} "
            f"({foundation.fingerprint}). Adapters of different bases cannot share one."
        )
    if identity.get("tokenizer_fingerprint") not in (None, tokenizer_fingerprint(foundation.tokenizer)):
        raise UserError(f"{path}: its tokenizer or chat template is another than that of {foundation.path}")


def lora_config(task_type: str = "CAUSAL_LM", r: int = 16, alpha: int = 32, dropout: float = 0.0, targets="all-linear"):
    """The LoRA of a new adapter. `targets` is "all-linear" or a list of module names."""
    from peft import LoraConfig

    if isinstance(targets, list) and len(targets) == 1:
        targets = targets[0] if targets[0] == "all-linear" else targets
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type=task_type)


def trainable_policy(foundation: Foundation, lora: Any | None):
    """The model that SFT or DPO trains.

    An adapter at the foundation goes on being trained (a trainable copy; its own LoRA settings hold); without one, a
    new adapter is put on; with `lora` None the whole model is trained.
    """
    from peft import PeftModel, get_peft_model

    if foundation.adapter_path:
        return PeftModel.from_pretrained(foundation.model, foundation.adapter_path, is_trainable=True)
    if lora is None:
        return foundation.model
    return get_peft_model(foundation.model, lora)


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The trunk that gives hidden states and the language-model head, below any PEFT wrapping."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Llama 4's text model keeps its trunk under another name than the one it gives
    trunk = causal.model if causal.base_model is causal else causal.base_model
    return trunk, causal.get_output_embeddings()


def hidden_width(model: nn.Module) -> int:
    """Width of the last hidden state, which heads read; OPT-350m's is not its config's hidden_size."""
    return decoder_and_head(model)[1].in_features


def head_is_plain(model: nn.Module) -> bool:
    """Whether logits are just head(hidden); false where a model scales or caps them (Gemma, Cohere, Granite)."""
    decoder, head = decoder_and_head(model)
    device = next(model.parameters()).device
    ids = torch.arange(1, 9, device=device).reshape(2, 4)
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        plain = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    return torch.allclose(full, plain, rtol=1e-4, atol=1e-4)


def completion_batch(prompt_ids: list[list[int]], response_ids: list[list[int]], pad_id: int, device="cpu", width=None):
    """Right-padded completions for one forward pass.

    Returns input_ids (B, L), attention_mask (B, L), positions (B, T): the column of input_ids whose next token is
    response token t, response ids (B, T) and their mask (B, T). `width` = (L, T) fixes the shape.
    """
    length = max(len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True))
    tokens = max(1, max(len(r) for r in response_ids))
    length, tokens = width or (length, tokens)
    ids = torch.full((len(prompt_ids), length), pad_id, dtype=torch.long)
    attention = torch.zeros((len(prompt_ids), length), dtype=torch.long)
    positions = torch.zeros((len(prompt_ids), tokens), dtype=torch.long)
    responses = torch.zeros((len(prompt_ids), tokens), dtype=torch.long)
    mask = torch.zeros((len(prompt_ids), tokens), dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        whole = len(prompt) + len(response)
        ids[row, :whole] = torch.tensor(prompt + response)
        attention[row, :whole] = 1
        positions[row, : len(response)] = torch.arange(len(prompt) - 1, whole - 1)
        responses[row, : len(response)] = torch.tensor(response)
        mask[row, : len(response)] = True
    return tuple(t.to(device) for t in (ids, attention, positions, responses, mask))


def gather_columns(hidden: Tensor, positions: Tensor) -> Tensor:
    """hidden (B, L, H) at positions (B, T) -> (B, T, H)."""
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def response_logprobs(
    model: nn.Module, ids, attention, positions, responses, temperature: float = 1.0, plain_head: bool = True
) -> tuple[Tensor, Tensor]:
    """log p(response token t | everything before it) and the entropy there, both (B, T), nats.

    The head is applied at the response's positions alone, so that no (B, L, V) tensor exists; `plain_head=False`
    takes the model's own logits for those that transform them.
    """
    if plain_head:
        decoder, head = decoder_and_head(model)
        hidden = decoder(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        logits = head(gather_columns(hidden, positions))
    else:
        full = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        logits = gather_columns(full, positions)
    return selected_logprobs(logits, responses, temperature)


@contextlib.contextmanager
def use_adapter(model: nn.Module, name: str | None):
    """Run with adapter `name` active (None: the bare base), then put back what was. For looking, not for training."""
    if name is None:
        with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
            yield
        return
    before = model.active_adapter
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)
        for parameter_name, parameter in model.named_parameters():  # set_adapter freezes the others
            parameter.requires_grad_(parameter_name in trainable)


def quiet() -> None:
    """Keep library chatter, telemetry and tokenizer warnings out of a program's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, to one another
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
