"""Tokenizers of any LLaMA: loaded, saved and trained, with one policy for BOS, EOS and padding.

Conversations are in `chat_format.py`, the exact conversion of a SentencePiece model is in
`sentencepiece_bpe.py`. The vocabulary never grows: adapters must fit the published backbone.
"""

import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.runs.folder import RunFolder, backbone_path
from chatllama.runtime.json_files import read_json
from chatllama.runtime.libraries import quiet_libraries
from chatllama.text import sentencepiece_bpe
from chatllama.text.tokenizer_files import (
    TOKENIZER_CONFIG,
    local_folder,
    read_by_library,
    read_file,
    read_template,
)

# Key of our own tokenizer_config.json: the tokenizer.json beside it is exact as it is.
MARKER = "chatllama_exact"
# LLaMA-3 keeps these for later use; no text and no template produces them.
RESERVED_PADS = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_250|>",
)
_FILES = ("tokenizer*", "chat_template*", "config.json", "added_tokens.json", "special_tokens_map*")


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder or hub id, with ids equal to its SentencePiece model's.

    A folder with a SentencePiece BPE `tokenizer.model` gets the exact conversion; one with only a
    tokenizer.json (LLaMA-3) is taken as it is. `add_special_tokens=True` puts in the BOS where the
    publisher has it so, and never the EOS; padding is on the left with a token that is not EOS.
    `trust_remote_code` allows a tokenizer that is Python code in the repository.

    Raises:
        ValueError: nothing loadable there, no EOS token, or no token to pad with.
    """
    code = ["*.py"] if trust_remote_code else []
    folder = local_folder(path, revision, [*_FILES, *code])
    config, llama = read_file(folder, TOKENIZER_CONFIG), read_file(folder, "config.json")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        read_file(folder, name)
    read_template(folder, config)
    tokenizer = _open(folder, str(path), config, trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{path}: {type(tokenizer).__name__} has no `tokenizers` pipeline; convert it to a "
            "tokenizer.json first"
        )
    _check_embeddings(tokenizer, str(path), llama.get("vocab_size"))
    vars(tokenizer)["max_positions"] = llama.get("max_position_embeddings")
    return _apply_policy(tokenizer, str(path), llama.get("vocab_size"))


def _open(folder: Path, path: str, config: dict[str, Any], trust_remote_code: bool) -> Any:
    """The tokenizer as one of the libraries, or our conversion, makes it; see `load_tokenizer`."""
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    model = sentencepiece_bpe.read_model(model_file) if model_file.is_file() else None
    is_bpe = model is not None and sentencepiece_bpe.is_bpe(model)
    with_json = json_file.is_file() and "auto_map" not in config
    if json_file.is_file() and (MARKER in config or (with_json and not is_bpe)):
        with read_by_library(json_file):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    elif is_bpe:
        with read_by_library(model_file):
            tokenizer = _from_sentencepiece(model_file, model, config)
    elif config or (folder / "config.json").is_file():
        with read_by_library(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    else:
        raise ValueError(f"{path}: no tokenizer.model, tokenizer.json or tokenizer_config.json")
    if model is not None:
        tokenizer.vocab_file = str(model_file)
    return tokenizer


def within_positions(tokenizer: PreTrainedTokenizerFast, max_length: int) -> int:
    """A limit in tokens, at most the max_position_embeddings of the model beside the tokenizer."""
    return min(max_length, vars(tokenizer).get("max_positions") or max_length)


def _check_embeddings(tokenizer: PreTrainedTokenizerFast, path: str, rows: int | None) -> None:
    """Refuses ids without a row of the embedding, but for a pad token, which is replaced."""
    vocab = {i: token for token, i in tokenizer.get_vocab().items() if token != tokenizer.pad_token}
    if rows is not None and (beyond := [index for index in sorted(vocab) if index >= rows]):
        raise ValueError(
            f"{path}: token {vocab[beyond[0]]!r} has id {beyond[0]}, but the model's embedding has "
            f"{rows} rows (vocab_size of config.json), so {len(beyond)} tokens have none: take the "
            "tokenizer of this model, or remove these tokens from its files"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Writes files that plain `AutoTokenizer.from_pretrained(folder)` reads back with equal ids.

    A SentencePiece model is kept beside them as tokenizer.model.
    """
    folder = Path(folder)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file)
    for key in ("is_local", "local_files_only", "name_or_path", "vocab_file", "auto_map"):
        config.pop(key, None)
    # Named LlamaTokenizer, the pipeline would be rebuilt by transformers, with other ids.
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", MARKER: True}
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    model_file, kept = vars(tokenizer).get("vocab_file"), folder / "tokenizer.model"
    if model_file and not (kept.exists() and kept.samefile(model_file)):
        shutil.copyfile(model_file, kept)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: str | Path
) -> PreTrainedTokenizerFast:
    """A SentencePiece BPE tokenizer with LLaMA's settings, trained on `texts`, saved in `folder`.

    Byte fallback, no normalisation, digits apart, spaces kept, unk 0, BOS 1, EOS 2; padding is unk.
    The same texts in the same order give the same file. `vocab_size` counts the 3 special and 256
    byte pieces.

    Raises:
        ValueError: no text, or a vocab_size that these texts cannot fill or that cannot hold them.
    """
    # SentencePiece drops lines over 4192 bytes and cannot hold line breaks: it gets short lines.
    lines = [
        line[start : start + 1000]  # of at most 4 bytes each
        for text in texts
        for line in text.splitlines()
        for start in range(0, len(line), 1000)
    ]
    if not lines:
        raise ValueError("no text to train a tokenizer on")
    output = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=output, model_type="bpe",
            vocab_size=vocab_size, character_coverage=0.99995, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=True, split_digits=True, allow_whitespace_only_pieces=True,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(_explain_vocab_size(vocab_size, str(error))) from error
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tokenizer.model").write_bytes(output.getvalue())
        save_tokenizer(load_tokenizer(scratch), folder)
    return load_tokenizer(folder)


def _from_sentencepiece(
    model_file: Path, model: Any, config: dict[str, Any]
) -> PreTrainedTokenizerFast:
    """The exact conversion, with tokens, names and chat template from the folder's other files."""
    folder = model_file.parent
    pipeline = sentencepiece_bpe.build_bpe(model_file, model)
    for index, token in sorted(_published_additions(folder, config).items()):
        if index < len(model.pieces):
            continue
        pipeline.add_tokens([token])
        if pipeline.token_to_id(token.content) != index:
            raise ValueError(
                f"{folder}: added token {token.content!r} should have id {index} but the "
                f"{len(model.pieces)} pieces and the tokens before it end elsewhere"
            )
    names = read_file(folder, "special_tokens_map.json") | config
    spec, special = model.trainer_spec, {}
    for role, index in (("bos", spec.bos_id), ("eos", spec.eos_id), ("unk", spec.unk_id)):
        special[f"{role}_token"] = model.pieces[index].piece if index >= 0 else None
    for name in (*special, "pad_token"):
        given = names.get(name)
        content = given["content"] if isinstance(given, dict) else given
        if content and pipeline.token_to_id(content) is not None:
            special[name] = content
    adds_bos = special["bos_token"] is not None and config.get("add_bos_token") is not False
    return PreTrainedTokenizerFast(
        tokenizer_object=pipeline, chat_template=read_template(folder, config),
        add_bos_token=adds_bos, clean_up_tokenization_spaces=False,
        model_max_length=names.get("model_max_length"), **special,
    )  # fmt: skip


def _published_additions(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens that the publisher added behind the SentencePiece vocabulary, by id."""
    added = read_file(folder, "added_tokens.json").items()
    found: dict[int, dict[str, Any]] = {i: {"content": c, "special": True} for c, i in added}
    tokens = read_file(folder, "tokenizer.json").get("added_tokens", [])
    found |= {token["id"]: token for token in tokens}
    found |= {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    keys = ("content", "special", "lstrip", "rstrip", "single_word")
    return {
        # Not normalized: found in the text as written, before spaces are escaped.
        index: AddedToken(normalized=False, **{k: v for k, v in token.items() if k in keys})
        for index, token in found.items()
    }


def _apply_policy(
    tokenizer: PreTrainedTokenizerFast, path: str, num_embeddings: int | None
) -> PreTrainedTokenizerFast:
    """The tokenizer with EOS checked and a pad token that exists and never hides EOS."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{path}: the tokenizer has no EOS token, so no answer could end. Name one of its "
            "tokens as `eos_token` in tokenizer_config.json"
        )
    vocab = tokenizer.get_vocab()
    for token in (tokenizer.pad_token, tokenizer.unk_token, *RESERVED_PADS):
        index = vocab.get(token) if isinstance(token, str) else None
        if index is None or index == tokenizer.eos_token_id:
            continue
        if num_embeddings is None or index < num_embeddings:
            tokenizer.pad_token = token
            break
    else:
        raise ValueError(
            f"{path}: no token to pad with: pad_token is {tokenizer.pad_token!r}, EOS is "
            f"{tokenizer.eos_token!r}, and there is no unk or reserved token. Name any token that "
            "text never produces as `pad_token` in tokenizer_config.json"
        )
    tokenizer.padding_side = "left"
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _explain_vocab_size(vocab_size: int, error: str) -> str:
    """SentencePiece's error message, reworded for our configuration."""
    if limit := re.search(r"value <= (\d+)", error):
        return f"vocab_size {vocab_size} is too large for this text: at most {limit.group(1)}"
    if limit := re.search(r"smaller than required_chars\.?\s*\d+ vs (\d+)", error):
        return f"vocab_size {vocab_size} is too small: this text's characters need {limit.group(1)}"
    return f"vocab_size {vocab_size}: sentencepiece cannot train on this text: {error}"


def find_tokenizer(cfg: Config) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a config; None where the run would make it and has not yet."""
    quiet_libraries()
    run = RunFolder(Path(cfg.run_dir))
    if cfg.backbone.path is None and not run.backbone.is_dir():
        return None
    section = cfg.backbone
    path = backbone_path(section, run)
    trusted = section.trust_remote_code
    return load_tokenizer(path, revision=section.revision, trust_remote_code=trusted)
