"""Answers labelled good or bad (KTO), joined with the others to the same prompt."""

import json
from collections.abc import Iterator
from typing import cast

from chatllama.config import ColumnMapping, Format
from data.dialects import apply_mapping, label
from data.layouts import Raw, Unusable
from data.records import Conversation, Preference, labelled_preference

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
