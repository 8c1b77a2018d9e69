"""Meta's LLaMA written anew from its papers, to check an import against. Plain torch, float32.

Rotations are complex numbers on neighbouring channels, as Meta trained them; Hugging Face rotates
halves, which is why an import reorders rows. It reads one tensor at a time and keeps none.

Sources: LLaMA (arXiv 2302.13971), LLaMA-2 (arXiv 2307.09288), RoPE (arXiv 2104.09864). T tokens,
D channels, H heads, K key-value heads, C channels a head, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import silu

from chatllama.meta_params import MetaParams

Weight = Callable[[str], torch.Tensor]
"""Name -> whole tensor in Meta's order, float32."""


@torch.no_grad()
def reference_logits(params: MetaParams, weight: Weight, tokens: torch.Tensor) -> torch.Tensor:
    """Logits after every token: (T, V) float32.

    Args:
        params: the model's sizes.
        weight: gives each tensor when it is needed.
        tokens: (T,) int64.
    """
    turns = rotations(params, len(tokens))
    hidden = weight("tok_embeddings.weight")[tokens]
    for layer in range(params.n_layers):
        prefix = f"layers.{layer}."
        normed = rms_norm(hidden, weight(prefix + "attention_norm.weight"), params.norm_eps)
        hidden = hidden + attention(params, weight, prefix + "attention.", normed, turns)
        normed = rms_norm(hidden, weight(prefix + "ffn_norm.weight"), params.norm_eps)
        gate = silu(normed @ weight(prefix + "feed_forward.w1.weight").T)
        wide = gate * (normed @ weight(prefix + "feed_forward.w3.weight").T)
        hidden = hidden + wide @ weight(prefix + "feed_forward.w2.weight").T
    return rms_norm(hidden, weight("norm.weight"), params.norm_eps) @ weight("output.weight").T


def rms_norm(hidden: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """`hidden` (T, D) with root mean square 1 along D, times `scale` (D,)."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * scale


def rotations(params: MetaParams, length: int) -> torch.Tensor:
    """Unit complex numbers (T, C / 2): channel pair i turns by theta^(-2i / C) a position."""
    pairs = torch.arange(0, params.head_dim, 2, dtype=torch.float32)
    speeds = params.rope_theta ** -(pairs / params.head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), speeds)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """`heads` (T, H, C) with channels 2i and 2i + 1 turned as one complex number."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def attention(
    params: MetaParams, weight: Weight, prefix: str, hidden: torch.Tensor, turns: torch.Tensor
) -> torch.Tensor:
    """What causal attention adds to `hidden` (T, D)."""
    length, width = len(hidden), params.head_dim
    queries = (hidden @ weight(prefix + "wq.weight").T).view(length, params.n_heads, width)
    keys = (hidden @ weight(prefix + "wk.weight").T).view(length, params.n_kv_heads, width)
    values = (hidden @ weight(prefix + "wv.weight").T).view(length, params.n_kv_heads, width)
    shared = params.n_heads // params.n_kv_heads
    queries, keys = rotate(queries, turns), rotate(keys, turns).repeat_interleave(shared, dim=1)
    scores = torch.einsum("qhc,khc->hqk", queries, keys) / math.sqrt(width)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    mixed = torch.einsum("hqk,khc->qhc", weights, values.repeat_interleave(shared, dim=1))
    return mixed.reshape(length, -1) @ weight(prefix + "wo.weight").T
