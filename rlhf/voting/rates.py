"""Win rates of policies by people's votes, with intervals over prompts and annotators.

A vote counts 1 for the answer it prefers and one half for each where it calls both equally good or
equally bad; skips do not count. A prompt's share is the mean of its votes, a group's the mean of its
prompts, and the win rate the mean of the groups; what waits for votes is represented by what has
them. Annotators and groups are both drawn at random and
crossed, like seeds and groups elsewhere (rlhf/stats/crossed.py): with fewer than three annotators
the interval is over prompts alone, and the result holds for these annotators.

When enough votes are in is told by an interval that may be looked at after every vote (`follow`).
An ordinary 95 % interval that is read again and again, until it happens to exclude one half, errs
far more often than in 5 % of collections. A confidence sequence errs in 5 % of them at most,
however often and whenever it is read. This one is by betting (Waudby-Smith and Ramdas 2024, arXiv
2010.09686, section 4): gamblers bet against each possible win rate m, and m is given up once their
capital has grown 1/alpha times, which in fair bets has a chance of at most alpha (Ville 1939).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from rlhf.data.annotator_report import view_summary
from rlhf.data.sources import split_event
from rlhf.data.store import Store
from rlhf.stats.crossed import MIN_SEEDS, Estimate, crossed_statistic, holm, share
from rlhf.voting.ballots import (
    Ballots,
    Item,
    Table,
    counted,
    known_groups,
    read_ballots,
    table_of,
)

# Half a tied vote for every two policies keeps the strengths finite where one of them wins all
PRIOR_TIE = 0.5
LEVEL = 0.95
# win rates this near to one half are called equal
MARGIN = 0.1
# win rates that are bet against
GRID = np.linspace(0.0, 1.0, 501)
# Shares of its capital that a gambler risks at each step. Narrower in trials than stakes that are
# planned from what came before: 0.17 against 0.22 after 200 votes
FRACTIONS = (0.1, 0.2, 0.4)
# in the place of 1 / 0, at the ends of the grid
LARGEST_BET = 1e6
# collections are not planned further ahead than this
MOST_MORE = 100_000

State = Literal["one", "other", "equal", "open"]


@dataclass(frozen=True)
class Progress:
    """What the complete pairs allow to say at any time, with an error of at most `alpha`.

    state: "one" or "other" is ahead, "equal" within one half +- margin, or "open": go on. low, high:
    the confidence sequence of the win rate, given these annotators. more: about how many further
    groups the decision takes if the win rate stays what it is; None where that is not in sight.
    """

    state: State
    low: float
    high: float
    groups: int
    alpha: float
    margin: float
    more: int | None


def follow(
    shares: Sequence[float],
    *,
    equal_share: float = 0.0,
    alpha: float = 0.05,
    margin: float = MARGIN,
) -> Progress:
    """Return where the collection stands after groups with these shares, in the order of their end.

    shares: in [0, 1], each group's share for the first policy. equal_share: share of groups to
    which both gave the same answers; they are known before anybody votes, so the sequence is of the
    other groups, and its ends are moved towards one half.
    """
    low, high = confidence_sequence(shares, alpha)
    low, high = 0.5 + (1 - equal_share) * (np.array((low, high)) - 0.5)
    state: State = "open"
    if low > 0.5:
        state = "one"
    elif high < 0.5:
        state = "other"
    elif 0.5 - margin <= low and high <= 0.5 + margin:
        state = "equal"
    more = None
    if state == "open" and shares:
        more = _groups_to_go(shares, equal_share, alpha, margin)
    return Progress(state, float(low), float(high), len(shares), alpha, margin, more)


def confidence_sequence(shares: Sequence[float], alpha: float) -> tuple[float, float]:
    """Return the newest interval of the sequence, within all earlier ones; (0, 1) without a share.

        K_t(m) = mean over f and both signs of prod_s (1 + f (x_s - m) / m),  prod_s (1 - f (x_s - m) / (1 - m))

    the capital of gamblers who risk a fixed share f of it on the win rate lying above m, or below. A
    win rate m is kept while K(m) < 1 / alpha at all times.
    """
    x = np.asarray(shares, dtype=np.float64)
    if not len(x):
        return 0.0, 1.0
    gap = x[:, None] - GRID[None, :]
    with np.errstate(divide="ignore"):
        above, below = np.minimum(1 / GRID, LARGEST_BET), np.minimum(1 / (1 - GRID), LARGEST_BET)
    logs = []
    for fraction in FRACTIONS:
        logs.append(np.cumsum(np.log1p(fraction * above * gap), axis=0))
        logs.append(np.cumsum(np.log1p(-fraction * below * gap), axis=0))
    log_capital = np.logaddexp.reduce(logs, axis=0) - math.log(len(logs))
    is_kept = np.all(log_capital < math.log(1 / alpha), axis=0)
    kept = GRID[is_kept]
    # shares that change along the way can rule out every constant one
    if not len(kept):
        return float(x.mean()), float(x.mean())
    # values between two points of the grid are kept if either is
    step = GRID[1]
    return max(0.0, float(kept[0]) - step), min(1.0, float(kept[-1]) + step)


def _groups_to_go(
    shares: Sequence[float], equal_share: float, alpha: float, margin: float
) -> int | None:
    """Return about how many further groups a decision takes if shares stay as they are.

    The width falls as sqrt(log t / t); the shortest way to a decision counts.
    """
    low, high = confidence_sequence(shares, alpha)
    n, half = len(shares), (high - low) / 2
    centre = 0.5 + (1 - equal_share) * ((low + high) / 2 - 0.5)
    distance = abs(centre - 0.5)
    # the half width that excludes one half, or that stays within it +- margin: whichever is wider
    # comes first; of the groups that are voted on, like `half`
    needed = max(distance, margin - distance) / max(1 - equal_share, 1e-9)
    if needed <= 0:
        return None
    for total in np.unique(np.geomspace(n + 1, MOST_MORE, 200).astype(int)):
        shrunk = half * math.sqrt(math.log1p(total) / total * n / math.log1p(n))
        if shrunk <= needed:
            return int(total - n)
    return None


def summarise_votes(
    ballots: Ballots, *, overlap: int = 1, margin: float = MARGIN, level: float = LEVEL
) -> dict[str, Any] | None:
    """Return the win rates of all policies and of every two, as plain numbers; None without a vote.

    {"source", "event", "annotators", "votes", "prompts", "policies": [{policy, rate}], "pairs":
    [{one, other, rate, p_adjusted, votes, prompts, ties, equal, stop}]}. `rate` is
    `Estimate.to_dict()`: of two policies the share of the first; of more, each policy's mean chance
    over the others by Bradley and Terry's model. overlap: votes that make a pair complete; stop:
    `Progress` over complete pairs, which may be read after every vote.
    """
    if not ballots.annotators:
        return None
    items = ballots.items
    rates = {}
    for pair, own in items.items():
        # of what nobody has voted on, nothing is known
        if any(item.shares for item in own):
            rates[pair] = pair_rate(own, level)
    # several pairs of policies: one of them is beyond 1/2 by chance more often
    adjusted = holm([rate.p for rate in rates.values()])
    rows = []
    for (pair, rate), p in zip(rates.items(), adjusted, strict=True):
        # may be read after every vote, unlike the interval
        progress = follow(
            _complete(items[pair], overlap),
            equal_share=_equal_share(items[pair]),
            # all pairs of policies together keep the error, also those that nobody has voted on yet
            alpha=(1 - level) / len(items),
            margin=margin,
        )
        rows.append(_pair_row(pair, items[pair], rate, p, progress))

    return {
        "source": ballots.source,
        "event": ballots.event,
        "annotators": len(ballots.annotators),
        "scope": "annotators" if len(ballots.annotators) >= MIN_SEEDS else "these annotators",
        "votes": sum(row["votes"] for row in rows),
        "prompts": sum(row["prompts"] for row in rows),
        "policies": _policies(ballots, rates, level),
        "pairs": rows,
    }


def votes_of_store(name: str) -> dict[str, Any]:
    """Return what a report shows of a store ("votes.db", "votes.db@118"): how far its annotators
    agree, and `summarise_votes`, None where it compares no policies.
    """
    path, event = split_event(name)
    with Store.open(path, readonly=True) as store:
        view, overlap = store.at(event), int(store.setting("overlap", "1"))
        votes = summarise_votes(read_ballots(view), overlap=overlap)
        return {"annotators": view_summary(view), "votes": votes}


def _policies(
    ballots: Ballots, rates: dict[tuple[str, str], Estimate], level: float
) -> list[dict[str, Any]]:
    """Return each policy's win rate, the best first. rates: of each two that are voted on."""
    names, rows = ballots.policies, []
    if len(names) == 2:
        (pair, rate), *_ = rates.items()
        mirrored = replace(rate, estimate=1 - rate.estimate, low=1 - rate.high, high=1 - rate.low)
        rows = [(pair[0], rate), (pair[1], mirrored)]
    else:
        known: set[str] = set()
        for pair in rates:
            known |= known_groups(ballots.items[pair])
        groups = sorted(known)
        tables = {}
        for pair in rates:
            tables[pair] = table_of(ballots.items[pair], ballots.annotators, groups)
        size = len(ballots.annotators), len(groups)
        for number, name in enumerate(names):
            rows.append((name, _estimate(_mean_chance(names, tables, number), *size, level)))
    rows.sort(key=lambda row: -row[1].estimate)
    return [{"policy": name, "rate": rate.to_dict()} for name, rate in rows]


def pair_rate(items: Sequence[Item], level: float) -> Estimate:
    """Return the win rate by these items.

    Its interval is over their annotators and known groups alone: others, of which nothing is known,
    would make it too narrow.
    """
    annotators = list(dict.fromkeys(name for item in items for name in item.shares))
    groups = sorted(known_groups(items))
    table = table_of(items, annotators, groups)
    return _estimate(_rate(table), len(annotators), len(groups), level)


def _estimate(
    statistic: Callable[[np.ndarray, np.ndarray], float], annotators: int, groups: int, level: float
) -> Estimate:
    found = crossed_statistic(statistic, annotators, groups, null=0.5, level=level)
    # `share` leaves the p out, since a report claims nothing of its win rates; here they decide
    return replace(share(found, level), p=found.p)


def _rate(table: Table) -> Callable[[np.ndarray, np.ndarray], float]:
    def rate(annotator_weights: np.ndarray, group_weights: np.ndarray) -> float:
        means, counted = table.by_group(annotator_weights)
        weights = group_weights * counted
        return float(weights @ means / weights.sum()) if weights.sum() > 0 else np.nan

    return rate


def _mean_chance(
    names: Sequence[str], tables: dict[tuple[str, str], Table], policy: int
) -> Callable[[np.ndarray, np.ndarray], float]:
    """Return the statistic "mean chance of this policy over each other one" of the weights."""
    number = {name: i for i, name in enumerate(names)}

    def mean_chance(annotator_weights: np.ndarray, group_weights: np.ndarray) -> float:
        wins = np.zeros((len(names), len(names)))
        for (one, other), table in tables.items():
            means, counted = table.by_group(annotator_weights)
            weights = group_weights * counted
            wins[number[one], number[other]] += weights @ means
            wins[number[other], number[one]] += weights @ (1 - means)
        strengths = bradley_terry(wins)
        rest = np.delete(strengths, policy)
        return float(np.mean(strengths[policy] / (strengths[policy] + rest)))

    return mean_chance


def bradley_terry(wins: np.ndarray, prior_tie: float = PRIOR_TIE) -> np.ndarray:
    """Return strengths (K,), with geometric mean 1, such that i beats j with p_i / (p_i + p_j).

    wins: (K, K), how often the row's policy wins over the column's, ties counting one half for
    each (Bradley and Terry 1952). Hunter's minorisation (2004, Annals of Statistics 32, eq. 3):
    p_i <- (wins of i) / sum_j n_ij / (p_i + p_j), n_ij the meetings. prior_tie: tied votes added to
    every two.
    """
    wins = wins + prior_tie / 2 * (1 - np.eye(len(wins)))
    meetings = wins + wins.T
    strengths = np.ones(len(wins))
    for _ in range(10_000):
        new = wins.sum(axis=1) / np.sum(
            meetings / (strengths[:, None] + strengths[None, :]), axis=1
        )
        new /= np.exp(np.mean(np.log(new)))
        done = np.max(np.abs(np.log(new / strengths))) < 1e-10
        strengths = new
        if done:
            break
    return strengths


def _complete(items: Sequence[Item], overlap: int) -> list[float]:
    """Return the mean share of each group all of whose pairs are complete, in that order; a group of
    equal answers alone is none.
    """
    complete = []
    for own in _by_group(items):
        means, order = [], -1
        for item in own:
            if item.equal:
                means.append(0.5)
            elif len(item.shares) >= overlap:
                means.append(sum(item.shares.values()) / len(item.shares))
                order = max(order, item.order)
        # nobody was asked about equal answers
        if order >= 0 and len(means) == len(own):
            complete.append((order, sum(means) / len(means)))
    return [mean for _, mean in sorted(complete)]


def _equal_share(items: Sequence[Item]) -> float:
    """Return the share of groups in which all answers are equal."""
    groups = {item.group for item in items}
    asked, _ = counted(items)
    return len(groups - asked.keys()) / len(groups)


def _by_group(items: Sequence[Item]) -> list[list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return list(groups.values())


def _pair_row(
    pair: tuple[str, str], items: Sequence[Item], rate: Estimate, p: float, progress: Progress
) -> dict[str, Any]:
    shares: list[float] = []
    voted = equal = 0
    for item in items:
        shares += item.shares.values()
        voted += bool(item.shares)
        equal += item.equal
    return {
        "one": pair[0],
        "other": pair[1],
        "rate": rate.to_dict(),
        "p_adjusted": p if np.isfinite(p) else None,
        "votes": len(shares),
        "prompts": voted,
        "ties": shares.count(0.5) / len(shares),
        "equal": equal,
        "stop": asdict(progress),
    }
