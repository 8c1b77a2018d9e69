"""Meta's LLaMA: its params.json, checked, and its arithmetic in plain float32 torch.

An import is checked against the arithmetic, which reads one tensor at a time and keeps none.
Rotations are complex numbers on neighbouring channels, as Meta trained them; Hugging Face rotates
halves, so an import reorders rows. Files of tensors are read in `meta_shards.py`.

Sources: LLaMA (arXiv 2302.13971), LLaMA-2 (arXiv 2307.09288), RoPE (arXiv 2104.09864). T tokens,
D channels, H heads, K key-value heads, C channels a head, V vocabulary.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

IGNORED = "max_batch_size"
"""Key of the training job, not of the model."""
ASSUMED_POSITIONS = 2048
Weight = Callable[[str], Tensor]
"""Name -> whole tensor in Meta's order, float32."""


@dataclass(frozen=True)
class MetaParams:
    """The keys of params.json."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    """Default: `n_heads`."""
    norm_eps: float
    rope_theta: float
    """Default: 10000."""
    vocab_size: int | None
    """None for -1: the tokenizer's."""
    max_seq_len: int | None
    """Longest text in tokens; not in Meta's own files."""
    multiple_of: int | None
    ffn_dim_multiplier: float | None

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.dim // self.n_heads

    def ffn_dim(self) -> int | None:
        """Width of the feed-forward layer; None without `multiple_of`.

        Two thirds of 4 `dim`, scaled, rounded up to `multiple_of` (LLaMA-2, model.py).
        """
        if self.multiple_of is None:
            return None
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)


def read_params(file: Path) -> MetaParams:
    """The parameters in params.json; ValueError names the file and the key that is wrong."""
    if not file.is_file():
        raise ValueError(f"{file.parent}: no {file.name}; is this a folder of Meta's checkpoint?")
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object")
    known = [each.name for each in fields(MetaParams)]
    if unknown := sorted(set(values) - {*known, "use_scaled_rope", IGNORED}):
        raise ValueError(
            f"{file}: unknown keys {', '.join(unknown)}; LLaMA-1 and LLaMA-2 have "
            f"{', '.join(known)}. For newer models take the Hugging Face folder"
        )
    if values.get("use_scaled_rope"):
        raise ValueError(
            f"{file}: use_scaled_rope (LLaMA-3.1 and later) is not imported; take the Hugging "
            "Face folder of this model"
        )
    whole = partial(_number, file, values)
    number = partial(whole, whole=False)
    heads = whole("n_heads")
    params = MetaParams(
        dim=whole("dim"),
        n_layers=whole("n_layers"),
        n_heads=heads,
        n_kv_heads=whole("n_kv_heads", optional=True) or heads,
        norm_eps=number("norm_eps"),
        rope_theta=number("rope_theta") if "rope_theta" in values else 10000.0,
        vocab_size=None if values.get("vocab_size", -1) == -1 else whole("vocab_size"),
        max_seq_len=whole("max_seq_len", optional=True),
        multiple_of=whole("multiple_of", optional=True),
        ffn_dim_multiplier=number("ffn_dim_multiplier", optional=True),
    )
    if params.dim % (2 * heads):
        raise ValueError(f"{file}: dim {params.dim} is not an even multiple of n_heads {heads}")
    if heads % (groups := params.n_kv_heads):
        raise ValueError(f"{file}: n_heads {heads} is not a multiple of n_kv_heads {groups}")
    return params


def _number(
    file: Path, values: dict[str, Any], key: str, *, whole: bool = True, optional: bool = False
) -> Any:
    """The number above 0 at a key; None where it is `optional` and missing or null."""
    value = values.get(key)
    if optional and value is None:
        return None
    if key not in values:
        raise ValueError(f"{file}: no {key}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{file}: {key} must be a number above 0, not {value!r}")
    if whole and value != int(value):
        raise ValueError(f"{file}: {key} must be a whole number, not {value}")
    return int(value) if whole else value


@torch.no_grad()
def reference_logits(params: MetaParams, weight: Weight, tokens: Tensor) -> Tensor:
    """Logits (T, V) float32 after every one of the `tokens` (T,) int64."""
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


def rms_norm(hidden: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`hidden` (T, D) with root mean square 1 along D, times `scale` (D,)."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * scale


def rotations(params: MetaParams, length: int) -> Tensor:
    """Unit complex numbers (T, C / 2): channel pair i turns by theta^(-2i / C) a position."""
    pairs = torch.arange(0, params.head_dim, 2, dtype=torch.float32)
    speeds = params.rope_theta ** -(pairs / params.head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), speeds)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """`heads` (T, H, C) with channels 2i and 2i + 1 turned as one complex number."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def attention(
    params: MetaParams, weight: Weight, prefix: str, hidden: Tensor, turns: Tensor
) -> Tensor:
    """What causal attention adds to `hidden` (T, D)."""
    length, width = len(hidden), params.head_dim
    queries, keys, values = (
        (hidden @ weight(f"{prefix}w{part}.weight").T).view(length, -1, width) for part in "qkv"
    )
    shared = params.n_heads // params.n_kv_heads
    queries, keys = rotate(queries, turns), rotate(keys, turns).repeat_interleave(shared, dim=1)
    scores = torch.einsum("qhc,khc->hqk", queries, keys) / math.sqrt(width)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    mixed = torch.einsum("hqk,khc->qhc", weights, values.repeat_interleave(shared, dim=1))
    return mixed.reshape(length, -1) @ weight(prefix + "wo.weight").T
