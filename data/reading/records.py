"""Records: the meaning of one line of a data file, whatever its format.

Pure functions. The keys of each format are in `formats.py` and `conversions.py`, reading files in
`source.py`, turning messages into tokens in `data/tokenize.py`.

There are two kinds of bad record. A malformed one (a missing key, a wrong type) raises
`RecordError`: the file is not what the config says, and reading stops. A well-formed one that
cannot be used (an empty answer, a pair whose prompts differ) raises `Unusable`: it is left out,
and its reason is counted and reported.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from chatllama.config.sources import ColumnMapping, Format
from data.reading import formats
from data.reading.conversions import apply_mapping, convert, deletions, fitting_formats, label
from data.reading.formats import UNTRAINED, Malformed, Raw, RecordError, Unusable, mapping, shorten
from data.reading.marks import KEEP, check_record
from data.reading.verdicts import SETTLED

if TYPE_CHECKING:  # importing it takes seconds
    from chatllama.text.chat_format import Message

Kind = Literal["sft", "preferences", "prompts", "text"]

_BLANK = ("Zs", "Zl", "Zp", "Cc", "Cf")
# The formats that can be used for each kind, in the order in which they are tried.
_CONVERSATIONS: tuple[Format, ...] = (
    "self_instruct", "alpaca", "messages", "sharegpt", "prompt_completion", "utterances", "oasst",
    "translation",
)  # fmt: skip
_PREFERENCES: tuple[Format, ...] = ("hh", "preference", "ranked", "comparison")
KIND_FORMATS: dict[Kind, tuple[Format, ...]] = {
    "sft": ("kto", *_CONVERSATIONS, *_PREFERENCES, "question_answer"),
    "preferences": (*_PREFERENCES, "kto", "oasst"),
    "prompts": (
        *_PREFERENCES, "kto", *_CONVERSATIONS, "prompts", "turns", "question_answer", "lines",
    ),
    "text": ("text", "lines"),
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Turns; the last one is the assistant's."""

    messages: list[Message]
    untrained: list[int] = field(default_factory=list[int])
    """Numbers of the assistant's turns that are marked as not to be trained on."""


@dataclass(frozen=True)
class Labelled:
    """A conversation whose answer has a label; becomes a preference with others like it."""

    messages: list[Message]
    good: bool


@dataclass(frozen=True)
class Preference:
    """Answers to one prompt, the best first; a pair has two."""

    prompt: list[Message]
    answers: list[str]
    ranks: list[int]
    """0 for the best; equal ranks are a tie."""
    ratings: list[float]
    """Their differences are the margins of the pairs; all 0 if the record has none."""


@dataclass(frozen=True)
class Prompt:
    """Turns; the last one is the user's."""

    messages: list[Message]


@dataclass(frozen=True)
class Text:
    """Plain text to pre-train on."""

    text: str


Record = Conversation | Labelled | Preference | Prompt | Text


def parse_records(
    raw: object, format: Format | ColumnMapping, kind: Kind, where: str
) -> list[tuple[str, Record | Unusable]]:
    """Place and typed record of everything in an object; Unusable, with the reason, if of no use.

    Most objects are one record. Pairs and lists give SFT their best answer; everything that has a
    prompt gives PPO the prompt. `where`, `file:line`, begins the places and the error.

    Raises:
        RecordError: the object does not have the format.
    """
    found: list[tuple[str, Record | Unusable]] = []
    try:
        fields, name = named(raw, format, kind)
        check_record(mapping(raw, "the record"))
        if name not in KIND_FORMATS[kind]:
            raise Malformed(f"format {name} cannot be used for {kind}; {_formats_for(kind)}")
        for place, converted, plain in convert(fields, name, kind):
            try:
                found.append((where + place, _parse(converted, plain, kind)))
            except Unusable as reason:
                found.append((where + place, reason))
        if name == "oasst":
            found += [(where, Unusable(reason)) for reason in deletions(fields)]
    except Malformed as error:
        raise RecordError(f"{where}: {error}{_instead(raw, format, kind)}") from None
    except Unusable as reason:
        return [(where, reason)]
    return found


def _instead(raw: object, format: Format | ColumnMapping, kind: Kind) -> str:
    """The end of an error: the record's keys, and which format fits them if the given one does not.

    Nothing for formats that are told by more than keys.
    """
    if isinstance(format, ColumnMapping) or not isinstance(raw, Mapping):
        return ""
    fitting = fitting_formats(fields := cast(Raw, raw))
    if format in (*fitting, "oasst", "translation") or format not in KIND_FORMATS[kind]:
        return ""
    found = _fitting_for(kind, fitting)
    keys = [key for key in formats.keys_of(fields) if key not in (KEEP, SETTLED)]
    fits = f"fit format {found}" if found else f"do not fit format {format}"
    return f" (the record's keys {keys} {fits})"


def named(raw: object, format: Format | ColumnMapping, kind: Kind) -> tuple[Raw, Format]:
    """The object and the name of its format, after a mapping of columns."""
    fields = mapping(raw, "the record")
    if not isinstance(format, ColumnMapping):
        return fields, format
    added = {key: fields[key] for key in (KEEP, SETTLED) if key in fields}
    fields = {**apply_mapping(fields, format, answers_optional=kind == "prompts"), **added}
    if format.label is not None:
        return fields, "kto"
    if (name := _fitting_for(kind, fitting_formats(fields))) is None:
        raise Malformed(f"the columns {sorted(fields)} make no record for {kind}")
    return fields, name


def _parse(fields: Raw, format: Format, kind: Kind) -> Record:
    """One record in a format of `formats.py`."""
    if format == "text":
        return Text(_not_empty(formats.string(fields, "text"), "text"))
    if format in ("hh", "preference"):
        chosen, rejected = map(_without_marks, formats.pair(fields, format))
        if kind == "preferences":
            return _preference(chosen, rejected, formats.margin(fields))
        return _for_kind(chosen, kind)
    if format == "ranked":
        prompt, answers, ranks, ratings = formats.ranking(fields)
        if kind == "preferences":
            return _ranked(_without_marks(prompt), answers, ranks, ratings)
        return _for_kind([*prompt, {"role": "assistant", "content": answers[0]}], kind)
    turns = formats.conversation(fields, format, prompts_only=kind == "prompts")
    if kind == "preferences":
        return Labelled(_alternating(_without_marks(turns), "assistant"), label(fields))
    return _for_kind(turns, kind)


def detect_format(raw: object, kind: Kind, where: str) -> Format:
    """The format that a record's keys fit.

    Raises:
        RecordError: no format that can be used for `kind` fits.
    """
    if not isinstance(raw, Mapping):
        raise RecordError(f"{where}: expected an object with keys, got {shorten(raw)}")
    fields = cast(Raw, raw)
    fitting = fitting_formats(fields)
    if (found := _fitting_for(kind, fitting)) is not None:
        return found
    keys = formats.keys_of(fields)
    looks = f" (it looks like {' or '.join(fitting)})" if fitting else ""
    raise RecordError(
        f"{where}: no format for {kind} fits a record with the keys {keys}{looks}; "
        f"{_formats_for(kind)}; or say which column holds what, as in `format: {{prompt: "
        "question, completion: answer}`"
    )


def _fitting_for(kind: Kind, fitting: list[Format]) -> Format | None:
    return next((name for name in KIND_FORMATS[kind] if name in fitting), None)


def record_key(record: Record) -> str:
    """Digest of the record's first user turn (text: of all of it).

    Held-out splits use it, so that a prompt, and a dialogue and its continuation, are on the same
    side, in every stage.
    """
    match record:
        case Text(text):
            question = text
        case Conversation(messages) | Labelled(messages) | Prompt(messages) | Preference(messages):
            question = next(turn["content"] for turn in messages if turn["role"] == "user")
    return hashlib.blake2b(question.strip().encode(), digest_size=16).hexdigest()


def record_texts(record: dict[str, Any]) -> list[str]:
    """Every text of a row of `read_source`: turns, answers, or the plain text."""
    turns = cast("list[Message]", record.get("messages") or record.get("prompt") or [])
    texts = [turn["content"] for turn in turns]
    return [*texts, *(record.get("answers") or []), *([record["text"]] if "text" in record else [])]


def _formats_for(kind: Kind) -> str:
    return f"formats for {kind}: {', '.join(KIND_FORMATS[kind])}"


def _for_kind(turns: list[Message], kind: Kind) -> Record:
    """The conversation, or its prompt if `kind` is prompts."""
    if kind == "prompts":
        prompt = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        return Prompt(_alternating(_plain(prompt), "user"))
    untrained = [i for i, turn in enumerate(turns) if UNTRAINED in turn]
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if answers and len(untrained) == len(answers):
        raise Unusable("every turn of the assistant is marked as not to be trained on")
    return Conversation(_alternating(_plain(turns), "assistant"), untrained)


def _plain(turns: list[Message]) -> list[Message]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _without_marks(turns: list[Message]) -> list[Message]:
    """The turns of a prompt and an answer to compare; only the answer's mark matters."""
    if turns and UNTRAINED in turns[-1]:
        raise Unusable("the answer is marked as not to be trained on")
    return _plain(turns)


def _preference(chosen: list[Message], rejected: list[Message], by: float) -> Preference:
    _alternating(chosen, "assistant")
    _alternating(rejected, "assistant")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("chosen and rejected answer different prompts")
    answers = [chosen[-1]["content"], rejected[-1]["content"]]
    if answers[0].strip() == answers[1].strip():
        raise Unusable("chosen equals rejected")
    return Preference(chosen[:-1], answers, [0, 1], [by, 0.0])


def _ranked(
    prompt: list[Message], answers: list[str], ranks: list[int], ratings: list[float]
) -> Preference:
    _alternating(prompt, "user")
    if len(answers) < 2:
        raise Unusable("fewer than two answers")
    for answer in answers:
        _not_empty(answer, "answer")
    if len({answer.strip() for answer in answers}) == 1:
        raise Unusable("all answers are equal")
    if ranks[-1] == 0:
        raise Unusable("all answers are tied")
    return Preference(prompt, answers, ranks, ratings)


def _alternating(turns: list[Message], last: str) -> list[Message]:
    """`turns`, if they are system? user assistant user ... and end with `last`."""
    if [turn["role"] for turn in turns].count("system") > 1:
        raise Unusable("two system prompts")
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    if not spoken:
        raise Unusable("no turns")
    for i, turn in enumerate(spoken):
        if turn["role"] != ("user", "assistant")[i % 2]:
            raise Unusable("roles do not alternate between user and assistant")
        _not_empty(turn["content"], f"{turn['role']} turn")
    if spoken[-1]["role"] != last:
        raise Unusable(f"the last turn is the {spoken[-1]['role']}'s")
    return turns


def _not_empty(text: str, name: str) -> str:
    if all(_is_blank(char) for char in text):
        raise Unusable(f"empty {name}")
    return text


def _is_blank(char: str) -> bool:
    """Whether nothing is seen of a character: white space, control or of zero width."""
    return char in "\u2800\u3164" or unicodedata.category(char) in _BLANK
