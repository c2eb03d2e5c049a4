"""Votes between policies: which votes of a preference store compare answers of two policies."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf.data.store_queries import StoreView
from rlhf.data.votes import SHARES, Vote, final_votes
from rlhf.text import short_names


@dataclass
class Item:
    """One prompt on which two policies meet: the share of the first in each annotator's vote.

    equal: both gave the same answer, so that nobody need be asked, and everybody would call it a
    tie. order: the event of the last vote, by which pairs are complete one after the other.
    """

    group: str
    shares: dict[str, float] = field(default_factory=dict)
    equal: bool = False
    order: int = 0


@dataclass
class Ballots:
    """All items of every two policies, the policies in the order in which the store met them.

    items: {(one, other): items}, shares being those of `one`. sources: what each annotator is,
    `Vote.source`.
    """

    policies: list[str]
    annotators: list[str]
    items: dict[tuple[str, str], list[Item]]
    sources: dict[str, str]
    event: int

    @property
    def source(self) -> str:
        """Return who voted: "human", "simulated", "judge" or "mixed"."""
        found = {self.sources[name] for name in self.annotators}
        return found.pop() if len(found) == 1 else "mixed"


def read_ballots(view: StoreView) -> Ballots:
    """Return the votes on pairs of two policies; without items where the store has no such pair.

    Pairs of one policy's own answers, made to train on, and control pairs do not count.
    """
    pairs: dict[int, dict[str, Any]] = {}
    models: dict[str, None] = {}
    for id, pair in view.pairs().items():
        if pair["kind"] == "normal" and _is_between_policies(pair):
            pairs[id] = pair
            models |= dict.fromkeys((pair["model_a"], pair["model_b"]))
    names = dict(zip(models, short_names(list(models)), strict=True))
    policies = list(names.values())

    cast: dict[int, list[Vote]] = {}
    annotators: dict[str, None] = {}
    sources = {}
    for vote in view.votes():
        if vote.comparison not in pairs:
            continue
        cast.setdefault(vote.comparison, []).append(vote)
        sources[vote.annotator] = vote.source
        # an adjudicator decides a pair and is no annotator whose taste is measured
        if not vote.is_final and vote.choice != "skip":
            annotators[vote.annotator] = None

    items: dict[tuple[str, str], list[Item]] = {}
    for id, pair in pairs.items():
        one, other = names[pair["model_a"]], names[pair["model_b"]]
        swapped = policies.index(one) > policies.index(other)
        item = _item(pair["metadata"]["group"], cast.get(id, []), swapped=swapped)
        items.setdefault((other, one) if swapped else (one, other), []).append(item)
    # pairs that nobody is asked about, and everybody would call a tie
    for model_a, model_b, group in view.equal_answers():
        if model_a in names and model_b in names:
            one, other = sorted((names[model_a], names[model_b]), key=policies.index)
            items.setdefault((one, other), []).append(Item(group, equal=True))
    return Ballots(policies, list(annotators), items, sources, view.event)


@dataclass(frozen=True)
class Table:
    """The items of one pair of policies as arrays, for weights of annotators and of groups.

    shares, counts (A, N): each annotator's share for the first policy, 0 and a count of 0 where
    there is no vote. group (N,): the number of each item's group, of `groups`. item_weight (N,) and
    group_weight (G,): what each counts, see `table_of`.
    """

    shares: np.ndarray
    counts: np.ndarray
    group: np.ndarray
    item_weight: np.ndarray
    group_weight: np.ndarray

    def by_group(self, annotator_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean share of each group (G,) and what it counts, 0 without a vote."""
        counts = annotator_weights @ self.counts
        seen = counts > 0
        means = (annotator_weights @ self.shares)[seen] / counts[seen]
        weight, group = self.item_weight[seen], self.group[seen]
        size = np.bincount(group, weights=weight, minlength=len(self.group_weight))
        total = np.bincount(group, weights=weight * means, minlength=len(self.group_weight))
        is_seen = size > 0
        return total / np.where(is_seen, size, 1.0), is_seen * self.group_weight


def known_groups(items: Sequence[Item]) -> set[str]:
    """Return the groups that have a vote, or in which all answers are equal."""
    asked, voted = counted(items)
    equal = {item.group for item in items if item.group not in asked}
    return equal | voted.keys()


def counted(items: Sequence[Item]) -> tuple[Counter[str], Counter[str]]:
    """Return how many items of each group people are asked about, and how many have a vote."""
    asked: Counter[str] = Counter()
    voted: Counter[str] = Counter()
    for item in items:
        if not item.equal:
            asked[item.group] += 1
        if item.shares:
            voted[item.group] += 1
    return asked, voted


def table_of(items: Sequence[Item], annotators: Sequence[str], groups: Sequence[str]) -> Table:
    """Return the items as arrays; `groups` are all groups, in the order of their weights.

    Equal answers are known before anybody votes. So that they do not draw a win rate to one half
    while votes are still coming, items that wait for votes are represented by the voted ones: of
    their group, and where it has none, groups by the groups that are voted on.
    """
    known = known_groups(items)
    asked, voted = counted(items)
    items = [item for item in items if item.group in known and (item.shares or item.equal)]

    row = {name: number for number, name in enumerate(annotators)}
    column = {name: number for number, name in enumerate(groups)}
    shares = np.zeros((len(annotators), len(items)))
    counts = np.zeros((len(annotators), len(items)))
    item_weight = np.ones(len(items))
    for number, item in enumerate(items):
        if item.equal:
            shares[:, number], counts[:, number] = 0.5, 1.0
        else:
            item_weight[number] = asked[item.group] / voted[item.group]
        for name, share in item.shares.items():
            shares[row[name], number], counts[row[name], number] = share, 1.0

    group_weight = np.zeros(len(groups))
    for name in known:
        group_weight[column[name]] = len(asked) / len(voted) if voted[name] else 1.0
    # their sum stays the number of groups that are known
    group_weight *= len(known) / max(1e-300, group_weight.sum())
    group = np.array([column[item.group] for item in items], dtype=int)
    return Table(shares, counts, group, item_weight, group_weight)


def _is_between_policies(pair: dict[str, Any]) -> bool:
    known = pair["model_a"] is not None and pair["model_b"] is not None
    return known and pair["model_a"] != pair["model_b"]


def _item(group: str, votes: Sequence[Vote], *, swapped: bool) -> Item:
    """Return an item; an adjudicator's word takes the place of what the others said."""
    item = Item(group)
    final = next(iter(final_votes(votes).values()), None)
    for vote in votes:
        share = SHARES.get(vote.choice)
        if share is None or vote.is_final:
            continue
        share = SHARES[final.choice] if final else share
        item.shares[vote.annotator] = 1.0 - share if swapped else share
        item.order = max(item.order, vote.event)
    return item
