"""Hashes of files, and the cache of those of large ones."""

import os
import shutil
from pathlib import Path

import pytest

from chatllama.runtime import digests
from chatllama.runtime.files import file_hash


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, with every file a large one and a cache of the test's."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return file_hash(path)

    monkeypatch.setattr(digests, "file_hash", counted)
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setattr(digests, "cache_file", lambda: tmp_path / "cache/digests.json")
    return names


def hashes(*paths: Path, fresh: bool = False) -> list[str]:
    return list(digests.file_hashes(paths, fresh).values())


def test_a_large_file_is_read_once(tmp_path: Path, read: list[str]):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("b")
    expected = sorted([file_hash(one), file_hash(two)])
    assert sorted(hashes(one, two)) == sorted(hashes(one, two)) == expected
    assert sorted(read) == ["one", "two"]
    assert hashes(one, fresh=True) == [file_hash(one)] and read[2:] == ["one"]


@pytest.mark.parametrize("change", ["content", "size", "copied", "in place, time set back"])
def test_a_file_that_is_another_is_read_again(tmp_path: Path, read: list[str], change: str):
    file = tmp_path / "file"
    file.write_text("old")
    (before,), times = hashes(file), file.stat()
    if change == "copied":
        shutil.copy2(file, tmp_path / "copy")
        (tmp_path / "copy").replace(file)
    else:
        file.write_text("longer" if change == "size" else "new")
    if change == "in place, time set back":
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (hashes(file) == [before]) == (change == "copied")
    assert read == ["file", "file"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": [1, 2]}', "\x00"])
def test_a_damaged_cache_holds_nothing(tmp_path: Path, read: list[str], content: str):
    digests.cache_file().parent.mkdir()
    digests.cache_file().write_text(content)
    file = tmp_path / "file"
    file.write_text("a")
    assert hashes(file) == hashes(file) == [file_hash(file)] and read == ["file"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, read: list[str]):
    (tmp_path / "cache").write_text("a file where the folder would be")
    file = tmp_path / "file"
    file.write_text("a")
    assert hashes(file) == hashes(file) == [file_hash(file)] and read == ["file", "file"]


def test_small_files_are_read_and_what_is_gone_is_forgotten(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("aa")
    two.write_text("b")
    hashes(one)
    one.unlink()
    hashes(two)
    assert str(one) not in digests.cache_file().read_text()
    monkeypatch.setattr(digests, "LARGE", 2)
    hashes(two)
    assert read == ["one", "two", "two"]
