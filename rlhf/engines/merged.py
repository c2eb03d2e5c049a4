"""A causal model with its active LoRA adapter folded into copies of the weights that it changes.

Sampling reads the same weights thousands of times between two changes of the adapter. Folding
W + scale B A once removes three small products and PEFT's Python code from every layer of each of
these passes. All that the adapter does not change (embeddings, norms, the head) is shared with the
base, and the base itself is never written to.
"""

import copy

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.model.quantized import QuantizedLinear
from rlhf.ranks.divided import SHARE_OF_FREE_MEMORY, free_memory, is_divided


@torch.no_grad()
def merged(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the causal model without PEFT's modules, and "".

    Where the active adapter cannot be folded in, or its copies do not fit, return the model as it
    was given and the reason. The copies take the memory of the adapted weights for as long as the
    returned model lives; they do not follow later changes of the adapter.
    """
    if not hasattr(model, "get_base_model"):
        return model, ""
    causal = model.get_base_model()
    reason = _obstacle(causal) or _too_large(causal)
    if reason:
        return model, reason
    return _without_adapters(causal, {}), ""


def _active(layer: BaseTunerLayer) -> list[str]:
    """Return the adapters that a pass through this LoRA layer would use."""
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _rows_active(layer: TrainableTokensLayer) -> list[str]:
    """Return the adapters whose rows of the embeddings a pass would use."""
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.trainable_tokens_delta]


def _obstacle(causal: nn.Module) -> str:
    """Return what of the active adapter is not plain LoRA on a plain linear layer, or ""."""
    if any(map(is_divided, causal.parameters())):
        return "ZeRO-3 partitions the weights"
    for name, module in causal.named_modules():
        # rows of embeddings are replaced by their wrapper, which is seen as well
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            reason = _obstacle_of_layer(module)
            if reason:
                return f"{name}: {reason}"
    return ""


def _obstacle_of_layer(layer: BaseTunerLayer) -> str:
    if layer.merged_adapters:
        return "an adapter is merged into the base"
    if layer.disable_adapters:
        return ""
    if not isinstance(layer, LoraLayer):
        return f"{type(layer).__name__} is not LoRA"
    base = layer.base_layer
    if isinstance(base, QuantizedLinear):
        return "the base is quantised, and a merged copy would be whole"
    if type(base) not in (nn.Linear, Conv1D) or not base.weight.is_floating_point():
        return f"{type(base).__name__} is no plain linear layer"
    for name in _active(layer):
        if name in layer.lora_variant or layer.lora_bias.get(name):
            return "the adapter is more than LoRA's product (DoRA, a bias)"
    return ""


def _too_large(causal: nn.Module) -> str:
    """Return why the copies do not fit beside what is in memory, or ""."""
    weights = []
    for module in causal.modules():
        is_lora = isinstance(module, LoraLayer) and _active(module)
        if is_lora or (isinstance(module, TrainableTokensLayer) and _rows_active(module)):
            weights.append(module.base_layer.weight)
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    if not needed:
        return ""
    free = free_memory(weights[0].device)
    if needed <= SHARE_OF_FREE_MEMORY * free:
        return ""
    return (
        f"a copy of the adapted weights takes {needed / 2**30:.1f} GiB, more than "
        f"{SHARE_OF_FREE_MEMORY:.0%} of the {free / 2**30:.1f} GiB that are free"
    )


def _without_adapters(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of the tree of modules that shares every tensor that no adapter changes.

    made: copies by the id of their original, since a module may stand in several places. What a
    model reaches on another way than its tree of modules is the original with its adapter, which
    computes the same.
    """
    if id(module) in made:
        return made[id(module)]
    if isinstance(module, TrainableTokensWrapper):
        twin = _with_rows(module.token_adapter)
    elif isinstance(module, ModulesToSaveWrapper):
        twin = _chosen(module)
    elif isinstance(module, BaseTunerLayer):
        twin = _folded(module)
    else:
        twin = copy.copy(module)
        twin._modules = {
            name: child if child is None else _without_adapters(child, made)
            for name, child in module._modules.items()
        }
    made[id(module)] = twin
    return twin


def _folded(layer: BaseTunerLayer) -> nn.Module:
    """Return the layer below an adapter, with W + scale B A in a copy where the adapter is active."""
    base = layer.base_layer
    adapters = [] if layer.disable_adapters else _active(layer)
    if not adapters:
        return base
    weight = base.weight
    for name in adapters:
        # in the wider of both dtypes: LoRA is in float32 on a base in bfloat16
        weight = weight + layer.get_delta_weight(name)
    return _with_weight(base, weight.to(base.weight.dtype))


def _with_rows(layer: TrainableTokensLayer) -> nn.Module:
    """Return the embeddings, or the head that is tied to them, with the rows that are trained."""
    adapters = _rows_active(layer)
    if not adapters:
        return layer.base_layer
    return _with_weight(layer.base_layer, layer.get_merged_weights(adapters))


def _chosen(wrapper: ModulesToSaveWrapper) -> nn.Module:
    """Return the module that a pass through the wrapper uses: an adapter's own, or the base's."""
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    return wrapper.modules_to_save[wrapper.active_adapters[0]]


def _with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """Return a copy of a module that has another weight and shares all else."""
    twin = copy.copy(module)
    twin._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return twin
