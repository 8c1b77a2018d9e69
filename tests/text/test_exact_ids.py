"""Ids of real texts in five languages, alone and inside a conversation: sentencepiece's own."""

import csv
import gzip
import itertools
import json
import random
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from chatllama.config.model import ChatSection
from chatllama.text.chat_format import render
from chatllama.text.encoding import encode
from chatllama.text.tokenizer import load_tokenizer

LEAST = {"english": 15_000, "korean": 43_000, "japanese": 3_000, "chinese": 8_000, "code": 10_000}
LLAMA, STORIES = "llama_tokenizer", "stories260k/hf"


def strings(value: Any) -> Iterator[str]:
    """Every string inside a decoded JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


def json_lines(file: Path) -> Iterator[Any]:
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def code_texts() -> Iterator[str]:
    """The modules of Python's own library: the short ones whole, all of them cut at blank lines."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with tokenize.open(file) as source:
            text = source.read()
        if len(text) < 5_000:
            yield text
        yield from text.split("\n\n")


@cache
def texts_by_language(testdata: Path) -> dict[str, list[str]]:
    """Every text of the files of each language."""
    found: dict[str, list[str]] = {language: [] for language in LEAST}
    english, chinese = found["english"], found["chinese"]
    for name in ("reviews/rt-polarity.pos", "reviews/rt-polarity.neg", "text/tinyshakespeare.txt"):
        english += (testdata / name).read_text("latin-1").splitlines(keepends=True)[:6000]
    english += strings(list(json_lines(testdata / "hh_rlhf/harmless-base-first1800.jsonl.gz")))
    for name in ("alpaca", "dpo"):
        for language in ("en", "zh"):
            file = testdata / f"llama_factory/{name}_{language}_demo.json"
            texts = strings(json.loads(file.read_text("utf-8")))
            found["english" if language == "en" else "chinese"] += texts
    chinese += strings(json.loads((testdata / "oasst/oaast_rm_zh.json").read_text("utf-8")))
    chinese += strings(list(json_lines(testdata / "sharegpt/sharegpt_zh_1K_format.jsonl")))
    with (testdata / "ko_chatbot/ChatbotData.csv").open(encoding="utf-8", newline="") as table:
        found["korean"] += itertools.chain.from_iterable(csv.reader(table))
    found["korean"] += strings(list(json_lines(testdata / "reviews/nsmc_first20000.jsonl")))
    found["japanese"] += strings(list(json_lines(testdata / "ja_instruction/data.jsonl")))
    found["code"] += code_texts()
    return found


def assert_exact(folder: Path, texts: list[str]) -> None:
    """Alone, and as questions and answers of LLaMA-2's layout, which Meta encodes in one piece."""
    tokenizer = load_tokenizer(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    wrong = [text for text in texts if encode(tokenizer, text) != reference.encode(text)]
    assert not wrong, f"{len(wrong)} of {len(texts)} texts differ, first: {wrong[:3]!r}"
    chat = ChatSection(template="llama2")
    for asked, answer in zip(texts[::2], texts[1::2], strict=False):
        messages: list[Any] = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
        tail = f" {answer.strip()}" if answer.strip() else ""
        expected = reference.encode(f"[INST] {asked.strip()} [/INST]{tail}")
        assert render(tokenizer, chat, messages).ids == [1, *expected, 2], (asked, answer)


@pytest.mark.parametrize("folder", [pytest.param(LLAMA, marks=pytest.mark.slow), STORIES])
def test_some_texts_of_every_language(testdata: Path, folder: str) -> None:
    rng = random.Random(0)
    for texts in texts_by_language(testdata).values():
        assert_exact(testdata / folder, rng.sample(texts, 300))


@pytest.mark.slow
@pytest.mark.parametrize("language", LEAST)
def test_all_texts_of_a_language(testdata: Path, language: str) -> None:
    texts = texts_by_language(testdata)[language]
    assert len(texts) >= LEAST[language] and sum(LEAST.values()) >= 30_000
    assert_exact(testdata / LLAMA, texts)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [LLAMA, STORIES])
def test_random_texts(testdata: Path, folder: str) -> None:
    rng = random.Random(1)
    alphabets = ["ab", "abc ", "a \n", "= -", "the ot ", "<s>/unk0xA", " a", "()[]{}: \t"]
    texts = [
        "".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 60))) for _ in range(20_000)
    ]
    assert_exact(testdata / folder, [*texts, "".join(texts[:2000])])
