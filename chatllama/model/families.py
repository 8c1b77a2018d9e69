"""Model families: which are trained here, what each has apart, and what the others have.

All of them are LLaMA's graph, in transformers' own classes. These name their modules alike, so that
annotations say LlamaForCausalLM and LlamaConfig throughout and stand for every family. What a layer
computes otherwise is asked of this table. Imports nothing heavy: `chatllama plan` reads it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """What a family has apart from the others."""

    name: str
    """`model_type` in config.json, and of its module in transformers."""
    classes: str
    """What its classes' names in transformers begin with."""
    gguf: str
    """llama.cpp's name of the architecture. Only in its llama rows of queries and keys are in
    Meta's order, frequencies have divisors, and so a window is not computed."""
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Key of config.json -> the matrices that have a bias where it is true."""
    biased: tuple[str, ...] = ()
    """Matrices that always have one."""
    head_norms: bool = False
    """RMSNorm over each query and key head, before it is rotated."""
    head_dim: int | None = None
    """Where config.json has none. None: hidden_size over the heads."""
    windows: bool = False
    """Whether layers may look back over `sliding_window` tokens only."""


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "Llama", "llama", {"attention_bias": ATTENTION, "mlp_bias": MLP}),
        Family("mistral", "Mistral", "llama", windows=True),
        Family("qwen2", "Qwen2", "qwen2", biased=ATTENTION[:3], windows=True),
        Family("qwen3", "Qwen3", "qwen3", {"attention_bias": ATTENTION}, head_norms=True,
               head_dim=128, windows=True),
    )
}  # fmt: skip
MISSING = {
    "mixtral": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
    "qwen3_moe": "a mixture of experts",
    "phi3": "queries, keys and values in one matrix",
    "gemma": "norms and embeddings of other scales",
    "gemma2": "norms and embeddings of other scales",
    "gemma3_text": "norms and embeddings of other scales",
    "smollm3": "layers without rotary embedding",
}
"""model_type in config.json -> what its graph has that is not computed here."""


def find_family(kind: object) -> Family:
    """The family of a `model_type`; ValueError names another one, and what is missing for it."""
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    reason = f": it has {MISSING[kind]}" if isinstance(kind, str) and kind in MISSING else ""
    raise ValueError(f"a {kind!r} model, not one of {', '.join(FAMILIES)}{reason}")


def family_of(config: Any) -> Family:
    """The family of a config of transformers, or of one that code of a model derives from it."""
    kinds = [vars(kind).get("model_type") for kind in type(config).__mro__]
    return next((FAMILIES[k] for k in kinds if k in FAMILIES), None) or find_family(kinds[0])


def family_class(config: Any, part: str) -> type[Any]:
    """Transformers' own class of a part, such as RMSNorm or ForCausalLM."""
    family = family_of(config)
    module = import_module(f"transformers.models.{family.name}.modeling_{family.name}")
    return vars(module)[family.classes + part]


def biased(family: Family, values: Mapping[str, Any]) -> frozenset[str]:
    """Names of the matrices that have a bias, by the keys of config.json."""
    named = [names for key, names in family.bias_keys.items() if values.get(key)]
    return frozenset(family.biased).union(*named)


def head_dim(family: Family, values: Mapping[str, Any]) -> int:
    """Numbers of an attention head, by the keys of config.json."""
    width = max(1, values["hidden_size"] // values["num_attention_heads"])
    return values.get("head_dim") or family.head_dim or width


def window(config: Any, layer: int) -> int | None:
    """Tokens that a layer looks back over, its own included; None: all of them.

    Args:
        config: of transformers, which fills in what config.json leaves out.
        layer: number, from 0.
    """
    if not family_of(config).windows:
        return None
    types = vars(config).get("layer_types")  # Mistral has none: all layers are alike
    return config.sliding_window if not types or types[layer] == "sliding_attention" else None


def smallest_window(config: Any) -> int | None:
    """The smallest of all layers that is shorter than the longest text; None: there is none."""
    windows = [window(config, layer) for layer in range(config.num_hidden_layers)]
    return min((w for w in windows if w and w < config.max_position_embeddings), default=None)
