"""Switching off what a model draws at random in training."""

import copy
import re
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# attributes that say how much is drawn; PhiMoE's router_jitter_noise is a threshold
RATE = re.compile(r"dropout|pdrop$|^layerdrop$|^(input_)?jitter_noise$|^moe_jitter_eps$")


def disable_dropout(model: nn.Module, lora_dropout: float = 0.0) -> None:
    """Switch off whatever a model draws at random in training, so that it is the same function
    there as elsewhere.

    Dropout modules and rates that a model reads as numbers: of attention, of whole layers, of the
    noise on what a router reads. Configs keep their rates, for they are saved with the weights.
    `lora_dropout` is what remains on the input of the LoRA adapter "default".
    """
    silent: dict[int, Any] = {}  # copies of the configs that layers read rates from (Falcon)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = lora_dropout if name.endswith(".lora_dropout.default") else 0.0
        _silence(module)
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not isinstance(
            module, (PreTrainedModel, PeftModel)
        ):
            if id(config) not in silent:
                silent[id(config)] = copy.copy(config)
                _silence(silent[id(config)])
            module.config = silent[id(config)]
        # it draws the experts, without a rate that could be 0
        if type(module).__name__ == "PhimoeTopKRouter":
            module.eval()
            module.train = lambda mode=True, router=module: router


def _silence(holder: Any) -> None:
    for name, value in vars(holder).items():
        if RATE.search(name) and isinstance(value, float):
            setattr(holder, name, 0.0)
