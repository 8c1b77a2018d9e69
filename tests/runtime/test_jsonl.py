"""JSON lines files: read, appended to, cut back, continued."""

from pathlib import Path

import pytest

from chatllama.runtime.jsonl import append_lines, keep_lines, read_lines, resume, settings_path


def test_a_torn_last_line_is_left_out_and_then_removed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    assert read_lines(path) == []
    assert resume({"n": 1}, path) == [[]]
    append_lines(path, [{"a": "\u2028"}, {"a": "\u00e9"}])
    with path.open("ab") as file:
        file.write(b'{"a": "\xc3')
    assert read_lines(path) == [{"a": "\u2028"}, {"a": "\u00e9"}]
    assert resume({"n": 1}, path) == [[{"a": "\u2028"}, {"a": "\u00e9"}]]
    assert path.read_bytes().endswith(b'{"a": "\xc3\xa9"}\n')
    keep_lines(path, lambda line: line["a"] == "\u00e9")
    assert path.read_text("utf-8") == '{"a": "\u00e9"}\n'


def test_lines_that_are_no_objects_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:3: not a JSON object"):
        read_lines(path)


def test_settings_must_be_the_same_in_both_directions(tmp_path: Path) -> None:
    path, ledger = tmp_path / "a.jsonl", tmp_path / "a.jsonl.ledger"
    assert resume({"seed": 0, "stops": ("x",)}, path, ledger) == [[], []]
    # Nothing was made yet, so other settings may replace these.
    assert resume({"seed": 1, "stops": ("x",)}, path, ledger) == [[], []]
    append_lines(ledger, [{"requests": 1}])  # which gave no result
    assert resume({"seed": 1, "stops": ["x"]}, path, ledger) == [[], [{"requests": 1}]]
    with pytest.raises(ValueError, match=r"made otherwise \(seed was 1, is 2\)"):
        resume({"seed": 2, "stops": ["x"]}, path, ledger)
    with pytest.raises(ValueError, match=r"stops was \['x'\], is None"):
        resume({"seed": 1}, path, ledger)
    with pytest.raises(ValueError, match=r"top was None, is 3"):
        resume({"seed": 1, "stops": ["x"], "top": 3}, path, ledger)
    settings_path(path).unlink()
    with pytest.raises(ValueError, match=r"exists, without a\.jsonl\.settings\.json beside it"):
        resume({"seed": 1, "stops": ["x"]}, path, ledger)
    with pytest.raises(ValueError, match=r"new: not a file"):
        (tmp_path / "new").mkdir()
        resume({}, tmp_path / "new")


def test_numbers_that_are_not_finite_can_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_lines(path, [{"a": 1.0}, {"a": float("nan")}], finite=True)
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match="missing"):
        append_lines(tmp_path / "missing" / "a.jsonl", [{"a": 1}])
