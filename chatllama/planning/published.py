"""Shapes of published LLaMAs, by hub id, so that a plan needs neither the network nor a licence."""

from chatllama.planning.shape import ModelShape


def _shape(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    key_heads: int,
    vocabulary: int,
    *,
    head_dim: int | None = None,
    tied: bool = False,
) -> ModelShape:
    width = head_dim or hidden // heads
    return ModelShape(hidden, inner, layers, heads, key_heads, width, vocabulary, tied)


_7B = _shape(4096, 11008, 32, 32, 32, 32_000)
_13B = _shape(5120, 13824, 40, 40, 40, 32_000)
_70B = _shape(8192, 28672, 80, 64, 8, 32_000)
_3_8B = _shape(4096, 14336, 32, 32, 8, 128_256)
_3_70B = _shape(8192, 28672, 80, 64, 8, 128_256)

PUBLISHED: dict[str, ModelShape] = {
    "huggyllama/llama-7b": _7B,
    "huggyllama/llama-13b": _13B,
    "huggyllama/llama-30b": _shape(6656, 17920, 60, 52, 52, 32_000),
    "huggyllama/llama-65b": _shape(8192, 22016, 80, 64, 64, 32_000),
    "meta-llama/Llama-2-7b-hf": _7B,
    "meta-llama/Llama-2-13b-hf": _13B,
    "meta-llama/Llama-2-70b-hf": _70B,
    "meta-llama/Meta-Llama-3-8B": _3_8B,
    "meta-llama/Meta-Llama-3-70B": _3_70B,
    "meta-llama/Llama-3.1-8B": _3_8B,
    "meta-llama/Llama-3.1-70B": _3_70B,
    "meta-llama/Llama-3.1-405B": _shape(16384, 53248, 126, 128, 8, 128_256),
    "meta-llama/Llama-3.2-1B": _shape(2048, 8192, 16, 32, 8, 128_256, tied=True),
    "meta-llama/Llama-3.2-3B": _shape(3072, 8192, 28, 24, 8, 128_256, tied=True),
    "meta-llama/Llama-3.3-70B": _3_70B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _3_8B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _3_70B,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _shape(2048, 5632, 22, 32, 4, 32_000),
    "HuggingFaceTB/SmolLM2-135M": _shape(576, 1536, 30, 9, 3, 49_152, tied=True),
    "HuggingFaceTB/SmolLM2-360M": _shape(960, 2560, 32, 15, 5, 49_152, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B": _shape(2048, 8192, 24, 32, 32, 49_152, tied=True),
}


def published_shape(hub_id: str) -> ModelShape | None:
    """The shape of a published model or of its instruction-tuned sibling; None: not in the list."""
    lower = {name.lower(): shape for name, shape in PUBLISHED.items()}
    name = hub_id.lower()
    plain = name.removesuffix("-hf").removesuffix("-chat").removesuffix("-instruct")
    for known in (name, plain, f"{plain}-hf"):
        if known in lower:
            return lower[known]
    return None
