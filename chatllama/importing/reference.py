"""Meta's LLaMA in plain float32 torch, which an import is checked against.

It reads one tensor at a time and keeps none. Rotations are complex numbers on neighbouring
channels, as Meta trained them and GGUF files keep them; Hugging Face rotates halves, so an import
reorders rows.

Sources: LLaMA (arXiv 2302.13971), LLaMA-2 (arXiv 2307.09288), RoPE (arXiv 2104.09864). T tokens,
D channels, H heads, K key-value heads, C channels a head, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1.0, 4.0
"""Of LLaMA-3.1's scaling in all that Meta has published; neither params.json nor GGUF name them."""
Weight = Callable[[str], Tensor]
"""Name -> whole tensor in Meta's order, float32."""


@dataclass(frozen=True)
class Shape:
    """What the arithmetic must know beside the weights."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    speeds: Tensor
    """(C / 2,) float32, radians by which each pair of channels turns a position."""
    stretch: float = 1.0
    """Length of a rotated channel pair over its length before: YaRN's attention factor."""
    biases: frozenset[str] = frozenset()
    """Names of the biases, where layers have them."""
    tied: bool = False
    """The embedding is the output matrix, too."""
    head_norms: bool = False
    """Query and key heads are normed before they are rotated (Qwen3)."""

    def rotated_heads(self, name: str) -> int | None:
        """Heads whose channels are rows of a tensor and are rotated; None: of no such tensor."""
        heads = {"wq": self.n_heads, "wk": self.n_kv_heads, "q_norm": 1, "k_norm": 1}
        return heads.get(name.split(".")[-2])

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return 2 * len(self.speeds)


def rope_speeds(theta: float, head_dim: int) -> Tensor:
    """(C / 2,) float32: channel pair i turns by theta^(-2i / C) radians a position."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def llama3_divisor(rope: Mapping[str, Any], speeds: Tensor) -> Tensor:
    """(C / 2,) float32: how much LLaMA-3.1 slows down each of its speeds (`apply_scaling`).

    Args:
        rope: under the names of transformers' rope_parameters.
    """
    ratio = rope["original_max_position_embeddings"] * speeds / (2 * torch.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((ratio - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def yarn_speeds(rope: Mapping[str, Any], speeds: Tensor) -> Tensor:
    """(C / 2,) float32: YaRN's speeds; slow ones are divided by the factor, fast ones stay.

    Source: arXiv 2309.00071, section 3.2; bounds rounded outwards as in its code and llama.cpp.

    Args:
        rope: under the names of transformers' rope_parameters, all of them given.
    """

    def pair(turns: float) -> float:
        """Which pair of channels turns so often within the original length."""
        length = rope["original_max_position_embeddings"] / (2 * math.pi * turns)
        return len(speeds) * math.log(length) / math.log(rope["rope_theta"])

    low = max(math.floor(pair(rope["beta_fast"])), 0)
    high = min(math.ceil(pair(rope["beta_slow"])), 2 * len(speeds) - 1)
    slow = ((torch.arange(len(speeds)) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return speeds * (1 - slow) + speeds / rope["factor"] * slow


@torch.no_grad()
def reference_logits(shape: Shape, weight: Weight, tokens: Tensor) -> Tensor:
    """Logits (T, V) float32 after every one of the `tokens` (T,) int64."""
    turns = shape.stretch * rotations(shape.speeds, len(tokens))
    hidden = weight("tok_embeddings.weight")[tokens]
    for layer in range(shape.n_layers):
        prefix = f"layers.{layer}."
        mlp = f"{prefix}feed_forward."
        normed = rms_norm(hidden, weight(prefix + "attention_norm.weight"), shape.norm_eps)
        hidden = hidden + attention(shape, weight, prefix + "attention.", normed, turns)
        normed = rms_norm(hidden, weight(prefix + "ffn_norm.weight"), shape.norm_eps)
        gate = silu(linear(shape, weight, mlp + "w1", normed))
        wide = gate * linear(shape, weight, mlp + "w3", normed)
        hidden = hidden + linear(shape, weight, mlp + "w2", wide)
    output = "tok_embeddings.weight" if shape.tied else "output.weight"
    return rms_norm(hidden, weight("norm.weight"), shape.norm_eps) @ weight(output).T


def rms_norm(hidden: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`hidden` (T, D) with root mean square 1 along D, times `scale` (D,)."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * scale


def linear(shape: Shape, weight: Weight, name: str, hidden: Tensor) -> Tensor:
    """One linear layer on `hidden` (T, in), with its bias where it has one."""
    result = hidden @ weight(f"{name}.weight").T
    return result + weight(f"{name}.bias") if f"{name}.bias" in shape.biases else result


def rotations(speeds: Tensor, length: int) -> Tensor:
    """Unit complex numbers (T, C / 2), from radians a position (C / 2,)."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), speeds)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """`heads` (T, H, C) with channels 2i and 2i + 1 turned as one complex number."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def attention(shape: Shape, weight: Weight, prefix: str, hidden: Tensor, turns: Tensor) -> Tensor:
    """What causal attention adds to `hidden` (T, D)."""
    length, width = len(hidden), shape.head_dim
    queries, keys, values = (
        linear(shape, weight, f"{prefix}w{part}", hidden).view(length, -1, width) for part in "qkv"
    )
    if shape.head_norms:
        queries, keys = (
            rms_norm(heads, weight(f"{prefix}{part}_norm.weight"), shape.norm_eps)
            for part, heads in (("q", queries), ("k", keys))
        )
    shared = shape.n_heads // shape.n_kv_heads
    queries, keys = rotate(queries, turns), rotate(keys, turns).repeat_interleave(shared, dim=1)
    scores = torch.einsum("qhc,khc->hqk", queries, keys) / math.sqrt(width)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    mixed = torch.einsum("hqk,khc->qhc", weights, values.repeat_interleave(shared, dim=1))
    return linear(shape, weight, f"{prefix}wo", mixed.reshape(length, -1))
