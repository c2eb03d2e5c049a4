"""What ZeRO-3 needs of us where no rank holds the whole base: loading, parts, and passes in step."""

import contextlib
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf.model.loading import load_model
from rlhf.ranks import deepspeed_backend, divided
from rlhf.ranks.distributed import DistributedContext
from tests.kinds import build


def as_divided(parameter: nn.Parameter, ds_persist: bool = False) -> None:
    """Mark a parameter as DeepSpeed does, with nothing of it here."""
    parameter.ds_id, parameter.ds_persist = id(parameter), ds_persist
    parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
    parameter.data = torch.empty(0)


def test_the_padding_of_a_part_is_not_read():
    # 5 numbers over 2 ranks are parts of 3, of which the last number of the second is none
    parameter = nn.Parameter(torch.arange(5.0))
    as_divided(parameter)
    parameter.ds_tensor, parameter.ds_zero_partition_rank = torch.tensor([3.0, 4.0, torch.nan]), 1
    assert divided.is_part(parameter) and divided.shape_of(parameter) == (5,)
    assert divided.own_part(parameter).tolist() == [3, 4]
    parameter.ds_zero_partition_rank = 0
    assert len(divided.own_part(parameter)) == 3
    assert divided.own_part(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize(("step", "count"), [(1, 10), (3, 4), (2, 4), (7, 2)])
def test_numbers_of_parts_are_those_of_the_whole(monkeypatch, step, count):
    """10 numbers over 4 ranks are parts of 3, 3, 3 and 1: some hold none of the sample."""
    numbers = torch.randn(10)
    expected = divided.sampled(numbers, step, count)
    assert expected.tolist() == numbers[::step][:count].bfloat16().view(torch.int16).tolist()
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda bits: parts.append(bits.clone()))
    padded = torch.cat([numbers, torch.full((2,), torch.nan)])
    for rank, part in enumerate(padded.split(3)):
        parameter = nn.Parameter(numbers.clone())
        as_divided(parameter)
        parameter.ds_tensor, parameter.ds_zero_partition_rank = part, rank
        divided.sampled(parameter, step, count)
    assert sum(parts).tolist() == expected.tolist()


def test_layers_outside_of_lists_and_in_them():
    settings = {"trainable_token_indices": [2], "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        build("llama")[0], LoraConfig(r=2, target_modules=["q_proj"], **settings)
    )
    roles = nn.ModuleDict({"trunk": model, "heads": nn.ModuleDict({"value": nn.Linear(4, 1)})})
    for name, parameter in roles.named_parameters():
        as_divided(parameter, ds_persist=name.endswith("norm.weight"))
    stream = divided.LayerStream([roles])
    names = {id(module): name for name, module in roles.named_modules()}
    found = [names[id(layer)].removeprefix("trunk.base_model.model.") for layer in stream.layers]
    layers = [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    # the wrapper reads the embeddings itself
    assert found == ["model.embed_tokens", *layers, "lm_head", "heads.value"]
    kept = {name for name, p in roles.named_parameters() if any(p is k for k in stream.kept)}
    assert all("lora_" in name or "norm" in name or "trainable" in name for name in kept)
    in_layers = {id(p) for part in stream.parts for p in part}
    assert in_layers | {id(p) for p in stream.kept} == {id(p) for p in roles.parameters()}


class Ranks:
    """Threads in the place of ranks, whose smallest number is found together."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count, timeout=20)
        self.numbers: list[int] = []

    def all_reduce(self, tensor, op):
        self.numbers.append(int(tensor))
        self.barrier.wait()
        lowest = min(self.numbers)
        if self.barrier.wait() == 0:
            self.numbers.clear()
        self.barrier.wait()
        tensor.fill_(lowest)


def layers_of_a_rank(seen: list, count: int = 3) -> nn.ModuleList:
    """Layers of one parameter each, which note what is done with them."""
    layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(count))
    for number, layer in enumerate(layers):
        as_divided(layer.weight)
        layer.weight.all_gather = lambda param_list, n=number: seen.append(n)
        layer.weight.partition = lambda param_list: None
        layer.forward = lambda: None
    return layers


# passes of each rank, and the layers of a pass
UNEVEN = {
    "one more": ([0, 1, 2], 2, [0, 1, 2], 1, [0, 1, 2, 0, 1, 2]),
    "none": ([0, 1, 2], 2, [0, 1, 2], 0, [0, 1, 2, 0, 1, 2]),
    # the rank without a head begins its second pass, and the other waits for it before the head
    "another way": ([0, 1, 2], 1, [0, 1], 2, [0, 1, 0, 1, 2]),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_ranks_that_make_other_passes_fetch_the_same_layers(monkeypatch, case):
    *given, expected = UNEVEN[case]
    ranks = Ranks(2)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)
    seen: list[list[int]] = [[], []]

    def run(rank: int) -> None:
        numbers, passes = given[2 * rank : 2 * rank + 2]
        layers = layers_of_a_rank(seen[rank])
        world = DistributedContext()
        with divided.LayerStream([layers]).passes(world):
            for _ in range(passes):
                for number in numbers:
                    layers[number]()
        assert world.before_waiting is None and not layers[0]._forward_pre_hooks

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [expected, expected]


def test_a_rank_serves_the_others_before_it_waits_for_them(monkeypatch):
    done: list[str] = []
    for name in ("all_reduce", "all_gather_object", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, n=name: done.append(n))
    world = DistributedContext(size=2, before_waiting=lambda: done.append("served"))
    world.sum(1.0)
    world.barrier()
    with pytest.raises(TypeError):
        # nothing was gathered
        world.gather([1])
    assert done == ["served", "all_reduce", "served", "barrier", "served", "all_gather_object"]


def test_hooks_of_deepspeed_are_away_inside_and_back_in_their_order():
    def theirs(*_):
        raise AssertionError("called")

    theirs.__module__ = "deepspeed.runtime.zero.parameter_offload"
    module, called = nn.Linear(2, 2), []
    module.register_forward_hook(lambda *_: called.append("first"))
    handle = module.register_forward_hook(theirs)
    module.register_forward_hook(lambda *_: called.append("last"))
    before = list(module._forward_hooks)
    with deepspeed_backend.without_hooks([module]):
        module(torch.ones(2))
    assert called == ["first", "last"] and list(module._forward_hooks) == before
    handle.remove()
    module(torch.ones(2))
    assert len(called) == 4


def test_dividing_draws_no_random_number(monkeypatch):
    """Or SFT under ZeRO-3 would start from another new adapter than in one plain process."""
    monkeypatch.setattr("deepspeed.zero.Init", lambda **settings: None)
    before = torch.get_rng_state()
    deepspeed_backend.divider({"zero_optimization": {"stage": 3}})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", [False, True])
def test_weights_are_divided_one_after_the_other_as_they_are_read(base_path, monkeypatch, stop):
    """Each once, also where two modules share it, and before the next one is there."""
    expected = load_model(base_path).model.state_dict()
    taken: list[nn.Parameter] = []
    sums: list[float] = []

    def divide(parameter: nn.Parameter) -> None:
        assert not any(map(torch.Tensor.numel, taken)) and not parameter.is_meta
        if stop and taken:
            raise OSError("the disk is gone")
        taken.append(parameter)
        sums.append(float(parameter.sum()))
        as_divided(parameter)

    monkeypatch.setattr(deepspeed_backend, "divider", lambda settings: divide)
    from transformers import AutoModelForCausalLM

    monkeypatch.delenv(divided.READ_AHEAD_OFF, raising=False)
    with pytest.raises(OSError) if stop else contextlib.nullcontext(), divided.dividing({}):
        model = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    assert divided.READ_AHEAD_OFF not in divided.os.environ
    nn.Linear(2, 2)
    if stop:
        assert len(taken) == 1
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in taken} == set(names.values()) and len(taken) == len(names)
    for parameter, total in zip(taken, sums, strict=True):
        assert total == float(expected[names[id(parameter)]].sum())
