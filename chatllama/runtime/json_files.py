"""JSON files that anyone may have written: read within limits, and held against a type.

Files of records, one a line, are in `jsonl.py`; writing is in `files.py`.
"""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing it takes longer than `--help` may
    from pydantic import TypeAdapter, ValidationError

MORE_KEYS: Any = {"extra": "allow"}
"""`__pydantic_config__` of a TypedDict that keeps keys which it does not name."""
MOST_BYTES = 64 * 2**20
"""Of a JSON file; the largest of a model, its tokenizer's, have about half of that."""
_POINTER = b"version https://git-lfs"
_SHOWN = 60
"""Characters of a wrong value in a message."""


def read_json(path: Path, shape: Any = dict[str, Any]) -> Any:
    """The content of a JSON file, of a type.

    Args:
        shape: a type that pydantic knows; numbers, texts and truth values are not converted.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not a regular file, too large, nested too deeply, not JSON, or of another type;
            names the file and the key.
    """
    from pydantic import ValidationError

    content = read_regular(path)
    try:
        return _checker(shape).validate_json(content, strict=True)
    except ValidationError as error:
        raise ValueError(f"{path} is damaged: {_first_problem(error)}") from None


def refuse_pointer(path: Path) -> None:
    """Raises ValueError for a file that git-lfs has left in the place of the real one."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path}: a git-lfs pointer, not the file itself: run git lfs pull")


def read_regular(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a regular file; ValueError for another kind of file or a larger one."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if found.st_size > most_bytes:
            raise ValueError(f"{path} has {found.st_size} bytes; at most {most_bytes} are read")
        refuse_pointer(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def held_to_be_whole(path: Path) -> Iterator[None]:
    """Turns what goes wrong with the content of `path` inside into a ValueError that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=64)
def _checker(shape: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def _first_problem(error: "ValidationError") -> str:
    """What is wrong with the first value, as `key.key must be ..., not value`."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return first["msg"].removeprefix("Invalid JSON: ")
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    if first["type"] == "missing":
        return f"{place} is missing"
    shown = repr(first["input"])
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return f"{place} {first['msg'].replace('Input should be', 'must be')}, not {shown}"
