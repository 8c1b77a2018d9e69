"""Statistics of score gaps: by hand, and recovered from data drawn with known answers."""

import math

import numpy as np
import pytest

from trainers.reward.diagnosis.calibration import (
    MAX_SCALE,
    agreement,
    best_scale,
    calibration_error,
    correlation,
    fit_flips,
    histogram,
    log_loss,
    reliability,
    sigmoid,
)

LOG3, LOG9 = math.log(3), math.log(9)  # sigmoid: 0.75 and 0.9


def drawn(count: int, flips: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Gaps whose labels agree with probability sigmoid(scale * |gap|), some of them flipped."""
    rng = np.random.default_rng(0)
    true = rng.normal(0.0, 2.0, count)
    right = rng.random(count) < sigmoid(scale * true)
    right ^= rng.random(count) < flips
    return np.where(right, true, -true)


def test_agreement_and_ties():
    assert agreement(np.array([0.1, -3.0, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_reliability_by_hand():
    gaps = np.array([LOG3, LOG3, -LOG3, LOG9])  # the model says .75, .75, .75, .9
    bins = reliability(gaps, np.ones(4), num_bins=5)  # .75 lies in [.7, .8), .9 in [.9, 1]
    assert [(b.share, round(b.confidence, 6)) for b in bins] == [(0.75, 0.75), (0.25, 0.9)]
    assert [b.accuracy for b in bins] == [pytest.approx(2 / 3), 1.0]
    assert bins[0].low == pytest.approx(0.2077, abs=1e-4)  # 2 of 3, by Wilson's formula
    expected = 0.75 * (0.75 - 2 / 3) + 0.25 * 0.1
    assert calibration_error(bins) == pytest.approx(expected)


def test_weights_count_pairs():
    gaps, weights = np.array([LOG3, -LOG3, -LOG3]), np.array([1.0, 0.5, 0.5])
    (only,) = reliability(gaps, weights)
    assert only.accuracy == 0.5 and only.share == 1.0
    assert log_loss(gaps, weights) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_scale_recovers_over_and_underconfidence():
    weights = np.ones(20_000)
    assert best_scale(drawn(20_000), weights) == pytest.approx(1.0, abs=0.05)
    assert best_scale(drawn(20_000, scale=0.5), weights) == pytest.approx(0.5, abs=0.03)
    assert best_scale(np.array([1.0, 2.0]), np.ones(2)) == pytest.approx(MAX_SCALE)
    assert best_scale(np.array([-1.0, -2.0]), np.ones(2)) == 0.0


def test_a_calibrated_model_has_no_calibration_error():
    gaps, weights = drawn(20_000), np.ones(20_000)
    assert calibration_error(reliability(gaps, weights)) < 0.01
    assert calibration_error(reliability(3 * gaps, weights)) > 0.08


def test_flipped_labels_are_told_from_unsureness():
    weights = np.ones(4000)
    clean = fit_flips(drawn(4000), weights)
    assert clean.share <= 0.02
    noisy = fit_flips(drawn(4000, flips=0.15, scale=2.0), weights)
    assert noisy.share == pytest.approx(0.15, abs=0.03) and noisy.evidence > 50
    assert noisy.scale == pytest.approx(2.0, abs=0.4)
    # The surest contradictions are the most suspicious, the surest agreements the least.
    gaps = drawn(4000, flips=0.15, scale=2.0)
    assert noisy.suspicion.argmax() == gaps.argmin() and noisy.suspicion.argmin() == gaps.argmax()
    assert noisy.suspicion.max() > 0.9


@pytest.mark.parametrize("flips", [0.0, 0.1, 0.25])
def test_the_evidence_is_twice_the_gain_in_log_likelihood(flips: float):
    gaps = drawn(600, flips=flips, scale=2.0)
    found = fit_flips(gaps, np.ones(600))

    def log_likelihood(share: float, scale: float) -> float:
        right = [1 / (1 + math.exp(-scale * gap)) for gap in gaps.tolist()]
        return sum(math.log(share + (1 - 2 * share) * p) for p in right)

    without = max(log_likelihood(0.0, scale / 200) for scale in range(1, 600))
    gain = log_likelihood(found.share, found.scale) - without
    assert found.evidence == pytest.approx(2 * gain, abs=1e-2)
    assert (found.evidence > 2.71) == (flips > 0)


def test_correlation_without_variation_is_zero():
    assert correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])) == pytest.approx(1.0)
    assert correlation(np.array([1.0, 1.0]), np.array([2.0, 4.0])) == 0.0


def test_histogram_keeps_every_pair():
    values = np.array([0.5, 1.5, -0.5, 50.0] + [2.0, -2.0] * 500)
    edges, shares = histogram(values, np.ones(1004), num_bins=4)
    assert edges == pytest.approx([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert shares == pytest.approx([500 / 1004, 1 / 1004, 1 / 1004, 502 / 1004])
