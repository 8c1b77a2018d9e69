"""Prompts from files, arguments and standard input."""

import json
from pathlib import Path

import pytest

from chatllama.inference.prompt_files import read_prompts


def test_prompts_of_a_jsonl_file(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\u2028b"}]
    records = [{"prompt": "x\ny"}, {"messages": turns, "id": "k"}, {"prompt": turns, "more": 1}]
    text = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second, third = read_prompts([], file, ["ignored"])
    assert (first.id, first.content, first.where) == (0, "x\ny", f"{file}:1")
    assert first.messages == [{"role": "user", "content": "x\ny"}]
    assert (second.id, second.messages, second.where) == ("k", turns, f"{file}:3")
    assert (third.id, third.messages) == (2, turns)


def test_prompts_of_text_and_arguments(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(b"one \r\n\r\ntwo\n")
    assert [(p.id, p.content) for p in read_prompts([], file, None)] == [(0, "one "), (1, "two")]
    assert [p.content for p in read_prompts([], None, iter(["a\n", "\n", "b"]))] == ["a", "b"]
    assert [p.content for p in read_prompts(["a\nb", "c"], None, iter(["d"]))] == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts"),
        ("\n\n", "no prompts"),
        ('{"prompt": "a"}\n{"prompt": ', r"p.jsonl:2: broken JSON \(.*, column 12\)"),
        ('"a"', "p.jsonl:1: expected an object"),
        ('{"text": "a"}', "expected one of `prompt` and `messages`; it has 'text'"),
        ('{"prompt": "a", "messages": []}', "expected one of"),
        ('{"messages": "a"}', "`messages` must be a list"),
        ('{"messages": [{"role": "user"}]}', "message 0 must have `role` and `content`"),
        ('{"messages": []}', "must be by 'user'; it is missing"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "it is by 'assistant'"),
        ('{"prompt": "  "}', "p.jsonl:1: the prompt is empty"),
        ('{"prompt": "a", "id": [1]}', r"`id` must be a number or a string, not \[1\]"),
        ('{"prompt": "a", "id": true}', "`id` must be"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts([], file, None)


def test_one_source_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    for arguments, name, message in (
        (["a"], file, "give one of the two"),
        ([], None, "no prompts: give them"),
        ([], file, "unknown type '.csv'; known: .jsonl, .txt"),
        ([], tmp_path / "none.txt", "no such file"),
        ([" "], None, "prompt 0: the prompt is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(arguments, name, None)
    (tmp_path / "p.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"p.txt: not UTF-8"):
        read_prompts([], tmp_path / "p.txt", None)
