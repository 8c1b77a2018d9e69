"""The file of `chatllama generate --out`: one JSON object a line, continued where it ends.

Beside F.jsonl lies F.jsonl.settings.json, which says what made the answers; a file is only
continued under equal settings. What an answer holds is decided in `generation_command.py`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatllama.run_folder import write_json

Key = tuple[int | str, int]
"""Prompt's id and number of the sample."""


def settings_path(path: Path) -> Path:
    """Where the settings of the answers in `path` are."""
    return path.with_name(path.name + ".settings.json")


def begin_or_continue(
    path: Path, settings: Mapping[str, Any], keys: Sequence[Key]
) -> list[dict[str, Any]]:
    """The answers that `path` already holds; a last line that was cut off is removed from it.

    Args:
        path: file to write to; made, with its folder, if missing.
        settings: JSON values that determine the answers.
        keys: of all answers, in order.

    Raises:
        ValueError: the file is not ours, was made with other settings, or is damaged.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists() or not path.stat().st_size:
        write_json(settings_path(path), settings)
        path.touch()
        return []
    if not path.is_file():
        raise ValueError(f"--out {path}: not a file")
    _check_settings(path, settings)
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    answers = [_parse(line, path, i) for i, line in enumerate(content[:end].split(b"\n")[:-1])]
    if len(answers) > len(keys):
        raise ValueError(f"--out {path}: {len(answers)} lines, more than the {len(keys)} answers")
    for number, (answer, key) in enumerate(zip(answers, keys, strict=False), start=1):
        found = (answer.get("id"), answer.get("sample", 0))
        if found != key:
            raise ValueError(
                f"--out {path}:{number}: id {found[0]!r}, sample {found[1]} where id {key[0]!r}, "
                f"sample {key[1]} belongs; the file was changed since it was written"
            )
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return answers


def append(path: Path, answers: Iterable[Mapping[str, Any]]) -> None:
    """Adds whole lines to the file."""
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(lines)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    beside = settings_path(path)
    remedy = "name another file with --out, or delete this one"
    if not beside.is_file():
        raise ValueError(f"--out {path} exists, without {beside.name} beside it: {remedy}")
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside}: damaged ({error}): {remedy}") from None
    differing = [
        "other prompts" if name == "prompts" else f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"--out {path} holds answers made otherwise ({'; '.join(differing)}): {remedy}"
        )


def _parse(line: bytes, path: Path, index: int) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise ValueError(f"--out {path}:{index + 1}: not an answer ({error})") from None
    if not isinstance(answer, dict):
        raise ValueError(f"--out {path}:{index + 1}: not an answer")
    return answer
