"""The model that a run will train, as fake tensors: its config.json is read, its weights are not."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.model.adapters import add_adapter, lora_config, not_adaptable
from rlhf.model.files import first_line
from rlhf.model.loading import DTYPES
from rlhf.model.quantized import QuantizedLinear


def read_shape(path: str) -> Any:
    """Return transformers' config of the model at a path or of a Hub name. Raises UserError where it
    cannot be read.
    """
    from transformers import AutoConfig

    if Path(path).suffix == ".gguf":
        raise UserError(
            f"{path}: a plan reads a config.json. Give the model it was made from: --model NAME"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    # every library has errors of its own for what is not there
    except Exception as error:
        raise UserError(
            f"{path}: no config.json could be read there or on the Hub ({first_line(error)}). "
            "Give the base, a Hub name or a folder with its config.json: --model NAME"
        ) from None


def empty_model(shape: Any, dtype: str, attention: str | None) -> nn.Module:
    """Return a frozen causal model of this shape on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            shape, dtype=DTYPES[dtype], attn_implementation=attention
        )
    return model.eval().requires_grad_(False)


def to_fake(model: nn.Module) -> nn.Module:
    """Put fake tensors in the place of a model's own, shared ones once; call it inside a
    FakeTensorMode.

    Fake tensors are on a CPU, so that kernels are chosen and precisions are cast as for real ones.
    PEFT cannot move them, so that adapters are put on before.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "meta":
                    tensors[name] = fake(tensor)
    return model


def pack(model: nn.Module, method: str) -> int:
    """Put layers in the place of the linear ones whose weights are kept in 4 or 8 bits, as
    `rlhf.model.quantized.quantize` does; return the bytes of their scales.
    """
    leave = not_adaptable(model) or ()
    head, scales = model.get_output_embeddings(), 0
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head and name.split(".")[-1] not in leave:
            layer = _packed(module, method)
            model.set_submodule(name, layer)
            scales += scale_bytes(module.in_features * module.out_features, module, method)
    return scales


def scale_bytes(numbers: int, layer: nn.Linear, method: str) -> int:
    """Return the bytes of a layer's scales: 8 bits for each block of 64 and 32 for each 256 blocks
    (nf4), or 32 bits a row (int8).
    """
    if method == "int8":
        return 4 * layer.out_features
    blocks = -(-numbers // 64)
    return blocks + 4 * -(-blocks // 256)


def _packed(source: nn.Linear, method: str) -> QuantizedLinear:
    """Return a QuantizedLinear of fake tensors, which makes its weight whole for each product."""
    layer = QuantizedLinear.__new__(QuantizedLinear)
    nn.Module.__init__(layer)
    whole = source.weight
    shape = (whole.numel() // 2, 1) if method == "nf4" else whole.shape
    packed = whole.new_empty(shape, dtype=torch.uint8 if method == "nf4" else torch.int8)
    layer.in_features, layer.out_features = source.in_features, source.out_features
    layer.method, layer.dtype = method, whole.dtype
    layer.weight, layer.bias = nn.Parameter(packed, requires_grad=False), source.bias
    size = tuple(whole.shape)
    layer.whole = lambda dtype=None: layer.weight.new_empty(size, dtype=dtype or layer.dtype)
    return layer


def lora_of(config: Any, adapter: str | None, task: str = "CAUSAL_LM") -> Any:
    """Return the LoRA settings of a run: those of the adapter that it starts from, or its options'."""
    if adapter is None:
        settings = (config.lora_r, config.lora_alpha, config.lora_dropout)
        return lora_config(task, *settings, config.lora_target_modules)
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(adapter)
    settings.inference_mode = False
    return settings


def adapted(model: nn.Module, lora: Any, keeps_dtype: bool) -> nn.Module:
    """Return the model with one adapter that learns: in float32, as PEFT and PPO keep it, or in the
    model's own dtype.
    """
    dtype = next(model.parameters()).dtype
    model = add_adapter(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype if keeps_dtype else torch.float32)
    return model
