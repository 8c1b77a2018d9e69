"""One token per row from logits, by inverting the cumulative distribution.

The random numbers are arguments. Top-k and top-p are exact, ties included, and sort the whole
vocabulary only where its likeliest tokens do not hold enough. There is no model here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from chatllama.config.schema import GenerationSection
from chatllama.generation.transfer import upload, upload_ids

CANDIDATES = 1024
BLOCK = 256
NO_TOKEN = -1
CPU = torch.device("cpu")
BROKEN = "the model's logits are NaN or infinite: its weights are broken"


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
        """The sampling of a config."""
        return cls(section.max_new_tokens, section.temperature, section.top_k, section.top_p)


class RowSampling:
    """Sampling of several rows as tensors; a single row broadcasts over a batch of any size."""

    def __init__(self, rows: Sequence[Sampling], device: torch.device = CPU) -> None:
        greedy = [row.temperature == 0 for row in rows]
        truncated = [
            not zero and (row.top_k > 0 or row.top_p < 1)
            for row, zero in zip(rows, greedy, strict=True)
        ]
        temperatures = [[row.temperature or 1.0] for row in rows]
        self.temperature = upload(torch.tensor(temperatures), device)
        """(B, 1) float32; 1 where greedy."""
        self.greedy = upload(torch.tensor(greedy), device)
        """(B,) bool."""
        self.top_k = upload(torch.tensor([[row.top_k] for row in rows]), device)
        """(B, 1) int64; 0: all tokens."""
        self.top_p = upload(torch.tensor([[row.top_p] for row in rows]), device)
        """(B, 1) float32."""
        self.truncated = upload_ids([i for i, is_cut in enumerate(truncated) if is_cut], device)
        """(N,) int64: the rows of which top_k or top_p leaves tokens out."""
        self.greedy_rows, self.truncated_rows = sum(greedy), sum(truncated)
        self.largest_top_k = max(row.top_k for row in rows)
        self.tempered = any(row.temperature not in (0, 1) for row in rows)


def next_tokens(logits: torch.Tensor, uniforms: torch.Tensor, rows: RowSampling) -> torch.Tensor:
    """One token id per row: (B,) int64; NO_TOKEN in a row that cannot be sampled.

    Args:
        logits: (B, V) float, of the next position; NaN and infinity spoil their own row only.
        uniforms: (B,) float32 in [0, 1).
        rows: sampling of each row, or of all.
    """
    scaled = logits.float() / rows.temperature if rows.tempered else logits.float()
    sound = scaled.amax(-1).isfinite()
    if logits.device.type == "cpu" and bool(sound.all()):  # on a GPU looking would wait for it
        return _tokens(logits, scaled, uniforms, rows)
    keep = sound[:, None]
    tokens = _tokens(logits.where(keep, 0.0), scaled.where(keep, 0.0), uniforms, rows)
    return tokens.where(sound, NO_TOKEN)


def _tokens(
    logits: torch.Tensor, scaled: torch.Tensor, uniforms: torch.Tensor, rows: RowSampling
) -> torch.Tensor:
    count = len(rows.greedy)
    if rows.greedy_rows == count:
        return logits.argmax(-1)
    probabilities = scaled.softmax(-1)
    if rows.truncated_rows == count:
        chosen = _truncated(probabilities, uniforms, rows.top_k, rows.top_p, rows.largest_top_k)
    else:
        chosen = _inverted(probabilities, uniforms)
        if rows.truncated_rows:
            some, largest = rows.truncated, rows.largest_top_k
            top_k, top_p = rows.top_k[some], rows.top_p[some]
            chosen[some] = _truncated(probabilities[some], uniforms[some], top_k, top_p, largest)
    return torch.where(rows.greedy, logits.argmax(-1), chosen) if rows.greedy_rows else chosen


def _inverted(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative weight reaches (1 - u) of the total: (B,) int64.

    In two stages, blocks and then tokens of one block, since the cumulative sum of a whole
    vocabulary costs more than the rest. 1 - u lies in (0, 1], so no token of weight 0 is chosen.

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
    target = (1 - uniforms[:, None]) * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=vocabulary - 1))
    within = torch.where(columns < vocabulary, inside, 0.0).cumsum(-1)
    # Two sums of the same numbers may round apart: the target must not exceed the block's end.
    rest = torch.minimum(target - before, within[:, -1:])
    return (block * BLOCK + torch.searchsorted(within, rest)).squeeze(-1)


def _truncated(
    weights: torch.Tensor,
    uniforms: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    largest_top_k: int,
) -> torch.Tensor:
    """Tokens sampled among the likeliest only: (B,) int64.

    Finds the token's rank among the sorted weights, then its id; of equal weights the smaller id
    has the smaller rank.

    Args:
        weights: (B, V) float32, not negative.
        uniforms: (B,) float32 in [0, 1).
        top_k: (B or 1, 1) int64; 0: all tokens.
        top_p: (B or 1, 1) float32; the fewest likeliest that hold this share of what top_k left.
        largest_top_k: of `top_k`.
    """
    vocabulary = weights.shape[-1]
    limit = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)
    limit = limit.expand(len(weights), 1)
    if weights.device.type != "cpu":
        return _by_sorting(weights, uniforms, limit, top_p)
    whole = weights.sum(-1, keepdim=True)
    count = min(max(CANDIDATES, largest_top_k), vocabulary)
    while True:
        best = _largest(weights, count)
        cumulative = best.cumsum(-1)
        among = cumulative.gather(1, limit.clamp(max=count) - 1)
        mass = top_p * torch.where(limit <= count, among, whole)
        reached = (cumulative[:, -1:] >= mass) | (limit <= count)
        if count == vocabulary or bool(reached.all()):
            break
        count = vocabulary
    rank = _rank(cumulative, uniforms, limit.clamp(max=count), mass)
    weight = best.gather(1, rank)
    likelier = count - torch.searchsorted(best.flip(1), weight, right=True)
    among_equals = rank - likelier
    row, token = (weights == weight).nonzero(as_tuple=True)
    first = torch.searchsorted(row, torch.arange(len(weights), device=row.device))
    return token[first + among_equals.squeeze(1)]


def _by_sorting(
    weights: torch.Tensor, uniforms: torch.Tensor, limit: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """As `_truncated`, by sorting the whole vocabulary with its ids.

    On a GPU that costs less than the waits for numbers that the shorter way depends on.
    """
    best, ids = weights.sort(dim=-1, descending=True, stable=True)
    cumulative = best.cumsum(-1)
    mass = top_p * cumulative.gather(1, limit - 1)
    return ids.gather(1, _rank(cumulative, uniforms, limit, mass)).squeeze(1)


def _rank(
    cumulative: torch.Tensor, uniforms: torch.Tensor, limit: torch.Tensor, mass: torch.Tensor
) -> torch.Tensor:
    """Rank of the sampled token among the sorted ones: (B, 1) int64.

    Tokens are kept until their total reaches `mass`, at most `limit` of them; the first always.
    """
    kept = torch.minimum(torch.searchsorted(cumulative, mass) + 1, limit)
    target = (1 - uniforms[:, None]) * cumulative.gather(1, kept - 1)
    return torch.searchsorted(cumulative, target)


def _largest(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest of each row in falling order, on the CPU: (B, count)."""
    # NumPy partitions and sorts numbers without their indices, with vector instructions: 1.6 and
    # 5 ms for 64 x 32,000, against 19 ms of topk(1024) and 140 ms of torch.sort.
    numbers = weights.numpy()
    if count < numbers.shape[1]:
        numbers = np.partition(numbers, numbers.shape[1] - count, axis=1)[:, -count:]
    return torch.from_numpy(np.sort(numbers, axis=1)[:, ::-1].copy())
