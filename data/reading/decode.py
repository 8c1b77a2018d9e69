"""Decoding: the objects of a file, each with its place, and the place of what cannot be decoded.

What a record means is in `formats.py` and `records.py`.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice, zip_longest
from typing import Any

import pyarrow.parquet

from chatllama.config.sources import DataSource
from data.reading.files import COMPRESSIONS, TYPES, DataFile, suffix
from data.reading.formats import RecordError, shorten, unique_keys
from data.reading.json_arrays import ArrayReader, Line
from data.reading.lines import (
    DAMAGES,
    MAX_BYTES,
    check_file,
    check_unpacked,
    not_read,
    open_unpacked,
    read_lines,
)

Decoded = tuple[str, object]
_QUOTING: dict[str, dict[str, Any]] = {
    "double": {},
    "backslash": {"doublequote": False, "escapechar": "\\"},
    "none": {"quoting": csv.QUOTE_NONE},
}
_QUOTING_HINT = (
    "cells in quotation marks have `quoting: double` (a mark inside is doubled) or `backslash`; "
    "with `none` marks are text"
)
PARQUET_ROWS = 64
"""Rows in memory at a time."""
_BACKSLASHES = "a backslash before a mark makes it text, as with `quoting: backslash`"


def decode(file: DataFile, source: DataSource) -> Iterator[Decoded]:
    """Place and object of each record of a file; a `RecordError` in place of what is broken.

    The place of a line of a jsonl or csv file is `name:line`; of a record of a json array or a
    parquet file, its number from 1. A txt file has a document for each run of lines between blank
    ones, or, with the format `lines`, on each line, as `{"text": ...}`. A broken line is one
    error, and the next is read; after damage that hides where records begin, nothing more is.
    The formats `text` and `lines` open a file of any name.
    """
    where = file.name
    try:
        for where, record in _records(file, source):
            yield where, record
    except RecordError as error:
        yield str(error).split(": ", 1)[0], error
    except DAMAGES as error:
        reason = str(error) or type(error).__name__
        yield _error(where, f"the file cannot be read after this ({reason})")


def _error(where: str, message: str) -> tuple[str, RecordError]:
    return where, RecordError(f"{where}: {message}")


def _records(file: DataFile, source: DataSource) -> Iterator[Decoded]:
    """`decode`, with exceptions for damage and for errors after which reading cannot go on."""
    kind = suffix(file.path)
    if kind not in TYPES and source.format not in ("text", "lines") and file.aligned is None:
        known = f"known: {', '.join((*TYPES, *COMPRESSIONS))}"
        hint = "for plain text of any name give format: text (or lines)"
        yield _error(file.name, f"unknown file type {kind!r}; {known}; {hint}")
        return
    if kind not in (".csv", ".tsv") and (source.columns or source.quoting):
        key = "columns` is for csv and tsv files without a header line"
        key = key if source.columns else "quoting` is for csv and tsv files"
        yield _error(file.name, f"`{key}")
        return
    for path in filter(None, (file.path, file.aligned)):
        check_file(path, file.name)
    if kind == ".parquet" and file.aligned is None:
        yield from _parquet(file)
        return
    with open_unpacked(file.path) as stream:
        lines = read_lines(stream, file.name, source.encoding)
        try:
            if file.aligned is not None:
                with open_unpacked(file.aligned) as other:
                    there = read_lines(other, file.aligned.name, source.encoding)
                    yield from _aligned(lines, there, file)
            elif kind in (".csv", ".tsv"):
                quoting = source.quoting or _quoting(file, kind, source)
                for where, row in _table(lines, file.name, kind, quoting, source.columns):
                    if isinstance(row, Cells) and quoting == "backslash" != source.quoting:
                        row.notes += (_BACKSLASHES,)
                    yield where, row
            elif kind in (".json", ".jsonl", ".ndjson"):
                yield from _json(lines, file.name)
            else:
                yield from _texts(lines, by_line=source.format == "lines")
        except RecordError as error:
            raise RecordError(f"{error}{not_read(str(error), file.path)}") from None


def _aligned(here: Iterator[Line], there: Iterator[Line], file: DataFile) -> Iterator[Decoded]:
    """Every line of `file` with the same line of its translation."""
    assert file.aligned is not None
    for one, two in zip_longest(here, there):
        if one is None or two is None:
            where, _ = one or two or ("", "")
            shorter = file.name if one is None else file.aligned.name
            raise RecordError(f"{where}: {shorter} has no such line: the files are not aligned")
        where, text = one
        broken = next((each for each in (text, two[1]) if isinstance(each, RecordError)), None)
        yield where, broken or {"source": text, "target": two[1]}


def _texts(lines: Iterator[Line], *, by_line: bool) -> Iterator[Decoded]:
    """Each line, or each run of lines between blank ones, as a text record."""
    begin, paragraph = "", list[str]()
    for where, line in chain(lines, [("", "")]):
        if isinstance(line, RecordError):
            yield where, line
            continue
        if line.strip():
            begin = begin if paragraph else where
            paragraph.append(line)
        if paragraph and (by_line or not line.strip()):
            yield begin, {"text": "\n".join(paragraph)}
            paragraph = []


def _json(lines: Iterator[Line], name: str) -> Iterator[Decoded]:
    """Objects of a json array, or one of each line; the first line decides which."""
    written = ((where, line) for where, line in lines if not isinstance(line, str) or line.strip())
    begin = list(islice(written, 1))
    where, first = begin[0] if begin else ("", "")
    text = first.strip() if isinstance(first, str) else ""
    if text.startswith("["):
        begin += islice(written, 1)
        # Where the first of several lines is valid as it is, there is a list on every line.
        if len(begin) < 2 or isinstance(_parse(text, where), RecordError):
            reader = ArrayReader(chain(begin, written))
            for number, record in enumerate(reader.values(), start=1):
                yield f"{name}: record {number}", record
            return
    hint = "; a json file holds an array, or one object a line" if text == "{" else ""
    for where, line in chain(begin, written):
        yield where, _parse(line, where, hint) if isinstance(line, str) else line
        if hint:
            return


def _parse(text: str, where: str, hint: str = "") -> object:
    """The value of a piece of JSON, or the error; the same key twice is one."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[error.pos :].strip() == ",":
            hint = "; it ends with a comma: remove those, or put [ and ] around the records"
        reason = f"{error.msg}, column {error.colno}"
    except RecursionError:
        reason, hint = "nested too deeply", ""
    except ValueError as error:
        reason, hint = str(error), ""
    return RecordError(f"{where}: broken JSON ({reason}): {shorten(text)}{hint}")


class Cells(dict[str, object]):
    """A row of a table, and what was done to its cells, to be reported."""

    notes: tuple[str, ...] = ()


def _quoting(file: DataFile, kind: str, source: DataSource) -> str:
    """How a table without `quoting` writes marks: none in a tsv, doubled ones in a csv.

    But backslashes where these stand before marks and themselves alone, all other marks are at the
    ends of cells, and more rows of the header's length, all of the table, are read so.
    """
    if kind == ".tsv":
        return "none"
    found = set[str]()
    with open_unpacked(file.path) as stream:
        for _, line in read_lines(stream, file.name, source.encoding):
            found.update(re.findall(r"\\(.|$)", str(line)))
            if re.search(r'[^,]"[^,]', re.sub(r"\\.", "", str(line))):
                return "double"
    if '"' not in found or not found <= {'"', "\\"}:
        return "double"
    num_rows = {"double": 0, "backslash": 0}
    for quoting in num_rows:
        with open_unpacked(file.path) as stream, suppress(RecordError):
            lines = read_lines(stream, file.name, source.encoding)
            rows = _table(lines, file.name, kind, quoting, source.columns)
            num_rows[quoting] = sum(1 if isinstance(row, Cells) else -MAX_BYTES for _, row in rows)
    return max(num_rows, key=num_rows.__getitem__)


def _table(
    lines: Iterator[Line], name: str, kind: str, quoting: str, columns: Sequence[str] | None
) -> Iterator[Decoded]:
    """Rows of a csv or tsv; cells are text; a cell `nan`, a missing value of pandas, is empty."""
    csv.field_size_limit(sys.maxsize)  # its default refuses cells over 131,072 characters

    def texts() -> Iterator[str]:
        for _, line in lines:
            if isinstance(line, RecordError):
                raise line  # a quoted cell may go on behind it
            yield line + "\n"

    delimiter = "," if kind == ".csv" else "\t"
    rows = csv.reader(texts(), delimiter=delimiter, strict=True, **_QUOTING[quoting])
    header = None if columns is None else list(columns)
    while True:
        begin = rows.line_num + 1
        where = f"{name}:{begin}"
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise RecordError(f"{where}: {error}; {_QUOTING_HINT}") from None
        if header is None:
            header = _header(cells, where, delimiter)
        elif len(cells) == len(header):
            yield where, _cells(header, cells, rows.line_num > begin)
        elif cells:
            wrong = f"{len(cells)} cells under a header of {len(header)}: {shorten(cells)}"
            yield _error(where, f"{wrong}; {_QUOTING_HINT}" if '"' in "".join(cells) else wrong)


def _cells(header: list[str], cells: list[str], over_lines: bool) -> Cells:
    row = Cells(
        zip(header, ("" if cell in ("nan", "NaN") else cell for cell in cells), strict=True)
    )
    notes = ["a cell over several lines: are its quotation marks right?"] if over_lines else []
    if any(cell in ("nan", "NaN") for cell in cells):
        notes.append("a cell 'nan' read as empty")
    row.notes = tuple(notes)
    return row


def _header(cells: list[str], where: str, delimiter: str) -> list[str]:
    """The names of the columns.

    Raises:
        RecordError: a name is empty or duplicate, or the delimiter is another.
    """
    other = next((d for d in (";", "\t", ",") if d != delimiter and d in "".join(cells)), None)
    if len(cells) == 1 and other is not None:
        kinds = {"\t": "a tab (name the file .tsv)", ",": "a comma (name the file .csv)"}
        hint = kinds.get(other, repr(other))
        raise RecordError(f"{where}: one column {cells[0]!r}; is the delimiter {hint}?")
    names = [cell.strip() for cell in cells]
    if len(names) > 1 and not names[0]:
        names[0] = "(row number)"  # of pandas, which writes its index without a name
    for name in names:
        if not name or names.count(name) > 1:
            wrong = "twice" if name else "without a name"
            raise RecordError(f"{where}: a column {name!r} {wrong} in the header {shorten(cells)}")
    return names


def _parquet(file: DataFile) -> Iterator[Decoded]:
    """Rows of a parquet file; its null is a missing key."""
    with pyarrow.parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            raise RecordError(f"{file.name}: two columns of one name: {names}")
        rows = (row for batch in _limited(table, file.name) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{file.name}: record {number}", {k: v for k, v in row.items() if v is not None}


def _limited(table: pyarrow.parquet.ParquetFile, name: str) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a table, up to the limit of unpacked bytes.

    Its own word for its size is checked first. The rows are counted as well, since repeated values
    take no room in the file.
    """
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    check_unpacked(sum(group.total_byte_size for group in groups), name)
    unpacked = 0
    for batch in table.iter_batches(batch_size=PARQUET_ROWS):
        unpacked += batch.nbytes
        check_unpacked(unpacked, name)
        yield batch
