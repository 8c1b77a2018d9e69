"""Containers, encodings and line ends; what is broken comes with its place."""

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from chatllama.config.sources import DataSource
from data.reading.decode import decode
from data.reading.files import DataFile
from data.reading.formats import RecordError


def run(file: Path, **options: Any) -> list[tuple[str, object]]:
    source = DataSource.model_validate({"path": file.name, **options})
    return list(decode(DataFile(file, file.name), source))


def errors(found: list[tuple[str, object]]) -> list[str]:
    return [str(each) for _, each in found if isinstance(each, RecordError)]


LINES = b'{"a": "x"}\n{"a": "y"}\n'
EXPECTED = [{"a": "x"}, {"a": "y"}]


def pack_zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": pack_zstd}


@pytest.mark.parametrize("name", PACKERS)
def test_compressed_files(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"a.jsonl.{name}"
    packed = PACKERS[name](LINES)
    file.write_bytes(packed)
    assert run(file) == [(f"a.jsonl.{name}:1", {"a": "x"}), (f"a.jsonl.{name}:2", {"a": "y"})]
    file.write_bytes(packed + PACKERS[name](b'{"a": "z"}\n'))  # two members, as `cat` makes them
    assert [record for _, record in run(file)] == [*EXPECTED, {"a": "z"}]
    file.write_bytes(packed[: len(packed) // 2])
    assert len(errors(run(file))) == 1 and file.name in errors(run(file))[0]
    file.write_bytes(b"no packed file")
    assert "cannot be read after this" in errors(run(file))[0]


def test_many_packed_lines_end_before_the_damage(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    lines = b"".join(b'{"a": "%06d"}\n' % i for i in range(50_000))
    packed = gzip.compress(lines)
    file.write_bytes(packed[: len(packed) // 2])
    found = run(file)
    assert len(found) > 1000 and isinstance(found[-1][1], RecordError)
    assert f"a.jsonl.gz:{len(found) - 1}: the file cannot be read after this" in str(found[-1][1])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + LINES, EXPECTED),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n"), EXPECTED),
        ("a.jsonl", LINES.rstrip(b"\n") + b"\n\n  \n", EXPECTED),
        ("a.ndjson", LINES, EXPECTED),
        ("a.jsonl", b'[{"a": "x"},\n {"a": "y"}]', EXPECTED),
        ("a.json", b'\n\n[\n{"a": "x"}, {"a": "y"}\n]\n', EXPECTED),
        ("a.json", LINES, EXPECTED),
        ("a.JSONL", LINES, EXPECTED),
        ("a.csv", b"\xef\xbb\xbfa\r\nx\r\ny\r\n", EXPECTED),
        ("a.csv", b'a,b\n"x\n1","2"""\n', [{"a": "x\n1", "b": '2"'}]),
        ("a.tsv", b'a\tb\nx, 1\t"2"\n', [{"a": "x, 1", "b": '"2"'}]),
        ("a.csv", b"a\n" + b"x" * 200_000, [{"a": "x" * 200_000}]),
        ("a.jsonl", '{"a": "x\u2028y\x85"}'.encode(), [{"a": "x\u2028y\x85"}]),
        ("a.json", b"[]", []),
    ],
)
def test_contents(tmp_path: Path, name: str, content: bytes, expected: Any) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    assert [record for _, record in run(file)] == expected


def test_csv_without_a_header(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("x,NA\nNone,\n")
    found = run(file, columns=["a", "b"])
    assert found == [("a.csv:1", {"a": "x", "b": "NA"}), ("a.csv:2", {"a": "None", "b": ""})]
    other = tmp_path / "a.jsonl"
    other.write_bytes(LINES)
    assert "`columns` is for csv and tsv" in errors(run(other, columns=["a"]))[0]


def test_latin_1_is_named_and_can_be_set(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    text = '{"a": "x"}\n{"a": "café"}\n{"a": "y"}\n'
    file.write_bytes(text.encode("latin-1"))
    found = run(file)
    assert [where for where, _ in found] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    (wrong,) = errors(found)
    assert wrong == (
        "a.jsonl:2: not UTF-8 (invalid continuation byte at byte 11); as latin-1 it reads "
        '\'{"a": "café"}\': if that is right, set `encoding: latin-1`'
    )
    assert run(file, encoding="latin-1")[1] == ("a.jsonl:2", {"a": "café"})


def test_plain_text_of_any_name(tmp_path: Path) -> None:
    file = tmp_path / "a.pos"
    file.write_bytes(b"one\n\ntwo\nthree\r\n")
    assert "for plain text of any name give format: text" in errors(run(file))[0]
    assert [record for _, record in run(file, format="lines")] == [
        {"text": "one"}, {"text": "two"}, {"text": "three"},
    ]  # fmt: skip
    assert run(file, format="text") == [
        ("a.pos:1", {"text": "one"}),
        ("a.pos:3", {"text": "two\nthree"}),
    ]


def test_broken_lines_do_not_hide_the_next(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": "x"}\n{"a": \n{"a": 1, "a": 2}\n\xff\n{"a": "y"}\n')
    found = run(file)
    assert [record for _, record in found if not isinstance(record, RecordError)] == EXPECTED
    assert [str(each).split(": ")[0] for each in errors(found)] == [
        "a.jsonl:2", "a.jsonl:3", "a.jsonl:4",
    ]  # fmt: skip
    assert "the key 'a' is twice" in errors(found)[1]


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    rows = [{"a": "x", "b": None}, {"a": "y", "b": {"c": [1]}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert run(file) == [
        ("a.parquet: record 1", {"a": "x"}),
        ("a.parquet: record 2", {"a": "y", "b": {"c": [1]}}),
    ]
    file.write_bytes(file.read_bytes()[:-9])
    assert "a.parquet: the file cannot be read" in errors(run(file))[0]
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, names=["a", "a"])
    pyarrow.parquet.write_table(table, file)
    assert "two columns of one name" in errors(run(file))[0]


def test_deep_and_huge_json(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    deep = '{"a": ' * 100_000
    file.write_text(f'{deep}\n{{"a": {"9" * 5000}}}\n{json.dumps({"a": "x"})}\n')
    found = run(file)
    assert found[2] == ("a.jsonl:3", {"a": "x"})
    assert "a.jsonl:1: broken JSON (nested too deeply)" in errors(found)[0]
    assert "a.jsonl:2: broken JSON (Exceeds" in errors(found)[1]


def test_long_arrays_are_read_piece_by_piece(tmp_path: Path) -> None:
    """However an array is laid out, its records come, and errors behind them have their line."""
    rows = [{"text": f"[{i}], {{\u00e9\n" + "x" * (i % 50), "more": [[i]]} for i in range(3000)]
    layouts = [
        json.dumps(rows),
        json.dumps(rows, indent=2, ensure_ascii=False),
        "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
        "[" + "\n,".join(map(json.dumps, rows)) + "]",
    ]
    file = tmp_path / "a.json"
    for text in layouts:
        file.write_text(text, encoding="utf-8")
        found = run(file)
        assert [value for _, value in found] == rows
        assert found[-1][0] == "a.json: record 3000"
    lines = layouts[2].split("\n")
    broken = "\n".join([*lines[:2900], lines[2900].replace('"more":', '"more"'), *lines[2901:]])
    file.write_text(broken, encoding="utf-8")
    *good, (where, error) = run(file)
    assert len(good) == 2899 and where == "a.json:2901"
    assert str(error).startswith("a.json:2901: broken JSON (Expecting ':' delimiter, column ")


def test_an_array_is_not_held_in_memory(tmp_path: Path) -> None:
    row = {"text": "x" * 10_000}
    file = DataFile(tmp_path / "a.json", "a.json")
    file.path.write_text("[" + ",\n".join([json.dumps(row)] * 2000) + "]")
    tracemalloc.start()
    try:
        count = sum(value == row for _, value in decode(file, DataSource(path="a.json")))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 2000 and peak < 2 * 2**20  # of 20 MB
