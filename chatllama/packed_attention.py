"""Attention within the rows of a packed batch, whose tokens stand end to end without padding.

transformers would describe such a batch by a mask of all tokens against all tokens. Here each row
is a causal call of its own, without a mask. Importing this teaches transformers' `sdpa` one more
keyword, `row_lengths`, which models pass on to their layers (and to their recomputation under
gradient checkpointing); without it nothing changes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: Sequence[int] | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls `sdpa`; with row lengths, row by row.

    Args:
        module: the attention layer.
        query: (B, heads, T, D); B is 1 with row lengths.
        key: (B, key heads, T, D).
        value: (B, key heads, T, D).
        attention_mask: as transformers makes it; unused with row lengths.
        row_lengths: tokens of each row, in order; they sum to T.
        **settings: of `sdpa`.
    """
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    rows = zip(*(x.split(list(row_lengths), dim=2) for x in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **settings)[0] for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("sdpa", attend)
NO_MASK = torch.empty(1, 1, 0, 0)
"""For the model's `attention_mask` beside `row_lengths`, so that no mask is made."""
