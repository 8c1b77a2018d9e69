"""Hypothesis against every reader: any bytes, object or table; nothing crashes or vanishes."""

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed_inputs import lines, read_bytes

from chatllama.config.sources import ColumnMapping, DataSource, Format
from data.reading.decode import decode
from data.reading.files import COMPRESSIONS, TYPES, DataFile
from data.reading.formats import RecordError, Unusable
from data.reading.records import KIND_FORMATS, Kind, detect_format, parse_records, record_key
from data.reading.source import GOOD

pytestmark = pytest.mark.slow
# The same examples on every machine, so that CI never fails by chance.
BOUNDED = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
KEYS = (
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output",
    "instances", "history", "system", "chosen", "rejected", "margin", "answers", "ranks", "scores",
    "output_1", "output_2", "preference", "winner", "label", "annotator1", "question", "answer",
    "utterances", "turns", "text", "role", "content", "from", "value", "name", "message_id",
    "parent_id", "message_tree_id", "replies", "rank", "translation", "en", "de", "source",
    "target", "loss_weight", "tool_calls", "type",
)  # fmt: skip
WORDS = (
    "", " ", "q", "a", "user", "assistant", "system", "human", "gpt", "prompter", "text", "tie",
    "model_a", "1", "0.5", "true", "\n\nHuman: q\n\nAssistant: a", "\n\nHuman:", "\ud800", "</s>",
)  # fmt: skip
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=20))
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 2, 0.5, 10**400]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)
MAPPINGS = st.dictionaries(
    st.sampled_from(list(ColumnMapping.model_fields)),
    st.one_of(st.sampled_from(KEYS), st.sampled_from(["messages.0", "history.0.1", "a.b", ""])),
    min_size=1,
    max_size=4,
)
FILES = [*(f"a{kind}" for kind in TYPES), *(f"a.jsonl{packed}" for packed in COMPRESSIONS)]
FORMATS: tuple[Format, ...] = get_args(Format)
KINDS: tuple[Kind, ...] = get_args(Kind)


def parsed(raw: Any, format: Any, kind: Kind) -> None:
    """`parse_records` gives records that have keys, reasons, or an error with the place."""
    try:
        found = parse_records(raw, format, kind, "f:7")
    except RecordError as error:
        assert str(error).startswith("f:7: ")
        return
    assert found
    for place, record in found:
        assert place.startswith("f:7")
        if isinstance(record, Unusable):
            assert str(record)
        else:
            assert len(record_key(record)) == 32


@pytest.mark.parametrize("format", FORMATS)
@BOUNDED
@given(raw=st.one_of(OBJECTS, VALUES), kind=st.sampled_from(KINDS))
def test_any_object_under_any_format(format: Format, raw: Any, kind: Kind) -> None:
    parsed(raw, format, kind)


@BOUNDED
@given(raw=OBJECTS, columns=MAPPINGS, kind=st.sampled_from(KINDS))
def test_any_object_under_any_mapping(raw: Any, columns: dict[str, str], kind: Kind) -> None:
    if any(columns.values()):
        parsed(raw, ColumnMapping(**columns), kind)


@BOUNDED
@given(raw=VALUES, kind=st.sampled_from(KINDS))
def test_detection_names_a_format_of_the_kind_or_the_place(raw: Any, kind: Kind) -> None:
    try:
        assert detect_format(raw, kind, "f:7") in KIND_FORMATS[kind]
    except RecordError as error:
        assert str(error).startswith("f:7: ")


@BOUNDED
@given(rows=st.lists(OBJECTS, min_size=1, max_size=6), kind=st.sampled_from(KINDS))
def test_any_lines_of_json(rows: list[Any], kind: Kind) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = read_bytes(Path(folder), "a.jsonl", lines(*rows), kind)
    assert {row["number"] for row in found} == set(range(len(rows)))


@pytest.mark.parametrize(
    "name", [f"a{kind}" for kind in TYPES] + [f"a.jsonl{p}" for p in COMPRESSIONS]
)
@BOUNDED
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.lists(st.one_of(st.binary(max_size=20), st.just(b'{"text": "a"}'), st.just(b'"a,\t"'),
                           st.just(b"\xef\xbb\xbf"), st.just(b"[")), max_size=8)
        .map(b"\n".join),
    )
)  # fmt: skip
def test_any_bytes_in_any_type_of_file(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            read_bytes(Path(folder), name, content, "text")
        except ValueError as error:
            assert str(error) == f"{name}: no records"


def decoded(name: str, content: bytes, **options: Any) -> list[object]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        return [
            value for _, value in decode(DataFile(file, name), DataSource(path=name, **options))
        ]


CLEAN = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(KEYS), st.one_of(CLEAN, st.integers(), st.none()), min_size=1),
    min_size=1,
    max_size=5,
)


@BOUNDED
@given(rows=ROWS, ascii=st.booleans(), packed=st.booleans(), array=st.booleans())
def test_json_comes_back_as_it_was(rows: list[Any], ascii: bool, packed: bool, array: bool) -> None:
    texts = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    text = json.dumps(rows, ensure_ascii=ascii, indent=1) if array else "\n".join(texts)
    content = text.encode()
    name = "a.jsonl.gz" if packed else "a.jsonl"
    assert decoded(name, gzip.compress(content) if packed else content) == rows


@BOUNDED
@given(
    rows=st.lists(st.lists(CLEAN, min_size=2, max_size=2), max_size=5),
    type_=st.sampled_from([".csv", ".tsv"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_tables_come_back_as_they_were(rows: list[list[str]], type_: str, end: str) -> None:
    sink = io.StringIO(newline="")
    delimiter = "," if type_ == ".csv" else "\t"
    table = csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    table.writerows([["one", "two"], *rows])
    found = decoded("a" + type_, sink.getvalue().encode(), quoting="double")
    # A quoted line break is read as LF, and nothing else changes.
    assert found == [{"one": unified(one), "two": unified(two)} for one, two in rows]


def unified(text: str) -> str:
    while "\r\n" in text:
        text = text.replace("\r\n", "\n")
    return text


@BOUNDED
@given(rows=ROWS)
def test_parquet_comes_back_as_it_was(rows: list[Any]) -> None:
    texts = [{key: str(value) for key, value in row.items() if value is not None} for row in rows]
    names = sorted({key for row in texts for key in row} | {"text"})
    columns = {name: [row.get(name) for row in texts] for name in names}
    sink = io.BytesIO()
    schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), sink)
    assert decoded("a.parquet", sink.getvalue()) == texts


@BOUNDED
@given(parents=st.lists(st.one_of(st.none(), st.integers(0, 7)), min_size=1, max_size=8))
def test_any_forest_of_messages(parents: list[int | None]) -> None:
    rows = [
        {
            "message_id": str(i),
            "parent_id": None if parent is None else str(parent),
            "role": "prompter" if i % 2 else "assistant",
            "text": f"t{i}",
            "rank": i,
        }
        for i, parent in enumerate(parents)
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = read_bytes(Path(folder), "a.jsonl", lines(*rows), "sft", format="oasst")
    good = [row for row in found if row["severity"] == GOOD]
    said = {turn["content"] for row in good for turn in row["messages"]}
    assert said <= {row["text"] for row in rows}
