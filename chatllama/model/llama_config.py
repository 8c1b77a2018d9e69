"""A model's config.json, held against bounds and its weights' headers before memory is allocated.

The weights are loaded in `backbone.py`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from chatllama.model.families import FAMILIES, biased, family_of, find_family, head_dim
from chatllama.model.safetensors_header import TensorEntry, model_files, read_header
from chatllama.runtime.json_files import read_json

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import LlamaConfig

_Width = Annotated[int, Field(ge=1, le=2**20)]
_Count = Annotated[int, Field(ge=1, le=2**16)]
_Id = Annotated[int, Field(ge=-1, lt=2**31)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LlamaFile(TypedDict, total=False):
    """Keys of config.json that a model is built from; others are let through."""

    model_type: str
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    hidden_size: _Width
    intermediate_size: _Width
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count | None
    head_dim: _Width | None
    max_position_embeddings: Annotated[int, Field(ge=1, lt=2**31)]
    sliding_window: Annotated[int, Field(ge=1, lt=2**31)] | None
    use_sliding_window: bool
    max_window_layers: Annotated[int, Field(ge=0, lt=2**31)]
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None
    hidden_act: str
    rms_norm_eps: Annotated[float, Field(ge=0, le=1)]
    initializer_range: Annotated[float, Field(ge=0, le=10)]
    attention_dropout: Annotated[float, Field(ge=0, le=1)]
    rope_theta: _Positive | None
    rope_scaling: dict[str, Any] | None
    rope_parameters: dict[str, Any] | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    use_cache: bool
    pad_token_id: _Id | None
    bos_token_id: _Id | list[_Id] | None
    eos_token_id: _Id | list[_Id] | None
    quantization_config: dict[str, Any] | None
    auto_map: dict[str, Any] | None
    architectures: list[str] | None


ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""Rotary embeddings that are the same for every text; `dynamic` up to the model's positions."""
ELSEWHERE = ("transformers_weights", "adapter_config.json")
"""A key and a file by which transformers would take the weights from another place."""


def check_model_folder(folder: Path) -> dict[str, Any]:
    """The values of config.json; empty without one.

    One of another architecture is let through: `check_trainable` names it.

    Raises:
        ValueError: a JSON file of the model is damaged, or has weights loaded from elsewhere.
    """
    key, file = ELSEWHERE
    config = folder / "config.json"
    values: dict[str, Any] = {}
    if config.is_file():
        values = read_json(config)
        if values.get("model_type", "llama") in FAMILIES or "auto_map" in values:
            read_json(config, LlamaFile)
        if values.get(key) is not None:
            raise ValueError(f"{config}: {key} is not read here; remove it")
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    if (folder / file).is_file():
        raise ValueError(
            f"{folder} holds an {file}, so it is an adapter and not a whole model: give the base "
            "that it names"
        )
    return values


def check_trainable(path: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError if a config.json is of no model that is trained here.

    Args:
        path: the model's, for the message.
    """
    try:
        if "model_type" in values and "auto_map" not in values:  # own code may derive from ours
            find_family(values["model_type"])
    except ValueError as error:
        raise ValueError(
            f"backbone.path: {path!r} cannot be loaded: config.json: {error}"
        ) from error
    method = (values.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "bitsandbytes"):
        wrong = f"backbone.path: {path!r} is quantised by {method} (config.json) and cannot be"
        remedy = "take the unquantised model; backbone.quantization quantises it"
        raise ValueError(f"{wrong} trained here: {remedy}")


def check_weights(llama: "LlamaConfig", folder: Path) -> None:
    """Raises ValueError if the tensors in the folder are not those that the config describes.

    Reads headers only. Folders without safetensors files are let through, and quantised weights,
    whose shapes are their library's.
    """
    check_architecture(llama, folder / "config.json")
    entries: dict[str, TensorEntry] = {}
    for file in model_files(folder):
        entries |= read_header(file)
    if not entries:
        return
    # Weights of a bare LlamaModel lack the prefix.
    bare = not any(name.startswith("model.") for name in entries)
    found = {f"model.{n}" if bare and n != "lm_head.weight" else n: entries[n] for n in entries}
    numbers = {n.split(".")[2] for n in found if n.startswith("model.layers.")}
    layers = 1 + max((int(n) for n in numbers if n.isascii() and n.isdigit()), default=-1)
    if layers < llama.num_hidden_layers:
        raise ValueError(
            f"{folder}: config.json says num_hidden_layers {llama.num_hidden_layers}, and the "
            f"weights have {layers}: they do not belong together"
        )
    if getattr(llama, "quantization_config", None):
        return
    missing = []
    for name, shape in tensor_shapes(llama):
        if name not in found:
            missing.append(name)
        elif found[name].shape != shape:
            raise ValueError(
                f"{folder}: {name} has shape {found[name].shape}, but by config.json it should "
                f"have {shape}: they do not belong together"
            )
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the model's tensors, such as {missing[0]}; they "
            "would be random numbers"
        )


def check_architecture(llama: "LlamaConfig", where: Path) -> None:
    """Raises ValueError for numbers of which no LLaMA can be built."""
    from transformers.activations import ACT2FN
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    heads, groups, width = _heads(llama)
    if llama.hidden_act not in ACT2FN:
        raise ValueError(f"{where}: hidden_act {llama.hidden_act!r} is no activation that is known")
    if heads % groups:
        raise ValueError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
        )
    kind = (llama.rope_parameters or {}).get("rope_type", "default")
    if kind not in ROPES:
        known = ", ".join(ROPES)
        raise ValueError(
            f"{where}: rope_parameters: rope_type {kind!r} is not computed here; {known} are"
        )
    pad = llama.pad_token_id
    if pad is not None and not -llama.vocab_size <= pad < llama.vocab_size:
        raise ValueError(f"{where}: pad_token_id {pad}, and the vocabulary has {llama.vocab_size}")
    try:
        rotary: Any = LlamaRotaryEmbedding(llama)
        sound = rotary.inv_freq.isfinite().all() and len(rotary.inv_freq) == width // 2
    except Exception as error:
        raise ValueError(f"{where}: rope_parameters cannot be used: {error!r}") from error
    if not sound:
        raise ValueError(f"{where}: rope_parameters give no frequency to each pair of a head")


def _heads(llama: "LlamaConfig") -> tuple[int, int, int]:
    """Query heads, key heads and the width of one; the config fills in what is left out."""
    assert llama.num_key_value_heads is not None
    width = head_dim(family_of(llama), llama.to_dict())
    return llama.num_attention_heads, llama.num_key_value_heads, width


def tensor_shapes(llama: "LlamaConfig") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a checkpoint of this model must hold."""
    hidden, inner = llama.hidden_size, llama.intermediate_size
    heads, groups, width = _heads(llama)
    queries, keys = heads * width, groups * width
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
                 "o_proj": (hidden, queries)}  # fmt: skip
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    family = family_of(llama)
    with_bias = biased(family, llama.to_dict())
    yield "model.embed_tokens.weight", (llama.vocab_size, hidden)
    for layer in range(llama.num_hidden_layers):
        for block, matrices in (("self_attn", attention), ("mlp", mlp)):
            for name, shape in matrices.items():
                yield f"model.layers.{layer}.{block}.{name}.weight", shape
                if name in with_bias:
                    yield f"model.layers.{layer}.{block}.{name}.bias", shape[:1]
        for norm in ("q_norm", "k_norm") if family.head_norms else ():
            yield f"model.layers.{layer}.self_attn.{norm}.weight", (width,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not llama.tie_word_embeddings:
        yield "lm_head.weight", (llama.vocab_size, hidden)
