"""The temperature on gaps small enough to work by hand, and that "after" is honest."""

import json
import math

import numpy as np
import pytest

from reward.cards.calibration import (
    as_temperature,
    calibration,
    cross_fitted,
    fit_sharpness,
    log_loss,
    with_temperature,
)


def test_temperature_by_hand():
    # 2, 2, 2, -2 and Platt's target t = 5/6: 6 (t - p) - 2 (t - (1 - p)) = 0 -> p = (2 t + 1) / 4 =
    # 2/3 = sigmoid(2 s) -> s = ln 2 / 2
    gaps = np.array([2.0, 2.0, 2.0, -2.0])
    assert fit_sharpness(gaps) == pytest.approx(math.log(2) / 2, abs=1e-9)
    assert as_temperature(fit_sharpness(gaps)) == pytest.approx(2 / math.log(2), abs=1e-8)
    # temperature is in units of the gaps
    assert fit_sharpness(10 * gaps) == pytest.approx(math.log(2) / 20, abs=1e-10)


def test_a_temperature_exists_where_all_pairs_are_right_and_is_infinite_where_none_is():
    # one pair: t = 2/3 = sigmoid(s g)
    assert fit_sharpness(np.array([4.0])) == pytest.approx(math.log(2) / 4, abs=1e-9)
    assert fit_sharpness(np.array([-1.0, -2.0])) == 0.0
    assert fit_sharpness(np.zeros(3)) == 0.0
    assert as_temperature(0.0) is None


def test_log_loss_by_hand():
    # sigmoid(ln 3) = 3/4 and 1/4
    assert log_loss(np.array([math.log(3), -math.log(3)])) == pytest.approx(
        -(math.log(0.75) + math.log(0.25)) / 2
    )
    assert calibration(np.zeros(4))["log_loss"] == pytest.approx(math.log(2))


def test_each_fold_has_the_temperature_of_the_others():
    # two groups make two folds: each is scaled by what the other one says
    gaps = np.array([2.0, 2.0, 2.0, -2.0, 4.0])
    groups = np.array(["a", "a", "a", "a", "b"])
    scaled = cross_fitted(gaps, groups)
    assert scaled[:4] == pytest.approx(gaps[:4] * math.log(2) / 4)
    assert scaled[4] == pytest.approx(4 * math.log(2) / 2)
    assert cross_fitted(gaps, np.array(["a"] * 5)) is None


def test_what_is_cross_fitted_is_no_better_than_a_coin_on_noise():
    # a model that knows nothing: fitted on the same pairs its loss would be at most log 2
    rng = np.random.default_rng(0)
    honest, flattered = [], []
    for _ in range(200):
        gaps = rng.normal(size=40)
        honest.append(log_loss(cross_fitted(gaps, np.arange(40).astype(str))))
        flattered.append(log_loss(gaps * fit_sharpness(gaps)))
    assert np.mean(honest) > math.log(2) > np.mean(flattered)


def test_an_overconfident_model_is_repaired_on_pairs_that_it_was_not_fitted_on():
    rng = np.random.default_rng(1)
    truth = 2 * rng.normal(size=2000)
    truth *= np.where(rng.random(2000) < 1 / (1 + np.exp(-truth)), 1, -1)
    found = with_temperature(5 * truth, np.arange(2000).astype(str))
    assert found["temperature"] == pytest.approx(5, rel=0.1)
    assert found["ece"] > 0.1 > 2 * found["after"]["ece"]
    assert found["after"]["log_loss"] < found["log_loss"] - 0.3
    # the temperature of other pairs is applied as it is
    other = with_temperature(5 * truth, np.arange(2000).astype(str), kept=5.0)
    assert other["after"]["log_loss"] == pytest.approx(log_loss(truth))
    assert other["temperature_from"] == "other pairs"
    never = with_temperature(truth, np.arange(2000).astype(str), kept=math.inf)
    assert never["after"]["log_loss"] == pytest.approx(math.log(2))
    json.dumps(never, allow_nan=False)
