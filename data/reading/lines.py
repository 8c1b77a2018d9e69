"""Lines of text files, packed or not, with limits on their size and hints at their encoding.

What the lines mean is in `decode.py`.
"""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow

from chatllama.runtime.json_files import refuse_pointer
from data.reading.formats import RecordError, shorten
from data.reading.json_arrays import Line

DAMAGES = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
MAX_BYTES = 1 << 40
"""Unpacked size of a file; more is taken for a mistake or an attack."""
MAX_LINE_BYTES = 1 << 30


def check_file(path: Path, name: str) -> None:
    """Raises RecordError for what is no regular file of a sensible size, or only a pointer."""
    if not path.is_file():
        raise RecordError(f"{name}: not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise RecordError(f"{name}: over {MAX_BYTES:,} bytes, the most that is read of a file")
    try:
        refuse_pointer(path)
    except ValueError as error:
        raise RecordError(str(error).replace(str(path), name, 1)) from None


def check_unpacked(size: int, name: str) -> None:
    """Raises RecordError for more bytes than are read of a file."""
    if size > MAX_BYTES:
        raise RecordError(f"{name}: over {MAX_BYTES:,} bytes (unpacked), the most that is read")


def not_read(error: str, path: Path) -> str:
    """`; reading stopped at line N, M lines not read`; nothing where no line follows."""
    last = re.match(r".*?:(\d+): ", error)
    if last is None or "UTF-16" in error:
        return ""
    try:
        with open_unpacked(path) as stream:
            total = sum(1 for _ in _physical_lines(stream, ""))
    except (*DAMAGES, RecordError):
        return ""
    rest = total - int(last[1])
    return f"; reading stopped at line {last[1]}, {rest} lines not read" if rest > 0 else ""


def open_unpacked(file: Path) -> BinaryIO:
    """The unpacked bytes of a file."""
    packing = file.suffix.lower()
    if packing == ".zst":
        packed = pyarrow.input_stream(str(file), compression="zstd")
        return io.BufferedReader(cast(Any, packed), buffer_size=1 << 16)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(packing, Path.open)(file, "rb")


def _physical_lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Lines of a file, with their ends: LF or CR LF, or CR alone where there is no LF.

    Raises:
        RecordError: a line or the whole is too long.
    """
    total = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise RecordError(f"{name}: a line of over {MAX_LINE_BYTES:,} bytes (unpacked)")
        if not total and not line.endswith(b"\n") and b"\r" in line:
            yield from line.splitlines(keepends=True)  # of bytes: at CR and LF alone
        else:
            yield line
        total += len(line)
        check_unpacked(total, name)


def read_lines(stream: BinaryIO, name: str, encoding: str) -> Iterator[Line]:
    """`name:line` and text of each line, without its end; an error for undecodable bytes."""
    for number, line in enumerate(_physical_lines(stream, name), start=1):
        where = f"{name}:{number}"
        if number == 1 and (line[:2] in (b"\xff\xfe", b"\xfe\xff") or _is_utf16(line)):
            raise RecordError(f"{where}: this is UTF-16; convert the file to UTF-8")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield where, line.decode(encoding).rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield where, RecordError(f"{where}: {_undecodable(line, error)}")


def _is_utf16(line: bytes) -> bool:
    """Whether many bytes of a first line are 0, as in UTF-16 without a byte order mark."""
    return len(line) > 3 and 5 * line.count(0) > len(line) and any(line)


def _undecodable(line: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with a line, and what it would be in another encoding."""
    wrong = f"not {error.encoding.upper()} ({error.reason} at byte {error.start + 1})"
    if not error.encoding.startswith("utf"):
        return wrong
    if re.search(rb"[\x80-\xff]{4}", line):  # Chinese has long runs of such bytes, Latin words not
        try:
            reads = line.decode("gb18030").strip()
            hint = f"as gb18030 it reads {shorten(reads)}: if that is right, set"
            return f"{wrong}; {hint} `encoding: gb18030`"
        except UnicodeDecodeError:
            pass
    reads = line[max(0, error.start - 20) : error.end + 20].decode("latin-1").strip()
    hint = f"; as latin-1 it reads {shorten(reads)}: if that is right, set `encoding: latin-1`"
    return wrong + (hint if reads.isprintable() else "")
