"""Win rates of known answers: the interval's coverage, planted biases, another library's fit."""

import numpy as np
import pytest

from trainers.judging.win_rate import (
    clustered,
    fit_logistic,
    length_controlled,
    numbered,
    position_bias,
    resampled,
    summarise,
    win_rate,
)
from trainers.reward.diagnosis.calibration import sigmoid


def test_the_interval_of_equal_models_holds_one_half_19_times_of_20() -> None:
    """Four answers a prompt that go the same way: one draw, not four."""
    rng, held, naive = np.random.default_rng(0), 0, 0
    prompts = np.repeat(np.arange(50), 4)
    draws, alone = resampled(prompts)[:400], resampled(np.arange(200))[:400]
    for _ in range(200):
        outcomes = np.repeat(rng.integers(0, 3, 50) / 2, 4)
        found = win_rate(outcomes, prompts, draws)
        held += found.low <= 0.5 <= found.high
        other = win_rate(outcomes, np.arange(200), alone)
        naive += other.low <= 0.5 <= other.high
    assert 182 <= held <= 198
    assert naive < 160  # each answer a draw of its own: an interval half as wide


def test_twenty_wins_of_twenty_are_no_certainty() -> None:
    found = win_rate(np.ones(20), np.arange(20), resampled(np.arange(20)))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.8389, abs=1e-4)  # Wilson: 1 / (1 + 1.96^2 / 20)


def test_clusters_count_once() -> None:
    # Prompts of weight 3, 1, 1: (3 + 1 + 1)^2 / (9 + 1 + 1).
    clusters = numbered(["a", "a", "a", "b", "c"])
    assert clusters.tolist() == [0, 0, 0, 1, 2]
    assert clustered(np.ones(5), clusters).sum() == pytest.approx(25 / 11)
    assert clustered(np.ones(4), np.array([0, 0, 1, 1])).tolist() == [0.5] * 4


@pytest.mark.slow
def test_the_fit_is_scikit_learns() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    x = rng.normal(0.2, 1.0, 300)
    targets = (rng.random(300) < sigmoid(0.7 + 1.5 * x)).astype(float)
    counts = rng.integers(0, 3, (2, 300)).astype(float)
    level, slope = fit_logistic(x, targets, counts)
    for row in range(2):
        other = linear.LogisticRegression(C=1e9, tol=1e-8).fit(x[:, None], targets, counts[row])
        assert level[row] == pytest.approx(other.intercept_[0], abs=5e-3)
        assert slope[row] == pytest.approx(other.coef_[0, 0], abs=5e-3)


def test_a_planted_length_bias_is_found_and_taken_out() -> None:
    """Equal answers, of which the second are mostly longer, and a judge that likes length."""
    rng = np.random.default_rng(2)
    longer = rng.normal(60.0, 80.0, 300)
    outcomes = (rng.random(300) < sigmoid(longer / 50)).astype(float)
    found = summarise(outcomes, longer, range(300))
    assert found["win_rate"]["low"] > 0.6 and found["longer_preferred"]["low"] > 0.65
    controlled = found["length_controlled"]
    assert controlled["coefficient"]["low"] > 1
    assert controlled["win_rate"]["low"] < 0.5 < controlled["win_rate"]["high"]
    # A judge that does not look at length is left alone.
    fair = summarise((rng.random(300) < 0.7).astype(float), longer, range(300))
    assert fair["length_controlled"]["win_rate"]["value"] == pytest.approx(0.7, abs=0.06)
    assert fair["longer_preferred"] and fair["position"] is None


def test_length_control_by_hand() -> None:
    """Lengths of deviation 10, so tanh(1) = .7616; .8 of the longer seconds win, .4 of the others.

    a = (logit .8 + logit .4) / 2 = (1.3863 - .4055) / 2, b = (1.3863 + .4055) / 2 / .7616.
    """
    outcomes = np.array([1.0] * 80 + [0.0] * 20 + [1.0] * 40 + [0.0] * 60)
    rows = np.arange(200)
    found = length_controlled(outcomes, np.repeat([10.0, -10.0], 100), rows, resampled(rows))
    assert found["coefficient"]["value"] == pytest.approx(1.1764, abs=2e-3)
    assert found["win_rate"]["value"] == pytest.approx(1 / (1 + np.exp(-0.4904)), abs=1e-3)
    assert found["win_rate"]["low"] < 0.58 < 0.66 < found["win_rate"]["high"]


@pytest.mark.parametrize("outcome", [0.0, 0.5, 1.0])
def test_one_sided_outcomes_and_equal_lengths_have_finite_numbers(outcome: float) -> None:
    rows = np.arange(12)
    for differences in (np.zeros(12), np.arange(12.0)):
        found = length_controlled(np.full(12, outcome), differences, rows, resampled(rows))
        for value in (*found["win_rate"].values(), *found["coefficient"].values()):
            assert np.isfinite(value)
        assert found["win_rate"]["value"] == pytest.approx(outcome, abs=0.02)


def test_a_judge_that_prefers_what_comes_first_is_found_and_cancels_out() -> None:
    rng = np.random.default_rng(3)
    second_first = (rng.random(300) < 0.85).astype(float)  # shown first, the second wins
    orders = np.stack([1 - (rng.random(300) < 0.85), second_first], axis=1)
    found = position_bias(orders, np.arange(300))
    assert 0.8 < found["first_shown"]["low"] < 0.85 < found["first_shown"]["high"] < 0.9
    assert found["decided"] == 600
    assert found["consistent"]["value"] == (orders[:, 0] == orders[:, 1]).mean() < 0.4
    mean = win_rate(orders.mean(1), np.arange(300), resampled(np.arange(300)))
    assert mean.low < 0.5 < mean.high


def test_position_by_hand() -> None:
    # The first in both orders, twice; what is shown first; ties; the first, then a tie.
    orders = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.5]])
    found = position_bias(orders, np.arange(5))
    # Verdicts for what is shown first: 1 and 0, twice; 1 and 1; none; 1.
    assert found["first_shown"]["value"] == 5 / 7 and found["decided"] == 7
    assert found["consistent"]["value"] == 3 / 5
    nothing = position_bias(np.full((2, 2), 0.5), np.array([0, 1]))
    assert nothing["first_shown"] is None and nothing["consistent"]["value"] == 1.0
