"""The names of cached results follow the code that makes them."""

import shutil
from pathlib import Path

import pytest

from data import caching


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for package in caching.CODE_OF_TOKENS:
        ignored = shutil.ignore_patterns("__pycache__", "samples")
        shutil.copytree(caching.PROJECT_ROOT / package, tmp_path / package, ignore=ignored)
    monkeypatch.setattr(caching, "PROJECT_ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "module",
    [
        "chatllama/text/chat_templates.py",
        "chatllama/text/encoding.py",
        "chatllama/text/tokenizer.py",
        "data/tokenize.py",
        "data/reading/conversions.py",
    ],
)
def test_a_change_of_any_line_makes_caches_stale(copied: Path, module: str) -> None:
    before = caching.code_digest()
    with (copied / module).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert caching.code_digest() != before


def test_every_module_counts(copied: Path) -> None:
    for package in caching.CODE_OF_TOKENS:
        for file in sorted((copied / package).rglob("*.py")):
            before = caching.code_digest()
            file.write_bytes(file.read_bytes() + b"# changed\n")
            assert caching.code_digest() != before, file


def test_other_code_does_not_count(copied: Path) -> None:
    before = caching.code_digest()
    (copied / "chatllama" / "serving.py").write_text("x = 1\n", encoding="utf-8")
    assert caching.code_digest() == before
