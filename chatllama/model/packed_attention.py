"""Attention within the rows of a packed batch, whose tokens stand end to end without padding.

transformers would describe such a batch by a mask of all tokens against all tokens. Our kernel
needs none, and equals transformers' `sdpa` where nothing is packed. As `sdpa` it makes a causal
call per row, as `varlen` one of PyTorch's FlashAttention (`torch.nn.attention.varlen`) for all.
It is registered under names of our own when a model is built; nothing of the library is replaced.

On a GPU one call per row is many small launches. `varlen` is a choice all the same: it was compared
with a model of PyTorch's function on a CPU, never run on a GPU by us.
"""

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chatllama.model.families import family_of, head_dim, smallest_window
from chatllama.runtime.distributed import device, to_device

SDPA, VARLEN = "chatllama_sdpa", "chatllama_varlen"
NO_MASK = torch.empty(1, 1, 0, 0)
"""`attention_mask` for a model that needs none: transformers then makes none, and does not
synchronise the GPU to look at the positions."""
LARGEST_HEAD = 256
"""Of FlashAttention."""


def registered(attention: str) -> str:
    """Name of an implementation in transformers: for sdpa and varlen that of our kernel."""
    for name in (SDPA, VARLEN):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, sdpa_mask)
    return {"sdpa": SDPA, "varlen": VARLEN}.get(attention, attention)


def packed_rows(attention: str | None, lengths: Sequence[int] | None) -> dict[str, Any]:
    """Keyword arguments for a model's rows without padding, packed or not, beside the positions.

    Models pass them on to their layers, and to their recomputation under gradient checkpointing.

    Args:
        attention: name of the model's implementation. Those that are not ours see by the positions
            where a row begins.
        lengths: tokens of each packed row, above 0, in order. None: the rows are of equal length
            and stand one below the other.
    """
    if attention not in (SDPA, VARLEN):
        return {}
    if lengths is None:
        return {"attention_mask": NO_MASK}
    if attention == SDPA:
        return {"row_lengths": lengths, "attention_mask": NO_MASK}
    bounds = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))
    return {"row_bounds": bounds, "longest_row": max(lengths), "attention_mask": NO_MASK}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: Sequence[int] | None = None,
    row_bounds: Tensor | None = None,
    longest_row: int = 0,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention (B, T, heads, D): transformers' `sdpa`, or within the rows of a packed batch.

    Args:
        query: (B, heads, T, D); B is 1 in a packed batch.
        key: (B, key heads, T, D); `value` has the same shape.
        value: see `key`.
        attention_mask: as transformers makes it, or `NO_MASK`; unused in a packed batch.
        row_lengths: tokens of each row, in order; they sum to T. One call per row.
        row_bounds: (rows + 1,) int32, where each row begins, and T. One call for all rows, in
            bfloat16 or float16 and without dropout (see `check_attention`).
        longest_row: tokens.
        sliding_window: see `within_window`.
        **settings: of `sdpa`.
    """
    if row_bounds is not None:
        from torch.nn.attention import varlen  # takes a second

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        bounds = (row_bounds, row_bounds, longest_row, longest_row)
        causal = {"window_size": ((sliding_window or 0) - 1, 0), "enable_gqa": True}
        output = varlen.varlen_attn(q, k, v, *bounds, scale=settings["scaling"], **causal)
        return cast(Tensor, output)[None], None
    if row_lengths is not None:
        rows = zip(*(x.split(list(row_lengths), dim=2) for x in (query, key, value)), strict=True)
        outputs = [
            sdpa_attention_forward(
                module, q, k, v, within_window(None, q, k, sliding_window), **settings
            )[0]
            for q, k, v in rows
        ]
        return torch.cat(outputs, dim=1), None
    mask = None if attention_mask is None or not attention_mask.numel() else attention_mask
    mask = within_window(mask, query, key, sliding_window)
    return sdpa_attention_forward(module, query, key, value, mask, **settings)


def within_window(
    mask: Tensor | None, query: Tensor, key: Tensor, window: int | None
) -> Tensor | None:
    """A mask that lets each query see the last `window` tokens only of what it sees.

    That is a sliding window, since a query sees its own sequence and nothing else, in order.

    Args:
        mask: (B, 1, Q, K) bool, True at what a query sees. None: causal, the queries being last.
        query: (B, heads, Q, D).
        key: (B, key heads, K, D).
        window: tokens, the query's own included. None: the mask stays as it is.
    """
    queries, keys = query.shape[2], key.shape[2]
    if window is None or keys <= window:
        return mask
    if mask is None:
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=key.device)
        return mask.tril(keys - queries).triu(keys - queries - window + 1)
    later = mask.sum(-1, keepdim=True) - mask.cumsum(-1, dtype=torch.int32)
    return mask & (later < window)


def check_attention(attention: str, llama: LlamaConfig) -> None:
    """Raises ValueError if an implementation does not work on this machine or for this model."""
    reason = _why_not_varlen(llama) if attention == "varlen" else None
    if attention == "eager" and (back := smallest_window(llama)):
        reason = f"computes no sliding window here, and this model has one of {back} tokens"
    if reason:
        raise ValueError(f"backbone.attn_implementation: {attention} {reason}; choose sdpa")


def _why_not_varlen(llama: LlamaConfig) -> str | None:
    if device().type != "cuda":
        return "needs a CUDA GPU, and this process sees none"
    if torch.cuda.get_device_capability(device()) < (8, 0):
        return f"needs a GPU of the Ampere generation or later, not {torch.cuda.get_device_name()}"
    size = head_dim(family_of(llama), llama.to_dict())
    if size % 8 or size > LARGEST_HEAD:
        return (
            f"needs attention heads of a multiple of 8 and at most {LARGEST_HEAD} numbers; this "
            f"model's have {size}"
        )
    if llama.attention_dropout:
        return f"has no dropout, and this model has attention_dropout {llama.attention_dropout}"
    from torch.nn.attention import varlen

    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys():
        return f"needs a newer torch than {torch.__version__}"
    return None
