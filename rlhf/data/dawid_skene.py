"""The model of Dawid and Skene (1979): the true class of each item and the skill of each annotator,
by EM.

Numbers only: `votes.py` makes pairs of the result, `agreement.py` a report on the annotators.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# item -> annotator -> value
Ratings = dict[Hashable, dict[str, Hashable]]


@dataclass
class Skills:
    """posterior: item -> (K,) probability of each class. confusion: annotator -> (K, K) p(says
    column | truth is row). prior: (K,) share of each class.
    """

    classes: list[Hashable]
    posterior: dict[Hashable, np.ndarray]
    confusion: dict[str, np.ndarray]
    prior: np.ndarray


def dawid_skene(
    ratings: Ratings,
    classes: Sequence[Hashable],
    *,
    known: dict[Hashable, Hashable] | None = None,
    pseudo: np.ndarray | None = None,
    mirror: Sequence[int] | None = None,
    weights: Mapping[Hashable, float] | None = None,
    rounds: int = 500,
    tolerance: float = 1e-6,
) -> Skills:
    """Fit by EM the model in which an annotator says l of an item of class k with probability
    pi_kl.

        E:  T_ik  proportional to  p_k prod_votes pi_kl          (Dawid and Skene 1979, eq. 2.5)
        M:  pi_kl proportional to  c_kl + sum_i T_ik [says l],   p_k proportional to c + sum_i T_ik   (eq. 2.3, 2.4)

    known: items whose class is certain (control pairs); they stay what they are and tell the
    annotators' skill.
    pseudo: (K, K) votes c_kl that every annotator is taken to have cast before, so that few votes
    decide little; with it, EM starts from that common skill, and c is 1 for each class. Without it
    (maximum likelihood as in the paper) c is 0, and EM starts from the shares of the votes.
    mirror: a permutation of the classes that must change nothing ("a" and "b" are only names): the
    counts of the M step are added to their image. weights: what an item's log-likelihood counts, 1
    where none is given, for items that are not independent: EM of sum_i w_i log L_i has w_i T_ik in
    the place of T_ik in the M step, and the same E step. Values of `ratings` that are not among `classes`
    are ignored, and so are items that have no other value, unless known. Ends when no T changes by more
    than `tolerance`.
    """
    number = {value: k for k, value in enumerate(classes)}
    K = len(number)
    known = {item: value for item, value in (known or {}).items() if item in ratings}
    items, annotators, votes = _as_array(ratings, number, known)
    fixed = np.array(
        [number[known[item]] if item in known else -1 for item in items], dtype=np.int64
    )
    weight = np.array([(weights or {}).get(item, 1.0) for item in items])[:, None]
    # the prior of every annotator, as votes
    start = np.zeros((K, K)) if pseudo is None else np.asarray(pseudo, dtype=np.float64)
    class_pseudo = 0.0 if pseudo is None else 1.0
    image = np.arange(K) if mirror is None else np.asarray(mirror)

    if pseudo is None:
        truth = _clamped(_normalised(_tally(votes[:, 0], votes[:, 2], (len(items), K))), fixed)
    else:
        confusion = np.repeat(_normalised(start)[None], len(annotators), axis=0)
        truth = _clamped(_posterior(votes, np.full(K, 1 / K), confusion, len(items)), fixed)

    for _ in range(rounds):
        # M step
        counts = _counts(votes, weight * truth, len(annotators)) + start
        # a and b are names: what holds of one holds of the other
        confusion = _normalised(counts + counts[:, image][:, :, image])
        shares = (weight * truth).sum(axis=0) + class_pseudo
        prior = _normalised(shares + shares[image])
        # E step
        before = truth
        truth = _clamped(_posterior(votes, prior, confusion, len(items)), fixed)
        if np.abs(truth - before).max(initial=0.0) <= tolerance:
            break
    return Skills(
        classes=list(classes),
        posterior=dict(zip(items, truth, strict=True)),
        confusion=dict(zip(annotators, confusion, strict=True)),
        prior=prior,
    )


def _as_array(
    ratings: Ratings, number: dict[Hashable, int], known: dict[Hashable, Hashable]
) -> tuple[list[Hashable], list[str], np.ndarray]:
    """Return the items and annotators that count, and the votes (V, 3): number of the item,
    annotator and class.
    """
    usable = {}
    for item, values in ratings.items():
        own = {name: number[value] for name, value in values.items() if value in number}
        if own or item in known:
            usable[item] = own
    annotators = sorted(set(itertools.chain.from_iterable(usable.values())))
    place = {name: j for j, name in enumerate(annotators)}
    votes = []
    for i, own in enumerate(usable.values()):
        votes += [(i, place[name], k) for name, k in own.items()]
    return list(usable), annotators, np.array(votes, dtype=np.int64).reshape(-1, 3)


def _counts(votes: np.ndarray, truth: np.ndarray, people: int) -> np.ndarray:
    """Return (people, K, K) votes l on items of class k that each annotator cast, given the (items,
    K) truth.
    """
    counts = np.zeros((people, truth.shape[1], truth.shape[1]))
    np.add.at(counts.transpose(0, 2, 1), (votes[:, 1], votes[:, 2]), truth[votes[:, 0]])
    return counts


def _posterior(
    votes: np.ndarray, prior: np.ndarray, confusion: np.ndarray, items: int
) -> np.ndarray:
    with np.errstate(divide="ignore"):
        logs = np.repeat(np.log(prior)[None], items, axis=0)
        np.add.at(logs, votes[:, 0], np.log(confusion)[votes[:, 1], :, votes[:, 2]])
    # many votes underflow; relative to the largest they do not
    logs -= logs.max(axis=1, keepdims=True)
    return _normalised(np.exp(logs))


def _clamped(truth: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    rows = fixed >= 0
    truth[rows] = np.eye(truth.shape[1])[fixed[rows]]
    return truth


def _tally(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    counts = np.zeros(shape)
    np.add.at(counts, (rows, columns), 1.0)
    return counts


def _normalised(counts: np.ndarray) -> np.ndarray:
    """Return rows that sum to 1; a row without any count becomes uniform."""
    total = counts.sum(axis=-1, keepdims=True)
    return np.where(
        total > 0, counts / np.where(total > 0, total, 1.0), 1.0 / max(1, counts.shape[-1])
    )
