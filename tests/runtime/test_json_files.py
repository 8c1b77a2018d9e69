"""JSON files of strangers: a value of the type asked for, or one ValueError that names the file."""

import os
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import TypedDict

from chatllama.runtime import json_files
from chatllama.runtime.json_files import held_to_be_whole, read_json


class Shape(TypedDict):
    count: int
    names: list[str]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "EOF"), ("{", "EOF"), ("[" * 100_000, "recursion limit"), ('{"a":' * 5_000, "recursi"),
        ("null", "the whole must be .*, not None"), ("[]", "must be .*not \\[\\]"),
        ("1" * 10_000, "number out of range"), ("version https://x\noid 1", "expected"),
        ("5", "not 5"), ("\0\0", "expected"),
    ],
)  # fmt: skip
def test_what_is_no_object_is_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "some.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"some\.json is damaged: .*{words}"):
        read_json(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"count": "3", "names": []}', "count must be a valid integer, not '3'"),
        ('{"count": true, "names": []}', "count must be a valid integer, not True"),
        ('{"count": 1.5, "names": []}', "count must be"),
        ('{"count": 1, "names": ["a", 5]}', "names.1 must be a valid string, not 5"),
        ('{"count": 1, "names": "' + "x" * 1000 + '"}', "names must be .*x{50,60}\\.\\.\\.$"),
        ('{"count": 1}', "names is missing"), ('{"names": [], "count": null}', "count must be"),
    ],
)  # fmt: skip
def test_values_of_other_types_are_named(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "some.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"some\.json is damaged: {words}"):
        read_json(file, Shape)
    file.write_text('{"count": 1, "names": ["a"]}')
    assert read_json(file, Shape) == {"count": 1, "names": ["a"]}


def test_only_regular_files_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "MOST_BYTES", 10)
    monkeypatch.setattr(json_files.read_regular, "__defaults__", (10,))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_text('{"a": 123456789}')
    for name, words in (("pipe", "not a regular file"), ("long", "16 bytes; at most 10"),
                        (".", "not a regular file")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing")


@pytest.mark.parametrize("wrong", [{}, [], None, {"a": []}, {"a": {"b": "x"}}])
def test_content_of_another_shape_names_its_file(wrong: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"a\.json is damaged: \w+Error"),
        held_to_be_whole(Path("a.json")),
    ):
        _ = wrong["a"]["b"] + 1
