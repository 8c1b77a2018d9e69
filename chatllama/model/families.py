"""Model families: which are trained here, and what the others have that is missing.

A Mistral is LLaMA's graph under the same names of tensors, but for a window beyond which it does
not look back. Within that window it is loaded as a LLaMA, and longer texts count as too long.
"""

import sys
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from chatllama.runtime.distributed import rank

MISSING = {
    "qwen2": "biases of queries, keys and values alone",
    "qwen3": "norms of queries and keys",
    "mixtral": "a mixture of experts",
    "phi3": "queries, keys and values in one matrix",
    "gemma": "norms and embeddings of other scales",
    "gemma2": "norms and embeddings of other scales",
    "gemma3_text": "norms and embeddings of other scales",
    "smollm3": "layers without rotary embedding",
}
"""model_type in config.json -> what its graph has that is not computed here."""
_WINDOW = "sliding_window"


def as_llama(config: PreTrainedConfig, path: str) -> LlamaConfig:
    """The config of the LLaMA with the same graph.

    Raises:
        ValueError: another family, by name, with what is missing for it.
    """
    if isinstance(config, LlamaConfig):
        return config
    if config.model_type == "mistral":
        return _mistral(config)
    kind = config.model_type
    reason = f": it has {MISSING[kind]}" if kind in MISSING else ""
    raise ValueError(
        f"backbone.path: {path!r} is a {kind!r} model, not a LLaMA (or Mistral){reason}"
    )


def _mistral(config: PreTrainedConfig) -> LlamaConfig:
    values: dict[str, Any] = config.to_dict()
    window = values.pop(_WINDOW, None)
    values.pop("model_type")
    positions = values["max_position_embeddings"]
    if window is not None and window < positions:
        values["max_position_embeddings"] = window
        if rank() == 0:
            print(
                f"backbone: a Mistral with a sliding window of {window} tokens: longer texts are "
                "refused or cut",
                file=sys.stderr,
            )
    return LlamaConfig.from_dict(values | {"architectures": ["LlamaForCausalLM"]})
