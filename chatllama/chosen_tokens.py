"""Log-probabilities of chosen tokens without the table of all logits.

The LM head of a large vocabulary is most of a small model's work and memory: a microbatch of 1,000
tokens makes 128 MB of float32 logits, several times over with autograd. Here a few rows are in
memory at a time, and what backward needs is one vector per token.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from chatllama.distributed import call_inside

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


def chosen_logprobs(
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
