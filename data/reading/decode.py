"""Decoding: the objects of a file, each with its place, and the place of what cannot be decoded.

What a record means is in `formats.py` and `records.py`.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet

from chatllama.config.sources import DataSource
from data.reading.files import COMPRESSIONS, TYPES, DataFile, suffix
from data.reading.formats import RecordError, shorten, unique_keys
from data.reading.json_arrays import ArrayReader, Line

Decoded = tuple[str, object]
DAMAGES = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)


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
    if source.columns is not None and kind not in (".csv", ".tsv"):
        yield _error(file.name, "`columns` is for csv and tsv files without a header line")
        return
    if kind == ".parquet" and file.aligned is None:
        yield from _parquet(file)
        return
    with _open(file.path) as stream:
        lines = _lines(stream, file.name, source.encoding)
        if file.aligned is not None:
            with _open(file.aligned) as other:
                there = _lines(other, file.aligned.name, source.encoding)
                yield from _aligned(lines, there, file)
        elif kind in (".csv", ".tsv"):
            yield from _table(lines, file.name, "," if kind == ".csv" else "\t", source.columns)
        elif kind in (".json", ".jsonl", ".ndjson"):
            yield from _json(lines, file.name)
        else:
            yield from _texts(lines, by_line=source.format == "lines")


def _open(file: Path) -> BinaryIO:
    """The unpacked bytes of a file."""
    packing = file.suffix.lower()
    if packing == ".zst":
        packed = pyarrow.input_stream(str(file), compression="zstd")
        return io.BufferedReader(cast(Any, packed), buffer_size=1 << 16)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(packing, Path.open)(file, "rb")


def _lines(stream: Iterable[bytes], name: str, encoding: str) -> Iterator[Line]:
    """`name:line` and text of each line, without its end; an error for undecodable bytes."""
    for number, line in enumerate(stream, start=1):
        where = f"{name}:{number}"
        if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise RecordError(f"{where}: this is UTF-16; convert the file to UTF-8")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield where, line.decode(encoding).rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield where, RecordError(f"{where}: {_undecodable(line, error)}")


def _undecodable(line: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with a line, and what it would be as latin-1."""
    around = line[max(0, error.start - 20) : error.end + 20]
    reads = around.decode("latin-1").strip()
    hint = f"; as latin-1 it reads {shorten(reads)}: if that is right, set `encoding: latin-1`"
    wrong = f"not {error.encoding.upper()} ({error.reason} at byte {error.start + 1})"
    return wrong + (hint if error.encoding.startswith("utf") and reads.isprintable() else "")


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
        if "\r" in text.strip():
            hint = "; the lines end with CR alone: convert the file to LF"
        reason = f"{error.msg}, column {error.colno}"
    except RecursionError:
        reason, hint = "nested too deeply", ""
    except ValueError as error:
        reason, hint = str(error), ""
    return RecordError(f"{where}: broken JSON ({reason}): {shorten(text)}{hint}")


def _table(
    lines: Iterator[Line], name: str, delimiter: str, columns: Sequence[str] | None
) -> Iterator[Decoded]:
    """Rows of a csv or tsv; every cell is text."""
    csv.field_size_limit(sys.maxsize)  # its default refuses cells over 131,072 characters

    def texts() -> Iterator[str]:
        for _, line in lines:
            if isinstance(line, RecordError):
                raise line  # a quoted cell may go on behind it
            yield line + "\n"

    rows = csv.reader(texts(), delimiter=delimiter, strict=True)
    header = None if columns is None else list(columns)
    while True:
        where = f"{name}:{rows.line_num + 1}"
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise RecordError(f"{where}: {error}") from None
        if header is None:
            header = _header(cells, where, delimiter)
        elif len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        elif cells:
            wrong = f"{len(cells)} cells under a header of {len(header)}: {shorten(cells)}"
            yield _error(where, wrong)


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
        batches = table.iter_batches(batch_size=1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{file.name}: record {number}", {k: v for k, v in row.items() if v is not None}
