"""`chatllama import FILE.gguf`: a model of llama.cpp as a plain Hugging Face folder.

Weights are dequantised: they are what llama.cpp computes with, not what was there before.
"""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from chatllama.importing.gguf_file import GgufFile
from chatllama.importing.gguf_loss import Loss, losses
from chatllama.importing.gguf_model import find_family, read_checkpoint, rope_parameters
from chatllama.importing.gguf_tokenizer import write_tokenizer
from chatllama.importing.hugging_face import (
    MAX_FILE_BYTES,
    NUM_CHECKED_TOKENS,
    Checkpoint,
    Dtype,
    check_positions,
    check_room,
    output_folder,
    write_checked,
)
from chatllama.model.families import Family
from chatllama.model.weight_files import dtype_name
from chatllama.runs.folder import INFO
from chatllama.runtime.files import file_hash, new_folder, write_json
from chatllama.runtime.libraries import quiet_libraries


def import_gguf(
    path: Path,
    out: Path | None = None,
    *,
    dtype: Dtype = "keep",
    max_positions: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes and returns the Hugging Face folder, checked, with its origin in chatllama.json.

    Args:
        out: the new folder. None: beside the file, with `-hf` behind its name.
        dtype: of the weights; `keep` is the matrices' own, and float32 where they are quantised.
        max_positions: longest text in tokens. None: that of the file.

    Raises:
        ValueError: no whole GGUF file of a family that is trained here, something in it that
            cannot be imported exactly, `out` exists, or the imported model's logits are not those
            of Meta's arithmetic.
    """
    quiet_libraries()
    path = path.resolve()
    out = output_folder(path, out, path.stem)
    check_positions(max_positions)
    file = GgufFile(path)
    family = find_family(file)
    source, chosen = read_checkpoint(file, family), _dtype(file, dtype)
    rope = rope_parameters(file, source.shape)
    lost = losses(file)
    with new_folder(out) as beside:
        check_room(beside, source, chosen)
        tokenizer = write_tokenizer(file, beside)
        config = _config(file, family, source, rope, tokenizer, chosen)
        if max_positions is not None:
            config.max_position_embeddings = max_positions
        _write_generation(file, tokenizer, config, beside)
        difference = write_checked(beside, config, source, max_file_bytes)
        info = {
            "stage": "import",
            "source": path.name,
            "sha256": {path.name: file_hash(path)},
            "dtype": dtype_name(chosen),
            "stored": {each.kind: vars(each) for each in lost},
            "logit_difference": difference,
            "num_checked_tokens": NUM_CHECKED_TOKENS,
        }
        write_json(beside / INFO, info)
    _report(out, file, config, lost, difference)
    return out


def _dtype(file: GgufFile, wanted: Dtype) -> torch.dtype:
    """The type to write; `keep` is that of the matrices, float32 where they are quantised."""
    if wanted != "keep":
        return getattr(torch, wanted)
    kinds = {stored.kind.name for stored in file.tensors.values() if len(stored.shape) > 1}
    plain = {"F16": torch.float16, "BF16": torch.bfloat16}
    return plain.get(next(iter(kinds)), torch.float32) if len(kinds) == 1 else torch.float32


def _config(
    file: GgufFile,
    family: Family,
    source: Checkpoint,
    rope: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
) -> LlamaConfig:
    shape, (vocab, dim) = source.shape, source.parts["tok_embeddings.weight"]
    if (count := len(tokenizer)) > vocab:
        raise ValueError(f"{file.path}: {count} tokens, but token_embd.weight has {vocab} rows")
    first = {"attention_bias": "attention.wq", "mlp_bias": "feed_forward.w1"}
    config = AutoConfig.for_model(
        family.name,
        architectures=[f"{family.classes}ForCausalLM"],
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=source.parts["layers.0.feed_forward.w1.weight"][0],
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=file.number(f"{family.gguf}.context_length"),
        rms_norm_eps=shape.norm_eps,
        rope_parameters=rope,
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
        tie_word_embeddings=shape.tied,
        dtype=dtype,
        **{key: f"layers.0.{first[key]}.bias" in shape.biases for key in family.bias_keys},
    )
    return cast(LlamaConfig, config)


def _write_generation(
    file: GgufFile, tokenizer: PreTrainedTokenizerFast, config: LlamaConfig, folder: Path
) -> None:
    """Writes generation_config.json, with every token that ends an answer."""
    section = GenerationConfig.from_model_config(config)
    keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    others = [index for key in keys if (index := file.index(key, len(tokenizer))) is not None]
    section.eos_token_id = list(dict.fromkeys([cast(int, tokenizer.eos_token_id), *others]))
    section.save_pretrained(folder)


def _report(
    out: Path, file: GgufFile, config: LlamaConfig, lost: list[Loss], difference: float
) -> None:
    """Prints what was written, and what the file's quantisation had lost before."""
    print(
        f"{out}: {config.num_hidden_layers} layers, {dtype_name(cast(torch.dtype, config.dtype))}; "
        f"logits differ from Meta's architecture by at most {difference:.1e} of their deviation"
    )
    for each in lost:
        print(f"    {each}")
    if any(each.error is not None for each in lost):
        print("    what quantisation has rounded away does not come back")
