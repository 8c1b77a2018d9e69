"""Prompts for batch generation: from arguments, a file or standard input.

Turning them into token ids is `chat_format.render`; the training sets are read by `data/`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:  # importing it takes seconds
    from chatllama.text.chat_format import Message

SUFFIXES = (".jsonl", ".json", ".txt")


@dataclass(frozen=True)
class Prompt:
    """One prompt, with its place."""

    id: int | str
    """The record's own, else its number from 0."""
    content: "str | list[Message]"
    """What the user says, or a conversation: it ends with the user, or with what is continued."""
    where: str
    """`file:line` and the like, for errors."""

    @property
    def messages(self) -> "list[Message]":
        """The conversation to answer."""
        if isinstance(self.content, str):
            return [{"role": "user", "content": self.content}]
        return self.content


def read_prompts(
    arguments: Sequence[str],
    file: Path | None,
    lines: Iterable[str] | None,
    continues: bool = False,
) -> list[Prompt]:
    """The prompts of exactly one source, in order; ValueError if it is missing or invalid.

    Args:
        file: .jsonl, or an array in .json or .jsonl, with `prompt` (text or messages) or
            `messages`, and perhaps `id`, in each record; an array may hold texts, too. Or .txt, one
            prompt a line. Empty lines are skipped.
        lines: read where the others are empty; None: there is no such input.
        continues: conversations may end with the assistant, whose message is then gone on with.
    """
    if arguments and file is not None:
        raise ValueError(f"prompts as arguments and --file {file}: give one of the two")
    if file is not None:
        prompts = _of_file(file)
        source = f"--file {file}"
    elif arguments:
        source = "the arguments"
        prompts = [Prompt(i, text, f"prompt {i}") for i, text in enumerate(arguments)]
    elif lines is not None:
        source = "standard input"
        prompts = _of_text(lines, "standard input")
    else:
        raise ValueError("no prompts: give them as arguments, with --file, or on standard input")
    if not prompts:
        raise ValueError(f"{source}: no prompts")
    for prompt in prompts:
        _check(prompt, continues)
    return prompts


def _of_file(file: Path) -> list[Prompt]:
    if file.suffix not in SUFFIXES:
        raise ValueError(
            f"--file {file}: unknown type {file.suffix!r}; known: {', '.join(SUFFIXES)}"
        )
    if not file.is_file():
        raise ValueError(f"--file {file}: no such file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {file}: not UTF-8: {error}") from None
    # Not splitlines(): that also breaks at U+2028, which JSON strings may hold as it is.
    if file.suffix == ".txt":
        return _of_text(text.split("\n"), str(file))
    if file.suffix == ".json" or text.lstrip().startswith("["):
        records = _json(text, str(file))
        if not isinstance(records, list):
            raise ValueError(f"--file {file}: expected an array; one record a line is .jsonl")
        return [_of_record(each, i, f"{file}[{i}]") for i, each in enumerate(records)]
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{file}:{number}"
        if line.strip():
            prompts.append(_of_record(_json(line, where), len(prompts), where))
    return prompts


def _of_text(lines: Iterable[str], source: str) -> list[Prompt]:
    """One prompt a line that is not blank."""
    texts = ((f"{source}:{i}", line.rstrip("\r\n")) for i, line in enumerate(lines, start=1))
    full = [(where, text) for where, text in texts if text.strip()]
    return [Prompt(i, text, where) for i, (where, text) in enumerate(full)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = (
            f"line {error.lineno}, column {error.colno}"
            if "\n" in text
            else f"column {error.colno}"
        )
        raise ValueError(f"{where}: broken JSON ({error.msg}, {at})") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deep") from None


def _of_record(record: Any, index: int, where: str) -> Prompt:
    if isinstance(record, str):
        return Prompt(index, record, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with `prompt` or `messages`")
    given = [key for key in ("prompt", "messages") if record.get(key) is not None]
    if len(given) != 1:
        keys = ", ".join(map(repr, record)) or "no key"
        raise ValueError(f"{where}: expected one of `prompt` and `messages`; it has {keys}")
    identity, content = record.get("id"), record[given[0]]
    if identity is None:
        identity = index
    elif isinstance(identity, float) and identity.is_integer():  # of a column with gaps
        identity = int(identity)
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        raise ValueError(f"{where}: `id` must be a number or a string, not {identity!r}")
    if isinstance(content, str) and given[0] == "prompt":
        return Prompt(identity, content, where)
    return Prompt(identity, _messages(content, f"{where}: `{given[0]}`"), where)


def _messages(value: object, name: str) -> "list[Message]":
    """The value as messages; their order is checked when they are rendered."""
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of messages with `role` and `content`")
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(cast("list[Any]", value)):
        fields = [turn.get(key) for key in ("role", "content")] if isinstance(turn, dict) else []
        if len(fields) != 2 or not all(isinstance(field, str) for field in fields):
            raise ValueError(f"{name}: message {i} must have `role` and `content`, both strings")
        messages.append({"role": fields[0], "content": fields[1]})
    return cast("list[Message]", messages)


def _check(prompt: Prompt, continues: bool) -> None:
    """Raises ValueError for a prompt whose last message can be neither answered nor continued."""
    messages = prompt.messages
    last = messages[-1]["role"] if messages else "missing"
    if last != "user" and not (continues and last == "assistant"):
        hint = "; --continue-final-message goes on with it" if last == "assistant" else ""
        last = f"by {last!r}" if messages else last
        raise ValueError(f"{prompt.where}: the last message must be by 'user'; it is {last}{hint}")
    if not messages[-1]["content"].strip():
        raise ValueError(f"{prompt.where}: the prompt is empty")
