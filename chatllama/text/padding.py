"""Rows of token ids padded to one length, on either side, with their masks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) int64 and mask (B, T) bool, True on the rows' tokens, which come first."""
    return _pad(rows, pad_id, "right")


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) int64 and mask (B, T) bool, True on the rows' tokens, which come last."""
    return _pad(rows, pad_id, "left")


def _pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return (pad_sequence(ids, True, pad_id, side), pad_sequence(masks, True, False, side))
