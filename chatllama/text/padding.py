"""Rows of token ids padded to one length, on either side, with their masks."""

from collections.abc import Sequence

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
