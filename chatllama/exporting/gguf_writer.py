"""A model and its adapter as GGUF files, for llama.cpp and Ollama. Needs the extra `gguf`.

Names and metadata are those of llama.cpp's architecture of the family. In its `llama`, rows of
queries and keys are in Meta's order: channels 2i and 2i + 1 of a head rotate together.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.model.adapters import SavedAdapter
from chatllama.model.families import biased, family_of, head_dim, smallest_window
from chatllama.model.weight_files import ModelFiles, cast_to, dtype_name
from chatllama.text.byte_level import SPLITS, split_name
from chatllama.text.chat_format import end_of_turn_ids
from chatllama.text.encoding import adds_bos, control_tokens
from chatllama.text.sentencepiece_bpe import read_model

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from gguf.tensor_mapping import TensorNameMap

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_Tensor = tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]
"""Shape, type as written, and a function that reads it."""
_ROPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""dynamic scaling begins beyond the context length."""
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""What llama.cpp computes whatever the file says: it takes the betas from its command line."""


def check_gguf(config: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError if the extra is missing, or llama.cpp does not support the model."""
    _package()
    kind = cast(dict[str, Any], config.rope_parameters).get("rope_type", "default")
    family = family_of(config)
    ropes = _ROPES if family.gguf == "llama" else _ROPES[:-1]
    if kind not in ropes:
        raise ValueError(f"GGUF: rope_type {kind!r} is not written; {', '.join(ropes)} are")
    if kind == "yarn":
        _check_yarn(cast(dict[str, Any], config.rope_parameters))
    if family.gguf != "llama" and biased(family, config.to_dict()) != set(family.biased):
        raise ValueError(f"GGUF: attention_bias, which llama.cpp's {family.gguf} does not have")
    if _sentencepiece(tokenizer) is None and _split(tokenizer) is None:
        raise ValueError(
            f"GGUF: a tokenizer that is neither a SentencePiece model nor byte-level BPE that "
            f"splits text as one of {', '.join(SPLITS)}; llama.cpp would split it in other ways. "
            "If the base has a tokenizer.model, put it beside the base's files"
        )


def _check_yarn(rope: dict[str, Any]) -> None:
    for key, usual in _YARN.items():
        if (value := rope.get(key, usual)) not in (usual, None):
            raise ValueError(f"GGUF: yarn with {key} {value}; llama.cpp computes {usual}")


def write_model_gguf(
    path: Path,
    files: ModelFiles,
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatSection,
    template: str,
    name: str,
) -> None:
    """Writes a merged model that `check_gguf` has passed, with tokenizer and Jinja chat template.

    Norms are in float32.
    """
    gguf, writer, names = _open(path, "model", name, config)
    _add_shape(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    writer.add_chat_template(template)
    stops = end_of_turn_ids(tokenizer, chat)
    writer.add_eos_token_id(stops[-1])
    if stops[0] != stops[-1]:
        writer.add_eot_token_id(stops[0])
    tensors: dict[str, _Tensor] = {}
    for own, shape in files.shapes.items():
        if own.endswith("rotary_emb.inv_freq"):
            continue
        dtype = torch.float32 if len(shape) == 1 else files.dtypes[own]
        read = partial(_read, files, own, config)
        tensors[gguf_name(names, own)] = (shape, dtype, read)
    if config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    if (factors := _rope_factors(config)) is not None:
        tensors["rope_freqs.weight"] = (tuple(factors.shape), torch.float32, lambda: factors)
    types = {
        torch.float32: gguf.LlamaFileType.ALL_F32,
        torch.float16: gguf.LlamaFileType.MOSTLY_F16,
        torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    }
    writer.add_file_type(types[files.dtypes["model.embed_tokens.weight"]])
    _write(writer, tensors)


def write_adapter_gguf(path: Path, adapter: SavedAdapter, config: LlamaConfig, name: str) -> None:
    """Writes a LoRA adapter that llama.cpp adds to a GGUF of the base when it starts."""
    gguf, writer, names = _open(path, "adapter", name, config)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.lora.alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tensors: dict[str, _Tensor] = {}
    for own, tensor in adapter.state.items():
        place, _, part = own.removeprefix("base_model.model.").rpartition(".lora_")
        target = f"{gguf_name(names, f'{place}.weight')}.lora_{part[0].lower()}"
        value = interleaved(tensor, place, config) if part.startswith("B") else tensor
        tensors[target] = (tuple(value.shape), torch.float32, lambda value=value: value)
    _write(writer, tensors)


def _open(
    path: Path, kind: str, name: str, config: LlamaConfig
) -> tuple[Any, "GGUFWriter", "TensorNameMap"]:
    """The `gguf` package, a new file whose `name` programs show, and llama.cpp's tensor names."""
    gguf = _package()
    architecture = family_of(config).gguf
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_name(name)
    kind = gguf.MODEL_ARCH[architecture.upper()]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    return gguf, writer, names


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need the extra: pip install 'chatllama[gguf]'") from error
    return gguf


def _read(files: ModelFiles, name: str, config: LlamaConfig) -> Tensor:
    return interleaved(files.tensor(name), name, config)


def gguf_name(names: "TensorNameMap", name: str) -> str:
    """The name of a tensor in llama.cpp; ValueError if it has none."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"GGUF: llama.cpp has no tensor for {name}")
    return found


def interleaved(rows: Tensor, name: str, config: LlamaConfig) -> Tensor:
    """Query or key rows (H * C, ...) in llama.cpp's order; other tensors as they are.

    Where that is Meta's, the inverse of `halves_together` of an import.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = next((key for key in heads if f"self_attn.{key}" in name), None)
    if part is None or family_of(config).gguf != "llama":
        return rows
    return rows.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).reshape(rows.shape)


def _write(writer: "GGUFWriter", tensors: Mapping[str, _Tensor]) -> None:
    """Header, then one tensor after another: one is in memory at a time."""
    from gguf import GGMLQuantizationType

    for name, (shape, dtype, _) in tensors.items():
        count = math.prod(shape) * dtype.itemsize
        if dtype == torch.bfloat16:
            kind, raw = np.dtype(np.int16), GGMLQuantizationType.BF16
        else:
            kind, raw = np.dtype(dtype_name(dtype)), None
        writer.add_tensor_info(name, shape, kind, count, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (_, dtype, get) in tensors.items():
        value = cast_to(get(), dtype, name).contiguous()
        bits = value.view(torch.int16) if dtype == torch.bfloat16 else value
        writer.write_tensor_data(bits.numpy())
    writer.close()


def context_length(config: LlamaConfig) -> int:
    """The longest text in tokens that llama.cpp reads as we do: it computes no sliding window."""
    return smallest_window(config) or config.max_position_embeddings


def _add_shape(writer: "GGUFWriter", config: LlamaConfig) -> None:
    rope = cast(dict[str, Any], config.rope_parameters)
    kind = rope.get("rope_type", "default")
    assert kind in _ROPES
    width = head_dim(family_of(config), config.to_dict())
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(cast(int, config.num_key_value_heads))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(_factor(config))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        usual = 1 + 0.1 * math.log(_factor(config))
        writer.add_rope_scaling_attn_factors(_rotary(config).attention_scaling / usual)


def _factor(config: LlamaConfig) -> float:
    """Of linear scaling or yarn, whose factor may be left to the lengths."""
    rope = cast(dict[str, Any], config.rope_parameters)
    if rope["factor"] is not None:
        return float(rope["factor"])
    return config.max_position_embeddings / rope["original_max_position_embeddings"]


def _rotary(config: LlamaConfig) -> Any:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config)


def _rope_factors(config: LlamaConfig) -> Tensor | None:
    """LLaMA-3.1's divisor of each frequency: (C / 2,) float32; None without that scaling."""
    rope = cast(dict[str, Any], config.rope_parameters)
    if rope.get("rope_type") != "llama3":
        return None
    scaled = cast(Tensor, _rotary(config).inv_freq)
    steps = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return float(rope["rope_theta"]) ** -steps / scaled


def _sentencepiece(tokenizer: PreTrainedTokenizerFast) -> Any | None:
    """The tokenizer's SentencePiece model, where it has one."""
    file = vars(tokenizer).get("vocab_file")
    return read_model(Path(file)) if file else None


def _split(tokenizer: PreTrainedTokenizerFast) -> str | None:
    return split_name(json.loads(tokenizer.backend_tokenizer.to_str()))


def _add_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerFast, num_rows: int) -> None:
    """Pieces with scores and kinds, as SentencePiece or as byte-level BPE."""
    model = _sentencepiece(tokenizer)
    tokens: list[str] = [f"[PAD{index}]" for index in range(num_rows)]
    kinds = [_UNUSED] * num_rows
    scores = [-1000.0] * num_rows
    if model is not None:
        writer.add_tokenizer_model("llama")
        for index, piece in enumerate(model.pieces):
            tokens[index], scores[index], kinds[index] = piece.piece, piece.score, piece.type
        writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
        writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
    else:
        bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cast(str, _split(tokenizer)))
        for token, index in bpe["vocab"].items():
            tokens[index], kinds[index] = token, 1
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    controls = control_tokens(tokenizer)
    for index, token in tokenizer.added_tokens_decoder.items():
        if index < num_rows and (model is None or index >= len(model.pieces)):
            tokens[index] = token.content
            kinds[index] = _CONTROL if token.content in controls else _USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if isinstance(index, int):
            add(index)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
