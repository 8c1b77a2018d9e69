"""params.json of Meta's checkpoint, read and checked. Files of tensors: `meta_shards.py`."""

import json
import math
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from chatllama.importing.reference import (
    HIGH_FREQ_FACTOR,
    LOW_FREQ_FACTOR,
    Shape,
    llama3_divisor,
    rope_speeds,
)
from chatllama.runtime.json_files import refuse_pointer

IGNORED = "max_batch_size"
"""Key of the training job, not of the model."""
ASSUMED_POSITIONS = 2048
_ORIGINAL_POSITIONS = 8192
"""Of Llama 3, before its rotary embedding was scaled."""
_FACTORS = {"untied": 8.0, "tied": 32.0}
"""Of that scaling: Llama 3.1 and 3.3 have an LM head, Llama 3.2 1B and 3B share the embedding."""


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
    use_scaled_rope: bool = False
    """Llama 3.1 and later."""
    rope_scaling_factor: float | None = None
    """None: that of the published models."""

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.dim // self.n_heads

    def shape(self, tied: bool) -> Shape:
        """The same for the arithmetic that checks an import."""
        speeds = rope_speeds(self.rope_theta, self.head_dim)
        if self.use_scaled_rope:
            speeds = speeds / llama3_divisor(self.rope(tied), speeds)
        heads = self.n_heads, self.n_kv_heads
        return Shape(self.n_layers, *heads, self.norm_eps, speeds, tied=tied)

    def rope(self, tied: bool) -> dict[str, Any]:
        """Transformers' rope_parameters."""
        if not self.use_scaled_rope:
            return {"rope_type": "default", "rope_theta": self.rope_theta}
        return {
            "rope_type": "llama3",
            "rope_theta": self.rope_theta,
            "factor": self.rope_scaling_factor or _FACTORS["tied" if tied else "untied"],
            "low_freq_factor": LOW_FREQ_FACTOR,
            "high_freq_factor": HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": _ORIGINAL_POSITIONS,
        }

    def assumed_positions(self, is_llama3: bool) -> int:
        """Longest text in tokens, which Meta's own files do not say."""
        if not is_llama3:
            return ASSUMED_POSITIONS
        return 16 * _ORIGINAL_POSITIONS if self.use_scaled_rope else _ORIGINAL_POSITIONS

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
    refuse_pointer(file)
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object")
    known = [each.name for each in fields(MetaParams)]
    if unknown := sorted(set(values) - {*known, IGNORED}):
        raise ValueError(
            f"{file}: unknown keys {', '.join(unknown)}; LLaMA-1 to Llama 3.3 have "
            f"{', '.join(known)}. For other models take the Hugging Face folder"
        )
    if not isinstance(scaled := values.get("use_scaled_rope", False), bool):
        raise ValueError(f"{file}: use_scaled_rope must be true or false, not {scaled!r}")
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
        use_scaled_rope=scaled,
        rope_scaling_factor=number("rope_scaling_factor", optional=True),
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
