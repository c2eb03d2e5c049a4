"""The best of n responses by a proxy score: its KL, and what it scores, from N responses a prompt."""

import math
from collections.abc import Iterable

import numpy as np


def best_of_n_kl(n: float) -> float:
    """Return log n - (n - 1)/n, nats: the KL of the best of n to the policy that it is chosen from.

    Stiennon et al. 2020, appendix G.3. It is exact in the limit of responses that never repeat or
    tie, and an upper bound otherwise (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(total: int, n: int) -> np.ndarray:
    """Return (total,) the probability of each rank, the lowest first, to be the best of n drawn
    without replacement from `total`.

        w_i = C(i - 1, n - 1) / C(total, n),  i = 1 ... total

    Raises ValueError unless 1 <= n <= total.
    """
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} of {total} responses: expected n from 1 to {total}")
    # from w_total = n / total downwards: w_(i-1) / w_i = (i - n) / (i - 1), with no large binomials
    i = np.arange(total, 1, -1)
    steps = np.maximum(i - n, 0) / (i - 1)
    return np.cumprod(np.append(n / total, steps))[::-1]


def best_of_n_means(proxy: np.ndarray, values: np.ndarray, sizes: Iterable[int]) -> np.ndarray:
    """Return (P, M) the expected value of the best of n by the proxy, for each prompt and each of M
    sizes n.

    The mean over all subsets of n of a prompt's N responses, which is unbiased and has the least
    variance (Nakano et al. 2021, arXiv 2112.09332, appendix I). proxy, values: (P, N). Responses
    that tie by the proxy share their places: the best is any of them.
    """
    proxy, values = np.asarray(proxy, dtype=float), np.asarray(values, dtype=float)
    order = np.argsort(proxy, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    shared = np.empty_like(ordered)
    for row, scores in enumerate(np.take_along_axis(proxy, order, axis=1)):
        _, tie = np.unique(scores, return_inverse=True)
        shared[row] = (np.bincount(tie, ordered[row]) / np.bincount(tie))[tie]
    weights = [best_of_n_weights(proxy.shape[1], n) for n in sizes]
    return shared @ np.array(weights).T
