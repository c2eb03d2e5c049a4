"""The cache of reference log-probabilities: what names a row and a reference, and the files."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.model.adapters import frozen_copy, lora_config
from rlhf.model.loading import load_model, trainable_policy
from rlhf.offline.reference_cache import (
    ReferenceCache,
    batches_by_length,
    cache_folder,
    reference_key,
    row_keys,
    with_new_response,
)
from rlhf.ranks.distributed import DistributedContext
from rlhf.runs import budget
from rlhf.runs.budget import Cost

KEYS = [bytes([n]) * 16 for n in range(3)]


def batch(*rows):
    """A batch of (prompt, response) rows, chosen ones first, padded by 0 on the right."""
    width = max(len(prompt + response) for prompt, response in rows)
    columns = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, response in rows:
        pad = [0] * (width - len(prompt + response))
        columns["input_ids"].append(prompt + response + pad)
        columns["attention_mask"].append([1] * len(prompt + response) + pad)
        columns["completion_mask"].append([0] * len(prompt) + [1] * len(response) + pad)
    return {name: torch.tensor(column) for name, column in columns.items()}


def test_a_row_is_its_ids_and_where_its_response_begins():
    row, other = ([5, 6], [7, 2]), ([5], [9, 9, 9, 9, 2])
    (key, _) = row_keys(batch(row, other))
    # neither padding nor the rest of the batch, nor the side, plays a part
    assert row_keys(batch(row, row)) == [key, key] == row_keys(batch(other, row))[1:] * 2
    for changed in (([5, 6], [8, 2]), ([5], [6, 7, 2]), ([5, 6, 7], [2]), ([5, 6], [7])):
        assert row_keys(batch(changed, other))[0] != key
    # 0 may be a token as well as padding
    assert row_keys(batch(([5, 6], [7, 2, 0]), other))[0] != key


def test_ld_alpha_makes_a_row_depend_on_the_length_of_the_other():
    row, short, long = ([5], [7, 7, 2]), ([5], [2]), ([5], [8, 8, 8, 2])
    one, two = row_keys(batch(row, short), 0.5)[0], row_keys(batch(row, long), 0.5)[0]
    assert len({one, two, row_keys(batch(row, short), 0.4)[0], row_keys(batch(row, short))[0]}) == 4
    assert row_keys(batch(row, short))[0] == row_keys(batch(row, long))[0]


def policy(path, seed=0, **settings):
    torch.manual_seed(seed)
    model = trainable_policy(load_model(path), lora_config(r=2, **settings))
    frozen_copy(model, "default", "ref")
    return model


def test_a_reference_is_all_that_decides_its_numbers(base_path, sft_path):
    model = policy(sft_path)
    key = reference_key(model, "ref", autocast=False)
    found = {key, reference_key(model, "ref", autocast=True), reference_key(model, None)}
    parameters = dict(model.named_parameters())
    for name in ("model.norm.weight", "q_proj.lora_B.ref.weight"):
        parameter = next(p for n, p in parameters.items() if n.endswith(name))
        before = parameter.data.clone()
        # the least change of a weight there is
        flat = parameter.data.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
        found.add(reference_key(model, "ref", autocast=False))
        parameter.data.copy_(before)
    model.peft_config["ref"].lora_alpha += 1
    found.add(reference_key(model, "ref", autocast=False))
    model.peft_config["ref"].lora_alpha -= 1
    model.config.rms_norm_eps *= 2
    found.add(reference_key(model, "ref", autocast=False))
    model.config.rms_norm_eps /= 2
    found.add(reference_key(load_model(base_path, "bfloat16").model, None))
    assert len(found) == 8

    # training moves the policy and leaves the reference
    trained = next(p for n, p in parameters.items() if n.endswith("q_proj.lora_B.default.weight"))
    trained.data += 1.0
    assert reference_key(model, "ref", autocast=False) == key
    assert reference_key(policy(sft_path), "ref", autocast=False) == key


def test_a_new_adapter_is_the_base_whatever_its_seed(base_path):
    bare = reference_key(load_model(base_path).model, None)
    one, two = policy(base_path, seed=1), policy(base_path, seed=2)
    assert reference_key(one, "ref") == reference_key(two, "ref") == bare


@pytest.fixture
def said():
    return []


def opened(said, **world):
    return ReferenceCache("model", DistributedContext(**world), said.append)


def test_what_is_kept_is_read_again_to_the_last_bit(said):
    value = float(torch.tensor(-1 / 3))
    first = opened(said)
    first.add(KEYS[:2], [value, -2.5], Cost())
    first.save()
    # of a concurrent run, which knows nothing of the first
    other = ReferenceCache("model", DistributedContext(), said.append)
    other.add(KEYS[1:], [-2.5, -7.0], Cost())
    other.save()
    again = opened(said)
    assert again.get(KEYS) == [value, -2.5, -7.0] and KEYS[2] not in first and not said
    assert len(list(again.folder.iterdir())) == 2
    # nothing new: nothing is written
    again.save()
    assert len(list(again.folder.iterdir())) == 2


def test_a_run_pays_for_what_it_finds_as_if_it_had_computed_it(said, monkeypatch):
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: 100.0))
    first = opened(said)
    # 6 FLOPs and 2 seconds for either row, 5 and 1 for the third
    first.add(KEYS[:2], [-1.0, -2.0], Cost(12.0, 4.0))
    first.add(KEYS[2:], [-3.0], Cost(5.0, 1.0))
    first.save()
    again = opened(said)
    again.budget.began = 100.0
    again.pay(KEYS[:1])
    # a batch with a row that is new to the run is computed whole: 6 + 6
    again.pay(KEYS[:2])
    # one without is not computed again
    again.pay([KEYS[1], KEYS[0]])
    assert again.budget.metrics() == {
        **{f"budget/{name}": 0 for name in ("episodes", "tokens_generated", "tokens_trained")},
        **{"budget/flops": 18.0, "budget/reference_flops": 18.0},
        **{"budget/seconds": 6.0, "budget/reference_seconds": 6.0},
    }


@pytest.mark.parametrize("damage", [lambda old: old[:-1], lambda old: old[:5] + b"x" + old[6:]])
def test_a_damaged_file_is_removed_and_said(said, damage):
    cache = opened(said)
    cache.add(KEYS, [-1.0, -2.0, -3.0], Cost())
    cache.save()
    (file,) = cache.folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again = opened(said)
    assert not any(key in again for key in KEYS) and not file.exists()
    assert said == [f"{file}: removed, since it is damaged; its rows are computed again"]


def test_a_folder_that_cannot_be_written_stops_nothing(said, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "file"))
    cache = opened(said)
    cache.add(KEYS[:1], [-1.0], Cost())
    cache.save()
    assert cache.get(KEYS[:1]) == [-1.0]
    assert len(said) == 1 and "cannot be kept" in said[0] and "Set RLHF_CACHE" in said[0]


def test_the_place_of_the_cache(monkeypatch):
    assert cache_folder() == Path(os.environ["RLHF_CACHE"])
    monkeypatch.delenv("RLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert cache_folder() == Path("/var/caches/rlhf")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "rlhf"


def test_batches_hold_rows_of_like_length_up_to_so_many_tokens():
    # 9 alone: two rows of 9 would be 18; then 2 x 6 = 12; then 3 x 4 = 12; 20 is over the limit
    assert batches_by_length([4, 6, 9, 4, 6, 4, 1, 20], 13) == [[7], [2], [1, 4], [0, 3, 5], [6]]
    assert batches_by_length([], 13) == []


def test_pairs_need_a_pass_where_a_response_is_new():
    # of three answers a, b, c to one prompt, the pair b and c brings nothing new
    ids = {"a": [7, 2], "b": [8, 2], "c": [9, 9, 2]}
    pairs = [
        {"prompt_ids": [5], "chosen_ids": ids[one], "rejected_ids": ids[other]}
        for one, other in ("ab", "ca", "bc")
    ]
    seen = set()
    assert with_new_response(pairs, seen) == [0, 1] and len(seen) == 3
    # to another prompt they are other responses
    assert with_new_response([pairs[2] | {"prompt_ids": [6]}], seen) == [0]
    # with ld_alpha the shorter length counts, which is 2 in these and 3 in the first of the longer
    assert with_new_response(pairs, set(), 0.5) == [0, 1]
    longer = [pair | {"rejected_ids": [3, 3, 3, 2]} for pair in pairs[1:]]
    assert with_new_response([*pairs, *longer], set(), 0.5) == [0, 1, 3, 4]
