"""Did-you-mean: the known names that are nearest to one that is unknown. Imports nothing heavy."""

import difflib
from collections.abc import Iterable
from pathlib import Path


def did_you_mean(wanted: str, known: Iterable[str], most: int = 3) -> str:
    """`; did you mean a or b?` with the nearest names, or nothing."""
    near = difflib.get_close_matches(wanted, list(known), n=most)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def files_like(path: str | Path) -> str:
    """The same with the files and folders beside a path that does not exist."""
    given = Path(path)
    if not given.parent.is_dir():
        return files_like(given.parent) if given.parent != given else ""
    names = (str(given.with_name(file.name)) for file in sorted(given.parent.iterdir()))
    return did_you_mean(str(given), names)
