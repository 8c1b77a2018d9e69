"""The shape of a LLaMA-like model from its config.json: parameters, and the matrices LoRA adapts.

No weights are read, and nothing heavy is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chatllama.config.model import FromScratch, LoraSection
from chatllama.model.families import FAMILIES, Family, biased, head_dim


@dataclass(frozen=True)
class Matrix:
    """A linear layer inside a decoder layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements without the bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder of the LLaMA family, by the names of config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    biased: frozenset[str] = frozenset()
    """Matrices with a bias."""
    head_norms: bool = False
    """RMSNorm over each query and key head."""
    window: int | None = None
    """Tokens that layers look back over, where some do not see the whole text."""

    @property
    def query_width(self) -> int:
        """Numbers of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Numbers of all key heads together; values have as many."""
        return self.num_key_value_heads * self.head_dim

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The linear layers of one decoder layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        sizes = {
            "q_proj": (hidden, self.query_width),
            "k_proj": (hidden, self.key_width),
            "v_proj": (hidden, self.key_width),
            "o_proj": (self.query_width, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        return tuple(Matrix(name, *size, name in self.biased) for name, size in sizes.items())

    @property
    def linear_parameters(self) -> int:
        """Elements of all decoder layers' matrices, without biases: what quantisation packs."""
        return self.num_hidden_layers * sum(matrix.weights for matrix in self.matrices)

    @property
    def vector_parameters(self) -> int:
        """Elements of norms and biases."""
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.head_norms
        biases = sum(matrix.outputs for matrix in self.matrices if matrix.bias)
        return self.num_hidden_layers * (norms + biases) + self.hidden_size

    @property
    def table_parameters(self) -> int:
        """Elements of the embedding, and of the LM head where it is no view of the embedding."""
        return (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters of the causal model."""
        return self.linear_parameters + self.vector_parameters + self.table_parameters

    def adapted(self, lora: LoraSection) -> tuple[Matrix, ...]:
        """The matrices of one decoder layer that get an adapter.

        Raises:
            ValueError: a name that no matrix has.
        """
        if lora.target_modules == "all-linear":
            return self.matrices
        names = [matrix.name for matrix in self.matrices]
        for name in lora.target_modules:
            if name not in names:
                raise ValueError(
                    f"lora.target_modules: {name!r} is no linear layer of a decoder layer; there "
                    f"are {', '.join(names)}"
                )
        return tuple(matrix for matrix in self.matrices if matrix.name in lora.target_modules)

    def adapter_parameters(self, lora: LoraSection) -> int:
        """Elements of A and B of one adapter."""
        per_layer = sum(m.inputs + m.outputs for m in self.adapted(lora))
        return self.num_hidden_layers * lora.r * per_layer


def read_shape(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape that a config.json describes.

    Args:
        where: names the file in errors.

    Raises:
        ValueError: not of the LLaMA family, or a size is missing or no positive integer.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{where}: model_type {kind!r} has no plan; planned are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {key} must be a positive integer, not {value!r}")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", head_dim(family, {**config, "head_dim": None})),
        vocab_size=size("vocab_size"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        biased=biased(family, config),
        head_norms=family.head_norms,
        window=size("sliding_window") if _has_window(family, config) else None,
    )


def _has_window(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether layers look back over `sliding_window` tokens only, by the keys of config.json."""
    if not family.windows or config.get("sliding_window") is None:
        return False
    types = config.get("layer_types")
    if types is not None:
        return "sliding_attention" in types
    return family.name == "mistral" or bool(config.get("use_sliding_window"))


def from_scratch_shape(section: FromScratch) -> ModelShape:
    """Shape of the LLaMA that `backbone.from_scratch` makes."""
    return ModelShape(
        hidden_size=section.hidden_size,
        intermediate_size=section.intermediate_size,
        num_hidden_layers=section.num_layers,
        num_attention_heads=section.num_heads,
        num_key_value_heads=section.num_kv_heads,
        head_dim=section.hidden_size // section.num_heads,
        vocab_size=section.vocab_size,
        tie_word_embeddings=True,
    )
