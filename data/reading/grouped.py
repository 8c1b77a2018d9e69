"""Records that stand in several objects of a source: message trees (OASST) and labels (KTO)."""

import json
from collections.abc import Iterator
from typing import cast

from chatllama.config.sources import ColumnMapping, Format
from data.reading.conversions import apply_mapping, label
from data.reading.formats import (
    Raw,
    RecordError,
    Unusable,
    shorten,
)
from data.reading.records import (
    Conversation,
    Kind,
    Preference,
    Record,
    labelled_preference,
    parse_records,
)

JOINED = "joined to the tree of its first message"
ORPHAN = "the messages above it are not in the source"
Found = tuple[int, str, Record | Unusable | RecordError]


def is_tree_message(raw: object) -> bool:
    """Whether an object is one message of a tree, not a whole tree."""
    return isinstance(raw, dict) and "message_id" in raw and "prompt" not in raw


class MessageTrees:
    """All messages of a source; they are held in memory, for they may stand in any order."""

    def __init__(self) -> None:
        self._messages: dict[str, tuple[int, str, dict[str, object]]] = {}

    def add(self, number: int, where: str, raw: object) -> None:
        """Takes the next message.

        Raises:
            RecordError: it has no id, or another one's.
        """
        fields = cast(Raw, raw)
        name = fields["message_id"]
        if not isinstance(name, str) or not name:
            raise RecordError(f"{where}: message_id: expected a string, got {shorten(name)}")
        if name in self._messages:
            before = self._messages[name][1]
            raise RecordError(f"{where}: message_id {name!r} stands at {before} too")
        kept = {key: fields.get(key) for key in ("role", "text", "rank")}
        message = {**kept, "parent_id": fields.get("parent_id"), "replies": []}
        self._messages[name] = number, where, message

    def records(self, kind: Kind) -> Iterator[Found]:
        """What each tree holds, at the place of its first message, then why the others are none."""
        roots: list[str] = []
        children: dict[str, list[str]] = {}
        for name, (_, _, message) in self._messages.items():
            parent = message["parent_id"]
            if parent is None or parent == "":
                roots.append(name)
            elif isinstance(parent, str) and parent in self._messages:
                children.setdefault(parent, []).append(name)
        joined: set[str] = set()
        for root in roots:
            number, where, first = self._messages[root]
            waiting = [root]
            while waiting:
                name = waiting.pop()
                joined.add(name)
                below = children.get(name, [])
                waiting += below
                self._messages[name][2]["replies"] = [self._messages[each][2] for each in below]
            try:
                found = parse_records({"prompt": first}, "oasst", kind, where)
            except RecordError as error:
                yield number, where, error
                continue
            yield from ((number, place, record) for place, record in found)
        first_ones = set(roots)
        for name, (number, where, _) in self._messages.items():
            if name not in first_ones:
                yield number, where, Unusable(JOINED if name in joined else ORPHAN)


Place = tuple[int, str]
"""Number and place of a record."""


def is_good(raw: object, format: Format | ColumnMapping) -> bool:
    """The label of an object that `parse_records` has taken for a labelled answer."""
    fields = cast(Raw, raw)
    if isinstance(format, ColumnMapping):
        fields = apply_mapping(fields, format, answers_optional=False)
    return label(fields)


class LabelledAnswers:
    """All labelled answers of a source, by prompt; they are held in memory."""

    def __init__(self) -> None:
        self._by_prompt: dict[str, list[tuple[Place, Conversation, bool]]] = {}

    def add(self, number: int, where: str, answer: Conversation, good: bool) -> None:
        """Takes the next answer."""
        prompt = json.dumps(answer.messages[:-1])
        self._by_prompt.setdefault(prompt, []).append(((number, where), answer, good))

    def preferences(self) -> Iterator[tuple[int, str, Preference | Unusable]]:
        """For every answer, in the order of prompts: a preference, or why it is none.

        The first answer to a prompt that has both labels stands for all of them; each of the
        others is counted as joined to it.
        """
        for answers in self._by_prompt.values():
            good = [answer for _, answer, is_good in answers if is_good]
            bad = [answer for _, answer, is_good in answers if not is_good]
            try:
                if not good or not bad:
                    raise Unusable("no answer with the other label to the same prompt")
                first: Preference | Unusable = labelled_preference(good, bad)
                rest = Unusable("joined with the other answers to its prompt")
            except Unusable as reason:
                first = rest = reason
            for i, ((number, where), _, _) in enumerate(answers):
                yield number, where, rest if i else first
