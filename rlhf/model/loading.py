"""The model that a run starts from: its base, its tokenizer and the adapter that it continues.

A path is one of four things, and every stage takes any of them as `model_name_or_path`: a Hub name
or folder with whole weights; a GGUF file, which is converted once (`rlhf/model/from_gguf.py`); a folder
with an adapter (its base is read from it); a finished run of ours.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.data.encode import tokenizer_fingerprint
from rlhf.errors import UserError
from rlhf.model.adapters import (
    adapter_settings,
    adapter_weights,
    add_adapter,
    load_adapter,
    not_adaptable,
)
from rlhf.model.files import (
    IDENTITY_FILE,
    adapter_base,
    check_not_quantized,
    check_positions,
    first_line,
    read_identity,
    require_policy,
)
from rlhf.model.from_gguf import as_folder
from rlhf.model.quantized import METHODS, quantize
from rlhf.model.tokenizer import load_tokenizer
from rlhf.model.weights import check_finite, fingerprint
from rlhf.options.shared import require_bitsandbytes
from rlhf.ranks.divided import dividing
from rlhf.text import say_once
from rlhf.values import read_yaml

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# keep the base as the adapter at hand was trained on it
AS_TRAINED = "as trained"


@dataclass
class InitialModel:
    """A base model without adapters, its tokenizer, and the folder of an adapter on it, if any."""

    # a causal language model in eval mode: on the CPU, or divided among the ranks
    model: nn.Module
    tokenizer: Any
    path: str
    base_path: str
    adapter_path: str | None
    # of the whole weights, also where they are packed
    fingerprint: str
    # "nf4" or "int8" where the base is packed (`rlhf/model/quantized.py`)
    quantization: str | None = None
    # loads the whole base once more, or another class of transformers from another path
    another: Callable[..., nn.Module] | None = None


def load_model(
    path: str,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    quantization: str | None = AS_TRAINED,
    zero: dict[str, Any] | None = None,
) -> InitialModel:
    """Load what stands at `path`; an adapter's base is checked against the fingerprint the adapter
    carries.

    quantization: "nf4" or "int8" packs the base, None keeps it whole, and AS_TRAINED follows the
    adapter. A base has one fingerprint in all of them: an adapter that was trained on a packed one
    loads on the whole one and the other way round, which is said.
    zero: the DeepSpeed JSON of ZeRO-3, under which each rank keeps a part of the base alone, from
    the first weight on; all ranks load it together.

    Raises UserError when there is nothing to load, the tokenizer is missing or unusable, or the
    base is another one.
    """
    from transformers import AutoModelForCausalLM

    adapter_path = path if (Path(path) / "adapter_config.json").is_file() else None
    if adapter_path:
        # both refuse what cannot be used before anything large is loaded
        adapter_settings(adapter_path)
        adapter_weights(adapter_path)
    base_path = adapter_base(adapter_path) if adapter_path else path
    tokenizer = load_tokenizer(path)
    named = (
        f" It is the 'base_model_name_or_path' of {adapter_path}/adapter_config.json."
        if adapter_path
        else ""
    )

    def another(cls: Any = AutoModelForCausalLM, source: str = base_path) -> nn.Module:
        return load_weights(
            cls, source, dtype, attn_implementation, run=path, more=named, zero=zero
        )

    model = another()

    # adapters of other programs carry no fingerprint
    found = fingerprint(model)
    identity = read_identity(adapter_path) if adapter_path else {}
    expected = identity.get("base_fingerprint")
    if expected not in (None, "", found):
        raise UserError(
            f"{adapter_path}: this adapter was trained on a base with fingerprint {expected}, but {base_path} has "
            f"{found}. Point 'base_model_name_or_path' in its adapter_config.json to the right base."
        )

    # fewer tokens than embeddings are common: models round their vocabulary up
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model only {embeddings} embeddings; "
            "they do not belong together"
        )
    if quantization == AS_TRAINED:
        quantization = trained_on(identity, path)
        require_bitsandbytes(quantization == "nf4", f"{path}: its base in 4 bits")
    elif adapter_path:
        _compare_quantization(identity, adapter_path, quantization)
    if quantization:
        quantize(model, quantization, not_adaptable(model) or ())
    return InitialModel(
        model,
        tokenizer,
        path,
        base_path,
        adapter_path,
        fingerprint=found,
        quantization=quantization,
        another=another,
    )


def trained_on(identity: dict[str, Any], where: str) -> str | None:
    """Return how the base was kept that an adapter with this rlhf.json was trained on."""
    method = identity.get("quantization")
    if method not in (None, *METHODS):
        raise UserError(
            f"{where}/{IDENTITY_FILE}: 'quantization' is {method!r}, expected one of {', '.join(METHODS)}"
        )
    return method


def _compare_quantization(identity: dict[str, Any], path: str, now: str | None) -> None:
    """Say where an adapter was trained on a base that is kept in another way."""
    then = trained_on(identity, path)
    if "base_fingerprint" in identity and then != now:
        kinds = {None: "whole", "nf4": "in 4 bits", "int8": "in 8 bits"}
        say_once(
            f"{path}: trained on a base that was kept {kinds[then]}, which is kept {kinds[now]} here. Its outputs "
            "differ by the rounding of the weights (load_in_4bit, load_in_8bit)"
        )


def load_weights(
    cls: Any,
    path: str,
    dtype: str,
    attn_implementation: str | None,
    run: str | None = None,
    more: str = "",
    zero: dict[str, Any] | None = None,
) -> nn.Module:
    """Load a model by one of transformers' Auto classes, in eval mode: whole and on the CPU, or
    divided among the ranks (`zero`, see `load_model`).

    attn_implementation: None takes what the run in the folder `run` was given, where this machine
    has it, else transformers' own choice: sdpa where the model has it, eager elsewhere.

    Raises UserError, with `more` at its end, when nothing can be loaded, and when tensors of the
    files and of the model do not fit: transformers would draw the missing ones at random and leave
    out the others.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    wanted = attn_implementation or (attention_of(run) if run else None)
    path = as_folder(path)
    check_not_quantized(path)
    try:
        with dividing(zero):
            model, info = cls.from_pretrained(
                path,
                dtype=DTYPES[dtype],
                attn_implementation=wanted,
                output_loading_info=True,
                # they are refused below, by name
                ignore_mismatched_sizes=True,
                # otherwise transformers asks on the terminal whether to run the code
                trust_remote_code=False,
            )
    except ImportError as error:
        found = f"attn_implementation {wanted} cannot be used here ({first_line(error)})"
        if attn_implementation or not wanted:
            raise UserError(
                f"{path}: {found}. Choose another, for example: --attn_implementation sdpa"
            ) from None
        print(f"{run}: {found}; taking transformers' own choice", file=sys.stderr)
        return load_weights(cls, path, dtype, None, more=more, zero=zero)
    # every library has errors of its own for files that are cut off
    except Exception as error:
        raise UserError(f"{path}: no model could be loaded ({first_line(error)}).{more}") from None

    mismatched = [
        f"{name} {tuple(saved)} for {tuple(own)}" for name, saved, own in info["mismatched_keys"]
    ]
    faults = {
        "missing": info["missing_keys"],
        "without a place": info["unexpected_keys"],
        "of another shape": mismatched,
    }
    misfits = [f"{len(names)} {what} ({_some(names)})" for what, names in faults.items() if names]
    if misfits:
        raise UserError(
            f"{path}: its tensors do not fit {type(model).__name__}: {'; '.join(misfits)}. They belong to another "
            f"config.json or kind of model, or were saved through a wrapper (torch.compile, DDP).{more}"
        )
    check_finite(model.named_parameters(), path)
    if zero is not None:
        # weights are on the device that they are gathered on
        move_buffers(model, next(model.parameters()).device)

    # Llama 4's text model gives another prefix, under which there is nothing
    if model.base_model is model:
        model.base_model_prefix = "model"
    return model.eval()


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move what a model keeps beside its weights, such as the frequencies of positions."""
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _some(names: Iterable[str], count: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def attention_of(path: str) -> str | None:
    """Return the attn_implementation that the run at `path` (or of this checkpoint) was given, else
    None.
    """
    folder = Path(path)
    # a checkpoint is RUN/checkpoints/checkpoint-N
    for place in (folder, folder.parent.parent):
        if (place / "config.yaml").is_file():
            return read_yaml(place / "config.yaml").get("attn_implementation")
    return None


def context_length(config: Any) -> int | None:
    """Return the tokens that a model's positions reach, prompt and response together; None where
    nothing limits them.

    Learned positions end there, and rotary ones were not trained beyond. The factor of a scaling of
    the rotary positions counts, unless max_position_embeddings holds it already (always with llama3
    and longrope). A sliding window is no limit.
    """
    config = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")
    limit = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    if limit is None or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    # models with layers of several kinds (Gemma 3) have a mapping for each kind
    by_type_of_layer = [part for part in rope.values() if isinstance(part, dict)]
    lengths = [limit]
    for scaling in by_type_of_layer or [rope]:
        if scaling.get("rope_type") in ("linear", "dynamic", "yarn"):
            lengths.append(
                int(scaling["factor"] * (scaling.get("original_max_position_embeddings") or limit))
            )
    return max(lengths)


def check_context(
    model: nn.Module, path: str, max_prompt_length: int, max_response_length: int
) -> None:
    """Raise UserError where a prompt and a response of the greatest lengths go beyond the model's
    positions.
    """
    check_positions(path, context_length(model.config), max_prompt_length, max_response_length)


def write_identity(path: str | Path, initial: InitialModel, **more: Any) -> None:
    """Write rlhf.json: which base and tokenizer the weights in this folder belong to."""
    identity = {
        "base_fingerprint": initial.fingerprint,
        "base_model_name_or_path": initial.base_path,
        "tokenizer_fingerprint": tokenizer_fingerprint(initial.tokenizer),
        **({"quantization": initial.quantization} if initial.quantization else {}),
        **more,
    }
    (Path(path) / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")


def check_same_base(path: str, initial: InitialModel) -> None:
    """Raise UserError unless the adapter at `path` belongs to this base and this tokenizer with its
    template.
    """
    identity = read_identity(path)
    if identity.get("base_fingerprint") not in (None, initial.fingerprint):
        raise UserError(
            f"{path}: trained on base {identity['base_fingerprint']}, but the base of this run is {initial.base_path} "
            f"({initial.fingerprint}). Adapters of different bases cannot share one."
        )
    if identity.get("tokenizer_fingerprint") not in (
        None,
        tokenizer_fingerprint(initial.tokenizer),
    ):
        raise UserError(
            f"{path}: its tokenizer or chat template is another than that of {initial.path}"
        )
    _compare_quantization(identity, path, initial.quantization)


def trainable_policy(initial: InitialModel, lora: Any | None):
    """Return the model that SFT or DPO trains.

    An adapter that the run starts from is trained further, under its own LoRA settings; without
    one, a new adapter is put on; with `lora` None the whole model is trained.
    """
    if initial.adapter_path:
        require_policy(initial.adapter_path)
        return load_adapter(initial.model, initial.adapter_path)
    if lora is None:
        return initial.model
    return add_adapter(initial.model, lora)
