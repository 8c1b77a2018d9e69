"""Vocabularies of GGUF files: the same ids as the tokenizers that they were made of."""

import random
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import TinyGguf, byte_level_metadata, sentencepiece_metadata
from transformers import AutoTokenizer

from chatllama.importing.gguf_file import GgufFile
from chatllama.importing.gguf_tokenizer import write_tokenizer
from chatllama.text.encoding import encode
from chatllama.text.sentencepiece_bpe import TEXTS
from chatllama.text.tokenizer import load_tokenizer


def imported(tmp_path: Path, made: TinyGguf) -> Any:
    made.write(tmp_path / "tiny.gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    write_tokenizer(GgufFile(tmp_path / "tiny.gguf"), folder)
    return load_tokenizer(folder)


def test_sentencepiece_gives_the_ids_of_its_model(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    ours = imported(tmp_path, TinyGguf(sentencepiece=tiny_tokenizer_dir / "tokenizer.model"))
    theirs = load_tokenizer(tiny_tokenizer_dir)
    for text in (*TEXTS, "Anna walks through the river at 3 o'clock"):
        assert encode(ours, text) == encode(theirs, text), text
    assert ours("Anna").input_ids == theirs("Anna").input_ids  # with BOS
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert plain("  Anna 12").input_ids == theirs("  Anna 12").input_ids
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<unk>")


def test_sentencepiece_settings_that_files_name(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """No BOS, no space before the text, tokens that were added, rows without a token."""
    file = tiny_tokenizer_dir / "tokenizer.model"
    values = sentencepiece_metadata(file)
    lists = {
        "tokens": [*values["tokenizer.ggml.tokens"], "<|im_end|>", "[PAD301]"],
        "scores": [*values["tokenizer.ggml.scores"], -1000.0, -1000.0],
        "token_type": [*values["tokenizer.ggml.token_type"], 3, 5],
        "add_bos_token": False,
        "add_space_prefix": False,
        "eos_token_id": 300,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in lists.items()}
    ours = imported(tmp_path, TinyGguf(sentencepiece=file, metadata=metadata, rows=302))
    theirs = load_tokenizer(tiny_tokenizer_dir)
    assert len(ours) == 301 and ours.eos_token_id == 300
    assert ours("Anna").input_ids == encode(theirs, "Anna", continues=True)
    assert 300 not in encode(ours, "a <|im_end|> b")


@pytest.mark.slow
def test_llamas_own_vocabulary(tmp_path: Path, testdata: Path) -> None:
    file = testdata / "llama_tokenizer" / "tokenizer.model"
    ours = imported(tmp_path, TinyGguf(sentencepiece=file, rows=32000))
    theirs = load_tokenizer(file.parent)
    texts = (testdata / "text").glob("*.txt")
    lines = [line for each in texts for line in each.read_text("utf-8").splitlines()]
    assert len(lines) > 1000
    for line in [*TEXTS, *random.Random(0).sample(lines, 1000)]:
        assert encode(ours, line) == encode(theirs, line), line


# Pieces of " cat12 123's" by each split, before the merges of `byte_level_tokens`.
SPLIT = {
    "gpt-2": ["Ġcat", "12", "Ġ", "123", "'", "s"],
    "smollm": ["Ġcat", "1", "2", "Ġ", "1", "2", "3", "'", "s"],
    "llama-bpe": ["Ġcat", "12", "Ġ", "123", "'", "s"],
    "qwen2": ["Ġcat", "1", "2", "Ġ", "1", "2", "3", "'", "s"],
    "tekken": ["Ġcat", "1", "2", "Ġ", "1", "2", "3", "'", "s"],
}


@pytest.mark.parametrize("pre", [*SPLIT, "llama3", "starcoder", "deepseek-r1-qwen"])
def test_byte_level_splits_as_the_file_names(pre: str, tmp_path: Path) -> None:
    ours = imported(tmp_path, TinyGguf(pre=pre))
    aliases = {"llama3": "llama-bpe", "starcoder": "smollm", "deepseek-r1-qwen": "qwen2"}
    text = " cat12 123's"
    assert ours.convert_ids_to_tokens(encode(ours, text)) == SPLIT[aliases.get(pre, pre)]
    text = "\n\n naïve  <|im_end|> 日本\t"
    ids = encode(ours, text)
    assert ours.decode(ids) == text and 2 not in ids
    assert ours("<|im_start|>a<|im_end|>").input_ids[::2] == [1, 2]


@pytest.mark.parametrize(
    ("pre", "added", "expected"),
    [
        ("smollm", None, []),
        ("llama-bpe", None, [1]),
        ("smollm", True, [1]),
        ("llama-bpe", False, []),
        ("gpt-2", True, [1]),
    ],
)
def test_bos_is_added_where_the_file_says_so(
    pre: str, added: bool | None, expected: list[int], tmp_path: Path
) -> None:
    metadata = {"tokenizer.ggml.add_bos_token": added}
    ours = imported(tmp_path, TinyGguf(pre=pre, metadata=metadata))
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    for tokenizer in (ours, plain):
        assert tokenizer("a").input_ids[:-1] == expected


def test_no_bos_and_unused_rows(tmp_path: Path) -> None:
    values = byte_level_metadata("qwen2")
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.tokens": [*tokens, "<tool>", "[PAD1]", "<|last|>", "[PAD2]"],
        "tokenizer.ggml.token_type": [*kinds, 4, 5, 3, 5],
    }
    ours = imported(tmp_path, TinyGguf(pre="qwen2", metadata=metadata))
    assert ours.bos_token is None and "[PAD1]" not in ours.get_vocab()
    assert ours.convert_tokens_to_ids("<|last|>") == len(tokens) + 2
    assert ours("a<tool>b").input_ids[1] == len(tokens)
    assert ours.decode([len(tokens), len(tokens) + 2], skip_special_tokens=True) == "<tool>"
    assert encode(ours, "cafe\u0301") == encode(ours, "café")  # Qwen composes first
