"""The arithmetic of PPO on all answers of a tiny policy at once: KL and gradient are exact sums."""

import itertools

import pytest
import torch

from trainers.ppo.ppo_math import gae, masked, policy_loss, shape_rewards


class Tabular:
    """All answers of a 2-token policy over 3 words; word 0 is EOS and ends the answer."""

    mask: torch.Tensor

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(9)
        # State 0: before the first token; states 1, 2: after word 1 or 2.
        self.logits = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        self.reference = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        answers = [(0, 0), *itertools.product((1, 2), (0, 1, 2))]
        self.words = torch.tensor(answers)
        self.states = torch.tensor([(0, first) for first, _ in answers])
        self.mask = torch.tensor([(True, first != 0) for first, _ in answers])
        self.scores = torch.randn(7, generator=generator, dtype=torch.float64)

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """(7, 2), of every answer's tokens; garbage after EOS."""
        return logits.log_softmax(-1)[self.states, self.words]

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return masked(self.logprobs(logits), self.mask).sum(1).exp()


def exact_kl(table: Tabular) -> float:
    """KL of the answers' distributions from the per-state sums, not from the sampled tokens."""
    p, q = table.logits.softmax(-1), table.reference.softmax(-1)
    per_state = (p * (p / q).log()).sum(-1)
    return float(per_state[0] + p[0, 1] * per_state[1] + p[0, 2] * per_state[2])


def test_expected_k1_is_the_exact_kl():
    table = Tabular()
    probabilities = table.probabilities(table.logits)
    assert probabilities.sum().item() == pytest.approx(1.0)
    kl = table.logprobs(table.logits) - table.logprobs(table.reference)
    rewards = shape_rewards(torch.zeros(7), kl, table.mask, kl_coef=1.0)
    assert -(probabilities @ rewards.sum(1)).item() == pytest.approx(exact_kl(table), rel=1e-12)
    assert exact_kl(table) > 0.1


def test_expected_k3_is_the_exact_kl_too_but_its_gradient_as_reward_is_not():
    # Why the config refuses k3 in the reward (PPO.md P6): unbiased, yet the wrong gradient.
    table = Tabular()
    logits = table.logits.clone().requires_grad_()
    log_ratio = masked(table.logprobs(table.reference) - table.logprobs(logits), table.mask)
    k3 = (log_ratio.exp() - 1 - log_ratio).sum(1)
    probabilities = table.probabilities(logits)
    assert (probabilities @ k3).item() == pytest.approx(exact_kl(table), rel=1e-12)
    (exact,) = torch.autograd.grad(probabilities @ k3, logits, retain_graph=True)
    (as_reward,) = torch.autograd.grad(probabilities @ k3.detach(), logits)
    assert (as_reward - exact).norm() > 0.3 * exact.norm()


@pytest.mark.parametrize(("lam", "exact_values"), [(1.0, False), (0.95, True), (0.0, True)])
def test_enumerated_gradient_identity(lam: float, exact_values: bool):
    # PPO.md 2b: all answers once through rewards -> GAE -> loss, weighed by their probability,
    # must give the gradient of J = E[score] - kl_coef KL; any baseline at lambda 1, else V^pi.
    table, kl_coef = Tabular(), 0.3
    logits = table.logits.clone().requires_grad_()
    probabilities = table.probabilities(logits)
    reference, mask = table.logprobs(table.reference), table.mask
    whole = masked(table.logprobs(logits) - reference, mask).sum(1)
    (expected,) = torch.autograd.grad(probabilities @ (table.scores - kl_coef * whole), logits)

    logprobs = table.logprobs(logits)
    kl = (logprobs - reference).detach()
    rewards = shape_rewards(table.scores, kl, mask, kl_coef)
    weights = probabilities.detach()
    if exact_values:
        to_go = rewards.flip(1).cumsum(1).flip(1)
        values = torch.stack(
            [
                (weights * to_go[:, 0]).sum().expand(7),
                torch.stack(
                    [
                        (weights * to_go[:, 1])[table.words[:, 0] == first].sum()
                        / weights[table.words[:, 0] == first].sum()
                        for first in table.words[:, 0]
                    ]
                ),
            ],
            dim=1,
        )
    else:
        values = torch.randn(7, 1, generator=torch.Generator().manual_seed(1)).double()
        values = torch.cat([torch.full((7, 1), 0.7).double(), values], 1)
        values[1:4, 1], values[4:, 1] = values[1, 1], values[4, 1]  # a baseline knows the state
    advantages, _ = gae(rewards, values, mask, 1.0, lam)
    loss = policy_loss(
        logprobs, logprobs.detach(), advantages * weights[:, None], mask, 0.2, 1.0
    ).loss
    (actual,) = torch.autograd.grad(-loss, logits)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert expected.norm() > 0.1
