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


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_as_its_records(tmp_path: Path, name: str, indent: int | None) -> None:
    file = tmp_path / name
    turns = [{"role": "user", "content": "c"}]
    file.write_text(
        json.dumps(
            ["a", {"prompt": "b", "id": 7.0}, {"messages": turns, "id": None}], indent=indent
        )
    )
    found = read_prompts([], file, None)
    assert [(p.id, p.messages[0]["content"]) for p in found] == [(0, "a"), (7, "b"), (2, "c")]
    assert found[1].where == f"{file}[1]"


@pytest.mark.parametrize(("given", "id"), [("1.0", 1), ("null", 1), ('"x"', "x"), ("-3.0", -3)])
def test_ids_of_columns_with_gaps(tmp_path: Path, given: str, id: int | str) -> None:
    file = tmp_path / "p.jsonl"
    line = '{"prompt": "b", "messages": null, "id": %s}\n'
    file.write_text('{"prompt": "a"}\n' + line % given)
    found = read_prompts([], file, None)[1].id
    assert found == id and type(found) is type(id)


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
        ("5", "p.jsonl:1: expected an object"),
        ('{"text": "a"}', "expected one of `prompt` and `messages`; it has 'text'"),
        ('{"prompt": "a", "messages": []}', "expected one of"),
        ('{"messages": "a"}', "`messages` must be a list"),
        ('{"messages": [{"role": "user"}]}', "message 0 must have `role` and `content`"),
        ('{"messages": []}', "must be by 'user'; it is missing"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "it is by 'assistant'"),
        ('{"prompt": "  "}', "p.jsonl:1: the prompt is empty"),
        ('{"prompt": "a", "id": [1]}', r"`id` must be a number or a string, not \[1\]"),
        ('{"prompt": "a", "id": true}', "`id` must be"),
        ('{"prompt": "a", "id": 1.5}', "`id` must be a number"),
        ("[]", "no prompts"),
        ('["a", {"text": "b"}]', r"p.jsonl\[1\]: expected one of"),
        ('[\n"a",\n]', r"p.jsonl: broken JSON \(.*, line 3, column 1\)"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts([], file, None)


def test_a_last_answer_is_for_continuing_only(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text('{"prompt": "c"}\n' + json.dumps({"messages": turns}) + "\n")
    with pytest.raises(ValueError, match=r"p.jsonl:2: .* by 'assistant'; --continue-final-message"):
        read_prompts([], file, None)
    asked, begun = read_prompts([], file, None, continues=True)
    assert asked.messages[-1]["role"] == "user" and begun.messages == turns
    for bad in ([*turns[:1], {"role": "assistant", "content": " "}], [], [{"role": "tool"}]):
        file.write_text(json.dumps({"messages": bad}))
        with pytest.raises(ValueError, match=r"p.jsonl:1: "):
            read_prompts([], file, None, continues=True)


def test_one_source_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    for arguments, name, message in (
        (["a"], file, "give one of the two"),
        ([], None, "no prompts: give them"),
        ([], file, "unknown type '.csv'; known: .jsonl, .json, .txt"),
        ([], tmp_path / "none.txt", "no such file"),
        ([" "], None, "prompt 0: the prompt is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(arguments, name, None)
    (tmp_path / "p.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"p.txt: not UTF-8"):
        read_prompts([], tmp_path / "p.txt", None)
