import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf.model.lora import FusedLinear, LoraProduct, fuse


def product(x, weight, bias, a, b, scale):
    """The same by the definition."""
    y = x @ weight.T + scale * (x @ a.T) @ b.T
    return y if bias is None else y + bias


@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradients_are_those_of_the_definition(biased):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5), torch.randn(4, 5)
    bias = torch.randn(4) if biased else None
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    results = []
    for function in (LoraProduct.apply, product):
        learnt = [tensor.double().requires_grad_() for tensor in (x, a, b)]
        fixed = [None if tensor is None else tensor.double() for tensor in (weight, bias)]
        y = function(learnt[0], *fixed, learnt[1], learnt[2], 0.7)
        y.square().sum().backward()
        results.append([y.detach(), *(tensor.grad for tensor in learnt)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


def test_by_hand():
    # x W = 2 * 3 = 6, s (x A) B = 0.5 * (2 * 5) * 7 = 35
    one = [torch.tensor([[number]]) for number in (2.0, 3.0, 5.0, 7.0)]
    a, b = one[2].requires_grad_(), one[3].requires_grad_()
    y = LoraProduct.apply(one[0], one[1], None, a, b, 0.5)
    y.backward()
    # dy/dA = s B x = 0.5 * 7 * 2, dy/dB = s A x = 0.5 * 5 * 2
    assert (y.item(), a.grad.item(), b.grad.item()) == (41.0, 7.0, 5.0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 4)

    def forward(self, x):
        return self.inner(x)


def adapted(**settings):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False, **settings)
    plain = get_peft_model(Net(), config)
    fused = copy.deepcopy(plain)
    fuse(fused)
    return plain, fused


@pytest.mark.parametrize(
    "settings, is_fused",
    [({}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False), ({"lora_dropout": 0.5}, False)],
)  # fmt: skip
def test_a_fused_layer_is_pefts_and_falls_back_where_it_is_not(settings, is_fused):
    plain, fused = adapted(**settings)
    x = torch.randn(3, 5)
    layer = fused.base_model.model.inner
    assert isinstance(layer, FusedLinear)
    assert (layer._fused_adapter(x) is not None) == is_fused
    outputs = []
    for model in (plain, fused):
        # the same dropout
        torch.manual_seed(2)
        outputs.append(model.train()(x))
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)


def test_adapters_that_are_off_merged_or_of_another_dtype_take_pefts_way():
    plain, fused = adapted()
    x = torch.randn(3, 5)
    layer = fused.base_model.model.inner
    with plain.disable_adapter(), fused.disable_adapter():
        assert layer._fused_adapter(x) is None
        torch.testing.assert_close(plain(x), fused(x), atol=0, rtol=0)
    assert layer._fused_adapter(x.bfloat16()) is None
    fused.merge_adapter()
    assert layer._fused_adapter(x) is None
    torch.testing.assert_close(plain(x), fused(x), atol=1e-6, rtol=0)


def test_on_a_base_in_bfloat16_products_are_made_in_it_and_gradients_are_in_float32():
    plain, fused = adapted()
    results = []
    for model in (fused, plain):
        layer = model.base_model.model.inner
        layer.base_layer.bfloat16()
        x = torch.linspace(-2, 2, 15, dtype=torch.bfloat16).reshape(3, 5).requires_grad_()
        assert model is plain or layer._fused_adapter(x) is not None
        y = model(x)
        y.float().square().sum().backward()
        learnt = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        assert y.dtype == x.grad.dtype == torch.bfloat16
        assert all(weight.grad.dtype == torch.float32 for weight in learnt)
        results.append([y, x.grad, *(weight.grad for weight in learnt)])
    for ours, theirs in zip(*results, strict=True):
        # bfloat16 rounds by 2^-9, here a few times one after the other
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 2**-6


def test_the_output_may_be_changed_in_place_and_the_input_need_not_be_contiguous():
    _, fused = adapted()
    x = torch.randn(5, 3).t()
    y = fused(x)
    y.mul_(2)
    y.sum().backward()
    plain, _ = adapted()
    (2 * plain(x)).sum().backward()
    ours, theirs = (dict(m.named_parameters()) for m in (fused, plain))
    for name, parameter in theirs.items():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-6, rtol=1e-6)


def test_under_autocast_pefts_layer_computes():
    plain, fused = adapted()
    x = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), fused(x))
