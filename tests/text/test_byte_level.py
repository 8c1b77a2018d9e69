"""Names of splits: found for the publishers' forms of each, and for nothing else."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from chatllama.text.byte_level import SPLITS, byte_level_pipeline, split_name

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {**step, "invert": False, **changes}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def pipeline(pre_tokenizer: dict[str, Any] | None, normalizer: Any = None) -> dict[str, Any]:
    return {"model": {"type": "BPE"}, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}


WHOLE = {**BYTE_LEVEL, "use_regex": True}
BYTES = {**BYTE_LEVEL, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
FORMS = {
    "gpt-2": (WHOLE, None),
    "smollm": (sequence(DIGITS, WHOLE), None),
    "llama-bpe": (sequence(split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), BYTES), None),
    "qwen2": (sequence(split(QWEN), {**BYTES, "trim_offsets": False}), {"type": "NFC"}),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_publishers_forms_have_names(name: str) -> None:
    assert split_name(pipeline(*FORMS[name])) == name


@pytest.mark.parametrize("name", SPLITS)
def test_what_is_built_has_its_name_and_keeps_every_byte(name: str) -> None:
    built = byte_level_pipeline(name, {"a": 0, "<b>": 1}, [], {1: True})
    assert split_name(json.loads(built.to_str())) == name
    assert built.encode("a<b>a").ids == [0, 1, 0]


STRANGE: dict[str, dict[str, Any]] = {
    "another expression": pipeline(sequence(split(QWEN + "|x"), BYTES)),
    "two expressions": pipeline(sequence(split(r"\p{N}"), split(QWEN), BYTES)),
    "parts removed": pipeline(sequence(split(QWEN, behavior="Removed"), BYTES)),
    "inverted": pipeline(sequence(split(QWEN, invert=True), BYTES)),
    "a prefix": pipeline({**WHOLE, "add_prefix_space": True}),
    "runs of digits": pipeline(sequence({**DIGITS, "individual_digits": False}, WHOLE)),
    "words": pipeline({"type": "Whitespace"}),
    "nothing": pipeline(None),
    "lower case": pipeline(WHOLE, {"type": "Lowercase"}),
    "words as tokens": {**pipeline(WHOLE), "model": {"type": "WordLevel"}},
    "unigrams": json.loads(Tokenizer(models.Unigram()).to_str()),
}


@pytest.mark.parametrize("name", STRANGE)
def test_others_have_none(name: str) -> None:
    assert split_name(STRANGE[name]) is None
