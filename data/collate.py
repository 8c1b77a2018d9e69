"""Rows of token ids as rectangular tensors, and which rows belong to which step.

Masks come from positions, never from ids: a pad id may also be a real token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) int64 and mask (B, T) bool, True on the rows' tokens, which come first.

    Args:
        rows: B sequences of ids; T is the longest's length.
        pad_id: fills the rest.
    """
    return _pad(rows, pad_id, left=False)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) int64 and mask (B, T) bool, True on the rows' tokens, which come last.

    Args:
        rows: B sequences of ids; T is the longest's length.
        pad_id: fills the rest.
    """
    return _pad(rows, pad_id, left=True)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position (B, T) int64 of each token in its row, from 0; 0 before the first token.

    Args:
        mask: (B, T) bool, True on tokens.
    """
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Every pair (better, worse) of a list of answers; ties make none.

    Args:
        ranks: of the answers, 0 for the best.
    """
    numbers = range(len(ranks))
    return [(i, j) for i in numbers for j in numbers if ranks[i] < ranks[j]]


@dataclass(frozen=True)
class AnswerPairs:
    """The pairs among the answers of several prompts; answers are numbered one after another."""

    better: torch.Tensor
    """(P,) int64, answer that is preferred."""
    worse: torch.Tensor
    """(P,) int64, answer that it is preferred to."""
    margin: torch.Tensor
    """(P,) float32, difference of their ratings."""
    weight: torch.Tensor
    """(P,) float32, 1 / number of the prompt's pairs: all prompts weigh the same."""
    prompt: torch.Tensor
    """(P,) int64, whose answers these are."""


def answer_pairs(examples: Iterable[Mapping[str, Any]]) -> AnswerPairs:
    """All pairs among the answers of `examples`, prompt by prompt.

    Args:
        examples: with `ranks` and `ratings`, one of each for every answer.
    """
    rows: list[tuple[int, int, float, float, int]] = []
    first = 0
    for number, example in enumerate(examples):
        pairs, ratings = ordered_pairs(example["ranks"]), example["ratings"]
        for i, j in pairs:
            by = ratings[i] - ratings[j]
            rows.append((first + i, first + j, by, 1 / len(pairs), number))
        first += len(ratings)
    better, worse, margin, weight, prompt = zip(*rows, strict=True)
    return AnswerPairs(
        torch.tensor(better),
        torch.tensor(worse),
        torch.tensor(margin, dtype=torch.float32),
        torch.tensor(weight, dtype=torch.float32),
        torch.tensor(prompt),
    )


@dataclass(frozen=True)
class PreferenceCollator:
    """Examples of `tokenize_preferences` as one batch: every answer with its prompt; their pairs.

    For attention that only knows whole sequences; else `answer_rows.py` spares the repetition.
    """

    pad_id: int

    def __call__(
        self, examples: Sequence[dict[str, Any]]
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], AnswerPairs]:
        """The batch.

        Returns:
            (N, T) int64 ids of all answers with their prompts, padded on the right, and (N, T)
            bool mask, True on tokens; the pairs.
        """
        rows = [ids for example in examples for ids in example["answer_ids"]]
        return pad_right(rows, self.pad_id), answer_pairs(examples)

    def num_tokens(self, example: Mapping[str, Any]) -> int:
        """Tokens that the model computes for an example."""
        return sum(map(len, example["answer_ids"]))


def batch_indices(num_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of step `step`, over all ranks; rank r takes its slice.

    Epochs follow each other without a gap, each in its own random order, so that every batch is
    full and every example comes up once before any comes up twice. Depends on the arguments
    alone: a run resumed at any step, on any number of ranks, sees the same batches.

    Args:
        num_examples: size of the training set.
        batch_size: examples a step, over all ranks.
        step: from 0.
        seed: of the order.

    Raises:
        ValueError: there are no examples.
    """
    if num_examples < 1:
        raise ValueError(f"no examples to train on (num_examples = {num_examples})")
    begin = step * batch_size
    places = [divmod(place, num_examples) for place in range(begin, begin + batch_size)]
    return [int(_epoch_order(num_examples, epoch, seed)[offset]) for epoch, offset in places]


def bucket_by_length(lengths: Sequence[int], group: int) -> list[int]:
    """An order in which the rows of every group go from short to long; groups keep their place.

    With an optimizer step's batch as the group, its microbatches hold rows of like length and need
    less padding, while the step sees the same rows: its gradient stays what it was.

    Args:
        lengths: tokens of each row.
        group: rows of a group.
    """
    groups = (range(i, min(i + group, len(lengths))) for i in range(0, len(lengths), group))
    return [i for rows in groups for i in sorted(rows, key=lambda i: lengths[i])]


def fill_rate(lengths: Sequence[int], microbatch_size: int) -> float:
    """Share of the positions that the model computes which hold tokens, not padding.

    Args:
        lengths: tokens of each row, in training order.
        microbatch_size: rows that are padded to one length.
    """
    starts = range(0, len(lengths), microbatch_size)
    batches = [lengths[start : start + microbatch_size] for start in starts]
    return sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


@lru_cache(maxsize=4)
def _epoch_order(num_examples: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def _pad(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = True
    return ids, mask
