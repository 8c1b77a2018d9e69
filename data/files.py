"""Files: from a path in the config to decoded objects, each with its place for errors.

Nothing here knows what a record means; that is `layouts.py` and `records.py`.
"""

import csv
import difflib
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet

from data.layouts import RecordError, shorten

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def find_file(path: str) -> Path | None:
    """The file or folder that `path` names; None where it can only be a hub id.

    A relative path is looked for from the current directory, then from the folder that holds this
    package, so that `data/samples/...` works wherever the package is installed.

    Raises:
        ValueError: `path` is that of a file, and there is none.
    """
    given = Path(path).expanduser()
    candidates = [given] if given.is_absolute() else [Path.cwd() / given, PROJECT_ROOT / given]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if _suffix(given) not in SUFFIXES and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return None
    places = {str(folder) for folder in (c.parent for c in candidates) if folder.is_dir()}
    names = sorted({file.name for place in places for file in Path(place).iterdir()})
    near = difflib.get_close_matches(given.name, names, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    tried = " and ".join(str(candidate) for candidate in candidates)
    raise ValueError(f"no data file {path!r} (tried {tried}){hint}")


def decode(file: Path, path: str) -> Iterator[tuple[str, object]]:
    """Place and object of each record of a file.

    A line of a jsonl or csv file is placed by `path:line`; a record of a json array or a parquet
    file by its number, from 1. A txt file holds a document for each run of lines between blank
    ones, as `{"text": ...}`.

    Args:
        file: what to open.
        path: how the config names it, for the places.

    Raises:
        RecordError: broken JSON, csv or UTF-8, or a file of no known type.
    """
    suffix = _suffix(file)
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise RecordError(f"{path}: unknown file type {suffix!r}; known: {known}, also .gz")
    if suffix == ".parquet":
        yield from _parquet(file, path)
        return
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        match suffix:
            case ".txt":
                yield from _paragraphs(_lines(stream, path))
            case ".csv":
                yield from _table(stream, path)
            case _:
                yield from _json(stream, path)


def _suffix(file: Path) -> str:
    """`.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    return Path(file.stem).suffix.lower() if file.suffix == ".gz" else file.suffix.lower()


def _lines(stream: Iterable[bytes], path: str) -> Iterator[tuple[str, str]]:
    """`file:line` and text of each line, without its end."""
    for number, line in enumerate(stream, start=1):
        where = f"{path}:{number}"
        try:
            yield where, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise RecordError(f"{where}: not UTF-8 ({error.reason}): {shorten(line)}") from None


def _paragraphs(lines: Iterator[tuple[str, str]]) -> Iterator[tuple[str, object]]:
    """Each run of lines between blank ones, as a text record."""
    begin, paragraph = "", list[str]()
    for where, line in lines:
        if line.strip():
            begin = begin if paragraph else where
            paragraph.append(line)
        elif paragraph:
            yield begin, {"text": "\n".join(paragraph)}
            paragraph = []
    if paragraph:
        yield begin, {"text": "\n".join(paragraph)}


def _json(stream: Iterable[bytes], path: str) -> Iterator[tuple[str, object]]:
    """Objects of a json array, or one of each line; told apart by the first character."""
    lines = ((where, line) for where, line in _lines(stream, path) if line.strip())
    for where, line in lines:
        if line.lstrip().startswith("["):
            yield from _array("\n".join([line, *(rest for _, rest in lines)]), path)
            return
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{where}: broken JSON ({error.msg}, column {error.colno}): {shorten(line)}"
            ) from None


def _array(text: str, path: str) -> Iterator[tuple[str, object]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}:{error.lineno}: broken JSON ({error.msg})") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}: record {number}", record


def _table(stream: Iterable[bytes], path: str) -> Iterator[tuple[str, object]]:
    """Rows of a csv with a header line; every cell is text."""
    rows = csv.reader((line + "\n" for _, line in _lines(stream, path)), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{rows.line_num + 1}"
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise RecordError(f"{where}: {error}") from None
        if header is None:
            header = cells
        elif len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        elif cells:
            raise RecordError(f"{where}: {len(cells)} cells under a header of {len(header)}")


def _parquet(file: Path, path: str) -> Iterator[tuple[str, object]]:
    """Rows of a parquet file; its null is a missing key."""
    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}: record {number}", {k: v for k, v in row.items() if v is not None}
