"""A LLaMA in Meta's words: what its params.json says, checked, and its arithmetic written anew.

The arithmetic is what an import is checked against, in plain float32 torch, reading one tensor at a
time and keeping none. Rotations are complex numbers on neighbouring channels, as Meta trained them;
Hugging Face rotates halves, which is why an import reorders rows. Files of tensors are read in
`shards.py`.

Sources: LLaMA (arXiv 2302.13971), LLaMA-2 (arXiv 2307.09288), RoPE (arXiv 2104.09864). T tokens,
D channels, H heads, K key-value heads, C channels a head, V vocabulary.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

# Of the training job, not of the model.
IGNORED = ("max_batch_size",)
KNOWN = (
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "max_seq_len",
    "use_scaled_rope",
)
ASSUMED_POSITIONS = 2048
Weight = Callable[[str], Tensor]
"""Name -> whole tensor in Meta's order, float32."""


@dataclass(frozen=True)
class MetaParams:
    """A LLaMA in Meta's words."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    """`n_heads` where the file does not say."""
    norm_eps: float
    rope_theta: float
    """10000 where the file does not say."""
    vocab_size: int | None
    """None where the file says -1: as many as the tokenizer has."""
    max_seq_len: int | None
    """Longest text in tokens; Meta's own files do not say."""
    multiple_of: int | None
    ffn_dim_multiplier: float | None

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.dim // self.n_heads

    def ffn_dim(self) -> int | None:
        """Width of the feed-forward layer; None where the file does not say.

        Two thirds of 4 `dim`, scaled, rounded up to `multiple_of` (LLaMA-2, model.py).
        """
        if self.multiple_of is None:
            return None
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)


def read_params(file: Path) -> MetaParams:
    """The parameters in params.json.

    Raises:
        ValueError: no such file, no JSON, a key that is missing, unknown or of another type, or
            values that do not fit each other.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent}: no {file.name}; is this a folder of Meta's checkpoint?")
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object")
    unknown = sorted(set(values) - {*KNOWN, *IGNORED})
    if unknown:
        raise ValueError(
            f"{file}: unknown keys {', '.join(unknown)}; LLaMA-1 and LLaMA-2 have "
            f"{', '.join(KNOWN[:-1])}. For newer models take the Hugging Face folder"
        )
    if values.get("use_scaled_rope"):
        raise ValueError(
            f"{file}: use_scaled_rope (LLaMA-3.1 and later) is not imported; take the Hugging "
            "Face folder of this model"
        )
    heads = _whole(file, values, "n_heads")
    vocabulary, scale = values.get("vocab_size", -1), values.get("ffn_dim_multiplier")
    params = MetaParams(
        dim=_whole(file, values, "dim"),
        n_layers=_whole(file, values, "n_layers"),
        n_heads=heads,
        n_kv_heads=_optional(file, values, "n_kv_heads") or heads,
        norm_eps=_number(file, values, "norm_eps"),
        rope_theta=_number(file, {"rope_theta": 10000.0, **values}, "rope_theta"),
        vocab_size=None if vocabulary == -1 else _whole(file, values, "vocab_size"),
        max_seq_len=_optional(file, values, "max_seq_len"),
        multiple_of=_optional(file, values, "multiple_of"),
        ffn_dim_multiplier=None if scale is None else _number(file, values, "ffn_dim_multiplier"),
    )
    if params.dim % (2 * heads):
        raise ValueError(f"{file}: dim {params.dim} is not an even multiple of n_heads {heads}")
    if heads % params.n_kv_heads:
        raise ValueError(
            f"{file}: n_heads {heads} is not a multiple of n_kv_heads {params.n_kv_heads}"
        )
    return params


def _optional(file: Path, values: dict[str, Any], key: str) -> int | None:
    """The whole number of a key that may be missing or null."""
    return None if values.get(key) is None else _whole(file, values, key)


def _whole(file: Path, values: dict[str, Any], key: str) -> int:
    value = _number(file, values, key)
    if value != int(value):
        raise ValueError(f"{file}: {key} must be a whole number, not {value}")
    return int(value)


def _number(file: Path, values: dict[str, Any], key: str) -> float:
    if key not in values:
        raise ValueError(f"{file}: no {key}")
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{file}: {key} must be a number above 0, not {value!r}")
    return value


@torch.no_grad()
def reference_logits(params: MetaParams, weight: Weight, tokens: Tensor) -> Tensor:
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
