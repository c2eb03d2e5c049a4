"""The forms that a policy is exported in: each is written, read back and compared with the run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from rlhf.adapters import adapter_weights
from rlhf.errors import UserError
from rlhf.export.check import compare, greedy_answers
from rlhf.export.gguf_file import check_writable, write_gguf
from rlhf.export.modelfile import modelfile
from rlhf.from_gguf import as_folder, read_gguf
from rlhf.models import load_model, trainable_policy
from rlhf.startup import model_loaded
from rlhf.tokenizer import stop_ids
from rlhf.weights import IDENTITY_FILE, read_json

# of vLLM's --max-lora-rank
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# settings of LoRA that vLLM refuses or passes over
NOT_VLLM = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


def write_form(to: str, kind: str, run: str, folder: Path, prompts: int) -> dict[str, Any]:
    """Write the policy of a run into `folder`, compare what was written with the run, and return
    the facts of export.json.

    kind: of the weights in GGUF, f16 or q8_0. prompts: how many to check it on. Raises UserError
    where the model has no such form.
    """
    initial = load_model(run)
    model_loaded(initial.model)
    tokenizer, name = initial.tokenizer, Path(run).resolve().name
    if to in ("gguf", "ollama"):
        check_writable(initial.model.config, tokenizer)
    if to == "vllm":
        if not initial.adapter_path:
            raise UserError(f"{run}: whole weights, no adapter. Take --to merged")
        check_lora(initial.adapter_path)
    stops = stop_ids(tokenizer, initial.model)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = trainable_policy(initial, None).to(device).eval()
    if prompts:
        _say(f"{run}: {prompts} greedy answers")
    answers = greedy_answers(policy, tokenizer, prompts)

    _say(f"{folder}: writing")
    # commands are given in the folder, which may be moved
    facts: dict[str, Any] = {"name": name, "run": run, "base": initial.base_path}
    file = folder / f"{name}-{kind}.gguf"
    if to == "vllm":
        # what a GGUF file was converted to
        base = initial.model.config.name_or_path
        base = str(Path(base).resolve()) if Path(base).exists() else base
        settings = write_lora(initial.adapter_path, base, folder)
        tokenizer.save_pretrained(folder)
        rank = next(allowed for allowed in RANKS if allowed >= settings["r"])
        facts["form"] = f"LoRA of rank {settings['r']} for vLLM"
        facts["load"] = (
            f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}=."
        )
    elif to == "merged":
        dtype = AutoConfig.from_pretrained(as_folder(initial.base_path)).dtype or torch.float32
        merged(policy).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        facts["form"] = f"safetensors in {str(dtype).removeprefix('torch.')}"
        facts["load"] = "vllm serve ."
    else:
        write_gguf(file, merged(policy), tokenizer, kind, name)
        facts["form"] = f"GGUF in {kind}"
        facts["load"] = f"llama-cli -m {file.name} -cnv"
    if to == "ollama":
        (folder / "Modelfile").write_text(modelfile(file.name, tokenizer, stops), encoding="utf-8")
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


def merged(policy: nn.Module) -> nn.Module:
    """Return a policy with its adapter added to the base's weights; changes it in place."""
    if not hasattr(policy, "merge_and_unload"):
        return policy
    # PEFT unties an output head that the adapter holds whole
    return policy.merge_and_unload()


def _read_back(folder: Path, file: Path) -> tuple[nn.Module, Any]:
    if file.is_file():
        return read_gguf(file)
    initial = load_model(str(folder))
    return trainable_policy(initial, None), initial.tokenizer


def check_lora(adapter: str) -> None:
    """Raise UserError unless vLLM serves this adapter as the run computes it."""
    settings = read_json(Path(adapter) / "adapter_config.json")
    found = [name for name in NOT_VLLM if settings.get(name)]
    if settings.get("peft_type") != "LORA":
        found.append("peft_type")
    others = [name for name in adapter_weights(adapter) if ".lora_" not in name]
    if found or others or settings["r"] > RANKS[-1]:
        what = f"'{found[0]}'" if found else others[0] if others else f"rank {settings['r']}"
        raise UserError(f"{adapter}: vLLM does not serve an adapter with {what}. Take --to merged")


def write_lora(adapter: str, base: str, folder: Path) -> dict[str, Any]:
    """Copy an adapter with its base named in full; return its settings."""
    settings = read_json(Path(adapter) / "adapter_config.json")
    settings |= {"base_model_name_or_path": base, "inference_mode": True}
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    save_file(adapter_weights(adapter), folder / "adapter_model.safetensors", {"format": "pt"})
    if (Path(adapter) / IDENTITY_FILE).is_file():
        shutil.copy(Path(adapter) / IDENTITY_FILE, folder)
    return settings
