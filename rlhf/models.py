"""Tokenizer, base model and adapters: loading, naming by fingerprint, saving.

A path is one of three things, and every stage takes any of them as `model_name_or_path`:
a Hub name or folder with whole weights; a folder with an adapter (its base is read from it); a finished run of ours.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import UserError, did_you_mean, near_file, read_yaml
from rlhf.data.encode import PLAIN_TEMPLATE, tokenizer_fingerprint
from rlhf.tensors import selected_logprobs

IDENTITY_FILE = "rlhf.json"  # beside every adapter: what it was trained on, checked when it is loaded
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")
VALUE_HEAD_FILE = "value_head.safetensors"  # beside the adapter of a critic
# LoRA settings that change the base itself, or that depend on the prompt: such an adapter cannot share a base
NOT_SHARED = ("layer_replication", "kasa_config", "arrow_config", "alora_invocation_tokens")
REWRITES_BASE = re.compile("pissa|corda|olora|loftq|lora_ga")  # initial values that are taken out of the base's weights
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # of which PEFT refuses the out_proj
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
MERGE = "Merge the adapter (merge_and_unload and save_pretrained of PEFT) and start from the merged model"


@dataclass
class InitialModel:
    """A base model without adapters, its tokenizer, and the adapter folder (if any) that stands on it."""

    model: nn.Module  # a causal language model, on the CPU, in eval mode
    tokenizer: Any
    path: str
    base_path: str
    adapter_path: str | None
    fingerprint: str


def load_model(path: str, dtype: str = "float32", attn_implementation: str | None = None) -> InitialModel:
    """Load what stands at `path`; an adapter's base is checked against the fingerprint the adapter carries.

    Raises UserError when there is nothing to load, the tokenizer is missing or unusable, or the base is another one.
    """
    from transformers import AutoModelForCausalLM

    adapter_path = path if (Path(path) / "adapter_config.json").is_file() else None
    if adapter_path:
        adapter_settings(adapter_path)  # both refuse what cannot be used before anything large is loaded
        adapter_weights(adapter_path)
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
    return InitialModel(model, tokenizer, path, base_path, adapter_path, print_fingerprint)


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
            trust_remote_code=False,  # else transformers asks on the terminal whether to run it
        )
    except ImportError as error:
        found = f"attn_implementation {wanted} cannot be used here ({_first_line(error)})"
        if attn_implementation or not wanted:
            raise UserError(f"{path}: {found}. Choose another, for example: --attn_implementation sdpa") from None
        print(f"{run}: {found}; taking transformers' own choice", file=sys.stderr)
        return load_weights(cls, path, dtype, None, more=more)
    except Exception as error:  # every library has errors of its own for files that are cut off
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
    check_finite(model.named_parameters(), path)
    if model.base_model is model:
        model.base_model_prefix = "model"  # Llama 4's text model gives another name, under which there is nothing
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
    config = read_json(Path(adapter_path) / "adapter_config.json")
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
    with loading(path, "chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False)
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
    for name, tensor in sorted(_base_weights(model).items()):
        name = name.removeprefix("base_model.model.")
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


def write_identity(path: str | Path, initial: InitialModel, **more: Any) -> None:
    """Write rlhf.json: which base and tokenizer the weights in this folder belong to."""
    identity = {
        "base_fingerprint": initial.fingerprint,
        "base_model_name_or_path": initial.base_path,
        "tokenizer_fingerprint": tokenizer_fingerprint(initial.tokenizer),
        **more,
    }
    (Path(path) / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")


def read_identity(path: str | Path) -> dict[str, Any]:
    """What rlhf.json in a folder says; empty where there is none."""
    file = Path(path) / IDENTITY_FILE
    return read_json(file) if file.is_file() else {}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file holds anything else, or only a part of one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({_first_line(error)}). Save or copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise UserError for the first (name, tensor) that holds NaN or infinity: nothing learns from it."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise UserError(
                f"{where}: '{name}' holds numbers that are not finite (NaN or infinity), so it is no model that could "
                "be used. Take an earlier checkpoint or another start; for a run of one's own, a lower learning_rate"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; one pass without a copy. aminmax hands NaN on."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(float(low)) and math.isfinite(float(high))


@contextlib.contextmanager
def loading(path: str, what: str, more: str = ""):
    """Whatever a library raises inside is a fault of the files at `path`: a UserError that names them."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path}: no {what} could be loaded ({_first_line(error)}).{more}") from None


def check_targets(model: nn.Module, targets: list[str]) -> None:
    """Raise UserError unless each name is that of a layer that LoRA can adapt, or "all-linear" stands alone.

    PEFT takes a name for the end of a layer's path (q_proj, layers.0.self_attn.q_proj), and says nothing of one that
    matches none as long as another does.
    """
    from transformers.pytorch_utils import Conv1D

    if targets == ["all-linear"]:
        return
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    wrong = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    known = sorted({name.rpartition(".")[2] for name in layers})
    expected = f"Layers of this model: {', '.join(known)}; or all-linear alone"
    if not targets:
        raise UserError(f"'lora_target_modules' is empty. {expected}")
    if wrong:
        near = did_you_mean(wrong[0], known)
        raise UserError(f"'lora_target_modules': no layer is called '{wrong[0]}'.{near} {expected}")


def check_same_base(path: str, initial: InitialModel) -> None:
    """Raise UserError unless the adapter at `path` belongs to this base and this tokenizer with its template."""
    identity = read_identity(path)
    if identity.get("base_fingerprint") not in (None, initial.fingerprint):
        raise UserError(
            f"{path}: trained on base {identity['base_fingerprint']}, but this run stands on {initial.base_path} "
            f"({initial.fingerprint}). Adapters of different bases cannot share one."
        )
    if identity.get("tokenizer_fingerprint") not in (None, tokenizer_fingerprint(initial.tokenizer)):
        raise UserError(f"{path}: its tokenizer or chat template is another than that of {initial.path}")


def lora_config(task_type: str = "CAUSAL_LM", r: int = 16, alpha: int = 32, dropout: float = 0.0, targets="all-linear"):
    """The LoRA of a new adapter. `targets` is "all-linear" or a list of module names."""
    from peft import LoraConfig

    if isinstance(targets, list) and len(targets) == 1:
        targets = targets[0] if targets[0] == "all-linear" else targets
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type=task_type)


def trainable_policy(initial: InitialModel, lora: Any | None):
    """The model that SFT or DPO trains.

    An adapter at the foundation goes on being trained (a trainable copy; its own LoRA settings hold); without one, a
    new adapter is put on; with `lora` None the whole model is trained.
    """
    if initial.adapter_path:
        require_policy(initial.adapter_path)
        return load_adapter(initial.model, initial.adapter_path)
    if lora is None:
        return initial.model
    return add_adapter(initial.model, lora)


def adapter_settings(path: str) -> Any:
    """Return the PEFT settings of the adapter in a folder, ready to be put on a base beside others.

    Raises UserError when there are none, when they cannot be read, when the adapter is a critic's, and for settings
    that PEFT cannot keep apart where several adapters share a base.
    """
    from peft import LoraConfig, PeftConfig

    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{path}: no adapter (adapter_config.json) there")
    if (Path(path) / VALUE_HEAD_FILE).is_file():
        raise UserError(
            f"{path}: the critic of a PPO run, not a policy or reward model; the policy is in {file.parent.parent}"
        )
    with loading(str(file), "settings of an adapter"):
        config = PeftConfig.from_pretrained(path)
    config.inference_mode = False
    if not isinstance(config, LoraConfig):
        return config
    found = [name for name in NOT_SHARED if getattr(config, name, None)]
    if isinstance(config.init_lora_weights, str) and REWRITES_BASE.match(config.init_lora_weights):
        found.append("init_lora_weights")
    if config.bias != "none" and any(n.endswith(".bias") and "lora_" not in n for n in adapter_weights(path)):
        found.append("bias")
    if found:
        raise UserError(
            f"{file}: '{found[0]}: {getattr(config, found[0])}' changes the base, which other adapters share, so that "
            f"PEFT cannot hold copies of it. {MERGE}"
        )
    config.bias = "none"  # it was of a base without any: nothing was trained
    return config


def require_policy(path: str) -> None:
    """Raise UserError if the adapter in a folder is a reward model's."""
    config = adapter_settings(path)
    if config.task_type == "SEQ_CLS" or (Path(path) / "reward.json").is_file():
        raise UserError(
            f"{path}: a reward model, which is no policy. Start from a base model, or from a run of launch/sft.py, "
            "launch/dpo.py or launch/ppo.py"
        )


def adapter_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of the adapter in a folder by the names they were saved under.

    Raises UserError if they are missing, cut off or not finite.
    """
    from peft.utils import load_peft_weights

    if not any((Path(path) / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise UserError(f"{path}: adapter_config.json is there, adapter_model.safetensors is not")
    with loading(str(path), "adapter weights"):
        weights = load_peft_weights(str(path), device="cpu")
    check_finite(weights.items(), str(path))
    return weights


def add_adapter(model: nn.Module, config: Any, name: str = "default", where: str = "lora") -> nn.Module:
    """Put a new adapter on a model, which becomes a PeftModel unless it is one. Raises UserError where PEFT refuses."""
    from peft import PeftModel, get_peft_model
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    config = copy.deepcopy(config)  # PEFT writes into it what it finds in this model
    config.base_model_name_or_path = model.config.name_or_path
    if getattr(config, "target_modules", None) == "all-linear":
        config.exclude_modules = config.exclude_modules or _not_adaptable(model)
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: PEFT cannot put this adapter on the model ({_first_line(error)})") from None
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and "adapter_state_dict" not in vars(module):
            for method in ("adapter_state_dict", "adapter_state_dict_load_map"):
                setattr(module, method, _of_held_adapters(module, getattr(module, method)))
        if isinstance(module, TrainableTokensWrapper):
            module.bias = None  # TRL reads it off a head; PEFT passes on the weight alone
    return model


def _not_adaptable(model: nn.Module) -> list[str] | None:
    """Names of linear layers that LoRA cannot be on: routers that give more than a tensor, and what Mamba's kernels
    read without a call."""
    names = {"out_proj"} if model.config.model_type in MAMBA else set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).__name__.endswith("Router"):  # Llama 4, PhiMoE
            names.add(name.rpartition(".")[2])
    return sorted(names) or None


def _of_held_adapters(wrapper: nn.Module, method: Callable) -> Callable:
    """PEFT's method of a module beside LoRA, which it calls for every adapter, for those that hold any.

    The state that ZeRO-3 gathers is without frozen adapters, such as a reference: none of them is saved then.
    """

    def held(name: str, *state: dict[str, Tensor]) -> dict[str, Any]:
        if name not in wrapper._adapters or any(not any(name in key.split(".") for key in given) for given in state):
            return {}
        return method(name, *state)

    return held


def load_adapter(
    model: nn.Module, path: str, config: Any = None, name: str = "default", leave: tuple[str, ...] = ()
) -> nn.Module:
    """Put the adapter in a folder on a model, all of it: LoRA, modules_to_save, embeddings, single tokens.

    config: its settings, where they are not to be those of the folder. leave: modules of the base whose weights are
    not wanted, such as the output head under a scalar head. Returns the PeftModel. Raises UserError unless every other
    weight of the folder finds its place and every place its weight; copies of the base's own weights, which PEFT saves
    beside an adapter of the embeddings, are compared with the base.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    def wanted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        prefixes = tuple(f"base_model.model.{module}." for module in leave)
        return {n: w for n, w in weights.items() if not n.startswith(prefixes)}

    given = wanted(adapter_weights(path))
    model = add_adapter(model, config or adapter_settings(path), name, path)
    if reason := _not_copied(model, name):
        raise UserError(f"{path}/adapter_config.json: {reason}, of which PEFT makes no copies. {MERGE}")
    places = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    base, odd = _base_weights(model), []
    for weight in [n for n in given if n not in places]:
        own = base.get(_plain_name(weight))
        if own is None or own.shape != given[weight].shape:
            odd.append(f"no place for {weight}")
        elif not torch.equal(own.to("cpu", torch.bfloat16), given[weight].to(torch.bfloat16)):
            odd.append(f"{weight} is another than the base's, without being among its modules_to_save")
        del given[weight]
    for place, weight in wanted(places).items():
        if place not in given:
            odd.append(f"{place} is missing")
        elif given[place].shape != weight.shape:
            odd.append(f"{place} is {tuple(given[place].shape)}, expected {tuple(weight.shape)}")
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UserError(f"{path}: its weights do not fit this base: {'; '.join(odd[:3])}{more}")
    places.update(given)  # what is not wanted stays as it is
    set_peft_model_state_dict(model, places, adapter_name=name)
    return model


def _not_copied(model: nn.Module, name: str) -> str | None:
    """What adapter `name` of a PeftModel holds on this base that PEFT does not repeat for a second adapter, or None."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    config = model.peft_config[name]
    if getattr(config, "modules_to_tie", None) or getattr(config, "target_modules_to_tie", None):
        return "'ensure_weight_tying: true' ties the output head to an adapter of the embeddings"
    for wrapper in (m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)):
        if any(isinstance(m, AuxiliaryTrainingWrapper) for m in wrapper.modules() if m is not wrapper):
            return "'trainable_token_indices' and 'modules_to_save' meet in one module"
    return None


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return all that the LoRA adapter `name` holds: parameters by their names less that of the adapter."""
    pattern = re.compile(rf"\.(lora_\w+|modules_to_save|trainable_tokens_delta)\.{name}(?=\.|$)")
    return {pattern.sub(r".\1", n): p for n, p in model.named_parameters() if pattern.search(n)}


def frozen_copy(model: nn.Module, source: str, name: str) -> None:
    """Add adapter `name` to a PeftModel as a frozen copy of another, for example as the reference of what goes on."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    add_adapter(model, model.peft_config[source], name)
    weights = get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    set_peft_model_state_dict(model, weights, adapter_name=name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in trained)


def without_head(config: Any, causal: nn.Module) -> Any:
    """Return the settings of a LoRA adapter for a role without an output head: less what changes the head."""
    config, head = copy.deepcopy(config), head_name(causal)
    if config.modules_to_save:
        config.modules_to_save = [m for m in config.modules_to_save if not head.endswith(m)] or None
    if isinstance(config.trainable_token_indices, dict):
        tokens = {m: ids for m, ids in config.trainable_token_indices.items() if not head.endswith(m)}
        config.trainable_token_indices = tokens or None
    return config


def head_name(causal: nn.Module) -> str:
    """Return the name of a causal model's output head within it."""
    return next(name for name, module in causal.named_modules() if module is causal.get_output_embeddings())


def _plain_name(name: str) -> str:
    """The name that a weight of the base has without PEFT's wrapping."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name)


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base's own weights by their names without PEFT's wrapping."""
    ours = ("lora_", "modules_to_save", "trainable_tokens_")
    return {_plain_name(n): w for n, w in model.state_dict().items() if not any(part in n for part in ours)}


def like_rows(rows: Tensor, token: int) -> int:
    """Return how many other rows (V, H) of an output head have a cosine above 0.9 to that of a token; all for a row of
    zeros. Tokens that no text held keep together, since the loss has moved all of them alike."""
    if not rows[token].any():
        return len(rows) - 1
    rows = rows.detach()
    return int((torch.nn.functional.cosine_similarity(rows, rows[token][None]) > 0.9).sum()) - 1


def changes_head(config: Any, causal: nn.Module) -> bool:
    """Return whether a LoRA adapter with these settings changes the output head or the embeddings it is tied to."""
    names = [head_name(causal)]
    if causal.config.tie_word_embeddings:
        names += [name for name, module in causal.named_modules() if module is causal.get_input_embeddings()]
    changed = [*(config.modules_to_save or []), *(config.trainable_token_indices or [])]
    changed += config.target_modules if not isinstance(config.target_modules, str) else []
    return isinstance(config.trainable_token_indices, list) or any(
        name.endswith(module) for name in names for module in changed
    )


def token_rows(causal: nn.Module, token: int) -> list[int] | dict[str, list[int]] | None:
    """Return PEFT's `trainable_token_indices` for a token's row of the output head; None for a head with a bias."""
    head = causal.get_output_embeddings()
    if head.bias is not None:
        return None
    tied = head.weight is causal.get_input_embeddings().weight
    return [token] if tied else {head_name(causal): [token]}


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The trunk that gives hidden states and the language-model head, below any PEFT wrapping."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.base_model, causal.get_output_embeddings()


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


def silence_libraries() -> None:
    """Keep library chatter, telemetry and tokenizer warnings out of a program's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, to one another
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own words recommend to run whatever it holds
        return "a pickle that holds more than weights, and could run code; save the weights as safetensors"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
