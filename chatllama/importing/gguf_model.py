"""The model in a GGUF file: its sizes, tensors and rotary embedding, all of them checked."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chatllama.importing.gguf_file import GgufFile
from chatllama.importing.hugging_face import Checkpoint, neighbours_together
from chatllama.importing.reference import (
    HIGH_FREQ_FACTOR,
    LOW_FREQ_FACTOR,
    Shape,
    llama3_divisor,
    rope_speeds,
    yarn_speeds,
)
from chatllama.model.families import FAMILIES, Family

_NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
"""llama.cpp's name of a tensor -> Meta's."""
_ATTENTION = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
_MLP = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_HEAD_NORMS = ("attention.q_norm", "attention.k_norm")
_FACTORS = "rope_freqs.weight"
FACTOR_TOLERANCE = 1e-3


def find_family(file: GgufFile) -> Family:
    """The file's family; ValueError for what is not a whole model of one."""
    own, kind = file.text("general.architecture"), file.text("general.type", "model")
    known = {family.gguf: FAMILIES[family.gguf] for family in FAMILIES.values()}
    for wrong, reason in (
        (own not in known, f"its architecture is {own!r}; {', '.join(known)} are imported"),
        (kind != "model", f"its general.type is {kind!r}, not model"),
        (file.metadata.get(f"{own}.expert_count"), "it has a mixture of experts"),
    ):
        if wrong:
            raise ValueError(f"{file.path}: {reason}")
    return known[str(own)]


def _key(file: GgufFile, name: str) -> str:
    """A key of the metadata, which begins with the architecture."""
    return f"{file.text('general.architecture')}.{name}"


def read_checkpoint(file: GgufFile, family: Family) -> Checkpoint:
    """The file's model under Meta's names; ValueError if one is missing, strange or misshapen."""
    number, own = file.number, family.gguf
    layers, dim = number(f"{own}.block_count"), number(f"{own}.embedding_length")
    heads = _uniform(file, f"{own}.attention.head_count")
    ffn = _uniform(file, f"{own}.feed_forward_length")
    kv_heads = _uniform(file, f"{own}.attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ValueError(f"{file.path}: {heads} attention heads, but {kv_heads} of keys and values")
    head_dim = number(f"{own}.attention.key_length", dim // heads)
    for key in (f"{own}.attention.value_length", f"{own}.rope.dimension_count"):
        if (found := number(key, head_dim)) != head_dim or head_dim % 2:
            raise ValueError(f"{file.path}: {key} is {found} with heads of {head_dim}")
    vocab = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0
    shapes: dict[str, tuple[int, ...]] = {
        "attention.wq": (heads * head_dim, dim),
        "attention.wk": (kv_heads * head_dim, dim),
        "attention.wv": (kv_heads * head_dim, dim),
        "attention.wo": (dim, heads * head_dim),
        "feed_forward.w1": (ffn, dim),
        "feed_forward.w2": (dim, ffn),
        "feed_forward.w3": (ffn, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    } | dict.fromkeys(_HEAD_NORMS if family.head_norms else (), (head_dim,))
    names = {_meta_name(name): name for name in file.tensors if name != _FACTORS}
    tied = "output.weight" not in names
    parts: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim)}
    biased = [
        group for group in (_ATTENTION, _MLP)
        if any(f"layers.0.{inner}.bias" in names for inner in group)
    ] if own == "llama" else [_ATTENTION[: len(family.biased)]]  # fmt: skip
    for layer in range(min(layers, len(file.tensors))):
        parts |= {f"layers.{layer}.{inner}.weight": shape for inner, shape in shapes.items()}
        for inner in (inner for group in biased for inner in group):
            parts[f"layers.{layer}.{inner}.bias"] = shapes[inner][:1]
    parts["norm.weight"] = (dim,)
    parts |= {} if tied else {"output.weight": (vocab, dim)}
    _check_tensors(file, names, parts)
    speeds, stretch = _rotation(file, head_dim)
    biases = frozenset(name for name in parts if name.endswith(".bias"))
    eps = number(f"{own}.attention.layer_norm_rms_epsilon", whole=False)
    shape = Shape(layers, heads, kv_heads, eps, speeds, stretch, biases, tied, family.head_norms)

    def tensor(name: str) -> Tensor:
        rows, num_heads = file.tensor(names[name]), shape.rotated_heads(name)
        if own == "llama" or num_heads is None:
            return rows
        return neighbours_together(rows, num_heads)

    return Checkpoint(shape, parts, tensor)


def _uniform(file: GgufFile, key: str, default: int | None = None) -> int:
    """The number at a key, which some files give for every layer; ValueError if layers differ."""
    value: Any = file.metadata.get(key)
    if isinstance(value, list):
        if not value or any(each != value[0] for each in value):
            raise ValueError(f"{file.path}: {key} differs from layer to layer")
        file.metadata[key] = value[0]
    return file.number(key, default)


def _meta_name(name: str) -> str:
    """Meta's name of a tensor; the name itself if it has none."""
    inner, _, kind = name.rpartition(".")
    if not name.startswith("blk."):
        return f"{_NAMES.get(inner, inner)}.{kind}"
    _, layer, inner = [*inner.split(".", 2), "", ""][:3]
    return f"layers.{layer}.{_NAMES.get(inner, inner)}.{kind}"


def _check_tensors(
    file: GgufFile, names: dict[str, str], parts: dict[str, tuple[int, ...]]
) -> None:
    """Raises ValueError unless the file holds exactly these tensors, in these shapes."""
    if missing := [name for name in parts if name not in names]:
        raise ValueError(
            f"{file.path}: {len(missing)} tensors of the model are missing, such as {missing[0]} "
            "(Meta's name)"
        )
    if extra := [names[name] for name in names if name not in parts]:
        raise ValueError(
            f"{file.path}: {len(extra)} tensors that the model has no place for, such as {extra[0]}"
        )
    for name, shape in parts.items():
        if (found := file.tensors[names[name]].shape) != shape:
            raise ValueError(f"{file.path}: {names[name]} has shape {found}, expected {shape}")


def _theta(file: GgufFile) -> float:
    return float(file.number(_key(file, "rope.freq_base"), 10000.0, whole=False))


def _scaling(file: GgufFile) -> str:
    """The kind of rope scaling; ValueError for another kind than is imported."""
    kind = file.text(_key(file, "rope.scaling.type"), "none")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{file.path}: {_key(file, 'rope.scaling.type')} {kind!r} is not imported; none, "
            "linear, yarn and LLaMA-3.1's are"
        )
    return kind


def _rotation(file: GgufFile, head_dim: int) -> tuple[Tensor, float]:
    """Radians a position (C / 2,), and by how much rotated pairs of channels are stretched."""
    speeds = rope_speeds(_theta(file), head_dim)
    if _scaling(file) == "yarn":
        rope = _yarn(file)
        return yarn_speeds(rope, speeds), rope["attention_factor"]
    return speeds / _rope_divisor(file, head_dim), 1.0


def _yarn(file: GgufFile) -> dict[str, Any]:
    """Transformers' rope_parameters for yarn; ValueError for what they do not have."""
    prefix = _key(file, "rope.scaling.")
    number = partial(file.number, whole=False)
    for key, usual in (("yarn_log_multiplier", 0), ("yarn_ext_factor", 1), ("yarn_attn_factor", 1)):
        if (found := file.metadata.get(prefix + key, usual)) != usual:
            raise ValueError(f"{file.path}: {prefix}{key} {found} is not imported; {usual} is")
    if _FACTORS in file.tensors:
        raise ValueError(f"{file.path}: {_FACTORS} beside {prefix}type yarn is not imported")
    factor = float(number(f"{prefix}factor"))
    context = file.number(_key(file, "context_length"))
    return {
        "rope_type": "yarn",
        "rope_theta": _theta(file),
        "factor": factor,
        "original_max_position_embeddings": file.number(
            f"{prefix}original_context_length", context
        ),
        "beta_fast": float(number(f"{prefix}yarn_beta_fast", 32.0)),
        "beta_slow": float(number(f"{prefix}yarn_beta_slow", 1.0)),
        "attention_factor": float(number(f"{prefix}attn_factor", 1.0))
        * (1 + 0.1 * math.log(factor)),
    }


def _rope_divisor(file: GgufFile, head_dim: int) -> Tensor:
    """What each rotation frequency is divided by: (C / 2,) or () float32."""
    if _FACTORS in file.tensors:
        if (found := file.tensors[_FACTORS].shape) != (head_dim // 2,):
            raise ValueError(f"{file.path}: {_FACTORS} has shape {found} with heads of {head_dim}")
        return file.tensor(_FACTORS)
    linear = _scaling(file) == "linear"
    key = _key(file, "rope.scaling.factor" if linear else "rope.scale_linear")
    return torch.tensor(file.number(key, 1.0, whole=False))


def rope_parameters(file: GgufFile, shape: Shape) -> dict[str, Any]:
    """Transformers' rope_parameters, whose frequencies are those of the file.

    Raises:
        ValueError: another kind of scaling than linear, yarn and LLaMA-3.1's.
    """
    theta = _theta(file)
    if _scaling(file) == "yarn":
        return _yarn(file)
    plain = {"rope_type": "default", "rope_theta": theta}
    divisor = _rope_divisor(file, shape.head_dim)
    if divisor.dim() == 0:
        factor = float(divisor)
        return plain if factor == 1 else {**plain, "rope_type": "linear", "factor": factor}
    if bool((divisor == 1).all()):
        return plain
    speeds = rope_speeds(theta, shape.head_dim)
    context, length = file.number(_key(file, "context_length")), 2
    while length <= context:
        found = {
            **plain,
            "rope_type": "llama3",
            "factor": round(float(divisor.max()), 3),
            "low_freq_factor": LOW_FREQ_FACTOR,
            "high_freq_factor": HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": length,
        }
        if torch.allclose(llama3_divisor(found, speeds), divisor, rtol=FACTOR_TOLERANCE):
            return found
        length *= 2
    raise ValueError(
        f"{file.path}: {_FACTORS} are not those of LLaMA-3.1's scaling (low_freq_factor "
        f"{LOW_FREQ_FACTOR:g}, high_freq_factor {HIGH_FREQ_FACTOR:g}) at any original length"
    )
