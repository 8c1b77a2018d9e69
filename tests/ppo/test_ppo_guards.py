"""Small guards for bugs that no other test saw when they were planted (see mutations/)."""

import pytest

from chatllama.config.ppo import PpoSection
from trainers.ppo.rewards import Statistics
from trainers.ppo.train import PpoState, _next_kl_coef, _say_where_the_kl_is


def test_the_adaptive_controller_is_fed_with_the_kl_of_whole_responses():
    section = PpoSection(kl_controller="adaptive", kl_target=6.0, kl_horizon=10_000)
    assert section.rollout_batch_size == 128
    metrics = {"ppo/kl_sequence": 6.6, "ppo/kl_token": 0.66}
    # error 6.6 / 6 - 1 = .1, within +-.2: .15 * (1 + .1 * 128 / 10000)
    found = _next_kl_coef(section, PpoState(3, 0.15, Statistics()), metrics)
    assert found == pytest.approx(0.15 * 1.00128)
    fixed = PpoSection(kl_controller="fixed")
    assert _next_kl_coef(fixed, PpoState(3, 0.15, Statistics()), metrics) == 0.15


@pytest.mark.parametrize(
    ("reward", "loss", "said"), [(0.1, 0.2, True), (0.1, 0.0, False), (0.0, 0.2, False)]
)
def test_a_kl_that_counts_twice_is_said(
    reward: float, loss: float, said: bool, capsys: pytest.CaptureFixture[str]
):
    _say_where_the_kl_is(PpoSection(kl_coef=reward, kl_loss_coef=loss, kl_loss_estimator="k3"))
    text = capsys.readouterr().err
    expected = "counts twice: ppo.kl_coef 0.1 in the reward (k1) and ppo.kl_loss_coef 0.2 in the"
    assert (expected in text and "(k3)" in text) == said == bool(text)
