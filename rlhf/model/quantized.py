"""A frozen base whose linear layers keep their weights in 4 or 8 bits, under LoRA adapters that learn
(QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

A product makes the weight whole in the dtype of its input, in the forward and again in the backward
pass, and keeps neither. So a layer is one function wherever it is called: in training and in
sampling, for one row and for many, on a CPU and on a GPU. The layers of bitsandbytes itself are not:
on CPUs with AVX512-BF16 its 4-bit layer computes in bfloat16 in eval mode alone, and its 8-bit layer
rounds what it reads, with outliers that depend on the other rows of the batch.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from rlhf.errors import UserError

# 4 bits: NF4 in blocks of 64, whose scales are kept in 8 bits ("double quantisation"), 4.13 bits a
# weight; 8 bits: one scale for each row
METHODS = ("nf4", "int8")


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight is packed: y = x W' + b with W made whole for the product.

    weight: the packed numbers, uint8 of two a byte (nf4) or int8 (out, in). Scales are no buffers,
    so that casting a model, which keeps integers, does not round them.
    """

    def __init__(self, source: nn.Linear, method: str):
        """Pack the weight of a linear layer; its bias is shared."""
        nn.Module.__init__(self)
        whole = source.weight.detach()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.method, self.dtype = method, whole.dtype
        packed, self.state = _pack_4bit(whole) if method == "nf4" else _pack_8bit(whole)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = source.bias

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out, in) in `dtype`; by default that of the layer it was made from."""
        dtype = dtype or self.dtype
        packed = self.weight.detach()
        if self.method == "int8":
            return packed.to(dtype).mul_(self.state.to(dtype)[:, None])
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(packed, self.state).to(dtype)

    def scales(self) -> Tensor:
        """Return what the packed numbers are multiplied with: of blocks (nf4) or rows (int8)."""
        if self.method == "int8":
            return self.state
        from bitsandbytes.functional import dequantize_blockwise

        return dequantize_blockwise(self.state.absmax, self.state.state2) + self.state.offset

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return QuantizedProduct.apply(x, self.bias, self.whole)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        moved = self.state.to(self.weight.device)
        # bitsandbytes moves its state in place
        self.state = self.state if moved is None else moved
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.method}"


class QuantizedProduct(Function):
    """y = x W' + b with the gradient for x; `whole(dtype)` makes W (out, in), which is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, whole: Callable[..., Tensor]) -> Tensor:
        ctx.whole = whole
        rows, weight = x.reshape(-1, x.shape[-1]), whole(x.dtype)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        # as LoraProduct makes it, so that the base alone equals one under an adapter of zeros
        flat = y.view(-1, weight.shape[0])
        if bias is None:
            torch.mm(rows, weight.t(), out=flat)
        else:
            torch.addmm(bias.to(x.dtype), rows, weight.t(), out=flat)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient @ ctx.whole(gradient.dtype), None, None


def _pack_4bit(whole: Tensor) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(whole, compress_statistics=True, quant_type="nf4")


def _pack_8bit(whole: Tensor) -> tuple[Tensor, Tensor]:
    """Return round(127 w / max |w|) of each row, as LLM.int8 (Dettmers et al. 2022) has it, and
    max |w| / 127.
    """
    scale = whole.float().abs().amax(1) / 127
    # a row of zeros
    divisor = torch.where(scale > 0, scale, 1.0)
    return (whole.float() / divisor[:, None]).round_().to(torch.int8), scale


def quantize(model: nn.Module, method: str, leave: Collection[str] = ()) -> None:
    """Pack the linear layers of a causal model in place, all but its output head.

    leave: the last parts of names of layers whose weights are read without calling them. Each layer
    is let go before the next is packed. Raises UserError where there is none.
    """
    head = model.get_output_embeddings()
    found = 0
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head and name.split(".")[-1] not in leave:
            model.set_submodule(name, QuantizedLinear(module, method))
            found += 1
    if not found:
        raise UserError(
            f"{model.config.model_type}: none of its layers is a plain linear one, which load_in_4bit and "
            "load_in_8bit keep in fewer bits. Leave them out"
        )
    # files stay mapped into memory, with all that was packed, while one of their tensors is in use
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def dequantize(model: nn.Module) -> bool:
    """Replace packed layers, under adapters too, by linear ones of the same numbers; return whether
    there were any.
    """
    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    for name, module in packed:
        with torch.device("meta"):
            layer = nn.Linear(module.in_features, module.out_features, bias=False)
        layer.weight = nn.Parameter(module.whole(), requires_grad=False)
        layer.bias = module.bias
        model.set_submodule(name, layer)
    return bool(packed)


def is_quantized(model: nn.Module) -> bool:
    """Return whether layers of a model are packed."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def weight_memory(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of a model's weights, scales included, and those that they take whole."""
    now = whole = 0
    shared = {id(p): p for p in model.parameters()}
    for parameter in shared.values():
        now += parameter.numel() * parameter.element_size()
    whole = now
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            packed = module.weight.numel() * module.weight.element_size()
            whole += module.in_features * module.out_features * module.dtype.itemsize - packed
            now += _state_bytes(module)
    return now, whole


def _state_bytes(module: QuantizedLinear) -> int:
    if module.method == "int8":
        tensors = [module.state]
    else:
        # the tables of 16 and of 256 values are shared in the paper, and small
        state = module.state
        tensors = [state.absmax, state.state2.absmax]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
