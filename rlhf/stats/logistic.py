"""Logistic regression on one column, and whether it has a maximum."""

import numpy as np


def separable(x: np.ndarray, y: np.ndarray) -> bool:
    """Return whether a threshold on x parts all wins from all losses (y in [0, 1]), so that the
    steepest slope fits.
    """
    wins, losses = x[y > 0], x[y < 1]
    return bool(wins.min() >= losses.max() or losses.min() >= wins.max())


def logistic_fit(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, ridge: float, start: np.ndarray
) -> np.ndarray:
    """Return (theta, phi) that maximise sum w [y log p + (1 - y) log(1 - p)] - ridge phi^2 / 2 by
    Newton's method.

    p = sigmoid(theta + phi x). x, y, w (n,), w sums to 1, y in [0, 1].
    """
    theta, phi = start
    for _ in range(200):
        p = sigmoid(theta + phi * x)
        rest, curve = w * (y - p), w * p * (1 - p)
        first, second = rest.sum(), rest @ x - ridge * phi
        h11, h12, h22 = curve.sum(), curve @ x, curve @ x**2 + ridge
        determinant = h11 * h22 - h12**2
        # the Hessian's inverse times the gradient, by Cramer's rule
        step = np.array([h22 * first - h12 * second, h11 * second - h12 * first])
        step /= max(determinant, 1e-300)
        # far off, a full step can overshoot
        step /= max(1.0, np.abs(step).max())
        theta, phi = theta + step[0], phi + step[1]
        if np.abs(step).max() < 1e-11:
            break
    return np.array([theta, phi])


def sigmoid(x: np.ndarray | float) -> np.ndarray | float:
    """Return 1 / (1 + exp(-x)), by the hyperbolic tangent, which does not overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))
