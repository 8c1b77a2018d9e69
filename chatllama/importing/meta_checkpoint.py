"""`chatllama import`: Meta's original checkpoint as a plain Hugging Face folder.

Tensor by tensor, so that a few copies of the largest tensor are in memory, never a model. The
result is checked against a forward pass of Meta's own architecture (`meta_model.py`), layer by
layer, and appears under its name only when it is complete.
"""

import copy
import hashlib
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from chatllama.importing.meta_model import ASSUMED_POSITIONS, read_params, reference_logits
from chatllama.importing.meta_shards import MetaShards
from chatllama.model.weight_files import cast_to, chosen_dtype, dtype_name, open_model, write_model
from chatllama.runs.folder import INFO
from chatllama.runtime.files import replace_folder, write_json
from chatllama.runtime.libraries import quiet_libraries
from chatllama.text.sentencepiece_bpe import read_model
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
MAX_FILE_BYTES = 2 * 10**9
NUM_CHECKED_TOKENS = 16
MAX_DIFFERENCE = 1e-3
"""Largest difference of a logit, in standard deviations of the logits."""
CHECKSUMS = "checklist.chk"
_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def import_meta(
    folder: Path,
    out: Path | None = None,
    *,
    dtype: Dtype = "keep",
    max_positions: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes and returns the Hugging Face folder, checked, with its origin in chatllama.json.

    Args:
        folder: params.json, consolidated.NN.pth and, there or one above, tokenizer.model.
        out: the new folder. None: `folder` with `-hf` behind its name.
        dtype: of the weights; `keep` needs files of one type.
        max_positions: longest text in tokens. None: that of params.json, else 2048.

    Raises:
        ValueError: a file is missing, cut off or changed, files do not fit each other, `out`
            exists, or the imported model's logits are not those of Meta's architecture.
    """
    quiet_libraries()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    folder = folder.resolve()
    out = (folder.with_name(f"{folder.name}-hf") if out is None else out).resolve()
    if out.exists():
        raise ValueError(f"{out} exists; name another folder with --out")
    if max_positions is not None and max_positions < 1:
        raise ValueError(f"--max-positions {max_positions}: must be at least 1")
    params = read_params(folder / "params.json")
    tokenizer_file = _tokenizer_file(folder)
    with _beside(out) as beside:
        shutil.copyfile(tokenizer_file, beside / "tokenizer.model")
        tokenizer = load_tokenizer(beside)
        save_tokenizer(tokenizer, beside)
        shards = MetaShards(folder, params, len(tokenizer))
        chosen = chosen_dtype(dtype, shards.dtypes, f"{folder}")
        _check_room(beside, shards, chosen)
        inputs = [folder / "params.json", tokenizer_file, *shards.files]
        hashes = {file.name: _checked_hash(file) for file in inputs}
        positions = max_positions or params.max_seq_len or _assumed_positions()
        config = _config(shards, tokenizer, positions, chosen)
        _write(beside, config, shards, max_file_bytes)
        info = {
            "stage": "import",
            "source": folder.name,
            "sha256": hashes,
            "params": asdict(params),
            "dtype": dtype_name(chosen),
            "logit_difference": _check(beside, config, shards),
            "num_checked_tokens": NUM_CHECKED_TOKENS,
        }
        write_json(beside / INFO, info)
        replace_folder(beside, out)
    kinds = ", ".join(sorted(map(dtype_name, shards.dtypes)))
    print(
        f"{out}: {params.n_layers} layers, {kinds} -> {info['dtype']}; logits differ from "
        f"Meta's architecture by at most {info['logit_difference']:.1e} of their deviation"
    )
    return out


def _assumed_positions() -> int:
    print(f"longest text: {ASSUMED_POSITIONS} tokens assumed (LLaMA-2: --max-positions 4096)")
    return ASSUMED_POSITIONS


def hf_name(name: str) -> str:
    """The Hugging Face name of one of Meta's tensors."""
    if not name.startswith("layers."):
        return _NAMES[name]
    _, layer, inner = name.split(".", 2)
    return f"model.layers.{layer}.{_NAMES[inner]}"


def halves_together(rows: Tensor, num_heads: int) -> Tensor:
    """Query or key matrix (H * C, D) with each head's even rows before its odd ones.

    Meta rotates channels 2i and 2i + 1 of a head, Hugging Face channels i and i + C / 2.
    """
    heads = rows.unflatten(0, (num_heads, -1, 2))
    return heads.transpose(1, 2).reshape(rows.shape)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new folder next to `out`, removed afterwards if it was not moved there."""
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _tokenizer_file(folder: Path) -> Path:
    """Meta's SentencePiece model: in the folder, or above it as its download script puts it."""
    for place in (folder, folder.parent):
        if (file := place / "tokenizer.model").is_file():
            if read_model(file) is None:
                raise ValueError(
                    f"{file}: cut off, or no SentencePiece model; for LLaMA-3 and later take the "
                    "Hugging Face folder"
                )
            return file
    raise ValueError(f"{folder}: no tokenizer.model there or in {folder.parent}")


def _check_room(beside: Path, shards: MetaShards, dtype: torch.dtype) -> None:
    """Raises ValueError unless the disk has room for the new files."""
    needed = sum(math.prod(part.shape) for part in shards.parts.values()) * dtype.itemsize
    free = shutil.disk_usage(beside).free
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free"
        raise ValueError(f"{beside.parent}: {sizes}")


def _checked_hash(file: Path) -> str:
    """SHA-256 of a file; ValueError if its MD5 is not that of Meta's checklist.chk beside it."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            sha256.update(block)
            md5.update(block)
    checklist = file.with_name(CHECKSUMS)
    if checklist.is_file():
        for line in checklist.read_text(encoding="utf-8").splitlines():
            expected, _, name = line.partition(" ")
            if name.strip() == file.name and expected != md5.hexdigest():
                raise ValueError(
                    f"{file}: damaged: its MD5 is {md5.hexdigest()}, {checklist} says {expected}"
                )
    return sha256.hexdigest()


def _config(
    shards: MetaShards, tokenizer: PreTrainedTokenizerFast, positions: int, dtype: torch.dtype
) -> LlamaConfig:
    params = shards.params
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shards.vocab_size,
        hidden_size=params.dim,
        intermediate_size=shards.ffn_dim,
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.n_kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=params.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": params.rope_theta},
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
        tie_word_embeddings=False,
        dtype=dtype,
    )


def _write(beside: Path, config: LlamaConfig, shards: MetaShards, max_file_bytes: int) -> None:
    """Writes config and weights, with the names and shapes of transformers' model."""
    params, dtype = shards.params, cast(torch.dtype, config.dtype)
    config.save_pretrained(beside)
    GenerationConfig.from_model_config(config).save_pretrained(beside)
    metas = {hf_name(name): name for name in shards.parts}
    shapes = {hf_name(name): part.shape for name, part in shards.parts.items()}
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in wanted.items()} == shapes

    def converted(name: str) -> Tensor:
        meta = metas[name]
        tensor = shards.tensor(meta)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{meta} holds NaN or infinity")
        if meta.endswith(("wq.weight", "wk.weight")):
            heads = params.n_heads if meta.endswith("wq.weight") else params.n_kv_heads
            tensor = halves_together(tensor, heads)
        return cast_to(tensor, dtype, meta)

    write_model(beside, shapes, dtype, converted, max_file_bytes)


def _check(beside: Path, config: LlamaConfig, shards: MetaShards) -> float:
    """Largest difference of the written model's logits from Meta's, in their deviations.

    In float32 on both sides, from weights of the written type, on a few tokens. ValueError if it
    is too large.
    """
    count = min(NUM_CHECKED_TOKENS, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shards.vocab_size, (count,), generator=generator)

    def weight(name: str) -> Tensor:
        return shards.tensor(name).to(cast(torch.dtype, config.dtype)).float()

    expected = reference_logits(shards.params, weight, tokens)
    found = _written_logits(beside, config, tokens)
    difference = float((found - expected).abs().max() / expected.std())
    if not difference <= MAX_DIFFERENCE:  # NaN, too
        raise ValueError(
            f"the imported model's logits differ from those of Meta's architecture by "
            f"{difference:.2g} of their deviation (allowed: {MAX_DIFFERENCE:g}); nothing was kept"
        )
    return difference


@torch.no_grad()
def _written_logits(folder: Path, config: LlamaConfig, tokens: Tensor) -> Tensor:
    """Logits (T, V) float32 of transformers' LLaMA, with one of its layers in memory at a time."""
    weight = open_model(folder).tensor
    single = copy.deepcopy(config)
    single.num_hidden_layers, single.vocab_size, single.pad_token_id = 1, 1, None
    single.dtype = torch.float32
    model = LlamaModel(single).eval()
    norm = model.norm
    model.register_module("norm", torch.nn.Identity())
    hidden = embedding(tokens, weight("model.embed_tokens.weight"))[None].float()
    layer = model.layers[0]
    for number in range(config.num_hidden_layers):
        for name, parameter in layer.named_parameters():
            parameter.copy_(weight(f"model.layers.{number}.{name}"))
        hidden = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    norm.weight.copy_(weight("model.norm.weight"))
    return norm(hidden)[0] @ weight("lm_head.weight").float().T
