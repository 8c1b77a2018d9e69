"""SHA-256 of files, and a cache of those of large ones by path, size and times."""

import importlib.machinery
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from chatllama.runtime.files import file_hash, replace_text

LARGE = 2**24
"""Bytes from which a hash is kept: 10 ms of reading."""
THREADS = 4

Stamp = tuple[int, int, int]


def cache_file() -> Path:
    """Where hashes are kept: in the cache folder of Hugging Face's libraries (HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "chatllama" / "digests.json"


def file_hashes(paths: Iterable[Path], fresh: bool = True) -> dict[Path, str]:
    """Path -> SHA-256, in hexadecimal, of every file.

    Args:
        fresh: reads every byte. Otherwise the hash of a large file whose size and times of
            modification and of its inode are those of the last reading comes from the cache, which
            is left alone where it cannot be written.
    """
    stamps = {path: _stamp(path) for path in paths}
    large = {path: str(path.resolve()) for path, (size, *_) in stamps.items() if size >= LARGE}
    cache = _read_cache() if large else {}
    known = {
        path: cache[name][1]
        for path, name in large.items()
        if not fresh and name in cache and cache[name][0] == stamps[path]
    }
    unknown = [path for path in stamps if path not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(unknown, pool.map(file_hash, unknown), strict=True))
    if new := {large[path]: (stamps[path], found[path]) for path in unknown if path in large}:
        _write_cache({name: entry for name, entry in cache.items() if os.path.exists(name)} | new)
    return known | found


def _stamp(path: Path) -> Stamp:
    """Size and times; a copy has another time of its inode, which no tool can set back."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _read_cache() -> dict[str, tuple[Stamp, str]]:
    """Resolved path -> stamp and hash; what cannot be read holds nothing."""
    try:
        entries = json.loads(cache_file().read_text(encoding="utf-8"))
        return {
            name: ((size, modified, changed), sha)
            for name, (size, modified, changed, sha) in entries.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_cache(entries: dict[str, tuple[Stamp, str]]) -> None:
    lines = {name: [*stamp, sha] for name, (stamp, sha) in entries.items()}
    with suppress(OSError):
        replace_text(cache_file(), json.dumps(lines, indent=1) + "\n")


def function_file(name: str) -> Path | None:
    """The file that holds a function of that name, without importing it; None if not known."""
    folder, _, inner = name.replace(".py:", ":").rpartition("/")
    module = inner.partition(":")[0]
    if module == "__main__":
        file = vars(sys.modules[module]).get("__file__")
        return Path(file) if file else None
    first, *rest = module.split(".")
    here = [folder] if folder else [os.getcwd(), *sys.path]
    spec = importlib.machinery.PathFinder.find_spec(first, here)
    if spec is None or spec.origin is None:
        return None
    place = Path(spec.origin)
    if rest:
        place = place.parent.joinpath(*rest).with_suffix(".py")
    return place if place.is_file() else None
