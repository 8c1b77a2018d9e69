"""The tokenizer and chat template of a GGUF file: byte-level BPE, or SentencePiece with scores."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from chatllama.importing.gguf_file import GgufFile
from chatllama.text.byte_level import ALIASES, SPLITS, WHOLE_WORDS, byte_level_pipeline
from chatllama.text.sentencepiece_bpe import sp_model
from chatllama.text.tokenizer import load_tokenizer, save_tokenizer

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
"""Kinds of tokens, as in SentencePiece; 1 is normal."""
_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def write_tokenizer(file: GgufFile, folder: Path) -> PreTrainedTokenizerFast:
    """Writes the file's tokenizer into the folder, and loads it from there.

    Raises:
        ValueError: the vocabulary is neither byte-level BPE with a split of `byte_level.SPLITS` nor
            SentencePiece BPE, its lists do not fit each other, or it has no EOS token.
    """
    tokens = file.array(f"{_PREFIX}tokens", str)
    kinds = file.array(f"{_PREFIX}token_type", int, len(tokens))
    while kinds and kinds[-1] == _UNUSED:  # rows of the embedding beyond the vocabulary
        tokens, kinds = tokens[: len(kinds) - 1], kinds[:-1]
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(f"{file.path}: the token {twice!r} occurs twice")
    special: dict[str, Any] = {}
    for name, key in _NAMES.items():
        index = file.index(_PREFIX + key, len(tokens))
        special[name] = None if index is None else tokens[index]
    special["chat_template"] = file.text("tokenizer.chat_template")
    match file.text(f"{_PREFIX}model"):
        case "gpt2":
            _write_byte_level(file, folder, tokens, kinds, special)
        case "llama":
            _write_sentencepiece(file, folder, tokens, kinds, special)
        case other:
            raise ValueError(
                f"{file.path}: {_PREFIX}model is {other!r}; gpt2 (byte-level BPE) and llama "
                "(SentencePiece) are imported"
            )
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def _write_byte_level(
    file: GgufFile, folder: Path, tokens: list[str], kinds: list[int], special: dict[str, Any]
) -> None:
    found = file.text(f"{_PREFIX}pre")
    name = ALIASES.get(str(found), str(found))
    if name not in SPLITS:
        raise ValueError(
            f"{file.path}: {_PREFIX}pre, how text is split before its merges, is {found!r}; known: "
            f"{', '.join(sorted([*SPLITS, *ALIASES]))}"
        )
    merges = [tuple(merge.split(" ")) for merge in file.array(f"{_PREFIX}merges", str)]
    vocabulary = {
        token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != _UNUSED
    }  # fmt: skip
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(
                f"{file.path}: the merge {' '.join(merge)!r} is not of two tokens into one"
            )
    added = {
        index: kind == _CONTROL
        for index, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER_DEFINED)
    }
    opens = file.flag(f"{_PREFIX}add_bos_token", name in WHOLE_WORDS)
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level_pipeline(name, vocabulary, merges, added),
        add_bos_token=opens and special["bos_token"] is not None,
        clean_up_tokenization_spaces=False, **special,
    ).save_pretrained(folder)  # fmt: skip


def _write_sentencepiece(
    file: GgufFile, folder: Path, tokens: list[str], kinds: list[int], special: dict[str, Any]
) -> None:
    """Writes tokenizer.model, which `load_tokenizer` converts exactly, and the names beside it."""
    if f"{_PREFIX}precompiled_charsmap" in file.metadata:
        raise ValueError(f"{file.path}: a SentencePiece vocabulary with a map of characters")
    scores = file.array(f"{_PREFIX}scores", float)
    model = sp_model.ModelProto()
    for token, kind, score in zip(tokens, kinds, scores, strict=False):
        model.pieces.add(piece=token, type=kind, score=score)
    spec, rules = model.trainer_spec, model.normalizer_spec
    spec.model_type, spec.byte_fallback = sp_model.TrainerSpec.BPE, _BYTE in kinds
    spec.vocab_size = len(tokens)
    places = {token: index for index, token in enumerate(tokens)}
    for name in ("unk", "bos", "eos"):
        setattr(spec, f"{name}_id", places.get(special[f"{name}_token"], -1))
    spec.pad_id = -1
    rules.name = "identity"
    rules.add_dummy_prefix = file.flag(f"{_PREFIX}add_space_prefix", True)
    rules.remove_extra_whitespaces = file.flag(f"{_PREFIX}remove_extra_whitespaces", False)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {name: value for name, value in special.items() if value is not None}
    config["add_bos_token"] = file.flag(f"{_PREFIX}add_bos_token", True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
