"""Every command of README and docs: its words parse, its keys exist, and a test gives its options.

A test types the command, or calls it with the option as a keyword.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatllama import cli
from chatllama.config.errors import ConfigError
from chatllama.config.loader import load_config
from trainers.stages.arguments import parse_stage_arguments

PROJECT = Path(__file__).resolve().parent.parent
QUICKSTART = PROJECT / "configs" / "quickstart.yaml"
COMMAND = re.compile(
    r"^(?:\s*\w+\$ |\s{4,}|)(?:\.venv/bin/)?((?:chatllama |deepspeed |python train_).*)$"
)
SYNOPSIS = re.compile(r"\[--|\||\.\.\.")
STAGE = re.compile(r"train_(?:sft|rm|ppo)\.py$")
NEEDS_GPU = {"--compile", "--quantization"}
"""Options whose documented use needs a GPU or an extra; tests use them where these are."""


def pages() -> list[Path]:
    return [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Page and words of each command, continued lines joined, comments cut."""
    for page in pages():
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        inside = False
        for line in text.splitlines():
            if line.lstrip().startswith("```"):
                inside = not inside
            found = COMMAND.match(line)
            if found and (inside or line.startswith("    ")) and not SYNOPSIS.search(line):
                yield page.name, shlex.split(re.split(r" [&>]", found[1])[0], comments=True)


FOUND = list(commands())


def test_commands_are_found() -> None:
    assert len(FOUND) > 40
    assert {words[0] for _, words in FOUND} == {"chatllama", "deepspeed", "python"}


@pytest.mark.parametrize(("page", "words"), FOUND, ids=[" ".join(words) for _, words in FOUND])
def test_a_documented_command_parses(page: str, words: list[str]) -> None:
    if words[0] == "chatllama":
        overrides = vars(cli._parse(words[1:])).get("overrides") or []
    else:
        first = next(i for i, word in enumerate(words) if STAGE.search(word))
        config, *overrides = words[first + 1 :]
        assert config.endswith(".yaml")
        parse_stage_arguments("a stage", [str(QUICKSTART), *overrides])
        overrides = [word for word in overrides if not word.startswith("--")]
    try:
        load_config(QUICKSTART, overrides)
    except ConfigError as error:  # a value may not fit this config; a key must exist
        assert "unknown" not in str(error), error


def test_a_test_types_each_command_with_its_options() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob("test_*.py")]
    for page, words in FOUND:
        if words[0] != "chatllama" or len(words) == 1:
            continue
        names = words[1:3] if words[1] in ("data", "configs") else words[1:2]
        options = {word for word in words if word.startswith("--")} - NEEDS_GPU
        for option in options or {""}:
            field = option.removeprefix("--").replace("-", "_")
            uses = re.compile(rf"[\"\s]{option}[\"\s=]|\b{field}=" if option else "")
            assert any(
                all(f'"{name}"' in text for name in names) and uses.search(text) for text in texts
            ), f"{page}: no test types {' '.join(names)} {option}"
