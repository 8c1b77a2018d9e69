"""One token per row from logits, by inverting the cumulative distribution.

The random numbers are handed in. Top-k and top-p are exact, ties included, without sorting the
whole vocabulary where few tokens hold the probability. Nothing here knows a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chatllama.config import GenerationSection

FIRST_CANDIDATES = (64, 1024)
BLOCK = 256


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    """1: all tokens."""

    @classmethod
    def of(cls, section: GenerationSection) -> "Sampling":
        """The sampling that the config asks for."""
        return cls(section.max_new_tokens, section.temperature, section.top_k, section.top_p)


@dataclass(frozen=True)
class RowSampling:
    """How to choose the tokens of several rows, each in its own way."""

    temperature: torch.Tensor
    """(B, 1) float32; 1 where greedy."""
    greedy: torch.Tensor
    """(B,) bool."""
    top_k: torch.Tensor
    """(B, 1) int64; 0: all tokens."""
    top_p: torch.Tensor
    """(B, 1) float32."""
    all_greedy: bool
    some_greedy: bool
    max_top_k: int
    min_top_k: int
    cuts_top_p: bool

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device | None = None) -> "RowSampling":
        """As tensors; one row serves for a batch of any size."""
        greedy = [row.temperature == 0 for row in rows]
        top_ks = [0 if zero else row.top_k for row, zero in zip(rows, greedy, strict=True)]
        top_ps = [1.0 if zero else row.top_p for row, zero in zip(rows, greedy, strict=True)]
        temperatures = [[row.temperature or 1.0] for row in rows]
        return cls(
            temperature=torch.tensor(temperatures, device=device),
            greedy=torch.tensor(greedy, device=device),
            top_k=torch.tensor(top_ks, device=device)[:, None],
            top_p=torch.tensor(top_ps, device=device)[:, None],
            all_greedy=all(greedy),
            some_greedy=any(greedy),
            max_top_k=max(top_ks),
            min_top_k=min(top_ks),
            cuts_top_p=min(top_ps) < 1,
        )


def next_tokens(logits: torch.Tensor, uniforms: torch.Tensor, rows: RowSampling) -> torch.Tensor:
    """One token id per row: (B,) int64.

    Args:
        logits: (B, V) float, of the next position.
        uniforms: (B,) float32 in [0, 1).
        rows: how to choose.

    Raises:
        ValueError: a row of logits is NaN, or holds no finite number.
    """
    if rows.all_greedy:
        best, likeliest = logits.max(-1)
    else:
        best, likeliest = logits.amax(-1), None
    if not bool(best.isfinite().all()):
        raise ValueError("the model's logits are NaN or infinite: its weights are broken")
    if rows.all_greedy:
        assert likeliest is not None
        return likeliest
    # Unnormalised, the largest being 1: the sum below normalises.
    weights = logits.float().sub(best.float()[:, None]).div_(rows.temperature).exp_()
    if rows.max_top_k:
        weights = _top_k(weights, rows)
    if rows.cuts_top_p:
        weights = _top_p(weights, rows.top_p)
    chosen = _inverted(weights, uniforms)
    return torch.where(rows.greedy, logits.argmax(-1), chosen) if rows.some_greedy else chosen


def _inverted(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative weight reaches (1 - u) of the total: (B,) int64.

    In two stages, blocks and then tokens of one block, since cumulating a whole vocabulary costs
    more than the rest. 1 - u lies in (0, 1], so a token of weight 0 is never met.

    Args:
        weights: (B, V) float32, not negative, at least one above 0 in every row.
        uniforms: (B,) float32 in [0, 1).
    """
    vocabulary = weights.shape[-1]
    whole = vocabulary // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], 1)
    cumulative = sums.cumsum(-1)
    goal = (1 - uniforms[:, None]) * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, goal)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=vocabulary - 1))
    within = torch.where(columns < vocabulary, inside, 0.0).cumsum(-1)
    # Two sums of the same numbers may round apart: the goal must not lie behind the block's end.
    rest = torch.minimum(goal - before, within[:, -1:])
    return (block * BLOCK + torch.searchsorted(within, rest)).squeeze(-1)


def _top_k(weights: torch.Tensor, rows: RowSampling) -> torch.Tensor:
    """Weights with zeros behind each row's k likeliest tokens."""
    vocabulary = weights.shape[-1]
    largest = min(rows.max_top_k, vocabulary)
    best = weights.topk(largest).values
    last = best.gather(1, rows.top_k.expand(len(best), 1).clamp(1, largest) - 1)
    kept = (rows.top_k - (best > last).sum(-1, keepdim=True)).expand(len(best), 1)
    if rows.min_top_k == 0:
        everything = rows.top_k == 0
        last = torch.where(everything, 0.0, last)
        kept = torch.where(everything, vocabulary, kept)
    return _cut(weights, last, kept)


def _top_p(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Weights with zeros outside the fewest likeliest tokens that hold `top_p` of the total."""
    everything = top_p >= 1
    wanted = torch.where(everything, 0.0, top_p * weights.sum(-1, keepdim=True))
    best = _likeliest(weights, wanted)
    # Tokens are kept until their total reaches what is wanted; the first always.
    number = (best.cumsum(-1) - best < wanted).sum(-1, keepdim=True).clamp(min=1)
    last = best.gather(1, number - 1)
    tied = number - (best > last).sum(-1, keepdim=True)
    vocabulary = weights.shape[-1]
    return _cut(
        weights, torch.where(everything, 0.0, last), torch.where(everything, vocabulary, tied)
    )


def _likeliest(weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """So many of the largest weights, in falling order, that every row holds what is wanted."""
    for count in FIRST_CANDIDATES:
        best = weights.topk(min(count, weights.shape[-1])).values
        if bool((best.sum(-1, keepdim=True) >= wanted).all()):
            return best
    return weights.sort(descending=True).values


def _cut(weights: torch.Tensor, last: torch.Tensor, tied: torch.Tensor) -> torch.Tensor:
    """Weights above `last`, and the first `tied` of those equal to it; zeros elsewhere.

    Args:
        weights: (B, V) float32.
        last: (B, 1) float32.
        tied: (B, 1) int64.
    """
    equal = weights == last
    if bool((equal.sum(-1, keepdim=True) > tied).any()):
        equal &= equal.cumsum(-1) <= tied
        return torch.where((weights > last) | equal, weights, 0.0)
    return torch.where(weights >= last, weights, 0.0)
