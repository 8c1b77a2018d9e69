"""`chatllama import FOLDER`: Meta's original checkpoint as a plain Hugging Face folder.

Its files are read in `meta_params.py` and `meta_shards.py`; `hugging_face.py` writes and checks.
"""

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

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
from chatllama.importing.meta_params import MetaParams, read_params
from chatllama.importing.meta_shards import MetaShards
from chatllama.importing.tiktoken_vocabulary import read_ranks, write_tokenizer
from chatllama.model.weight_files import chosen_dtype, dtype_name
from chatllama.runs.folder import INFO
from chatllama.runtime.files import new_folder, write_json
from chatllama.runtime.libraries import quiet_libraries
from chatllama.text.sentencepiece_bpe import read_model
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer

CHECKSUMS = "checklist.chk"


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
        max_positions: longest text in tokens. None: that of params.json, else what is usual: 2048,
            8192 of Llama 3, 131072 of later ones.

    Raises:
        ValueError: a file is missing, cut off or changed, files do not fit each other, `out`
            exists, or the imported model's logits are not those of Meta's architecture.
    """
    quiet_libraries()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder or file")
    folder = folder.resolve()
    out = output_folder(folder, out, folder.name)
    check_positions(max_positions)
    params = read_params(folder / "params.json")
    tokenizer_file, tokens = _vocabulary(folder)
    with new_folder(out) as beside:
        if tokens is not None:
            tokenizer, ends = write_tokenizer(tokens, params.use_scaled_rope, beside)
        else:
            tokenizer, ends = _copy_tokenizer(tokenizer_file, beside)
        shards = MetaShards(folder, params, len(tokenizer))
        chosen = chosen_dtype(dtype, shards.dtypes, f"{folder}")
        shapes = {name: part.shape for name, part in shards.parts.items()}
        source = Checkpoint(params.shape(shards.tied), shapes, shards.tensor)
        check_room(beside, source, chosen)
        inputs = [folder / "params.json", tokenizer_file, *shards.files]
        hashes = {file.name: _checked_hash(file) for file in inputs}
        positions = max_positions or params.max_seq_len or _assumed_positions(params, tokens)
        config = _config(shards, tokenizer, positions, chosen)
        generation = GenerationConfig.from_model_config(config)
        generation.eos_token_id = ends
        generation.save_pretrained(beside)
        info = {
            "stage": "import",
            "source": folder.name,
            "sha256": hashes,
            "params": asdict(params),
            "dtype": dtype_name(chosen),
            "logit_difference": write_checked(beside, config, source, max_file_bytes),
            "num_checked_tokens": NUM_CHECKED_TOKENS,
        }
        write_json(beside / INFO, info)
    _report(out, shards, info)
    return out


def _copy_tokenizer(file: Path, folder: Path) -> tuple[PreTrainedTokenizerFast, int]:
    """Copies a SentencePiece model, and writes what plain transformers reads; also its EOS."""
    shutil.copyfile(file, folder / "tokenizer.model")
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, folder)
    return tokenizer, cast(int, tokenizer.eos_token_id)


def _report(out: Path, shards: MetaShards, info: dict[str, Any]) -> None:
    if shards.params.use_scaled_rope:
        print(f"rope scaling: factor {shards.params.rope(shards.tied)['factor']:g}")
    if shards.tied:
        print("no output.weight: the LM head is the embedding (tie_word_embeddings)")
    kinds = ", ".join(sorted(map(dtype_name, shards.dtypes)))
    print(
        f"{out}: {shards.params.n_layers} layers, {kinds} -> {info['dtype']}; logits differ from "
        f"Meta's architecture by at most {info['logit_difference']:.1e} of their deviation"
    )


def _assumed_positions(params: MetaParams, tokens: list[bytes] | None) -> int:
    positions = params.assumed_positions(is_llama3=tokens is not None)
    hint = " (LLaMA-2: --max-positions 4096)" if tokens is None else ""
    print(f"longest text: {positions} tokens assumed{hint}")
    return positions


def _vocabulary(folder: Path) -> tuple[Path, list[bytes] | None]:
    """Meta's tokenizer.model, in the folder or above it as its download script puts it.

    Also its tokens by rank where it is Llama 3's; None: a SentencePiece model.
    """
    for place in (folder, folder.parent):
        if (file := place / "tokenizer.model").is_file():
            tokens = read_ranks(file)
            if tokens is None and read_model(file) is None:
                raise ValueError(
                    f"{file}: cut off, or neither a SentencePiece model nor tiktoken's lines"
                )
            return file, tokens
    raise ValueError(f"{folder}: no tokenizer.model there or in {folder.parent}")


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
        rope_parameters=params.rope(shards.tied),
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
        tie_word_embeddings=shards.tied,
        dtype=dtype,
    )
