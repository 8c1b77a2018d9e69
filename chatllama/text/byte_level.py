"""Byte-level BPE and how it splits text before its merges, under llama.cpp's names for that.

A `tokenizers` pipeline holds the split as JSON; a GGUF file holds a name. A split that has no name
here is refused in both directions: tokens would differ silently.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

_GPT2 = "gpt-2's"
"""The split that ByteLevel does by itself."""
_DIGITS = "digits"
_LETTERS = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    + _REST
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_LETTERS}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_LETTERS}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST
)
# Source: llm_tokenizer_bpe and its table of names in src/llama-vocab.cpp of ggml-org/llama.cpp.
SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (_DIGITS, _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "tekken": (_TEKKEN,),
}
"""Name of a split -> regular expressions, one after another."""
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "starcoder": "smollm"}
ALIASES |= {"refact": "smollm", "deepseek-r1-qwen": "qwen2", "stablelm2": "qwen2"}
WHOLE_WORDS = ("llama-bpe", "tekken")
"""A word that is a token is that token, whatever the merges say (`ignore_merges`)."""
COMPOSED = ("qwen2",)
"""Text is composed (NFC) first; llama.cpp does not."""


def byte_letters() -> dict[str, int]:
    """Letter -> byte of byte-level BPE (GPT-2, LLaMA-3)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(256 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | letters


def split_name(pipeline: dict[str, Any]) -> str | None:
    """llama.cpp's name of the split of a byte-level BPE pipeline; None for other pipelines.

    Text may be composed (NFC) first, which llama.cpp does not do.
    """
    if pipeline["model"]["type"] != "BPE" or pipeline["normalizer"] not in (None, {"type": "NFC"}):
        return None
    found: list[str] = []
    for step in _steps(pipeline["pre_tokenizer"]):
        match step["type"]:
            case "Split" if step["behavior"] == "Isolated" and not step["invert"]:
                found.append(str(step["pattern"].get("Regex")))
            case "Digits" if step["individual_digits"]:
                found.append(_DIGITS)
            case "ByteLevel" if not step["add_prefix_space"]:
                found += [_GPT2] if step["use_regex"] else []
            case _:
                return None
    return next((name for name, split in SPLITS.items() if split == tuple(found)), None)


def byte_level_pipeline(
    name: str, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], added: dict[int, bool]
) -> Tokenizer:
    """The pipeline with llama.cpp's split of that name, one of `SPLITS`; it adds no BOS.

    Args:
        added: ids of the tokens that are found in text as they are -> whether they are special.
    """
    steps: list[dict[str, Any]] = []
    for part in SPLITS[name]:
        if part == _DIGITS:
            steps.append({"type": "Digits", "individual_digits": True})
        elif part != _GPT2:
            split = {"pattern": {"Regex": part}, "behavior": "Isolated", "invert": False}
            steps.append({"type": "Split", **split})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps.append({**byte_level, "use_regex": _GPT2 in SPLITS[name]})
    tokens = {index: token for token, index in vocabulary.items()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pipeline = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": tokens[index], "special": special, **plain}
            for index, special in sorted(added.items())
        ],
        "normalizer": {"type": "NFC"} if name in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": list(merges),
            "ignore_merges": name in WHOLE_WORDS,
        },
    }
    return Tokenizer.from_str(json.dumps(pipeline))


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer in order, sequences opened."""
    if step is None:
        return [{"type": "none"}]
    return [each for inner in step.get("pretokenizers", ()) for each in _steps(inner)] or [step]
