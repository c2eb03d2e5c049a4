"""LoRA layers that add the adapter in two fused products instead of PEFT's five passes."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import Function

from rlhf.model.quantized import QuantizedLinear
from rlhf.ranks.divided import is_divided


def fuse(model: nn.Module) -> None:
    """Let each plain LoRA layer of a PEFT model compute its forward pass by `LoraProduct`.

    Parameters, their names and everything that PEFT does with a layer stay; calling it again
    changes nothing.
    """
    for module in model.modules():
        if type(module) is lora.Linear and type(module.base_layer) in (nn.Linear, QuantizedLinear):
            module.__class__ = FusedLinear


class FusedLinear(lora.Linear):
    """PEFT's LoRA layer; `forward` is fused where that computes the same function."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self._fused_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        return LoraProduct.apply(
            x,
            self.base_layer.weight,
            self.base_layer.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            self.base_layer.whole if isinstance(self.base_layer, QuantizedLinear) else None,
        )

    def _fused_adapter(self, x: Tensor) -> str | None:
        """Return the active adapter if the fused product stands for it, else None."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        name, base, weight = active[0], self.base_layer, self.base_layer.weight
        is_plain = name not in self.lora_variant and not self.lora_bias[name]
        dropout = self.lora_dropout[name]
        draws = isinstance(dropout, nn.Dropout) and dropout.p > 0 and self.training
        # LoRA learns in float32 on a base in bfloat16, whose products are made in bfloat16
        learnt = self.lora_A[name].weight.dtype
        kept = base.dtype if isinstance(base, QuantizedLinear) else weight.dtype
        one_dtype = x.dtype == kept and x.dtype in (learnt, torch.bfloat16)
        # it would cast some of the products and not others
        is_cast = torch.is_autocast_enabled(x.device.type)
        # ZeRO-3 brings weights together when their own module is called, which is bypassed here
        is_whole = not is_divided(weight)
        if (
            not is_plain
            or draws
            or not one_dtype
            or is_cast
            or not is_whole
            or weight.requires_grad
        ):
            return None
        return name


class LoraProduct(Function):
    """y = x W' + b + s (x A') B', with gradients for x, A and B; W and b are frozen.

    x is (..., in), W (out, in), b (out,) or None, A (r, in), B (out, r), s a number (Hu et al.
    2022, eq. 3). The products with B in the forward and with A in the backward pass are added in
    place to those with W, so that nothing else of size (..., out) or (..., in) is made.
    `whole(dtype)` makes W of a quantised layer, once for each pass; weight is packed then.

    x, W and b have one dtype, in which all products are made and y is. A and B may be wider, as
    they are in mixed precision; so are their gradients then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        whole: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.learnt, ctx.whole, kept = a.dtype, whole, weight
        if whole is not None:
            weight = whole(x.dtype)
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = rows @ a.t()
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        # through a view: what is returned is not one, so that models may change it in place
        flat = y.view(-1, weight.shape[0])
        if bias is None:
            torch.mm(rows, weight.t(), out=flat)
        else:
            torch.addmm(bias, rows, weight.t(), out=flat)
        flat.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(rows, kept, a, b, low)
        ctx.scale, ctx.shape = scale, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_low = (gradient @ b).mul_(ctx.scale)
        of_x = of_a = of_b = None
        # the input of the first layer, the frozen embeddings, asks for none
        if ctx.needs_input_grad[0]:
            if ctx.whole is not None:
                weight = ctx.whole(gradient.dtype)
            of_x = (gradient @ weight).addmm_(of_low, a).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            of_a = (of_low.t() @ rows).to(ctx.learnt)
        if ctx.needs_input_grad[4]:
            of_b = (gradient.t() @ low).to(ctx.learnt).mul_(ctx.scale)
        return of_x, None, None, of_a, of_b, None, None
