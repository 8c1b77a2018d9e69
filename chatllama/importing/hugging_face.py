"""A new Hugging Face folder of a checkpoint with Meta's names and order of rows, checked.

Tensor by tensor, so that a few copies of the largest tensor are in memory, never a model. The
result is compared with a forward pass of Meta's own architecture (`reference.py`), layer by layer.
"""

import copy
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import LlamaConfig

from chatllama.importing.reference import Shape, reference_logits
from chatllama.model.families import family_class
from chatllama.model.weight_files import cast_to, open_model, write_model

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
MAX_FILE_BYTES = 2 * 10**9
NUM_CHECKED_TOKENS = 16
MAX_DIFFERENCE = 1e-3
"""Largest difference of a logit, in standard deviations of the logits."""
_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Checkpoint:
    """A model to import."""

    shape: Shape
    parts: Mapping[str, tuple[int, ...]]
    """Meta's names, such as layers.0.attention.wq.weight, and shapes."""
    tensor: Callable[[str], Tensor]
    """Reads one, rows of queries and keys in Meta's order."""


def hf_name(name: str) -> str:
    """The Hugging Face name of one of Meta's tensors."""
    inner, _, kind = name.rpartition(".")
    if not name.startswith("layers."):
        return f"{_NAMES[inner]}.{kind}"
    _, layer, inner = inner.split(".", 2)
    return f"model.layers.{layer}.{_NAMES[inner]}.{kind}"


def halves_together(rows: Tensor, num_heads: int) -> Tensor:
    """Query or key rows (H * C, ...) with each head's even rows before its odd ones.

    Meta rotates channels 2i and 2i + 1 of a head, Hugging Face channels i and i + C / 2.
    """
    heads = rows.unflatten(0, (num_heads, -1, 2))
    return heads.transpose(1, 2).reshape(rows.shape)


def neighbours_together(rows: Tensor, num_heads: int) -> Tensor:
    """Rows in Meta's order: the inverse of `halves_together`."""
    heads = rows.unflatten(0, (num_heads, 2, -1))
    return heads.transpose(1, 2).reshape(rows.shape)


def output_folder(source: Path, out: Path | None, stem: str) -> Path:
    """Where the import goes: `out`, or STEM-hf beside the source; ValueError if that exists."""
    out = (source.with_name(f"{stem}-hf") if out is None else out).resolve()
    if out.exists():
        raise ValueError(f"{out} exists; name another folder with --out")
    return out


def check_positions(max_positions: int | None) -> None:
    """Raises ValueError for a limit of no token."""
    if max_positions is not None and max_positions < 1:
        raise ValueError(f"--max-positions {max_positions}: must be at least 1")


def check_room(folder: Path, source: Checkpoint, dtype: torch.dtype) -> None:
    """Raises ValueError unless the disk has room for the new files."""
    needed = sum(math.prod(shape) for shape in source.parts.values()) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free"
        raise ValueError(f"{folder.parent}: {sizes}")


def write_checked(
    folder: Path, config: LlamaConfig, source: Checkpoint, max_file_bytes: int
) -> float:
    """Writes config and weights; returns the logits' largest difference from Meta's arithmetic.

    In standard deviations of the logits, on a few tokens, in float32 on both sides from weights of
    the written type.

    Raises:
        ValueError: the difference is too large, or a tensor is not finite or does not fit the type.
    """
    config.save_pretrained(folder)
    _write(folder, config, source, max_file_bytes)
    return _check(folder, config, source)


def _write(folder: Path, config: LlamaConfig, source: Checkpoint, max_file_bytes: int) -> None:
    shape, dtype = source.shape, cast(torch.dtype, config.dtype)
    metas = {hf_name(name): name for name in source.parts}
    shapes = {hf_name(name): part for name, part in source.parts.items()}
    with torch.device("meta"):
        expected = family_class(config, "ForCausalLM")(config).state_dict()
    if shape.tied:
        del expected["lm_head.weight"]
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} == shapes

    def converted(name: str) -> Tensor:
        meta = metas[name]
        tensor = source.tensor(meta)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{meta} holds NaN or infinity")
        if (num_heads := shape.rotated_heads(meta)) is not None:
            tensor = halves_together(tensor, num_heads)
        return cast_to(tensor, dtype, meta)

    write_model(folder, shapes, dtype, converted, max_file_bytes)


def _check(folder: Path, config: LlamaConfig, source: Checkpoint) -> float:
    count = min(NUM_CHECKED_TOKENS, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (count,), generator=generator)

    def weight(name: str) -> Tensor:
        return source.tensor(name).to(cast(torch.dtype, config.dtype)).float()

    expected = reference_logits(source.shape, weight, tokens)
    found = _written_logits(folder, config, tokens)
    difference = float((found - expected).abs().max() / expected.std())
    if not difference <= MAX_DIFFERENCE:  # NaN, too
        raise ValueError(
            f"the imported model's logits differ from those of Meta's architecture by "
            f"{difference:.2g} of their deviation (allowed: {MAX_DIFFERENCE:g}); nothing was kept"
        )
    return difference


@torch.no_grad()
def _written_logits(folder: Path, config: LlamaConfig, tokens: Tensor) -> Tensor:
    """Logits (T, V) float32 of transformers' model, with one of its layers in memory at a time."""
    weight = open_model(folder).tensor
    single = copy.deepcopy(config)
    single.num_hidden_layers, single.vocab_size, single.pad_token_id = 1, 1, None
    single.dtype = torch.float32
    model = family_class(config, "Model")(single).eval()
    norm = model.norm
    model.register_module("norm", torch.nn.Identity())
    hidden = embedding(tokens, weight("model.embed_tokens.weight"))[None].float()
    layer = model.layers[0]
    for number in range(config.num_hidden_layers):
        for name, parameter in layer.named_parameters():
            parameter.copy_(weight(f"model.layers.{number}.{name}"))
        hidden = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    norm.weight.copy_(weight("model.norm.weight"))
    output = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return norm(hidden)[0] @ weight(output).float().T
