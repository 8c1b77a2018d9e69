"""The arithmetic of PPO as pure functions of tensors and floats. Imports torch alone.

Nothing here samples, keeps state or depends on models and ranks. Shapes: B sequences, P prompt,
R response, T = P + R, V vocabulary. Tensors are (B, R) float32 and masks (B, R) bool where nothing
else is said. A mask is True where a token counts; what stands outside it (garbage, inf, NaN)
changes nothing and gets gradient exactly 0. `num_tokens` is the number of tokens of the whole
minibatch, over all ranks and microbatches: with sums divided by it, the gradient does not depend
on how the minibatch was split.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ROUNDING = 1e-6
"""A deviation below this share of the values' size is rounding: nothing is divided by it."""
GROUP_EPSILON = 1e-4
"""Added to a group's deviation; below this share of max(1, largest |score|) scores are equal."""
MAX_LOG_RATIO = 20.0
"""Nats: log ratios beyond +- this are taken for it before exp, which float32 ends at 88.7."""


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` inside the mask, 0 outside, also where x is NaN there."""
    return torch.where(mask, x, torch.zeros_like(x))


def mean_and_variance(x: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and biased variance (as in lm-human-preferences) of `x` inside the mask.

    The variance is 0 where the values differ by rounding alone.
    """
    inside = masked(x, mask).double()
    count = float(mask.sum())
    mean = float(inside.sum()) / count
    variance = float(inside.square().sum()) / count - mean**2
    return mean, 0.0 if variance <= (ROUNDING * float(inside.abs().max())) ** 2 else variance


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`x` shifted to mean 0 and scaled to variance 1 inside the mask; 0 outside.

    Statistics are those of the whole rollout batch, over all ranks (Huang 2022, "The 37
    implementation details of PPO"). With `shift_mean` False the mean stays: the sign of a reward
    has a meaning.
    """
    mean, var = mean_and_variance(x, mask)
    scaled = (x - mean) * (var + 1e-8) ** -0.5 if var else torch.zeros_like(x)
    return masked(scaled if shift_mean else scaled + mean, mask)


def last_index(mask: Tensor) -> Tensor:
    """Column of each row's last True: (B,) int64. Every row must hold one."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards of each response token: -kl_coef * kl, plus the score on the LAST True position.

    R_t = -kl_coef * (log pi - log pi_ref)(y_t) + [t = last] * score (Ziegler 2019,
    arXiv 1909.08593, eq. 2, with the KL split over tokens as in Stiennon 2020).

    Args:
        scores: (B,) float32, of whole responses.
        kl: k1 estimate of each sampled token, in nats: logprobs - ref_logprobs.
        mask: True up to and including the first EOS.
        kl_coef: reward per nat.
    """
    rewards = masked(-kl_coef * kl, mask)
    return rewards.scatter_add(1, last_index(mask)[:, None], scores[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalised advantage estimation, without gradient.

    d_t = R_t + gamma V_{t+1} - V_t; A_t = sum_k (gamma lam)^k d_{t+k}; returns = A + V, before
    any whitening (Schulman 2016, arXiv 1506.02438, eq. 16). V_t is the value of the state before
    token t; the value after the last token is 0.
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


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """sum_k gamma^k R_{t+k}: what a value predicts, without any estimate of it in the sum."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[1]


def rloo_advantages(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """A response's total reward less the mean of its prompt's other samples; without a critic.

    Ahmadian 2024, arXiv 2402.14740, eq. 7. Every token of a response gets the same number.

    Args:
        rewards: KL penalty included; the `group_size` (2 or more) samples of a prompt stand
            together.
    """
    centred = _centred(masked(rewards, mask).double().sum(1), group_size)
    return _on_tokens(centred * group_size / (group_size - 1), mask)


def grpo_advantages(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, group_size: int
) -> Tensor:
    """A response's score less its prompt's mean, over the deviation; the KL penalty is added after.

    (s_i - mean) / (deviation + 1e-4), with the unbiased deviation; 0 in a group whose scores are
    equal but for 1e-4 max(1, largest |s|). Then -kl_coef * (KL_i - mean), KL_i the sum over the
    response's tokens: divided by the deviation too, it would be noise of size 1 where scores are
    equal. Every token of a response gets the same number. Shao 2024, arXiv 2402.03300, 4.1.2, where
    the KL is in the loss.

    Args:
        scores: (B,) float32; the `group_size` (2 or more) samples of a prompt stand together.
        kl: k1 estimate of each sampled token, in nats.
        kl_coef: group deviations per nat.
    """
    groups, centred = scores.double().view(-1, group_size), _centred(scores.double(), group_size)
    deviation = groups.std(1, keepdim=True)
    equal = deviation <= GROUP_EPSILON * groups.abs().amax(1, keepdim=True).clamp(min=1.0)
    normalised = masked(centred / (deviation + GROUP_EPSILON), ~equal)
    penalty = kl_coef * _centred(masked(kl, mask).double().sum(1), group_size)
    return _on_tokens(normalised - penalty, mask)


def _centred(totals: Tensor, group_size: int) -> Tensor:
    """(B / group_size, group_size): numbers of responses (B,) less the mean of their group."""
    groups = totals.view(-1, group_size)
    return groups - groups.mean(1, keepdim=True)


def _on_tokens(of_responses: Tensor, mask: Tensor) -> Tensor:
    """(B, R) float32: each response's number on all of its tokens."""
    return masked(of_responses.view(-1, 1).expand(mask.shape).float(), mask).detach()


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped surrogate, and sums over the mask to be logged; all of shape ()."""

    loss: Tensor
    clipped: Tensor
    """Number of tokens whose clipped branch was active."""
    approx_kl: Tensor
    """Sum of 0.5 (log pi - log pi_old)^2, nats squared."""
    ratio_max: Tensor
    """Largest probability ratio."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    num_tokens: float,
) -> PolicyLoss:
    """PPO's clipped loss: sum of max(-A r, -A clip(r)) over tokens, divided by num_tokens.

    Schulman 2017, arXiv 1707.06347, eq. 7. Where |log r| is above MAX_LOG_RATIO, r stays there
    and has no gradient.

    Args:
        logprobs: of the sampled tokens, with gradient.
        old_logprobs: from the same forward function at rollout time.
        clip_range: half width of the trust region of the ratio.
    """
    log_ratio = masked(logprobs, mask) - masked(old_logprobs, mask)
    advantages = masked(advantages, mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
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
    """The clipped value loss and the number of clipped tokens, each of shape ()."""

    loss: Tensor
    clipped: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float,
    num_tokens: float,
) -> ValueLoss:
    """0.5 max((V - R)^2, (clip(V, V_old +- c) - R)^2), summed over tokens / num_tokens.

    As in lm-human-preferences `train_policy.py` and Huang 2022, detail 9.

    Args:
        clip_range: c, in units of normalised reward.
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
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    estimator: Literal["k2", "k3"],
    num_tokens: float,
) -> Tensor:
    """KL to the reference as a term of the loss, summed over tokens / num_tokens: ().

    With k = log pi - log pi_ref of a sampled token: k2 = 0.5 k^2, k3 = exp(-k) - 1 + k (Schulman
    2020, "Approximating KL divergence"; |k| at most MAX_LOG_RATIO in k3). Both are of one token at
    a time; only k1 in the reward also counts how a token changes the KL of those after it.
    """
    k = masked(logprobs, mask) - masked(ref_logprobs, mask)
    if estimator == "k3":
        k = k.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
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
        kl_sequence: mean over responses of the KL summed over tokens, in nats.
        target: nats per response.
        num_responses: since the last call, over all ranks.
        horizon: responses over which the coefficient adapts.
    """
    error = min(max(kl_sequence / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)
