"""Decoding: the objects of a file, each with its place, and the place of what cannot be decoded.

Nothing here knows what a record means; that is `layouts.py` and `records.py`.
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
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet

from data.reading.files import (
    COMPRESSIONS,
    TYPES,
    DataFile,
    suffix,
)
from data.reading.formats import RecordError, shorten, unique_keys
from data.reading.json_arrays import ArrayReader

Decoded = tuple[str, object]
Line = tuple[str, "str | RecordError"]
DAMAGES = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)


def decode(
    file: DataFile,
    encoding: str = "utf-8",
    columns: Sequence[str] | None = None,
    format: object = None,
) -> Iterator[Decoded]:
    """Place and object of each record of a file; a `RecordError` in place of what is broken.

    A line of a jsonl or csv file is placed by `name:line`; a record of a json array or a parquet
    file by its number, from 1. A txt file holds a document for each run of lines between blank
    ones, or, with the format `lines`, on each line, as `{"text": ...}`. A broken line is one
    error, and the next is read; damage after which no record can be told from the next ends the
    file.

    Args:
        file: what to open.
        encoding: of text files.
        columns: names of the columns of a csv or tsv file that has no header.
        format: of the source; `text` and `lines` open a file of any name.
    """
    kind = suffix(file.path)
    plain = format in ("text", "lines") or file.aligned is not None
    if kind not in TYPES and not plain:
        hint = "for plain text of any name give format: text (or lines)"
        error = f"unknown file type {kind!r}; known: {', '.join((*TYPES, *COMPRESSIONS))}; {hint}"
        yield file.name, RecordError(f"{file.name}: {error}")
        return
    if columns is not None and kind not in (".csv", ".tsv"):
        error = "`columns` is for csv and tsv files without a header line"
        yield file.name, RecordError(f"{file.name}: {error}")
        return
    where = file.name
    try:
        for where, record in _records(file, kind, encoding, columns, format):
            yield where, record
    except RecordError as error:
        yield str(error).split(": ", 1)[0], error
    except DAMAGES as error:
        reason = str(error) or type(error).__name__
        yield where, RecordError(f"{where}: the file cannot be read after this ({reason})")


def _records(
    file: DataFile, kind: str, encoding: str, columns: Sequence[str] | None, format: object
) -> Iterator[Decoded]:
    """`decode`, with exceptions for damage and for errors after which reading cannot go on."""
    if file.aligned is not None:
        yield from _aligned(file, file.aligned, encoding)
        return
    if kind == ".parquet":
        yield from _parquet(file)
        return
    with _open(file.path) as stream:
        lines = _lines(stream, file.name, encoding)
        match kind:
            case ".csv" | ".tsv":
                yield from _table(lines, file.name, "," if kind == ".csv" else "\t", columns)
            case ".json" | ".jsonl" | ".ndjson":
                yield from _json(lines, file.name)
            case _ if format == "lines":
                yield from _single_lines(lines)
            case _:
                yield from _paragraphs(lines)


def _open(file: Path) -> BinaryIO:
    """The unpacked bytes of a file."""
    match file.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(file, "rb"))
        case ".bz2":
            return cast(BinaryIO, bz2.open(file, "rb"))
        case ".xz":
            return cast(BinaryIO, lzma.open(file, "rb"))
        case ".zst":
            packed = pyarrow.input_stream(str(file), compression="zstd")
            return io.BufferedReader(cast(Any, packed), buffer_size=1 << 16)
        case _:
            return file.open("rb")


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


def _single_lines(lines: Iterator[Line]) -> Iterator[Decoded]:
    """Each line that is not blank, as a text record."""
    for where, line in lines:
        if isinstance(line, RecordError):
            yield where, line
        elif line.strip():
            yield where, {"text": line}


def _aligned(file: DataFile, other: Path, encoding: str) -> Iterator[Decoded]:
    """Every line with the same line of the other file."""
    with _open(file.path) as stream, _open(other) as stream_there:
        here = _lines(stream, file.name, encoding)
        there = _lines(stream_there, other.name, encoding)
        for one, two in zip_longest(here, there):
            if one is None or two is None:
                place, shorter = (two, file.name) if one is None else (one, other.name)
                assert place is not None
                wrong = f"{shorter} has no such line: the files are not aligned"
                raise RecordError(f"{place[0]}: {wrong}")
            where, text = one
            broken = next((each for each in (text, two[1]) if isinstance(each, RecordError)), None)
            yield where, broken or {"source": text, "target": two[1]}


def _paragraphs(lines: Iterator[Line]) -> Iterator[Decoded]:
    """Each run of lines between blank ones, as a text record."""
    begin, paragraph = "", list[str]()
    for where, line in lines:
        if isinstance(line, RecordError):
            yield where, line
        elif line.strip():
            begin = begin if paragraph else where
            paragraph.append(line)
        elif paragraph:
            yield begin, {"text": "\n".join(paragraph)}
            paragraph = []
    if paragraph:
        yield begin, {"text": "\n".join(paragraph)}


def _json(lines: Iterator[Line], name: str) -> Iterator[Decoded]:
    """Objects of a json array, or one of each line; told apart by the first line."""
    written = ((where, line) for where, line in lines if not isinstance(line, str) or line.strip())
    where, first = next(written, ("", ""))
    if isinstance(first, str) and first.lstrip().startswith("["):
        after = next(written, None)
        if after is None or isinstance(parse_json(first, where), RecordError):
            rest = written if after is None else chain([after], written)
            yield from _array(where, first, rest, name)
            return
        written = chain([after], written)  # a list on every line
    hint = ""
    if isinstance(first, str) and first.strip() == "{":
        hint = "; a json file holds an array, or one object a line"
    if first:
        record = parse_json(first, where, hint) if isinstance(first, str) else first
        yield where, record
        if hint:
            return
    for where, line in written:
        yield where, parse_json(line, where) if isinstance(line, str) else line


def parse_json(text: str, where: str, hint: str = "") -> object:
    """The value of a piece of JSON, or the error; the same key twice is one."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        if "\r" in text.strip():
            hint = "; the lines end with CR alone: convert the file to LF"
        column = f", column {error.colno}"
        wrong = f"broken JSON ({error.msg}{column}): {shorten(text)}{hint}"
    except RecursionError:
        wrong = f"broken JSON (nested too deeply): {shorten(text)}"
    except ValueError as error:
        wrong = f"broken JSON ({error}): {shorten(text)}"
    return RecordError(f"{where}: {wrong}")


def _array(where: str, first: str, lines: Iterator[Line], name: str) -> Iterator[Decoded]:
    """Records of a json array that begins on the line `first`."""
    reader = ArrayReader((_number(where), first), map(_numbered, lines), name)
    for number, record in enumerate(reader.values(), start=1):
        yield f"{name}: record {number}", record


def _numbered(line: Line) -> tuple[int, str]:
    """Number and text of a line.

    Raises:
        RecordError: it could not be decoded, and no later one can be understood without it.
    """
    where, text = line
    if isinstance(text, RecordError):
        raise text
    return _number(where), text


def _number(where: str) -> int:
    return int(where.rpartition(":")[2])


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
            yield where, RecordError(f"{where}: {wrong}")


def _header(cells: list[str], where: str, delimiter: str) -> list[str]:
    """The names of the columns.

    Raises:
        RecordError: a name that is empty or there twice, or another delimiter.
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
    number = 0
    with pyarrow.parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        if len(set(names)) < len(names):
            raise RecordError(f"{file.name}: two columns of one name: {names}")
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield (
                    f"{file.name}: record {number}",
                    {k: v for k, v in row.items() if v is not None},
                )
