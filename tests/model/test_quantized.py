"""A base in 4 or 8 bits: its numbers, its products, and all that reads it."""

import copy
import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf.engines.batched import generate, slots_are_exact
from rlhf.engines.hf import generate as plain_generate
from rlhf.engines.sampling import Sampling
from rlhf.errors import UserError
from rlhf.model.adapters import add_adapter, lora_config
from rlhf.model.files import IDENTITY_FILE, read_identity
from rlhf.model.loading import load_model
from rlhf.model.lora import FusedLinear, fuse
from rlhf.model.packing import decoder_and_head, packs
from rlhf.model.quantized import (
    QuantizedLinear,
    dequantize,
    is_quantized,
    quantize,
    weight_memory,
)
from rlhf.offline.reference_cache import reference_key
from rlhf.ranks.deepspeed_config import check_deepspeed_config
from rlhf.ranks.distributed import DistributedContext
from rlhf.ranks.optimizer_engine import make_engine
from rlhf.roles.one_base import Roles
from rlhf.runs.budget import decoder_shape
from rlhf.stages import check_zero
from tests.kinds import build
from tests.roles.test_one_base import batch_of

pytest.importorskip("bitsandbytes")

METHODS = ("nf4", "int8")


def layer_of(rows, method, bias=None) -> QuantizedLinear:
    weight = torch.tensor(rows)
    source = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    source.weight = nn.Parameter(weight)
    if bias is not None:
        source.bias = nn.Parameter(torch.tensor(bias), requires_grad=False)
    return QuantizedLinear(source, method)


def test_8_bits_by_hand():
    # scales 2.54 / 127 = 0.02, 0 and 1.27 / 127 = 0.01; 0.031 / 0.02 = 1.55 rounds to 2
    layer = layer_of([[2.54, -1.0, 0.031], [0.0, 0.0, 0.0], [1.27, -1.27, 0.004]], "int8")
    assert layer.weight.tolist() == [[127, -50, 2], [0, 0, 0], [127, -127, 0]]
    expected = torch.tensor([[2.54, -1.0, 0.04], [0.0, 0.0, 0.0], [1.27, -1.27, 0.0]])
    torch.testing.assert_close(layer.whole(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.scales(), torch.tensor([0.02, 0.0, 0.01]))
    # 2.54 - 2 + 0.12 = 0.66
    y = layer(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(y, torch.tensor([[0.66, 0.0, -1.27]]), atol=1e-6, rtol=0)


def test_4_bits_by_hand():
    # one block of 64, whose largest number is 2: the levels of NF4 (2305.14314, appendix E) times 2
    # come back, and others as the nearest of them. 0.0796 and 0.1609 meet at 0.1203
    row = [2.0, -2.0, 2 * 0.4407098, 2 * 0.119, 2 * 0.121] + [0.0] * 59
    layer = layer_of([row], "nf4")
    assert layer.weight.numel() == 32 and layer.weight.dtype == torch.uint8
    expected = 2 * torch.tensor([[1.0, -1.0, 0.4407098, 0.0795803, 0.1609302] + [0.0] * 59])
    torch.testing.assert_close(layer.whole(), expected, atol=1e-6, rtol=0)
    assert layer.scales().tolist() == [2.0]


@pytest.mark.parametrize("method", METHODS)
def test_products_and_gradients_are_those_of_the_whole_weight(method):
    torch.manual_seed(0)
    rows, bias = torch.randn(8, 32).tolist(), torch.randn(8).tolist()
    layer, x = layer_of(rows, method, bias), torch.randn(2, 3, 32)
    found = []
    for product in (layer, lambda x: nn.functional.linear(x, layer.whole(), layer.bias)):
        given = x.clone().requires_grad_()
        y = product(given)
        y.square().sum().backward()
        found.append((y.detach(), given.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def packed_model(base_path, method):
    return load_model(base_path, quantization=method).model


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_model_is_one_function_in_training_and_sampling(base_path, method):
    model = packed_model(base_path, method)
    ids = torch.arange(3, 30).reshape(1, -1)
    with torch.no_grad():
        sampling = model.eval()(ids).logits
        # nor does a row depend on those beside it
        beside = model(torch.cat([ids, ids.flip(1)])).logits[:1]
    learning = model.train()(ids).logits
    assert torch.equal(sampling, learning)
    torch.testing.assert_close(sampling, beside, atol=1e-5, rtol=0)
    assert packs(model, 30) and slots_are_exact(model)


@pytest.mark.parametrize("method", METHODS)
def test_lora_on_a_packed_layer_is_fused_and_keeps_no_whole_weight(base_path, method):
    torch.manual_seed(0)
    model = get_peft_model(
        packed_model(base_path, method), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 30).reshape(1, -1)
    found = []
    for step in (lambda: None, lambda: fuse(model), lambda: dequantize(model)):
        step()
        model.zero_grad()
        kept: list[tuple] = []

        def note(tensor, kept=kept):
            kept.append((tuple(tensor.shape), tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
        loss.backward()
        learnt = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        # (64, 32) is the shape of gate and up alone
        found.append((loss.item(), learnt, ((64, 32), torch.float32) in kept))
        fused = [type(m) is FusedLinear for m in model.modules() if hasattr(m, "lora_A")]
        assert all(fused) == (len(found) > 1)
    # with the weights whole again, they are kept
    assert [has_whole for *_, has_whole in found] == [False, False, True]
    for loss, learnt, _ in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        for name, gradient in learnt.items():
            torch.testing.assert_close(gradient, found[0][1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_casting_and_copying_leave_the_numbers(base_path, method):
    model = packed_model(base_path, method)
    layer = model.model.layers[0].mlp.up_proj
    expected = layer.whole()
    cast = copy.deepcopy(model).bfloat16().model.layers[0].mlp.up_proj
    assert torch.equal(cast.whole(), expected) and cast.whole().dtype == torch.float32
    assert torch.equal(cast.scales(), layer.scales())


@pytest.mark.parametrize("method", METHODS)
def test_all_but_head_and_embeddings_is_packed(base_path, method):
    whole, model = load_model(base_path).model, packed_model(base_path, method)
    kept = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    linear = {n for n, m in whole.named_modules() if isinstance(m, nn.Linear)}
    assert kept == linear - {"lm_head"} and len(kept) == 14
    assert torch.equal(model.get_output_embeddings().weight, whole.lm_head.weight)
    # 18,432 packed weights (test_budget), 10,400 others in float32 (320 x 32 embeddings and 5 x 32
    # norms). nf4: half a byte each and one byte a block of 64, and the scales of those, 4 bytes for
    # up to 256 of them; int8: a byte each, and 4 for each of the (32 + 16 + 16 + 32 + 64 + 64 + 32)
    # x 2 rows
    now = {"nf4": 18_432 // 2 + 18_432 // 64 + 14 * 4, "int8": 18_432 + 4 * 2 * 256}[method]
    assert weight_memory(model) == (now + 10_400 * 4, (18_432 + 10_400) * 4)
    # and its cost is that of the whole one
    assert decoder_shape(decoder_and_head(model)[0]) == decoder_shape(
        decoder_and_head(whole)[0]
    ).__class__(**vars(decoder_shape(decoder_and_head(whole)[0])) | {"trained": 0, "last": 0})


def test_files_of_a_packed_model_are_let_go(base_path, tmp_path):
    shutil.copytree(base_path, tmp_path / "base")
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc")
    for method, is_mapped in ((None, True), ("int8", False)):
        initial = load_model(str(tmp_path / "base"), quantization=method)
        gc.collect()
        assert (str(tmp_path / "base" / "model.safetensors") in maps.read_text()) == is_mapped
        head = initial.model.get_output_embeddings()
        # still tied
        assert head.weight is initial.model.get_input_embeddings().weight
        del initial, head
        gc.collect()


@pytest.mark.parametrize("method", METHODS)
def test_roles_on_a_packed_base_start_equal(base_path, sft_path, reward_path, method):
    for start in (sft_path, base_path):
        roles = Roles(load_model(start, quantization=method), lora_config(r=4), reward_path)
        with torch.no_grad():
            with roles.use("policy"):
                policy, _ = roles.logprobs(batch_of())
            with roles.use("reference"):
                reference, _ = roles.logprobs(batch_of())
        assert torch.equal(policy, reference)
        with roles.use("policy"):
            roles.logprobs(batch_of())[0].sum().backward()
        touched = [p for p in roles.parameters_of("policy") if p.grad is not None]
        assert len(touched) == len(roles.parameters_of("policy"))


def test_nothing_is_merged_on_a_packed_base_and_responses_are_the_plain_engines(sft_path, capsys):
    initial = load_model(sft_path, quantization="nf4")
    model = Roles(initial, lora_config()).trunk
    given = [[5, 6, 7], [8, 9, 10, 11]], [1, 2], Sampling(8, 1.0), [2], 0
    fast, slow = generate(model, *given), plain_generate(model, *given)
    assert fast.response_ids == slow.response_ids
    assert "the base is quantised, and a merged copy would be whole" in capsys.readouterr().err


def test_an_adapter_says_where_its_base_is_kept_in_another_way(sft_path, capsys):
    # it was trained on a whole base
    initial = load_model(sft_path, quantization="int8")
    assert "kept whole, which is kept in 8 bits here" in capsys.readouterr().err
    assert initial.fingerprint == load_model(sft_path).fingerprint
    assert load_model(sft_path).quantization is None and not capsys.readouterr().err


def test_references_on_whole_and_packed_bases_have_keys_of_their_own(base_path):
    models = [load_model(base_path, quantization=method).model for method in (None, *METHODS)]
    keys = {reference_key(model, None) for model in models}
    models[2].model.layers[0].mlp.up_proj.state[0] *= 2
    assert len(keys | {reference_key(models[2], None)}) == 4


def test_what_cannot_stand_on_a_packed_base_is_refused(base_path):
    with pytest.raises(UserError, match="DoRA reads the weights of the base"):
        add_adapter(packed_model(base_path, "int8"), LoraConfig(r=2, use_dora=True))
    with pytest.raises(UserError, match="gpt2: none of its layers is a plain linear one"):
        quantize(build("gpt2")[0], "int8")


def options(**changes):
    usual = {"load_in_4bit": False, "load_in_8bit": False, "optim": "adamw"}
    usual |= {"deepspeed": "zero3", "dtype": "float32"}
    return SimpleNamespace(**usual | changes)


def test_zero_3_is_refused_and_zero_2_is_not():
    world = DistributedContext(size=2, launched=True)
    for name, value in (("load_in_4bit", True), ("load_in_8bit", True), ("optim", "adamw_8bit")):
        check_zero("dpo", options(**{name: value}), DistributedContext())
        check_zero("dpo", options(**{name: value, "deepspeed": "zero2"}), world)
        with pytest.raises(UserError, match=rf"{name}.* does not go with ZeRO-3.*zero2"):
            check_zero("dpo", options(**{name: value}), world)
    check_zero("dpo", options(), world)


def stepped(folder, count, start=None):
    """Make steps of 8-bit AdamW on a matrix large enough for it and one that is not."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 4, bias=False))
    groups = [{"params": [layer.weight], "lr": 0.01} for layer in module]
    engine = make_engine(module, groups, DistributedContext(), optim="adamw_8bit")
    if start:
        engine.load(start)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, 8, 64, generator=generator)
    for x in inputs[2 if start else 0 : count]:
        engine.backward(module(x).square().mean(), last=True)
        engine.step([0.01, 0.01])
    engine.save(folder)
    return module, engine


def test_8_bit_adamw_keeps_its_moments_in_8_bits_and_resumes_to_the_last_bit(tmp_path):
    whole, engine = stepped(tmp_path / "whole", 6)
    large, small = (engine._adam_states(number)[0] for number in (0, 1))
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8
    assert small["state1"].dtype == torch.float32 and large["step"] == small["step"] == 6
    # 2 bytes a weight and 4 for each moment of a block of 256, instead of 8
    assert large["absmax1"].numel() == 64 * 96 // 256

    stepped(tmp_path / "part", 2)
    resumed, _ = stepped(tmp_path / "rest", 6, start=tmp_path / "part")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_8_bit_adamw_takes_back_a_discarded_step_and_counts_from_the_first_gradient():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 4, bias=False))
    groups = [{"params": [layer.weight], "lr": 0.01} for layer in module]
    engine = make_engine(module, groups, DistributedContext(), optim="adamw_8bit")
    before = module[0].weight.detach().clone()
    engine.backward(module(torch.ones(2, 64)).sum(), last=True)
    engine.step([0.01, 0.01], discard=True)
    assert torch.equal(module[0].weight, before)
    # a gradient of zeros is not one
    for scale, count in ((0.0, 0), (0.0, 0), (1.0, 1)):
        engine.backward(module(torch.ones(2, 64)).sum() * scale, last=True)
        engine.step([0.01, 0.01])
        assert [engine._adam_states(number)[0]["step"] for number in (0, 1)] == [count] * 2
    # the first step of Adam is the rate in the direction of the sign: 0.01
    assert (module[0].weight.detach() - before).abs().max() == pytest.approx(0.01, rel=1e-2)


def test_deepspeed_is_told_to_take_8_bit_adamw():
    world = DistributedContext(size=2, launched=True)
    given = {"zero_optimization": {"stage": 2}}
    more = {"per_device_train_batch_size": 4, "learning_rate": 1e-4, "max_grad_norm": 1.0}
    more |= {"dtype": "auto", "lr_scheduler_type": "linear"}
    eight = options(optim="adamw_8bit", **more)
    assert check_deepspeed_config(given, "x", world, eight)["zero_allow_untested_optimizer"]
    assert "zero_allow_untested_optimizer" not in check_deepspeed_config(
        given, "x", world, options(**more)
    )
    with pytest.raises(
        UserError, match=r'optimizer.type: "AdamW", but the optimizer is "adamw_8bit"'
    ):
        check_deepspeed_config(given | {"optimizer": {"type": "AdamW"}}, "x", world, eight)


def test_reward_models_of_bases_kept_in_two_ways_share_none(reward_path, tmp_path):
    from reward.loaded import RewardModels

    for folder, method in (("one", None), ("two", "nf4"), ("three", "nf4")):
        shutil.copytree(reward_path, tmp_path / folder)
        identity = read_identity(reward_path) | ({"quantization": method} if method else {})
        (tmp_path / folder / IDENTITY_FILE).write_text(json.dumps(identity))
    models = RewardModels()
    one, two, three = (models.load(str(tmp_path / name)) for name in ("one", "two", "three"))
    assert two.model is three.model and one.model is not two.model
    assert [is_quantized(reward.model) for reward in (one, two)] == [False, True]
