"""LoRA settings of the roles' adapters, and the precision of what they train beside LoRA."""

import torch
from peft import LoraConfig
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from rlhf.errors import UserError
from rlhf.model.adapters import adapter_settings
from rlhf.roles.critic import SCORE


def keep_in_float32(layer: nn.Module, dtype: torch.dtype) -> None:
    """Keep in float32, as LoRA is, what an adapter trains of a base in `dtype` beside LoRA: small
    steps would be lost.

    What a module in modules_to_save reads is widened, and what it gives is in `dtype` again.
    """
    if isinstance(layer, TrainableTokensWrapper):
        layer.token_adapter.trainable_tokens_delta.float()
    if isinstance(layer, ModulesToSaveWrapper):
        for module in layer.modules_to_save.float().values():
            module.register_forward_pre_hook(
                lambda _, given: tuple(x.float() if x.is_floating_point() else x for x in given)
            )
            module.register_forward_hook(lambda _, given, output: output.to(dtype))


def plain_config(lora: LoraConfig) -> LoraConfig:
    """A LoRA config for the trunk: no dropout, no scalar head of its own (heads stand beside the
    trunk, in fp32).
    """
    config = LoraConfig(
        **{**lora.to_dict(), "lora_dropout": 0.0, "inference_mode": False, "task_type": "CAUSAL_LM"}
    )
    # PEFT adds both to SEQ_CLS
    modules = [m for m in config.modules_to_save or [] if m not in (SCORE, "classifier")]
    config.modules_to_save = modules or None
    return config


def adapter_config(path: str) -> LoraConfig:
    """The LoRA settings of the adapter in a folder. Raises UserError if it holds none, or one that
    is not LoRA.
    """
    config = adapter_settings(path)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: a {config.peft_type} adapter; roles are LoRA adapters")
    return plain_config(config)
