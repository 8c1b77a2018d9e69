"""A last decoder layer that computes only the positions whose state is read.

A prompt's tokens act on a response through their keys and values alone, and a reward reads a single
position. With few layers, or long prompts, the other queries and feed-forward passes are a sizeable
share of the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import rotate_half

from chatllama.model.families import family_of, window


@dataclass(frozen=True)
class Wanted:
    """Positions that are read, in rows laid end to end."""

    places: Tensor
    """(N,) int64, rising."""
    counts: Sequence[int]
    """How many of each row; they sum to N."""
    lengths: Sequence[int]
    """Tokens of each row."""


class LastLayer(GradientCheckpointingLayer):
    """Before a decoder layer's class of transformers; with `wanted`, (B, T, H) -> (1, N, H)."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(
        self, hidden_states: Tensor, *args: Any, wanted: Wanted | None = None, **kwargs: Any
    ) -> Tensor:
        """The layer's output, everywhere or where it is wanted."""
        if wanted is None:
            return super().forward(hidden_states, *args, **kwargs)
        cosines, sines = (x.flatten(0, 1) for x in kwargs["position_embeddings"])
        normed = self.input_layernorm(hidden_states).flatten(0, 1)
        attended = self._attended(normed, wanted, cosines, sines)
        states = hidden_states.flatten(0, 1)[wanted.places][None] + attended
        return states + self.mlp(self.post_attention_layernorm(states))

    def _attended(self, normed: Tensor, wanted: Wanted, cosines: Tensor, sines: Tensor) -> Tensor:
        """What attention adds to the wanted positions: (1, N, H).

        Args:
            normed: (B * T, H).
            cosines: (B * T, D) of the rotary embedding, as `sines`.
            sines: see `cosines`.
        """
        layer, places = self.self_attn, wanted.places
        width = layer.head_dim
        query, key, value = (
            part.view(len(part), part.shape[1] // width, width).transpose(0, 1)[None]
            for part in (layer.q_proj(normed[places]), layer.k_proj(normed), layer.v_proj(normed))
        )
        if family_of(layer.config).head_norms:
            query, key = layer.q_norm(query), layer.k_norm(key)
        query = query * cosines[places] + rotate_half(query) * sines[places]
        key = key * cosines + rotate_half(key) * sines
        outputs, start = [query.new_empty(1, 0, *query.shape[1::2])], 0
        counts, lengths = list(wanted.counts), list(wanted.lengths)
        back = window(layer.config, layer.layer_idx) or max(lengths)
        queries, own_places = query.split(counts, dim=2), places.split(counts)
        keys, values = (x.split(lengths, dim=2) for x in (key, value))
        for q, k, v, own in zip(queries, keys, values, own_places, strict=True):
            columns = torch.arange(start, start + k.shape[2], device=own.device)
            start += k.shape[2]
            if len(own):
                sees = (columns <= own[:, None]) & (columns > own[:, None] - back)
                sees = sees[None, None]
                output, _ = sdpa_attention_forward(layer, q, k, v, sees, scaling=layer.scaling)
                outputs.append(output)
        return layer.o_proj(torch.cat(outputs, dim=1).flatten(2))


def trim_last_layer(llama: LlamaForCausalLM) -> None:
    """Makes a model take `wanted` (with the `sdpa` kernel only)."""
    layer = cast(Any, llama.model.layers[-1])
    layer.__class__ = type("LastLayer", (LastLayer, type(layer)), {})
