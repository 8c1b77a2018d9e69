"""Records that are spread over several objects of a source: message trees (OASST), labels (KTO)."""

import json
from collections.abc import Iterator, Sequence
from typing import cast

from data.reading.formats import Raw, RecordError, Unusable, shorten
from data.reading.marks import DELETED, KEEP, NOT_REVIEWED, deletion
from data.reading.records import Kind, Labelled, Preference, Record, parse_records

JOINED = "joined to the tree of its first message"
BELOW = "below a message that is left out"
PASSED_OVER = (JOINED, BELOW, DELETED, NOT_REVIEWED)
"""Reasons of single messages that do not mean a wrong format."""
ORPHAN = "the messages above it are not in the source"
Found = tuple[int, str, Record | Unusable | RecordError]
"""Number of the object, its place, and the record or why there is none."""


def is_tree_message(raw: object) -> bool:
    """Whether an object is one message of a tree, not a whole tree."""
    return isinstance(raw, dict) and "message_id" in raw and "prompt" not in raw


class MessageTrees:
    """All messages of a source, in memory because they may be in any order."""

    def __init__(self) -> None:
        self._messages: dict[str, tuple[int, str, dict[str, object]]] = {}

    def add(self, number: int, where: str, raw: object) -> None:
        """Adds a message.

        Raises:
            RecordError: its id is missing or a duplicate.
        """
        fields = cast(Raw, raw)
        name = fields["message_id"]
        if not isinstance(name, str) or not name:
            raise RecordError(f"{where}: message_id: expected a string, got {shorten(name)}")
        if name in self._messages:
            before = self._messages[name][1]
            raise RecordError(f"{where}: message_id {name!r} is at {before} too")
        keys = ("role", "text", "rank", "parent_id", "deleted", "review_result", KEEP)
        message = {key: fields.get(key) for key in keys}
        self._messages[name] = number, where, {**message, "replies": []}

    def records(self, kind: Kind) -> Iterator[Found]:
        """The records of each tree at its first message's place, then why the others have none."""
        roots: dict[str, None] = {}
        children: dict[str, list[str]] = {}
        for name, (_, _, message) in self._messages.items():
            parent = message["parent_id"]
            if parent is None or parent == "":
                roots[name] = None
            elif isinstance(parent, str) and parent in self._messages:
                children.setdefault(parent, []).append(name)
        joined, below = set[str](), set[str]()
        for root in roots:
            number, where, first = self._messages[root]
            waiting = [(root, False)]
            while waiting:
                name, lost = waiting.pop()
                (below if lost else joined).add(name)
                message, replies = self._messages[name][2], children.get(name, [])
                waiting += [(each, lost or bool(deletion(message))) for each in replies]
                kept = [self._messages[each][2] for each in replies]
                message["replies"] = [each for each in kept if not deletion(each)]
            try:
                tree = {"prompt": first, KEEP: first[KEEP]}
                found = parse_records(tree, "oasst", kind, where)
            except RecordError as error:
                yield number, where, error
                continue
            yield from ((number, place, record) for place, record in found)
        for name, (number, where, message) in self._messages.items():
            if name not in roots:
                reason = BELOW if name in below else ORPHAN
                if name in joined:
                    reason = deletion(message) or JOINED
                yield number, where, Unusable(reason)


class LabelledAnswers:
    """All labelled answers of a source, by prompt, in memory."""

    def __init__(self) -> None:
        self._by_prompt: dict[str, list[tuple[int, str, Labelled]]] = {}

    def add(self, number: int, where: str, answer: Labelled) -> None:
        """Adds an answer."""
        prompt = json.dumps(answer.messages[:-1])
        self._by_prompt.setdefault(prompt, []).append((number, where, answer))

    def preferences(self) -> Iterator[Found]:
        """For every answer, in the order of prompts: a preference, or why it is none.

        The first answer to a prompt with both labels gives the preference of all good answers over
        all bad ones; each of the others is counted as joined with it.
        """
        for group in self._by_prompt.values():
            first: Preference | Unusable = _preference([answer for _, _, answer in group])
            rest = Unusable("joined with the other answers to its prompt")
            for i, (number, where, _) in enumerate(group):
                yield number, where, first if not i or isinstance(first, Unusable) else rest


def _preference(group: Sequence[Labelled]) -> Preference | Unusable:
    """All good answers to a prompt before all bad ones."""
    good = [answer.messages[-1]["content"] for answer in group if answer.good]
    bad = [answer.messages[-1]["content"] for answer in group if not answer.good]
    if not good or not bad:
        return Unusable("no answer with the other label to the same prompt")
    if {answer.strip() for answer in good} & {answer.strip() for answer in bad}:
        return Unusable("one answer is labelled both good and bad")
    ranks = [0] * len(good) + [1] * len(bad)
    return Preference(group[0].messages[:-1], [*good, *bad], ranks, [0.0] * len(ranks))
