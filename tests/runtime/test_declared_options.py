import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from chatllama.runtime.declared_options import (
    ABOVE_0,
    add_options,
    at_least,
    check_limits,
    option,
    options_from,
)


@dataclass(frozen=True, kw_only=True)
class Example:
    folder: Path
    kind: Literal["a", "b"] | None = option(None, "which kind")
    most_rows: int = option(2**20, "rows at a time", limit=at_least(1), flag="--rows")
    seconds: float = option(0.5, "time", limit=ABOVE_0, metavar="S")
    out: Path | None = option(None, "file")
    names: tuple[str, ...] = option((), "several", flag="--name")
    quick: bool = option(False, "less")


def parser(*only: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="x")
    add_options(made, Example, only)
    return made


def parsed(*words: str) -> Example:
    return options_from(Example, parser().parse_args(words), folder=Path("f"))


def test_a_field_is_an_option() -> None:
    assert parsed() == Example(folder=Path("f"))
    words = "--kind b --rows 3 --seconds 2 --out o --name p --name q --quick"
    expected = Example(
        folder=Path("f"), kind="b", most_rows=3, seconds=2.0, out=Path("o"), names=("p", "q"),
        quick=True,
    )  # fmt: skip
    assert parsed(*words.split()) == expected


def test_help_shows_numbers_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = " ".join(parser().format_help().split())
    assert "--rows N rows at a time (default: 1048576)" in shown
    assert "--seconds S time (default: 0.5)" in shown and "--kind {a,b} which kind" in shown
    assert "--quick less" in shown and "--folder" not in shown


def test_only_the_named_options_are_declared() -> None:
    assert "--rows" in parser("most_rows").format_help()
    assert "--seconds" not in parser("most_rows").format_help()
    partly = options_from(Example, parser("quick").parse_args(["--quick"]), folder=Path(), out=None)
    assert partly == Example(folder=Path(), quick=True)


def test_limits_name_the_option_as_it_is_typed() -> None:
    check_limits(Example(folder=Path(), most_rows=1))
    with pytest.raises(ValueError, match=r"^--rows 0: must be at least 1$"):
        check_limits(Example(folder=Path(), most_rows=0))
    with pytest.raises(ValueError, match=r"^--seconds nan: must be above 0$"):
        check_limits(Example(folder=Path(), seconds=float("nan")))
