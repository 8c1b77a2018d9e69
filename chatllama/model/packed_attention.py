"""Attention within the rows of a packed batch, whose tokens stand end to end without padding.

transformers would describe such a batch by a mask of all tokens against all tokens. Importing this
teaches it two other ways, both without a mask and both its `sdpa` where nothing is packed: in
`sdpa` each row is a causal call of its own; in `varlen` all rows are one call of PyTorch's
FlashAttention for rows of any length (`torch.nn.attention.varlen`).

On a GPU one call per row is many small launches. Yet `varlen` is a choice, not what `sdpa` does
there: it was compared with a model of PyTorch's function on a CPU, never run on a GPU by us.
"""

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chatllama.runtime.distributed import device, to_device

NO_MASK = torch.empty(1, 1, 0, 0)
"""For the model's `attention_mask` where no mask is needed: none is made, and a GPU is not asked by
the positions whether one is."""
LARGEST_HEAD = 256
"""Of FlashAttention."""


def packed_rows(attention: str | None, lengths: Sequence[int] | None) -> dict[str, Any]:
    """What a model must be told of rows without padding, packed or not, beside the positions.

    Models pass it on to their layers, and to their recomputation under gradient checkpointing.

    Args:
        attention: name of the model's implementation. Those that are not ours see by the positions
            where a row begins.
        lengths: tokens of each packed row, above 0, in order. None: the rows are of equal length
            and stand one below the other.
    """
    if attention not in ("sdpa", "varlen"):
        return {}
    if lengths is None:
        return {"attention_mask": NO_MASK}
    if attention == "sdpa":
        return {"row_lengths": lengths, "attention_mask": NO_MASK}
    bounds = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))
    return {"row_bounds": bounds, "longest_row": max(lengths), "attention_mask": NO_MASK}


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
        attention_mask: as transformers makes it, or `NO_MASK`; unused with row lengths.
        row_lengths: tokens of each row, in order; they sum to T.
        **settings: of `sdpa`.
    """
    if attention_mask is not None and not attention_mask.numel():
        attention_mask = None
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    rows = zip(*(x.split(list(row_lengths), dim=2) for x in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **settings)[0] for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def attend_at_once(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_bounds: torch.Tensor | None = None,
    longest_row: int = 0,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls `sdpa`; with row bounds, all rows in one call.

    Args:
        module: the attention layer.
        query: (B, heads, T, D); with row bounds B is 1 and the type bfloat16 or float16.
        key: (B, key heads, T, D).
        value: (B, key heads, T, D).
        attention_mask: as transformers makes it, or `NO_MASK`; unused with row bounds.
        row_bounds: (rows + 1,) int32, where each row begins, and T.
        longest_row: tokens.
        **settings: of `sdpa`. `check_varlen` has seen to it that there is no dropout.
    """
    if attention_mask is not None and not attention_mask.numel():
        attention_mask = None
    if row_bounds is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    from torch.nn.attention import varlen  # takes a second

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    output = varlen.varlen_attn(
        q,
        k,
        v,
        row_bounds,
        row_bounds,
        longest_row,
        longest_row,
        scale=settings["scaling"],
        window_size=(-1, 0),  # causal
        enable_gqa=True,
    )
    return cast(torch.Tensor, output)[None], None


def check_varlen(llama: LlamaConfig) -> None:
    """Nothing, if all rows of a packed batch can be one call on this machine.

    Args:
        llama: of the model.

    Raises:
        ValueError: why not.
    """
    if reason := _why_not_varlen(llama):
        raise ValueError(f"backbone.attn_implementation: varlen {reason}; choose sdpa")


def _why_not_varlen(llama: LlamaConfig) -> str | None:
    if device().type != "cuda":
        return "needs a CUDA GPU, and this process sees none"
    if torch.cuda.get_device_capability(device()) < (8, 0):
        return f"needs a GPU of the Ampere generation or later, not {torch.cuda.get_device_name()}"
    size = llama.head_dim or llama.hidden_size // llama.num_attention_heads
    if size % 8 or size > LARGEST_HEAD:
        return (
            f"needs attention heads of a multiple of 8 and at most {LARGEST_HEAD} numbers; this "
            f"model's have {size}"
        )
    if llama.attention_dropout:
        return f"knows no dropout, and this model has attention_dropout {llama.attention_dropout}"
    from torch.nn.attention import varlen

    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys():
        return f"needs a newer torch than {torch.__version__}"
    return None


AttentionInterface.register("sdpa", attend)
AttentionInterface.register("varlen", attend_at_once)
AttentionMaskInterface.register("varlen", sdpa_mask)
