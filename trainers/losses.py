"""Losses of supervised training, as pure functions of tensors.

Sums over tokens, never means: the caller divides by the number of trained tokens of the whole
optimizer step, so that microbatches and ranks change nothing. PPO's losses are in `ppo_math.py`.
Shape legend: N trained positions, H hidden, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid


class TokenLoss(NamedTuple):
    """What one forward pass says about the tokens that train."""

    loss_sum: torch.Tensor
    """() float32, nats summed over the tokens."""
    num_correct: torch.Tensor
    """() int64, tokens that were the likeliest of the vocabulary."""


def token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    max_logits: int | None = None,
) -> TokenLoss:
    """Cross-entropy of the targets, summed, without ever holding all their logits.

    The positions go through the LM head a few at a time, and the gradient is taken there and then,
    while their probabilities exist: nothing is computed twice, and what lives until the backward
    pass is as small as `hidden` (and as `weight`, where that trains).

    Args:
        hidden: (N, H) any float, at the positions whose next token trains; N may be 0.
        weight: (V, H) any float, of the LM head; whole, so under ZeRO-3 inside the head's own call.
        targets: (N,) int64, the next tokens.
        max_logits: numbers of float32 that may live at a time; None: 16 MiB of them on the CPU,
            where more would leave the allocator's heap, 128 MiB elsewhere.
    """
    if max_logits is None:
        max_logits = 2**22 if hidden.device.type == "cpu" else 2**25
    rows = max(1, max_logits // len(weight))
    trains = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    return TokenLoss(*_HeadLoss.apply(hidden, weight, targets, rows, trains))


class _HeadLoss(torch.autograd.Function):
    """The loss of LM head and softmax, with its gradient from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        rows: int,
        trains: tuple[bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses () float32 and number of right guesses () int64."""
        loss_sum = torch.zeros((), device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        ctx.grad_hidden = torch.empty_like(hidden) if trains[0] else None
        ctx.grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trains[1] else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            wanted = targets[part, None]
            product = hidden[part] @ weight.t()  # in autocast's type
            logits = product.float()
            likeliest = logits.argmax(-1, keepdim=True)
            probabilities = logits.softmax(-1)
            # logsumexp - logit, by way of the likeliest token, whose probability is >= 1 / V
            gaps = logits.gather(1, likeliest) - logits.gather(1, wanted)
            loss_sum += (gaps - probabilities.gather(1, likeliest).log()).sum()
            num_correct += (likeliest == wanted).sum()
            if not any(trains):
                continue
            slopes = probabilities.scatter_add_(1, wanted, gaps.new_full(gaps.shape, -1.0))
            slopes = slopes.to(product.dtype)
            if ctx.grad_hidden is not None:
                ctx.grad_hidden[part] = slopes @ weight
            if ctx.grad_weight is not None:
                ctx.grad_weight += slopes.t() @ hidden[part]
        ctx.mark_non_differentiable(num_correct)
        ctx.weight_type = weight.dtype
        return loss_sum, num_correct

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> Any:
        """The gradients of `hidden` and `weight`, times that of the sum."""
        scale = grad_outputs[0]
        hidden = ctx.grad_hidden * scale if ctx.grad_hidden is not None else None
        weight = None
        if ctx.grad_weight is not None:
            weight = (ctx.grad_weight * scale).to(ctx.weight_type)
        return hidden, weight, None, None, None


def pairwise_loss(
    better: torch.Tensor,
    worse: torch.Tensor,
    margin: torch.Tensor,
    weight: torch.Tensor,
    num_prompts: int,
    *,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean over prompts of -log sigmoid(r_better - r_worse - margin), averaged over their pairs.

    With weight = 1 / C(K, 2) this is the loss of K ranked answers of InstructGPT (arXiv
    2203.02155, eq. 1), and for K = 2 plain Bradley-Terry. Margin as in LLaMA-2 (arXiv 2307.09288,
    3.2.2); centring, c (r_better + r_worse)^2, as in Eisenstein 2023 (arXiv 2312.09244). Smoothing
    weighs the opposite label: (1 - e) * -log sigmoid(d) + e * -log sigmoid(-d).

    Args:
        better: (P,) float32, scores of the preferred answers.
        worse: (P,) float32, scores of the others.
        margin: (P,) float32, by how much the scores should differ at least.
        weight: (P,) float32, 1 / number of pairs of the pair's prompt.
        num_prompts: prompts of the whole optimizer step, over all ranks and microbatches.
        center_coef: c; 0 leaves the scores' level open.
        label_smoothing: e, the share of labels taken to be wrong.
    """
    gap = better - worse - margin
    losses = -(1 - label_smoothing) * logsigmoid(gap) - label_smoothing * logsigmoid(-gap)
    losses = losses + center_coef * (better + worse).square()
    return (weight * losses).sum() / num_prompts
