"""Atomic replacement of files and folders: flushed to disk before they get their name."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """Brings a file's content, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Brings everything below `folder` onto the disk, the names last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            flush(path)
    flush(folder)


def replace_folder(beside: Path, folder: Path) -> None:
    """Moves the complete folder `beside` to `folder`, flushed to disk, in place of an older one.

    The older one is `.NAME.old` for the moment between two renames; `put_back` undoes a kill there.
    Files get the folder's right to read and write: safetensors gives them to their owner alone.
    """
    usual = beside.stat().st_mode & 0o666
    for path in beside.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(usual)
    flush_tree(beside)
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of `folder` if nothing goes wrong, and else is gone."""
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        replace_folder(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Restores the older folder where `replace_folder` was killed between its two renames."""
    old = _old(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Replaces the file `path` in one step: no reader gets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    flush(beside)
    beside.replace(path)
    flush(path.parent)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


CHUNK = 1 << 22


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, content: object) -> None:
    """Replaces `path` by `content` as JSON in one step."""
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
