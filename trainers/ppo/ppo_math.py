"""The arithmetic of PPO as pure functions of tensors and floats. Imports torch alone.

It samples nothing, holds no state and knows neither models nor ranks: statistics and token counts
that span ranks or microbatches are passed in. Shapes: B sequences, P prompt, R response,
T = P + R, V vocabulary. A mask is True where a token counts; what stands outside it (garbage,
inf, NaN) changes nothing and gets gradient exactly 0.
"""

from dataclasses import dataclass
from typing import Literal

import torch


def masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The numbers inside the mask, 0 outside, also where x is NaN there."""
    return torch.where(mask, x, torch.zeros_like(x))


def moments(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares of x inside the mask: (3,) float64, to be summed over ranks.

    Args:
        x: any shape, float.
        mask: bool, of the same shape.
    """
    inside = masked(x, mask).double()
    return torch.stack([mask.sum().double(), inside.sum(), inside.square().sum()])


def mean_and_variance(summed: torch.Tensor) -> tuple[float, float]:
    """Mean and biased variance (as in lm-human-preferences) from the summed `moments`.

    Args:
        summed: (3,) float64: count, sum, sum of squares.
    """
    count, total, squares = (float(number) for number in summed)
    mean = total / count
    return mean, max(squares / count - mean**2, 0.0)


def whiten(
    x: torch.Tensor,
    mask: torch.Tensor,
    mean: float,
    var: float,
    shift_mean: bool = True,
) -> torch.Tensor:
    """Numbers shifted to mean 0 and scaled to variance 1; 0 outside the mask.

    Statistics are passed in, so that all ranks and microbatches use those of the whole batch
    (Huang 2022, "The 37 implementation details of PPO").

    Args:
        x: (B, R) float32.
        mask: (B, R) bool.
        mean: of x over the mask, all ranks.
        var: of x over the mask, all ranks.
        shift_mean: False keeps the mean where it was (for rewards: their sign has a meaning).
    """
    scaled = (x - mean) * (var + 1e-8) ** -0.5
    return masked(scaled if shift_mean else scaled + mean, mask)


def last_index(mask: torch.Tensor) -> torch.Tensor:
    """Column of each row's last True: (B,) int64. Rows must hold at least one.

    Args:
        mask: (B, R) bool.
    """
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def shape_rewards(
    scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """Rewards of each response token: -kl_coef * kl, plus the score on the LAST True position.

    R_t = -kl_coef * (log pi - log pi_ref)(y_t) + [t = last] * score (Ziegler 2019,
    arXiv 1909.08593, eq. 2, with the KL split over tokens as in Stiennon 2020).

    Args:
        scores: (B,) float32, of whole responses.
        kl: (B, R) float32, k1 estimate of each sampled token: logprobs - ref_logprobs.
        mask: (B, R) bool, True up to and including the first EOS.
        kl_coef: reward per nat.

    Returns:
        (B, R) float32, 0 outside the mask.
    """
    rewards = masked(-kl_coef * kl, mask)
    return rewards.scatter_add(1, last_index(mask)[:, None], scores[:, None].to(rewards.dtype))


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns by generalised advantage estimation.

    d_t = R_t + gamma V_{t+1} - V_t; A_t = sum_k (gamma lam)^k d_{t+k}; returns = A + V, before
    any whitening (Schulman 2016, arXiv 1506.02438, eq. 16). The value after the last token is 0.

    Args:
        rewards: (B, R) float32.
        values: (B, R) float32, of the state before each token.
        mask: (B, R) bool.
        gamma: discount per token.
        lam: lambda.

    Returns:
        advantages (B, R) and returns (B, R), 0 outside the mask, without gradient.
    """
    rewards, values = masked(rewards, mask).detach(), masked(values, mask).detach()
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = delta + gamma * lam * running
        advantages[:, t] = running
        next_value = values[:, t]
    return masked(advantages, mask), masked(advantages + values, mask)


def group_advantages(
    rewards: torch.Tensor, mask: torch.Tensor, group_size: int, divide: bool
) -> torch.Tensor:
    """Advantages without a critic: a response's total reward against its prompt's other samples.

    rloo (Ahmadian 2024, arXiv 2402.14740, eq. 7): G_i less the mean of the others' G. With
    `divide` grpo (Shao 2024, arXiv 2402.03300, 4.1.2): G_i less the group's mean, over its unbiased
    deviation + 1e-6. G is the sum of all rewards of the response, its KL penalty included.

    Args:
        rewards: (B, R) float32; the samples of a prompt stand together.
        mask: (B, R) bool.
        group_size: samples per prompt, at least 2.
        divide: grpo instead of rloo.

    Returns:
        (B, R) float32: the same number at every token of a response, 0 outside the mask.
    """
    totals = masked(rewards, mask).sum(1).view(-1, group_size)
    centred = totals - totals.mean(1, keepdim=True)
    if divide:
        advantages = centred / (totals.std(1, keepdim=True) + 1e-6)
    else:
        advantages = centred * group_size / (group_size - 1)
    return masked(advantages.view(-1, 1).expand_as(rewards), mask).detach()


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped surrogate and what to log about it (sums over the mask, for averaging later)."""

    loss: torch.Tensor
    """() sum over tokens / num_tokens."""
    clipped: torch.Tensor
    """() number of tokens whose clipped branch was active."""
    approx_kl: torch.Tensor
    """() sum of 0.5 (log pi - log pi_old)^2, nats."""
    ratio_max: torch.Tensor
    """() largest probability ratio inside the mask."""


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    num_tokens: float,
) -> PolicyLoss:
    """PPO's clipped loss: sum of max(-A r, -A clip(r)) over tokens, divided by num_tokens.

    Schulman 2017, arXiv 1707.06347, eq. 7. Dividing by the caller's count of the whole minibatch,
    over all ranks and microbatches, makes the gradient independent of how it was split.

    Args:
        logprobs: (B, R) float32, of the sampled tokens, with gradient.
        old_logprobs: (B, R) float32, from the same forward function at rollout time.
        advantages: (B, R) float32.
        mask: (B, R) bool.
        clip_range: half width of the trust region of the ratio.
        num_tokens: response tokens of the whole minibatch.
    """
    log_ratio = masked(logprobs, mask) - masked(old_logprobs, mask)
    advantages = masked(advantages, mask)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(plain, clipped).sum() / num_tokens
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            clipped=(clipped > plain).sum(),
            approx_kl=(0.5 * log_ratio.square()).sum(),
            ratio_max=masked(ratio, mask).max(),
        )


@dataclass(frozen=True)
class ValueLoss:
    """The clipped value loss and the number of clipped tokens."""

    loss: torch.Tensor
    clipped: torch.Tensor


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    num_tokens: float,
) -> ValueLoss:
    """0.5 max((V - R)^2, (clip(V, V_old +- c) - R)^2), summed over tokens / num_tokens.

    As in lm-human-preferences `train_policy.py` and Huang 2022, detail 9.

    Args:
        values: (B, R) float32, with gradient.
        old_values: (B, R) float32, at rollout time.
        returns: (B, R) float32.
        mask: (B, R) bool.
        clip_range: c, in units of normalised reward.
        num_tokens: response tokens of the whole minibatch.
    """
    values, old_values = masked(values, mask), masked(old_values, mask)
    returns = masked(returns, mask)
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * torch.maximum(plain, clipped).sum() / num_tokens
    # Within the range `near` is the value but for rounding, which must not count as clipping.
    beyond = (values - old_values).abs() > clip_range
    return ValueLoss(loss=loss, clipped=(beyond & (clipped > plain)).sum().detach())


def kl_loss(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    estimator: Literal["k2", "k3"],
    num_tokens: float,
) -> torch.Tensor:
    """KL to the reference as a term of the loss, summed over tokens / num_tokens: ().

    With k = log pi - log pi_ref of a sampled token: k2 = 0.5 k^2, k3 = exp(-k) - 1 + k (Schulman
    2020, "Approximating KL divergence"). Both look at one token at a time: that today's token
    changes tomorrow's KL is only in the reward's k1.

    Args:
        logprobs: (B, R) float32, with gradient.
        ref_logprobs: (B, R) float32.
        mask: (B, R) bool.
        estimator: k2 or k3.
        num_tokens: response tokens of the whole minibatch.
    """
    k = masked(logprobs, mask) - masked(ref_logprobs, mask)
    per_token = 0.5 * k.square() if estimator == "k2" else torch.expm1(-k) + k
    return per_token.sum() / num_tokens


def explained_variance(variance_of_error: float, variance_of_returns: float) -> float:
    """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary."""
    return 1 - variance_of_error / variance_of_returns if variance_of_returns > 0 else 0.0


def adapted_kl_coef(
    kl_coef: float, kl_sequence: float, target: float, num_responses: int, horizon: int
) -> float:
    """The next kl_coef of the adaptive controller (Ziegler 2019, arXiv 1909.08593, 2.2).

    Args:
        kl_coef: now, reward per nat.
        kl_sequence: mean over responses of the KL summed over tokens, in nats.
        target: nats per response.
        num_responses: responses since the last call, over all ranks.
        horizon: responses over which the coefficient adapts.
    """
    error = min(max(kl_sequence / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)
