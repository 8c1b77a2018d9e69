"""What a checkpoint folder must hold, file by file, and whether it still does."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chatllama.run_folder import write_json

MANIFEST = "manifest.json"
THREADS = 4
CHUNK = 1 << 22


class DamagedError(ValueError):
    """A folder does not hold what its manifest says."""


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Lists size and SHA-256 of every file below `folder` in its manifest.json.

    Args:
        folder: complete.
        about: whatever else the reader must know, as JSON values.
    """
    files = {name: {"bytes": size, "sha256": sha} for name, (size, sha) in _files(folder).items()}
    write_json(folder / MANIFEST, {**about, "files": files})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        DamagedError: it is missing or not JSON.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: this is no complete checkpoint") from None
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise DamagedError(f"{path} is damaged: it lists no files")
    return content


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all as they were written.

    Raises:
        DamagedError: names the first file that is missing, cut off, or different.
    """
    manifest = read_manifest(folder)
    expected = manifest["files"]
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise DamagedError(f"{path} has {size} bytes; {entry['bytes']} were written")
    found = _files(folder)
    for name, entry in expected.items():
        if found[name][1] != entry["sha256"]:
            raise DamagedError(f"{folder / name} is corrupted: its content is not what was written")
    return manifest


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> dict[str, tuple[int, str]]:
    """Path below `folder` -> (bytes, SHA-256) of every file but the manifest itself."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(file_hash, paths))
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, sha)
        for path, sha in zip(paths, hashes, strict=True)
    }
