"""Translation as instruction data: pairs in every layout, requests, and EOS before padding."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from malformed_inputs import lines, read_bytes
from one_record import parse_record
from pydantic import ValidationError

from chatllama.config.model import ChatSection
from chatllama.config.sources import DataSource, split_language
from chatllama.text.chat_format import render
from chatllama.text.encoding import decode
from chatllama.text.padding import pad_right
from chatllama.text.tokenizer import load_tokenizer
from data.reading.formats import RecordError
from data.reading.records import Conversation, Prompt, detect_format
from data.reading.source import read_source
from data.reading.translation import TEMPLATES, request
from data.tokenize import tokenize

pytestmark = pytest.mark.usefixtures("data_cache")

DE_EN = ["de", "en"]
PAIRS = [("Guten Tag.", "Good day."), ("Wer ist da?", "Who is there?"), ("Es regnet.", "It rains.")]


def read(path: Path, languages: list[str] | None = None, **options: Any) -> list[tuple[str, str]]:
    """What is asked and answered."""
    source = DataSource.model_validate(
        {"path": str(path), "format": "translation", "languages": languages or DE_EN, **options}
    )
    data, report = read_source(source, "sft")
    assert report.format == "translation"
    return [(row[0]["content"], row[1]["content"]) for row in data["messages"][:]]


EXPECTED = [(request(german, DE_EN), english) for german, english in PAIRS]


def test_every_layout_gives_the_same_instructions(tmp_path: Path) -> None:
    wmt = [{"translation": {"de": german, "en": english}} for german, english in PAIRS]
    (tmp_path / "wmt.jsonl").write_bytes(lines(*wmt))
    flat = [{"id": 1, "en": english, "de": german} for german, english in PAIRS]
    (tmp_path / "flat.jsonl").write_bytes(lines(*flat))
    named = [{"source": german, "target": english} for german, english in PAIRS]
    (tmp_path / "named.jsonl").write_bytes(lines(*named))
    table = "".join(f"{english}\t{german}\n" for german, english in PAIRS)
    (tmp_path / "table.tsv").write_text(table)
    (tmp_path / "news.de").write_text("".join(f" {german} \r\n" for german, _ in PAIRS))
    packed = gzip.compress("".join(f"{english}\n" for _, english in PAIRS).encode())
    (tmp_path / "news.en.gz").write_bytes(packed)
    for name in ("wmt.jsonl", "flat.jsonl", "named.jsonl"):
        assert read(tmp_path / name) == EXPECTED
    assert read(tmp_path / "table.tsv", columns=["en", "de"]) == EXPECTED
    assert read(tmp_path / "news") == EXPECTED
    back = read(tmp_path / "news", ["en", "de"])
    assert back == [(request(english, ["en", "de"]), german) for german, english in PAIRS]


def test_requests_say_the_languages_and_hold_the_text() -> None:
    found = {request(f"Satz {i}", DE_EN) for i in range(200)}
    for template in TEMPLATES:
        asked = template.format(source="German", target="English", text="Satz 7")
        assert "English" in asked and "German" in asked
        assert request("Satz 7", DE_EN, template) == asked
        begin = template.split("{text}")[0].format(source="German", target="English")
        assert sum(each.startswith(begin or "Satz") for each in found) >= 15
    braces = request("{target} {0}", DE_EN, TEMPLATES[0])
    assert braces.endswith("\n\n{target} {0}")
    assert "Low German" in request("x", ["nds=Low German", "pt-BR"], TEMPLATES[0])
    assert split_language("pt-BR") == ("pt-BR", "Portuguese")


def test_prompts_and_detection() -> None:
    raw = {"translation": {"de": "Guten Tag.", "en": "Good day."}, "languages": DE_EN}
    assert detect_format(raw, "sft", "f:1") == "translation"
    asked: Any = {"role": "user", "content": request("Guten Tag.", DE_EN)}
    assert parse_record(raw, "translation", "prompts", "f:1") == Prompt([asked])
    answer: Any = {"role": "assistant", "content": "Good day."}
    assert parse_record(raw, "translation", "sft", "f:1") == Conversation([asked, answer])
    for wrong in (["xx", "en"], ["de", "de"], ["de"], "de"):
        with pytest.raises(RecordError, match="f:1: languages: "):
            parse_record({**raw, "languages": wrong}, "translation", "sft", "f:1")
    del raw["languages"]
    with pytest.raises(RecordError, match=r"f:1: format translation needs `languages`, as in"):
        parse_record(raw, "translation", "sft", "f:1")


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"translation": {"de": "a"}}, "expected 'de' and 'en' (or source and target), got ['de']"),
    ({"de": "a", "en": 3}, "en: expected a string, got 3"),
    ({"translation": []}, "translation: expected an object with keys"),
    ({"de": "a", "en": None}, "en: expected a string, got None"),
    ({"de": " ", "en": "a"}, "empty user turn"),
    ({"de": "a", "en": ""}, "empty assistant turn"),
]


@pytest.mark.parametrize(("row", "words"), BROKEN)
def test_broken_pairs_have_their_place(row: Any, words: str, tmp_path: Path) -> None:
    content = lines({"de": "a", "en": "b"}, row)
    options = {"format": "translation", "languages": DE_EN}
    _, bad = read_bytes(tmp_path, "a.jsonl", content, "sft", **options)
    assert bad["where"] == "a.jsonl:2" and words in bad["problem"]


def test_files_that_are_not_aligned(tmp_path: Path) -> None:
    (tmp_path / "a.de").write_bytes(b"eins\nzwei\n")
    (tmp_path / "a.en").write_bytes(b"one\n")
    with pytest.raises(ValueError, match=r"a\.de:2: a\.en has no such line"):
        read(tmp_path / "a")
    (tmp_path / "a.en").write_bytes(b"one\ntwo\nthree\n")
    with pytest.raises(ValueError, match=r"a\.en:3: .*a\.de has no such line"):
        read(tmp_path / "a")
    (tmp_path / "a.en").write_bytes(b"one\n\xfftwo\n")
    with pytest.raises(ValueError, match=r"a\.en:2: not UTF-8"):
        read(tmp_path / "a")
    (tmp_path / "a.en").unlink()
    with pytest.raises(ValueError, match=r"a\.de is there, but no .*a\.en beside it"):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "translation"}, "go together"),
        ({"languages": ["de", "en"]}, "go together"),
        ({"format": "translation", "languages": ["de", "xx"]}, "unknown language 'xx'; known: ar"),
        ({"format": "translation", "languages": ["de", "de"]}, "no translation"),
        ({"format": "translation", "languages": ["de"]}, "at least 2 items"),
    ],
)
def test_the_config_is_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataSource.model_validate({"path": "a", **options})


def test_sentence_then_eos_then_padding(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*[{"de": de, "en": en} for de, en in PAIRS]))
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    chat = ChatSection(template="llama2")
    source = DataSource(path=str(tmp_path / "a.jsonl"), format="translation", languages=DE_EN)
    examples, _ = tokenize(read_source(source, "sft")[0], "sft", tokenizer, chat, 300)
    assert isinstance(tokenizer.pad_token_id, int)
    ids, mask = pad_right(examples["input_ids"][:], tokenizer.pad_token_id)
    eos = tokenizer.eos_token_id
    for row, real, (asked, answer) in zip(ids.tolist(), mask.tolist(), EXPECTED, strict=True):
        length = sum(real)
        assert row[length - 1] == eos and row[:length].count(eos) == 1
        assert row[length:] == [tokenizer.pad_token_id] * (len(row) - length)
        prompt: list[Any] = [{"role": "user", "content": asked}]
        begin = len(render(tokenizer, chat, prompt, add_generation_prompt=True).ids)
        assert decode(tokenizer, row[begin : length - 1]).strip() == answer
