"""JSON lines files that grow line by line and survive a kill, with their settings beside them.

The callers interpret the lines; data sets of users are read in `data/reading`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from chatllama.runtime.files import replace_text, write_json
from chatllama.runtime.json_files import read_json

_BREAKS = re.compile("[\x85\u2028\u2029]")
"""Line breaks to `str.splitlines` and many readers, which JSON writes as they are."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file; none if it is missing.

    A last line without its newline was half written when a process was killed: it is left out.

    Raises:
        ValueError: another line is not a JSON object.
    """
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}:{number}: not a JSON object")
        found.append(content)
    return found


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]], *, finite: bool = False) -> None:
    """Adds whole lines in one write; with `finite`, numbers that are NaN or infinite raise."""
    content = "".join(json_line(line, finite) for line in lines).encode()
    try:
        with path.open("ab") as file:
            file.write(content)
    except OSError as error:  # a write's error, unlike an open's, has no path
        raise OSError(error.errno, error.strerror, str(path)) from error


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Replaces the file, made if missing, by its lines that are wanted."""
    replace_text(path, "".join(json_line(line) for line in read_lines(path) if wanted(line)))


def settings_path(path: Path) -> Path:
    """Where the settings of the lines in `path` are."""
    return path.with_name(path.name + ".settings.json")


def resume(settings: Mapping[str, Any], path: Path, *others: Path) -> list[list[dict[str, Any]]]:
    """The lines that each of a command's files holds; the first time, none: it makes the files.

    A last line that was cut off is removed. The settings, JSON values that determine the lines, are
    kept beside `path`, the command's result.

    Raises:
        ValueError: `path` is not ours, was made with other settings, or is damaged.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"--out {path}: not a file")
    files = (path, *others)
    settings = json.loads(json.dumps(settings))
    if not any(file.exists() and file.stat().st_size for file in files):
        write_json(settings_path(path), settings)
        for file in files:
            file.touch()
    _check_settings(path, settings)
    for file in files:
        _cut_torn_line(file)
    return [read_lines(file) for file in files]


def _cut_torn_line(path: Path) -> None:
    if path.is_file():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    beside = settings_path(path)
    remedy = "name another file with --out, or delete this one"
    if not beside.is_file():
        raise ValueError(f"--out {path} exists, without {beside.name} beside it: {remedy}")
    try:
        before = read_json(beside)
    except ValueError as error:
        raise ValueError(f"{error}: {remedy}") from None
    differing = [
        "other prompts"
        if name == "prompts"
        else f"{name} was {before.get(name)!r}, is {settings.get(name)!r}"
        for name in {**before, **settings}
        if before.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(f"--out {path} was made otherwise ({'; '.join(differing)}): {remedy}")


def json_line(content: Mapping[str, Any], finite: bool = False) -> str:
    """One line of JSON, with its line end."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=not finite)
    return _BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"
