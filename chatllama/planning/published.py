"""Shapes of published models, by hub id, so that a plan needs neither the network nor a licence."""

from functools import partial

from chatllama.model.families import FAMILIES
from chatllama.planning.shape import ModelShape


def _shape(
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    key_heads: int,
    vocabulary: int,
    *,
    kind: str = "llama",
    tied: bool = False,
    window: int | None = None,
) -> ModelShape:
    family = FAMILIES[kind]
    width, biased = family.head_dim or hidden // heads, frozenset(family.biased)
    sizes = (hidden, inner, layers, heads, key_heads, width, vocabulary)
    return ModelShape(*sizes, tied, biased, family.head_norms, window)


_qwen2 = partial(_shape, kind="qwen2")
_qwen3 = partial(_shape, kind="qwen3")
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
    "mistralai/Mistral-7B-v0.1": _shape(
        4096, 14336, 32, 32, 8, 32_000, kind="mistral", window=4096
    ),
    "mistralai/Mistral-7B-v0.3": _shape(4096, 14336, 32, 32, 8, 32_768, kind="mistral"),
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, 151_936, tied=True),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, 151_936, tied=True),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 11008, 36, 16, 2, 151_936, tied=True),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, 152_064),
    "Qwen/Qwen2.5-14B": _qwen2(5120, 13824, 48, 40, 8, 152_064),
    "Qwen/Qwen2.5-32B": _qwen2(5120, 27648, 64, 40, 8, 152_064),
    "Qwen/Qwen2.5-72B": _qwen2(8192, 29568, 80, 64, 8, 152_064),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, 151_936, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, 8, 151_936, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, 8, 151_936, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, 8, 151_936),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, 8, 151_936),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, 8, 151_936),
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
