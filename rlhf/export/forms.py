"""The forms that a policy is exported in: each is written, read back and compared with the run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from rlhf.engines.vllm_protocol import NOT_LOADED, RANKS, rank_option
from rlhf.errors import UserError
from rlhf.export.check import compare, greedy_answers
from rlhf.export.gguf_file import check_writable, modelfile, write_gguf
from rlhf.model.adapters import adapter_weights
from rlhf.model.files import IDENTITY_FILE, read_identity, read_json
from rlhf.model.from_gguf import as_folder, read_gguf
from rlhf.model.loading import InitialModel, load_model, trainable_policy
from rlhf.model.quantized import dequantize
from rlhf.model.tokenizer import stop_ids
from rlhf.ranks.distributed import own_device
from rlhf.startup import model_loaded

GGUF_FORMS = ("gguf", "ollama")


def write_form(to: str, kind: str, run: str, folder: Path, prompts: int) -> dict[str, Any]:
    """Write the policy of a run into `folder`, compare what was written with the run, and return
    the facts of export.json.

    kind: of the weights in GGUF, f16 or q8_0. prompts: how many to check it on. Raises UserError
    where the model has no such form.
    """
    initial = load_model(run)
    model_loaded(initial.model)
    if to in GGUF_FORMS:
        check_writable(initial.model.config, initial.tokenizer)
    if to == "vllm":
        check_lora(run, initial.adapter_path)

    # greedy answers of the run, before its adapter is merged away
    device = own_device()
    policy = trainable_policy(initial, None).to(device).eval()
    if prompts:
        _say(f"{run}: {prompts} greedy answers")
    answers = greedy_answers(policy, initial.tokenizer, prompts)

    _say(f"{folder}: writing")
    name = Path(run).resolve().name
    # a GGUF file, not the folder that it was converted to
    named = read_identity(initial.adapter_path or run).get("base_model_name_or_path")
    facts: dict[str, Any] = {"name": name, "run": run, "base": named or initial.base_path}
    file = folder / f"{name}-{kind}.gguf"
    if to == "vllm":
        facts |= _write_lora(initial, name, folder)
    elif to == "merged":
        facts |= _write_merged(initial, policy, folder)
    else:
        write_gguf(file, _merged(policy), initial.tokenizer, kind, name)
        facts |= {"form": f"GGUF in {kind}", "load": f"llama-cli -m {file.name} -cnv"}
    if to == "ollama":
        stops = stop_ids(initial.tokenizer, initial.model)
        text = modelfile(file.name, initial.tokenizer, stops)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        facts["load"] = f"ollama create {name} -f Modelfile && ollama run {name}"

    # before the second model is loaded
    del initial, policy
    if answers:
        _say(f"{folder}: reading back and comparing")
        written, its_tokenizer = _read_back(folder, file)
        facts["check"] = compare(written.to(device).eval(), its_tokenizer, answers)
    return facts


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _merged(policy: nn.Module) -> nn.Module:
    """Return a policy with its adapter added to the base's weights; changes it in place."""
    # the numbers that the run computed with, rounding included
    dequantize(policy)
    if not hasattr(policy, "merge_and_unload"):
        return policy
    # PEFT unties an output head that the adapter holds whole
    return policy.merge_and_unload()


def _write_merged(initial: InitialModel, policy: nn.Module, folder: Path) -> dict[str, str]:
    """Write whole weights in the dtype of the base's files. The commands to load an export are
    given in its folder, which may be moved.
    """
    dtype = AutoConfig.from_pretrained(as_folder(initial.base_path)).dtype or torch.float32
    _merged(policy).to(dtype).save_pretrained(folder)
    initial.tokenizer.save_pretrained(folder)
    return {
        "form": f"safetensors in {str(dtype).removeprefix('torch.')}",
        "load": "vllm serve .",
    }


def check_lora(run: str, adapter: str | None) -> None:
    """Raise UserError unless vLLM serves the adapter of a run as the run computes it."""
    if adapter is None:
        raise UserError(f"{run}: whole weights, no adapter. Take --to merged")
    # what vLLM would ignore, or refuse hours later
    settings = read_json(Path(adapter) / "adapter_config.json")
    found = [f"'{name}'" for name in NOT_LOADED if settings.get(name)]
    if settings.get("peft_type") != "LORA":
        found.append(f"'peft_type' {settings.get('peft_type')}")
    elif settings["r"] > RANKS[-1]:
        found.append(f"rank {settings['r']}")
    found += [name for name in adapter_weights(adapter) if ".lora_" not in name]
    if found:
        raise UserError(f"{run}: vLLM does not serve an adapter with {found[0]}. Take --to merged")


def _write_lora(initial: InitialModel, name: str, folder: Path) -> dict[str, str]:
    """Copy an adapter with its base named in full, which for a GGUF file is what it was converted
    to.
    """
    adapter, base = Path(initial.adapter_path), initial.model.config.name_or_path
    base = str(Path(base).resolve()) if Path(base).exists() else base
    settings = read_json(adapter / "adapter_config.json")
    settings |= {"base_model_name_or_path": base, "inference_mode": True}
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    weights = adapter_weights(adapter)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    initial.tokenizer.save_pretrained(folder)
    if (adapter / IDENTITY_FILE).is_file():
        shutil.copy(adapter / IDENTITY_FILE, folder)

    served = f"--enable-lora --max-lora-rank {rank_option(settings['r'])} --lora-modules {name}=."
    return {
        "form": f"LoRA of rank {settings['r']} for vLLM",
        "load": f"vllm serve {base} {served}",
    }


def _read_back(folder: Path, file: Path) -> tuple[nn.Module, Any]:
    """Return the model and the tokenizer of an export, as other programs would load them."""
    if file.is_file():
        return read_gguf(file)
    initial = load_model(str(folder))
    return trainable_policy(initial, None), initial.tokenizer
