"""Weights and moments that two ranks have written, put together by hand; whole runs are in
tests/launch/test_other_ranks.py.
"""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

from rlhf.errors import UserError
from rlhf.ranks.deepspeed_state import OwnPart, SavedParts, own_parts, rank_files


def numbers(*values):
    return torch.tensor(values, dtype=torch.float32)


def place(start, count):
    return SimpleNamespace(start=start, numel=count)


def write_rank(folder, rank, state):
    torch.save(
        {"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    )


def state_of(weights, padding=0):
    """Moments are the weights times 10 and 100, after 3 steps."""
    padded = torch.cat([weights, torch.zeros(padding)])
    return {"step": torch.tensor(3.0), "exp_avg": 10 * padded, "exp_avg_sq": 100 * padded}


@pytest.fixture
def zero2(tmp_path):
    """a = [1, 2, 3] and b = [[4, 5], [6, 7]] in one flat tensor of 8, four numbers a rank."""
    cut = [(numbers(1, 2, 3, 4), 0), (numbers(5, 6, 7), 1)]
    where = [{"a": place(0, 3), "b": place(3, 1)}, {"b": place(0, 3)}]
    for rank, ((weights, padding), names) in enumerate(zip(cut, where, strict=True)):
        state = {
            "param_slice_mappings": [names],
            "single_partition_of_fp32_groups": [weights],
            "base_optimizer_state": {
                "state": {0: state_of(weights, padding)},
                "param_groups": [{"lr": 0.5, "params": [0]}],
            },
        }
        write_rank(tmp_path, rank, state)
    return SavedParts(tmp_path, rank_files(tmp_path))


@pytest.fixture
def zero3(tmp_path):
    """The same, where each parameter is cut in two: a = [1, 2 | 3, -] and b = [4, 5 | 6, 7]."""
    shapes = [OrderedDict(a=torch.Size([3]), b=torch.Size([2, 2]))]
    torch.save({"param_shapes": shapes}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank, weights in enumerate([numbers(1, 2, 4, 5), numbers(3, 0, 6, 7)]):
        state = {
            "fp32_flat_groups": [weights],
            "optimizer_state_dict": {
                "state": {0: state_of(weights)},
                "param_groups": [{"lr": 0.5, "params": []}],
            },
        }
        write_rank(tmp_path, rank, state)
    return SavedParts(tmp_path, rank_files(tmp_path))


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_what_ranks_have_written_is_put_together_by_parameter(stage, request):
    saved = request.getfixturevalue(stage)
    assert saved.whole("a").tolist() == [1, 2, 3]
    assert saved.whole("b").tolist() == [4, 5, 6, 7]
    assert saved.whole("a", "exp_avg").tolist() == [10, 20, 30]
    assert saved.whole("b", "exp_avg_sq").tolist() == [400, 500, 600, 700]
    assert saved.settings[0]["lr"] == 0.5
    state = saved.empty_state(0, torch.ones(3))
    assert state["step"] == 3 and state["exp_avg"].tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="holds no state of c"):
        saved.whole("c")


def test_files_are_in_the_order_of_ranks(tmp_path):
    for rank in (10, 2, 0):
        write_rank(tmp_path, rank, {})
    found = [path.name.split("_")[3] for path in rank_files(tmp_path)]
    assert found == ["0", "2", "10"]


def test_moments_that_are_not_one_number_a_weight_are_refused(zero2):
    # bitsandbytes has one scale for 256 numbers
    zero2._states[0][0]["absmax1"] = numbers(1.0)
    with pytest.raises(
        UserError, match="'absmax1' of the optimizer is not one number for each weight"
    ):
        zero2.empty_state(0, torch.ones(3))


def test_a_part_is_copied_to_its_place():
    # the numbers 4 to 6 of a parameter of 8 stand from place 2 on
    target = torch.zeros(6)
    OwnPart(group=0, start=2, offset=4, count=3).copy(target, torch.arange(8.0))
    assert target.tolist() == [0, 0, 4, 5, 6, 0]


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        # four ranks have 2, 2, 1 and 0 of 5 numbers, and 1 of each of 4
        (0, [(0, 0, 2), (2, 0, 1)]),
        (2, [(0, 4, 1), (2, 2, 1)]),
        (3, [(0, 5, 0), (2, 3, 1)]),
    ],
)
def test_under_zero3_each_parameter_is_cut_into_equal_shares(rank, expected, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    parameters = [SimpleNamespace(ds_numel=5), SimpleNamespace(ds_numel=4)]
    hashable = [type("P", (), vars(p))() for p in parameters]
    optimizer = SimpleNamespace(
        fp16_groups=[hashable], fp32_partitioned_groups_flat=[numbers(0, 0, 0)]
    )
    flats, own = own_parts(optimizer)
    assert len(flats) == 1
    assert [(own[p].start, own[p].offset, own[p].count) for p in hashable] == expected
