"""Calibration: bins and their error by hand, the temperature by its optimum."""

import math

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from ich_det2.evaluation.calibration import (
    calibrate,
    expected_calibration_error,
    fit_temperature,
    reliability,
)


@pytest.fixture
def scored():
    """20 000 images whose true probability is known; the scores are twice too sure."""
    rng = np.random.default_rng(0)
    truth = expit(rng.normal(size=20_000))
    return (rng.random(20_000) < truth).astype(int), truth, expit(2 * logit(truth))


def test_bins_equal_scikit_learns(scored):
    y_true, _, score = scored
    bins = reliability(y_true, score, 10)
    observed, mean = calibration_curve(y_true, score, n_bins=10)
    np.testing.assert_allclose(bins["observed"], observed, atol=1e-12)
    np.testing.assert_allclose(bins["score"], mean, atol=1e-12)
    assert bins["n"].sum() == 20_000 and (bins["interval"][:, 0] <= bins["observed"]).all()


def test_hand_worked_error():
    # Bin 0: scores 0.02, 0.08, one bleeds: |0.05 - 0.5|. Bin 9: scores 1, 0.9, both: |0.95 - 1|.
    y_true, score = [0, 1, 1, 1], [0.02, 0.08, 1.0, 0.9]
    assert expected_calibration_error(y_true, score) == pytest.approx((2 * 0.45 + 2 * 0.05) / 4)
    assert math.isnan(expected_calibration_error([], []))


def test_temperature_undoes_overconfidence(scored):
    y_true, truth, score = scored
    temperature = fit_temperature(y_true, score)
    assert temperature == pytest.approx(2, rel=0.05)
    np.testing.assert_allclose(calibrate(score, 2.0), truth, atol=1e-4)
    before = expected_calibration_error(y_true, score)
    assert expected_calibration_error(y_true, calibrate(score, temperature)) < before / 3
    # Nothing near it is likelier.
    loss = [log_loss(y_true, calibrate(score, temperature * f)) for f in (0.98, 1, 1.02)]
    assert loss[1] < loss[0] and loss[1] < loss[2]


def test_order_stays_and_scores_of_0_and_1_are_no_trouble():
    score = np.array([0, 0.2, 0.5, 0.9, 1])
    scaled = calibrate(score, 3.0)
    assert (np.diff(scaled) > 0).all() and scaled[2] == pytest.approx(0.5)
    assert np.isfinite(fit_temperature([0, 1, 0, 1, 1], score))


def test_one_class_has_no_temperature():
    assert math.isnan(fit_temperature([0, 0], [0.1, 0.2]))


@pytest.mark.parametrize("function", [fit_temperature, reliability, expected_calibration_error])
def test_scores_that_are_no_probabilities_are_an_error(function):
    with pytest.raises(ValueError, match="scores from 0 to 1, got 0.5 to 3"):
        function([0, 1], [0.5, 3.0])
