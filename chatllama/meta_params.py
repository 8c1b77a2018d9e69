"""What Meta's params.json says of a LLaMA, checked; and the sizes that follow from it.

No tensors are read here: see `meta_shards.py`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
