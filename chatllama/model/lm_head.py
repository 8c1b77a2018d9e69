"""Log-probabilities and loss of given tokens without the table of all logits.

The LM head of a large vocabulary is most of a small model's work and memory: a microbatch of 1,000
tokens makes 128 MB of float32 logits, several times over with autograd. Here a few rows are in
memory at a time, and backward needs one vector per token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from chatllama.runtime.distributed import call_inside
from chatllama.runtime.products import is_plain, product

CHUNK_ELEMENTS = 2**22
"""Float32 logits in memory at a time; more than 16 MiB would leave the CPU allocator's heap."""
DEVICE_CHUNK_ELEMENTS = 2**25
"""The same on a GPU, where a small chunk is many kernels that each wait for the next."""
SLICE = 4096
"""Rows of a 16-bit head that are widened at a time on the CPU."""


def float32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits of 16-bit or float32 numbers as float32 sums: (..., V) float32.

    A 16-bit sum would round logits of 10 to 1/32, and log-probabilities with them.

    Args:
        hidden: (..., H) float; on a GPU of two dimensions.
        weight: (V, H) of the same type.
    """
    if weight.dtype == torch.float32:
        return product(hidden, weight.T)
    if hidden.device.type != "cpu":
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):  # the CPU has no such product
        wide = hidden.float()
        parts = [functional.linear(wide, part.float()) for part in weight.split(SLICE)]
        return torch.cat(parts, dim=-1)


def chunk_elements(device: torch.device) -> int:
    """Float32 logits in memory at a time."""
    return CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS


def _product_type(hidden: Tensor) -> torch.dtype:
    """The type of numbers that are multiplied: autocast's where it is on."""
    device = hidden.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else hidden.dtype


class _ChunkedHead(torch.autograd.Function):
    """LM head and log-softmax at temperature T, with gradients from the forward pass.

    With p = softmax(W h / T), d log p[t] / d h = (W[t] - p W) / T. The second result is each
    token's entropy; where the caller sums the log-probabilities, it is whether the target is the
    likeliest token, and W may train, since all tokens then have one upstream gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        summed: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        second = torch.empty_like(logprobs, dtype=torch.bool if summed else None)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        slopes = torch.empty_like(hidden) if needs_hidden else None
        weight_slopes = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        size = max(1, chunk // len(weight))
        kind = _product_type(hidden)
        factor = weight.to(kind)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = float32_logits(hidden[rows].to(kind), factor)
            if temperature != 1:
                logits /= temperature
            picked = logits.gather(1, targets[rows, None])
            if summed:
                likeliest = logits.argmax(-1, keepdim=True)
                second[rows] = likeliest[:, 0] == targets[rows]
                largest, powers = logits.gather(1, likeliest), logits.softmax(-1)
                log_total = -powers.gather(1, likeliest).log()  # of a probability >= 1 / V
                if needs_hidden or needs_weight:
                    powers.scatter_add_(1, targets[rows, None], torch.full_like(picked, -1.0))
                    errors = powers.to(kind)
                    if slopes is not None:
                        slopes[rows] = -product(errors, weight)
                    if weight_slopes is not None:
                        weight_slopes -= errors.T @ hidden[rows]
            else:
                largest = logits.amax(-1, keepdim=True)
                powers = logits.sub_(largest).exp()
                total = powers.sum(-1, keepdim=True)
                log_total = total.log()
                if slopes is not None:
                    expected = product(powers.to(hidden.dtype), weight) / total
                    slopes[rows] = (weight[targets[rows]] - expected) / temperature
                mean = logits.mul_(powers).sum(-1, keepdim=True) / total
                second[rows] = (log_total - mean)[:, 0]
            logprobs[rows] = (picked - largest - log_total)[:, 0]
            del logits, powers  # before the next ones are made
        ctx.save_for_backward(slopes, weight_slopes)
        ctx.weight_type = weight.dtype
        ctx.mark_non_differentiable(second)
        return logprobs, second

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> Any:
        slopes, weight_slopes = ctx.saved_tensors
        if slopes is not None:
            slopes = (gradients[0][:, None] * slopes).to(slopes.dtype)
        if weight_slopes is not None:  # all gradients are equal; there may be none
            weight_slopes = (gradients[0][:1].sum() * weight_slopes).to(ctx.weight_type)
        return slopes, weight_slopes, None, None, None, None


def token_logprobs(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets under softmax(logits / temperature), and entropies in nats.

    Both (N,) float32; the entropies carry no gradient. All happens inside the head's own call,
    where ZeRO-3 has gathered its weight. A head that trains, or is no plain matrix, computes all
    logits at once.

    Args:
        hidden: (N, H) float.
        targets: (N,) int64.
        temperature: above 0.
    """
    if is_plain(head) and not head.weight.requires_grad:
        weight = head.weight

        def scores(states: Tensor) -> tuple[Tensor, Tensor]:
            chunk = chunk_elements(states.device)
            return _ChunkedHead.apply(states, weight, targets, temperature, chunk, False)

        return call_inside([head], scores, hidden)
    logits = head(hidden).float() / temperature
    table = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(table.exp() * table).sum(-1)
    return table.gather(1, targets[:, None]).squeeze(1), entropy


class TokenLoss(NamedTuple):
    """Result of one forward pass for the tokens that train."""

    loss_sum: Tensor
    """() float32, nats summed over the tokens."""
    num_correct: Tensor
    """() int64, tokens that were the likeliest of the vocabulary."""


def token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, max_logits: int | None = None
) -> TokenLoss:
    """Cross-entropy of the targets, summed, without ever holding all their logits.

    The positions go through the LM head a few at a time, and the gradient is computed then:
    nothing is computed twice, and what lives until the backward pass is as small as `hidden` (and
    as `weight`, where that trains).

    Args:
        hidden: (N, H) any float, at the positions whose next token trains; N may be 0.
        weight: (V, H) any float, of the LM head; under ZeRO-3 pass it inside the head's own call.
        targets: (N,) int64, the next tokens.
        max_logits: float32 numbers in memory at a time; None: 16 MiB on the CPU, else 128 MiB.
    """
    chunk = max_logits or chunk_elements(hidden.device)
    if not torch.is_grad_enabled():
        weight = weight.detach()
    logprobs, correct = _ChunkedHead.apply(hidden, weight, targets, 1.0, chunk, True)
    return TokenLoss(-logprobs.sum(), correct.sum())
