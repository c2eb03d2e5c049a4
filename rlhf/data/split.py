"""Groups and the three splits: the same for every stage, without communication between stages.

The split of a group is a hash of its name, so every stage holds out the same groups; there is
no seed.
"""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, TypeVar

from rlhf.data.records import Record, digest, normalise
from rlhf.errors import UserError

R = TypeVar("R")
Split = Literal["train", "validation", "test"]


def split_of(group: str, validation_fraction: float = 0.05, test_fraction: float = 0.1) -> Split:
    """Return the split of a group by its hash u in [0, 1): test if u < test_fraction, validation at
    the other end.

    With a larger fraction each held-out set only grows: what was test stays test, what was
    validation stays so.
    """
    check_fractions(validation_fraction, test_fraction)
    # test at one end and validation at the other, so that a larger share of one takes none of the
    # other
    u = _uniform("split", group)
    if u < test_fraction:
        return "test"
    return "validation" if u >= 1.0 - validation_fraction else "train"


def half_of(group: str) -> Literal["a", "b"]:
    """Return the half of a group by a hash independent of `split_of`.

    The referee of an experiment trains on one half, every method on the other.
    """
    return "a" if _uniform("half", group) < 0.5 else "b"


def deal_folds(groups: Iterable[str], folds: int) -> dict[str, int]:
    """Return the fold of each group, 0 to folds - 1: groups in the order of a hash are dealt in turn.

    Folds differ by at most one group. The hash is independent of `split_of`. Raises UserError for
    fewer groups than folds.
    """
    ordered = sorted(set(groups), key=lambda group: (_uniform("fold", group), group))
    if len(ordered) < folds:
        raise UserError(
            f"{len(ordered)} groups cannot make {folds} folds: rows of one group stay together. Lower --folds, or "
            "give more data"
        )
    return {group: place % folds for place, group in enumerate(ordered)}


def first_by_hash(rows: Sequence[R], count: int | None) -> list[R]:
    """Return the first `count` rows (None: all) by a hash of the group that is independent of its
    split.

    rows: records, or what `encode` makes of them. The hash mixes all kinds of groups; their names
    or places would not where data names its groups or is sorted.
    """

    def key(row: R) -> tuple[float, str, str]:
        record = row["record"] if isinstance(row, dict) else row
        return _uniform("order", record.group), record.group, str(record.prompt)

    return sorted(rows, key=key)[:count]


def assign(
    records: list[Record],
    validation_fraction: float = 0.05,
    test_fraction: float = 0.1,
    places: list[str] | None = None,
) -> None:
    """Fill `split` of every record, in place.

    A split that the data gives wins, for the whole group. Where the data gives train and perhaps
    test but nowhere validation, validation is cut out of train by hash of the group. `places` names
    the rows in errors. Raises UserError if rows of one group carry different splits.
    """
    check_fractions(validation_fraction, test_fraction)
    given: dict[str, str] = {}
    for record in records:
        if (
            record.split is not None
            and given.setdefault(record.group, record.split) != record.split
        ):
            raise UserError(_conflict(records, record.group, places))

    cut_validation = bool(given) and "validation" not in given.values()
    for record in records:
        by_hash = split_of(record.group, validation_fraction, test_fraction)
        record.split = given.get(record.group, by_hash)
        if cut_validation and record.split == "train" and by_hash == "validation":
            record.split = "validation"


def check_fractions(validation_fraction: float, test_fraction: float) -> None:
    """Raise UserError unless both are in [0, 1) and leave something to train on."""
    for name, value in (
        ("validation_fraction", validation_fraction),
        ("test_fraction", test_fraction),
    ):
        if not 0.0 <= value < 1.0:
            raise UserError(
                f"option '{name}': found {value}, expected a share from 0 up to, not including, 1"
            )
    if validation_fraction + test_fraction >= 1.0:
        raise UserError(
            f"validation_fraction {validation_fraction} and test_fraction {test_fraction} leave nothing to train on; "
            "their sum must be below 1"
        )


def answer_pair(one: str, other: str) -> str:
    """Return a name for two answers that is the same in either order and however they are spaced or
    capitalised.
    """
    return digest("\x00".join(sorted((normalise(one), normalise(other)))))


def join_groups(groups: list[str], links: list[Iterable[Hashable]]) -> list[str]:
    """Return the groups after joining: rows with a group or any link in common, directly or over
    others, get one.

    groups: N names; links: for each row what it shares with others, such as its answer pair. The
    joint group's name is the smallest of its members' names, so it does not depend on the order of
    rows.
    """
    # a forest over groups and links (union-find); a root is its own parent
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for group, shared in zip(groups, links, strict=True):
        for link in shared:
            parent[root(("link", link))] = root(("group", group))

    roots = [root(("group", group)) for group in groups]
    smallest: dict[Hashable, str] = {}
    for node, group in zip(roots, groups, strict=True):
        smallest[node] = min(group, smallest.get(node, group))
    return [smallest[node] for node in roots]


def _uniform(purpose: str, group: str) -> float:
    """Return a number in [0, 1) that depends on nothing but the purpose and the group."""
    # 53 bits are what a float holds exactly
    whole = int.from_bytes(hashlib.sha256(f"{purpose}:{group}".encode()).digest()[:8], "big")
    return (whole >> 11) / 2**53


def _conflict(records: list[Record], group: str, places: list[str] | None) -> str:
    by_split: dict[str, list[str]] = {}
    for i, record in enumerate(records):
        if record.group == group and record.split is not None:
            by_split.setdefault(record.split, []).append(places[i] if places else f"record {i + 1}")

    found = []
    for split, rows in by_split.items():
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        found.append(f"{split} at {', '.join(rows[:3])}{more}")
    return (
        f"group '{group}' is given more than one split: {'; '.join(found)}. Rows of one group share a prompt or a "
        "pair of answers (or the value of a 'group' column), so one split would leak into the other. Give them one "
        "split, or leave out the 'split' column and let the group decide"
    )
