"""Losses of supervised training, as pure functions of tensors.

Sums over tokens, never means: the caller divides by the number of trained tokens of the whole
optimizer step, so that microbatches and ranks change nothing. PPO's losses are in `ppo_math.py`.
Shape legend: N trained positions, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.checkpoint import checkpoint


class TokenLoss(NamedTuple):
    """What one forward pass says about the tokens that train."""

    loss_sum: torch.Tensor
    """() float32, nats summed over the tokens."""
    num_correct: torch.Tensor
    """() int64, tokens that were the likeliest of the vocabulary."""


def token_loss(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    num_chunks: int = 1,
) -> TokenLoss:
    """Cross-entropy of the targets, summed, without ever holding all their logits.

    With more than one chunk, a chunk's logits are computed again in the backward pass (a third
    more work in the LM head) so that one chunk is the most that lives at a time. The number of
    chunks is given, not derived from N, because under ZeRO-3 all ranks must call the head equally
    often whatever their batches hold.

    Args:
        hidden: (N, H) any float, at the positions whose next token trains; N may be 0.
        head: the LM head, called as a module (ZeRO-3 gathers its weight then): (n, H) -> (n, V).
        targets: (N,) int64, the next tokens.
        num_chunks: parts in which the N positions go through the head.
    """
    parts = zip(hidden.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
    if num_chunks == 1 or not torch.is_grad_enabled():
        losses = [_chunk_loss(rows, head, wanted) for rows, wanted in parts]
    else:
        losses = [
            checkpoint(_chunk_loss, rows, head, wanted, use_reentrant=False)
            for rows, wanted in parts
        ]
    sums, correct = zip(*losses, strict=True)
    return TokenLoss(torch.stack(sums).sum(), torch.stack(correct).sum())


def _chunk_loss(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor
) -> TokenLoss:
    logits = head(hidden).float()
    num_correct = (logits.detach().argmax(-1) == targets).sum()
    return TokenLoss(cross_entropy(logits, targets, reduction="sum"), num_correct)


def head_chunks(num_positions: int, vocab_size: int, max_logits: int = 2**27) -> int:
    """Chunks for `token_loss` that keep a chunk's logits below about `max_logits` numbers.

    Args:
        num_positions: the most positions that a forward pass can train (microbatch x length).
        vocab_size: V.
        max_logits: float32 numbers; the default is 512 MiB of logits.
    """
    return -(-num_positions * vocab_size // max_logits)


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
