"""Layouts that people have: kept by a rule that is said, or refused with the right remedy."""

import gzip
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from malformed_inputs import GOOD_SFT, lines, message, read_bytes

from chatllama.config.sources import DataSource
from data.mixture import load_mixture
from data.reading import lines as line_reading
from data.reading.files import find_files
from data.reading.records import Kind
from data.reading.source import read_source

pytestmark = pytest.mark.usefixtures("data_cache")


def contents(row: dict[str, Any]) -> list[tuple[str, str]]:
    turns = row.get("messages") or row["prompt"]
    return [(turn["role"], turn["content"]) for turn in turns]


U, A, S = "user", "assistant", "system"
NAMED: list[tuple[dict[str, Any], Kind, list[tuple[str, str]]]] = [
    ({"instruction": "q", "context": "c", "response": "a", "category": "qa"}, "sft",
     [(U, "q\n\nc"), (A, "a")]),  # Dolly
    ({"instruction": "q", "context": "", "response": "a"}, "prompts", [(U, "q")]),
    ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, "sft",
     [(S, "s"), (U, "q"), (A, "a")]),  # OpenOrca
    ({"system_prompt": "", "question": "q", "response": "a"}, "sft", [(U, "q"), (A, "a")]),
    ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, "preferences",
     [(S, "s"), (U, "q")]),  # Orca's pairs
]  # fmt: skip


@pytest.mark.parametrize(("raw", "kind", "expected"), NAMED)
def test_layouts_with_names_of_their_own(
    raw: dict[str, Any], kind: Kind, expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    (row,) = read_bytes(tmp_path, "a.jsonl", lines(raw), kind)
    assert contents(row) == expected


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ({"instruction": "q", "input": "", "response1": "a", "response2": "b"}, "sft"),
        ({"instruction": "q", "answer_text": "b"}, "sft"),
        ({"prompt": "q", "best": "b"}, "sft"),
    ],
)
def test_a_wrong_guess_comes_with_a_mapping(raw: Any, kind: Kind, tmp_path: Path) -> None:
    try:
        (row,) = read_bytes(tmp_path, "a.jsonl", lines(raw), kind)
    except ValueError as error:
        assert "format: {prompt: question" in str(error)
    else:
        assert "format: {prompt: question" in row["problem"]


def dialogue(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


@pytest.mark.parametrize(
    ("human", "other"), [("Human", "GPT"), ("USER", "bing"), ("user", "ChatGPT")]
)
def test_roles_of_sharegpt_in_any_case(human: str, other: str, tmp_path: Path) -> None:
    (row,) = read_bytes(tmp_path, "a.json", lines(dialogue((human, "q"), (other, "a"))), "sft")
    assert contents(row) == [(U, "q"), (A, "a")] and row["notes"] == []


@pytest.mark.parametrize(
    "before", [[("gpt", "x")], [("system", "s"), ("bing", "x")], [("GPT", "x")] * 2]
)
def test_dialogues_that_open_with_the_assistant(
    before: list[tuple[str, str]], tmp_path: Path
) -> None:
    row = dialogue(*before, ("human", "q"), ("gpt", "a"))
    (found,) = read_bytes(tmp_path, "a.jsonl", lines(row), "sft")
    system = [(S, "s")] if before[0][0] == "system" else []
    assert contents(found) == [*system, (U, "q"), (A, "a")]
    (note,) = found["notes"]
    assert note == "opens with the assistant: its turns before the first question are cut"


TWO = [
    {"system": "one", "messages": [message(S, "two"), *GOOD_SFT["messages"]]},
    {"messages": [message(S, "one"), message(S, "two"), *GOOD_SFT["messages"]]},
    {"messages": [message(S, "one"), *GOOD_SFT["messages"], message(S, "two")]},
]


@pytest.mark.parametrize("row", TWO)
def test_two_system_prompts(row: dict[str, Any], tmp_path: Path) -> None:
    (found,) = read_bytes(tmp_path, "a.jsonl", lines(row), "sft")
    assert found["problem"] == "two system prompts"


@pytest.mark.parametrize("text", ["\u200b", " \u200d\ufeff\n", "\u2060\u00ad", "\u3164", "\u2800"])
def test_texts_of_which_nothing_is_seen(text: str, tmp_path: Path) -> None:
    for kind, row in (
        ("sft", {"messages": [message(U, "q"), message(A, text)]}),
        ("prompts", {"prompt": text}),
        ("text", {"text": text}),
        ("preferences", {"prompt": "q", "chosen": text, "rejected": "b"}),
    ):
        (found,) = read_bytes(tmp_path, "a.jsonl", lines(row), kind)  # pyright: ignore
        assert found["problem"].startswith("empty ")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet", "txt", "jsonl.gz"])
def test_pointers_of_git_lfs(kind: str, tmp_path: Path) -> None:
    found = read_bytes(tmp_path, f"a.{kind}", POINTER, "text")
    assert "git-lfs pointer" in found[0]["problem"] and "git lfs pull" in found[0]["problem"]


CHINESE = '{"prompt": "你好吗", "completion": "我很好。谢谢"}\n'
ENCODED = [
    (CHINESE.encode("gbk"), "`encoding: gb18030`"),
    (CHINESE.encode("gb18030"), 'as gb18030 it reads \'{"prompt": "你好吗"'),
    ('{"prompt": "Grüße", "completion": "çà"}\n'.encode("latin-1"), "`encoding: latin-1`"),
    (CHINESE.encode("utf-16-le"), "this is UTF-16; convert the file"),
    (lines(GOOD_SFT).decode().encode("utf-16-be"), "this is UTF-16; convert the file"),
]


@pytest.mark.parametrize(("content", "words"), ENCODED)
def test_hints_at_the_encoding(content: bytes, words: str, tmp_path: Path) -> None:
    (row,) = read_bytes(tmp_path, "a.jsonl", content, "sft")
    assert words in row["problem"]


def test_the_hint_is_right(tmp_path: Path) -> None:
    content = CHINESE.encode("gbk")
    (row,) = read_bytes(tmp_path, "a.jsonl", content, "sft", encoding="gb18030")
    assert contents(row) == [(U, "你好吗"), (A, "我很好。谢谢")]


@pytest.mark.parametrize("line", ['{"prompt": "q"},', '{"prompt": "q"} , ', '["a"],'])
def test_commas_at_line_ends(line: str, tmp_path: Path) -> None:
    content = lines(GOOD_SFT) + line.encode() + b"\n"
    *_, row = read_bytes(tmp_path, "a.jsonl", content, "sft")
    assert "it ends with a comma: remove those, or put [ and ]" in row["problem"]


def test_only_regular_files_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in ("/dev/zero", str(tmp_path / "pipe.jsonl")):
        with pytest.raises(ValueError, match="not a regular file"):
            find_files(path)
        with pytest.raises(ValueError, match=r"^a: not a regular file"):  # as it is opened, too
            line_reading.check_file(Path(path), "a")
    monkeypatch.setattr(line_reading, "MAX_BYTES", 1000)
    monkeypatch.setattr(line_reading, "MAX_LINE_BYTES", 500)
    packed = gzip.compress(lines(*[GOOD_SFT] * 100))
    *_, last = read_bytes(tmp_path, "a.jsonl.gz", packed, "sft")
    assert "over 1,000 bytes (unpacked)" in last["problem"]
    (last,) = read_bytes(tmp_path, "b.jsonl.gz", gzip.compress(b"x" * 10**5), "sft")
    assert "a line of over 500 bytes" in last["problem"]
    (last,) = read_bytes(tmp_path, "c.jsonl", lines(*[GOOD_SFT] * 100), "sft")
    assert "over 1,000 bytes" in last["problem"]


def parquet(path: Path, rows: list[dict[str, str]], **options: Any) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("rows", "options", "read"),
    [
        # compressed: the file says how large it is unpacked, and no row is read
        ([{"prompt": "q" * 90 + str(i), "completion": "a"} for i in range(300)],
         {"use_dictionary": False}, 0),
        # every row the same: only reading tells
        ([{"prompt": "q" * 90, "completion": "a"}] * 3000, {}, 64),
        ([{"prompt": "q", "completion": "a" * 5000}] * 3000, {}, 0),
    ],
)  # fmt: skip
def test_parquet_is_limited_by_its_unpacked_size(
    rows: list[dict[str, str]],
    options: dict[str, Any],
    read: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = parquet(tmp_path / "a.parquet", rows, compression="zstd", **options)
    assert len(content) < 8000
    *_, whole = read_bytes(tmp_path, "b.parquet", content, "sft")
    assert not whole["problem"]
    monkeypatch.setattr(line_reading, "MAX_BYTES", 10_000)
    *good, last = read_bytes(tmp_path, "c.parquet", content, "sft")
    assert "over 10,000 bytes (unpacked), the most that is read" in last["problem"]
    assert len(good) == read


@pytest.mark.parametrize("text", ["Translate:", "q", "Continue"])
def test_all_records_begin_alike(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": text, "completion": f"{i}"} for i in range(6)]
    file.write_bytes(lines(*rows))
    source = DataSource(path=str(file))
    read_source(source, "sft")
    with pytest.raises(ValueError, match=r"all begin with the same user turn.*`eval_data`"):
        load_mixture([source], [], 0.9999999, 0, "sft")
