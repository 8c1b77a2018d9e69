"""Tables as they are written: quotation marks, line ends, row numbers, numbers, missing values."""

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import pytest
from malformed_inputs import read_bytes

from chatllama.config.sources import DataSource
from data.reading.decode import decode
from data.reading.files import DataFile
from data.reading.source import read_source

pytestmark = pytest.mark.usefixtures("data_cache")

LANGUAGES = {"format": "translation", "languages": ["de", "en"], "columns": ["de", "en"]}
QUOTED = [
    ("Guten Tag.", "Good day."), ('"Ja!"', '"Yes!"'), ('"Zwei', "Two"), ('Drei"', "Three"),
]  # fmt: skip
SAID = [
    ("Guten Tag.", "Good day."), ('"Hallo", sagte er.', '"Hello," he said.'),
    ("Zwei", "Two"), ("Drei", "Three"),
]  # fmt: skip
INCH = [('ein 5" Rohr', 'a 5" pipe'), ('"', '"'), ('""', 'a""b')]


def cells(folder: Path, content: bytes, name: str = "a.tsv", **options: Any) -> list[Any]:
    file = folder / name
    file.write_bytes(content)
    source = DataSource.model_validate({"path": name, **options})
    return [record for _, record in decode(DataFile(file, name), source)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("rows", [QUOTED, SAID, INCH])
def test_marks_in_a_tsv_are_text(rows: list[tuple[str, str]], end: str, tmp_path: Path) -> None:
    content = "".join(f"{a}\t{b}{end}" for a, b in rows).encode()
    found = cells(tmp_path, content, columns=["de", "en"])
    assert [(row["de"], row["en"]) for row in found] == rows
    commas = content.replace(b",", b";").replace(b"\t", b",")
    found = cells(tmp_path, commas, "a.csv", columns=["de", "en"], quoting="none")
    assert [(row["de"], row["en"]) for row in found] == [
        (a.replace(",", ";"), b.replace(",", ";")) for a, b in rows
    ]
    made = read_bytes(tmp_path, "a.tsv", content, "sft", **LANGUAGES)
    assert [row["messages"][1]["content"] for row in made] == [b for _, b in rows]


def test_a_quoted_tsv_is_asked_for(tmp_path: Path) -> None:
    content = b'a\tb\n"x\ty"\t"say ""z"""\n'
    (row,) = cells(tmp_path, content, quoting="double")
    assert row == {"a": "x\ty", "b": 'say "z"'}
    (error,) = cells(tmp_path, content)
    assert "a.tsv:2: 3 cells under a header of 2" in str(error) and "quoting" in str(error)


BACKSLASHES = [
    (b'a,b\n"say \\"hi\\"",x\n', {"a": 'say "hi"', "b": "x"}),
    (b'a,b\n"x","end \\""\n', {"a": "x", "b": 'end "'}),
    (b'a,b\n"c:\\\\d, e",x\n', {"a": "c:\\d, e", "b": "x"}),
]


@pytest.mark.parametrize(("content", "expected"), BACKSLASHES)
def test_backslashes_before_marks(content: bytes, expected: Any, tmp_path: Path) -> None:
    assert cells(tmp_path, content, "a.csv", quoting="backslash") == [expected]


DETECTED = [
    ('say "hi", he said', "x"), ('"', '"'), ('"all of it"', 'one " mark'),
    ('two\nlines "here"', "a,b"), ('a path c:\\d and "marks"', 'at the end "'),
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_backslashes_are_found(packed: bool, tmp_path: Path) -> None:
    for row in DETECTED:
        written = io.StringIO(newline="")
        writer = csv.writer(written, doublequote=False, escapechar="\\", quoting=csv.QUOTE_ALL)
        writer.writerows([("prompt", "completion"), ("q", "a"), row, ("r", "b")])
        content = written.getvalue().encode()
        assert b'\\"' in content
        name = "a.csv.gz" if packed else "a.csv"
        file = tmp_path / name
        file.write_bytes(gzip.compress(content) if packed else content)
        data, report = read_source(DataSource(path=str(file)), "sft")
        found = [tuple(turn["content"] for turn in turns) for turns in data["messages"][:]]
        assert found == [("q", "a"), row, ("r", "b")]
        said = "3 records: a backslash before a mark makes it text, as with `quoting: backslash`"
        assert said in report.summary()


NOT_DETECTED = [
    (b'a,b\n"c:\\",x\n"say ""hi""",x\n', [("c:\\", "x"), ('say "hi"', "x")]),
    (b'a,b\nin c:\\"new",x\n', [('in c:\\"new"', "x")]),
    (b'a,b\n"\\",""\n', [("\\", "")]),
]


@pytest.mark.parametrize(("content", "expected"), NOT_DETECTED)
def test_backslashes_of_a_csv_with_doubled_marks_stay(
    content: bytes, expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    found = cells(tmp_path, content, "a.csv")
    assert [(row["a"], row["b"]) for row in found] == expected
    assert all(row.notes == () for row in found)


@pytest.mark.parametrize(
    "content",
    [b'a,b\n"say \\"hi\\" in \\LaTeX",x\n', b'a,b\n"say \\"hi\\"",x\n"y"\n',
     b'a,b\n"say \\"hi\\"",x\n"y ""z""",x\n'],
)  # fmt: skip
def test_a_wrong_dialect_says_what_to_set(content: bytes, tmp_path: Path) -> None:
    error = cells(tmp_path, content, "a.csv")[-1]
    assert "a.csv:2" in str(error) and "`backslash`" in str(error)


def test_quoting_is_for_tables(tmp_path: Path) -> None:
    source = DataSource(path="a.jsonl", quoting="none")
    (found,) = decode(DataFile(tmp_path / "a.jsonl", "a.jsonl"), source)
    assert "`quoting` is for csv and tsv" in str(found[1])


STOPPED = [
    ("a.csv", b'Q,A\nq,"a"b\nx,y\nz,w\n', "reading stopped at line 2, 2 lines not read"),
    ("a.csv", b'Q,A\nq,a\nq,"a\nx,y\nz,w\n', "reading stopped at line 3, 2 lines not read"),
    ("a.tsv", b"Q\tA\nq\ta\nq\t\xff\nx\ty\n", None),
    (
        "a.json",
        b'[\n{"a": 1},\n{"a" 1},\n{},\n{}\n]',
        "reading stopped at line 3, 3 lines not read",
    ),
]


@pytest.mark.parametrize(("name", "content", "words"), STOPPED)
def test_lines_that_are_not_read_are_counted(
    name: str, content: bytes, words: str | None, tmp_path: Path
) -> None:
    last = cells(tmp_path, content, name)[-1]
    assert words is None or str(last).endswith(words)
    if words is None:
        assert "reading stopped at line 3, 1 lines not read" in str(last)


@pytest.mark.parametrize("missing", ["nan", "NaN"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_cells_over_lines_and_missing_values_are_said(
    name: str, missing: str, tmp_path: Path
) -> None:
    content = f'prompt,completion\nq,"one\ntwo"\nr,{missing}\n{missing},x\ns,nano\n'
    file, quoted = tmp_path / name, name == "a.csv"
    file.write_text(content if quoted else content.replace(",", "\t").replace('"one\ntwo"', "one"))
    data, report = read_source(DataSource(path=str(file)), "sft")
    answers = [row[1]["content"] for row in data["messages"][:]]
    assert answers == ["one\ntwo" if quoted else "one", "nano"]
    assert report.left_out == {"empty assistant turn": 1, "empty user turn": 1}
    said = report.summary()
    assert ("1 records: a cell over several lines" in said) == quoted
    assert "2 records: a cell 'nan' read as empty" in said


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_numbers_and_row_numbers_of_pandas(name: str, tmp_path: Path) -> None:
    content = b",prompt,chosen,rejected,margin\n0,q,a,b,0.5\n1,r,c,d,2\n2,s,e,f,1e-1\n"
    content = content.replace(b",", b"\t") if name == "a.tsv" else content
    found = read_bytes(tmp_path, name, content, "preferences")
    assert [row["ratings"][0] for row in found] == [0.5, 2.0, 0.1]
    assert found[0]["notes"] == ["key not used: (row number)"]
