"""Log-probabilities of chosen tokens without the table of all logits.

The LM head of a large vocabulary is most of a small model's work and memory: a microbatch of 1,000
tokens makes 128 MB of float32 logits, several times over with autograd. Here a few rows are in
memory at a time, and what backward needs is one vector per token.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from chatllama.runtime.distributed import call_inside

CHUNK_ELEMENTS = 2**22


class _Chosen(torch.autograd.Function):
    """The gradient of one log-probability needs no logits: forward leaves it behind, ready.

    With p = softmax(W h / T), d log p[t] / d h = (W[t] - p W) / T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        wants_gradient = ctx.needs_input_grad[0]
        slopes = torch.empty_like(hidden) if wants_gradient else None
        size = max(1, CHUNK_ELEMENTS // len(weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = functional.linear(hidden[rows], weight).float()
            if temperature != 1:
                logits /= temperature
            picked = logits.gather(1, targets[rows, None])
            largest = logits.amax(-1, keepdim=True)
            powers = logits.sub_(largest).exp()
            total = powers.sum(-1, keepdim=True)
            logprobs[rows] = (picked - largest - total.log()).squeeze(1)
            if slopes is not None:
                expected = functional.linear(powers.to(hidden.dtype), weight.T) / total
                slopes[rows] = (weight[targets[rows]] - expected) / temperature
            entropy[rows] = (total.log() - logits.mul_(powers).sum(-1, keepdim=True) / total)[:, 0]
            del logits, powers  # before the next ones are made
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(slopes.dtype), None, None, None


def token_logprobs(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the targets under softmax(logits / temperature), and entropies in nats.

    Both (N,) float32; the entropies carry no gradient. All happens inside the head's own call,
    where ZeRO-3 has made its weight whole. A head that trains, or is no plain matrix, gives all
    logits at once.

    Args:
        head: the LM head, without bias.
        hidden: (N, H) float.
        targets: (N,) int64.
        temperature: above 0.
    """
    if type(head) is nn.Linear and not head.weight.requires_grad:
        weight = head.weight

        def scores(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return _Chosen.apply(states, weight, targets, temperature)

        return call_inside([head], scores, hidden)
    logits = head(hidden).float() / temperature
    table = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(table.exp() * table).sum(-1)
    return table.gather(1, targets[:, None]).squeeze(1), entropy


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
