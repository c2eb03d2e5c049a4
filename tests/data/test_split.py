import itertools
import math

import pytest

from rlhf.data.records import Prompt
from rlhf.data.split import answer_pair, assign, first_by_hash, half_of, join_groups, split_of
from rlhf.errors import UserError

GROUPS = [f"group {i}" for i in range(4000)]


def prompt(group, split=None):
    return Prompt(prompt=[{"role": "user", "content": "x"}], group=group, split=split)


def test_splits_and_halves_never_change():
    # First byte of `printf split:a | sha256sum` and so on: 48 76 03 74 84 09 d0 3d 24 8a; below
    # 0x33.33 (0.2) is test, from 0xcc.cd (0.8) validation. `printf half:a`: 3d 3f d5 7b 27 30 71 90
    # 20 04; below 0x80 is half a.
    letters = {"train": "-", "validation": "v", "test": "t"}
    assert "".join(letters[split_of(g, 0.2, 0.2)] for g in "abcdefghij") == "--t--tv-t-"
    assert "".join(half_of(g) for g in "abcdefghij") == "aabaaaabaa"


def test_expected_shares():
    # binomial: 4000 groups at p = 0.1 is 400 with standard deviation 19, at 0.05 is 200 with 13.8;
    # 4 of them allowed
    splits = [split_of(g, 0.05, 0.1) for g in GROUPS]
    for name, p in (("test", 0.1), ("validation", 0.05), ("train", 0.85)):
        assert abs(splits.count(name) - 4000 * p) < 4 * math.sqrt(4000 * p * (1 - p))
    halves = [half_of(g) for g in GROUPS]
    assert abs(halves.count("a") - 2000) < 4 * math.sqrt(1000)


def test_half_is_independent_of_split():
    # among the 1600 or so test groups at 0.4, half "a" is as likely as elsewhere
    test = [g for g in GROUPS if split_of(g, 0.1, 0.4) == "test"]
    in_a = sum(half_of(g) == "a" for g in test)
    assert abs(in_a - len(test) / 2) < 4 * math.sqrt(len(test) / 4)


def test_larger_fractions_only_add():
    small = {g: split_of(g, 0.05, 0.1) for g in GROUPS}
    large = {g: split_of(g, 0.2, 0.4) for g in GROUPS}
    assert all(large[g] == small[g] for g in GROUPS if small[g] != "train")
    assert {split_of(g, 0.0, 0.0) for g in GROUPS} == {"train"}


def test_assign_by_hash_keeps_a_group_together():
    records = [prompt(g) for g in GROUPS[:100] * 2]
    assign(records, 0.2, 0.2)
    assert [r.split for r in records] == [split_of(g, 0.2, 0.2) for g in GROUPS[:100] * 2]


def test_given_splits_win_and_reach_the_whole_group():
    records = [prompt("a", "test"), prompt("a"), prompt("b", "train"), prompt("c", "validation")]
    assign(records, 0.49, 0.49)
    assert [r.split for r in records] == ["test", "test", "train", "validation"]


def test_validation_is_cut_out_of_train_when_the_data_has_none():
    records = [prompt(g, "test" if i < 10 else "train") for i, g in enumerate(GROUPS[:400])]
    assign(records, 0.2, 0.1)
    assert all(r.split == "test" for r in records[:10])
    by_hash = [split_of(g, 0.2, 0.1) == "validation" for g in GROUPS[10:400]]
    assert [r.split == "validation" for r in records[10:]] == by_hash
    # no test row is made beside the given ones
    assert {r.split for r in records[10:]} == {"train", "validation"}


def test_a_group_with_two_splits_is_refused_with_its_rows():
    records = [
        prompt("a", "train"),
        prompt("b", "train"),
        prompt("a", "test"),
        prompt("a", "train"),
    ]
    with pytest.raises(UserError, match=r"group 'a'.*train at f row 1, f row 4; test at f row 3"):
        assign(records, places=[f"f row {i}" for i in range(1, 5)])


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (-0.1, 0.1), (0.1, 1.0), (float("nan"), 0.1)])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(UserError, match="fraction"):
        split_of("a", *fractions)


def test_answer_pairs_have_no_order_and_no_case():
    assert answer_pair("Yes.", " no") == answer_pair("No", "yes.")
    assert answer_pair("a", "b") != answer_pair("a", "c")
    assert answer_pair("a b", "c") != answer_pair("a", "b c")


def test_joined_groups_are_named_by_the_smallest_whatever_the_order():
    # d-b share x, b-c share y, so b = c = d; a stands alone; the second b has no link and follows
    # its namesake
    rows = [("d", ["x"]), ("b", ["x", "y"]), ("a", []), ("c", ["y"]), ("b", [])]
    for order in itertools.permutations(rows):
        joint = join_groups([g for g, _ in order], [links for _, links in order])
        assert joint == [{"a": "a"}.get(g, "b") for g, _ in order]


def test_the_first_few_are_drawn_by_the_hash_of_their_group():
    # of 400 billing and 400 delivery groups, written in that order, 100 of either kind: sd of a
    # draw without replacement sqrt(200 / 4 * 600 / 799) = 6.1. By name all of them would be
    # billing.
    kinds = [f"{kind}-{i:03}" for kind in ("billing", "delivery") for i in range(400)]
    records = [Prompt(prompt=[{"role": "user", "content": name}], group=name) for name in kinds]
    chosen = first_by_hash(records, 200)
    assert 75 < sum(r.group.startswith("billing") for r in chosen) < 125
    # whatever the order of rows
    assert chosen == first_by_hash(records[::-1], 200) == first_by_hash(records, None)[:200]
    encoded = [{"record": r, "prompt_ids": []} for r in records]
    assert [row["record"] for row in first_by_hash(encoded, 200)] == chosen
    # independent of the split: of the test groups as many come first as of the others
    test = sum(
        split_of(r.group, test_fraction=0.5, validation_fraction=0.0) == "test" for r in chosen
    )
    assert 75 < test < 125
