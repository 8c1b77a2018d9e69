"""What a data file is: its format, what it can train, how long its records are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.config.sources import DataSource, Format
from chatllama.text.chat_format import render
from data.checking.tokens import conversations
from data.reading.formats import RecordError
from data.reading.records import Kind, detect_format
from data.reading.source import decode_source, read_source

MEASURED = 500
"""Records whose tokens are counted."""
KINDS: dict[Kind, str] = {"preferences": "pairs", "sft": "conversations", "prompts": "prompts"}
"""From what says most about a record: pairs are conversations, and those hold prompts."""


@dataclass(frozen=True)
class FirstLook:
    """A data file or hub id that can be used."""

    path: str
    kind: Kind
    format: Format
    rows: Dataset
    """Its usable records."""
    summary: str
    """Counts, and examples of what was left out."""

    @property
    def source(self) -> dict[str, str]:
        """The entry of a stage's `data`."""
        return {"path": self.path, "format": self.format}

    def lengths(
        self, tokenizer: PreTrainedTokenizerFast, chat: ChatSection, *, prompts: bool
    ) -> list[int]:
        """Tokens of the first records, in order of size; with `prompts` without the last answer.

        Of a record with several answers, those with the longest.

        Raises:
            ValueError: the chat template refuses every one of them.
        """
        found: list[int] = []
        refusal: ValueError | None = None
        for row in islice(self.rows, MEASURED):
            sizes: list[int] = []
            for turns in conversations(cast(dict[str, Any], row)):
                asked = turns[:-1] if prompts and turns[-1]["role"] == "assistant" else turns
                opens = asked[-1]["role"] == "user"
                try:
                    rendered = render(tokenizer, chat, asked, add_generation_prompt=opens)
                    sizes.append(len(rendered.ids))
                except ValueError as error:
                    refusal = error
            found += [max(sizes)] if sizes else []
        if not found:
            raise ValueError(f"{self.path}: no record can be rendered: {refusal}")
        return sorted(found)


def first_look(path: str) -> FirstLook:
    """The format of a file's first record, what it can serve as, and its usable records.

    Raises:
        ValueError: there is no such file, or its records fit no format.
    """
    source = DataSource(path=path)
    where, raw = next(iter(decode_source(source)), ("", None))
    if raw is None:
        raise ValueError(f"{path}: there is no record in it")
    if isinstance(raw, RecordError):
        raise raw
    reasons: list[RecordError] = []
    for kind in KINDS:
        try:
            format = detect_format(raw, kind, where)
        except RecordError as error:
            reasons.append(error)
            continue
        rows, report = read_source(source, kind)
        return FirstLook(path, kind, format, rows, report.summary())
    raise reasons[1]  # of conversations, the commonest


def quantile(lengths: Sequence[int], share: float) -> int:
    """The length that this share of sorted lengths does not exceed."""
    return lengths[min(len(lengths) - 1, int(share * len(lengths)))]
