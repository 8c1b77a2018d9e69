"""What became of records as tokens: counts, and characters that a tokenizer cannot write.

The tokens are made in `tokenize.py`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from chatllama.text.encoding import decode, encode
from data.reading.records import record_texts

NUM_EXAMPLES = 3
MOST = 0.95
"""Share of records that a limit should leave whole."""


@dataclass(frozen=True)
class TokenReport:
    """Counts of tokenised records."""

    num_read: int
    num_kept: int
    changed: dict[str, int]
    """Kept but changed, by what was done."""
    left_out: dict[str, int]
    """Left out, by reason."""
    lost: list[str] = field(default_factory=list[str])
    """Of each kept record that has some, the characters that the tokenizer cannot write."""
    examples: list[str] = field(default_factory=list[str])
    """`file:line: reason` of the first few that the chat template refuses."""
    num_over: int = 0
    """Records that a limit on tokens has cut or left out."""
    limit: int = 0
    """Tokens of it; at most the model's positions."""
    most_need: int = 0
    """Tokens within which 95 % of the records are whole."""
    positions: int | None = None
    """Tokens that the model reads; None: unknown."""

    def summary(self) -> str:
        """A line for the log, and one for each example."""
        counts = [f"{count} {what}" for what, count in self.changed.items()]
        counts += [f"{count} left out: {reason}" for reason, count in self.left_out.items()]
        if self.lost:
            characters = Counter("".join(self.lost)).most_common(5)
            counts.append(
                f"{len(self.lost)} with characters that this tokenizer cannot write, such as "
                f"{', '.join(repr(char) for char, _ in characters)}: <unk> or nothing stands for "
                "them. Take a tokenizer with byte fallback, or take them out (`chatllama data "
                "check` counts each)"
            )
        line = "; ".join([f"{self.num_kept} of {self.num_read} examples", *counts])
        return "\n  ".join([line, *self.examples])

    def lengths(self, key: str, new: int = 0) -> dict[str, Any]:
        """What a limit on tokens did, as `trainers/stages/forecast.py` takes it; see `advice`."""
        return {
            "records": self.num_read,
            "over": self.num_over,
            "limit": f"{self.limit} tokens ({key})",
            "advice": self.advice(key, new),
        }

    def advice(self, key: str, new: int = 0) -> str:
        """What keeps most records whole: the key's value, or what else where the model's end is.

        Args:
            key: of the limit.
            new: tokens that the model reads after those of the record.
        """
        most = self.most_need if self.positions is None else self.positions - new
        if self.most_need <= most:
            return f"{key}={self.most_need} keeps {MOST:.0%} whole"
        first = f"{key}={most} keeps more, and no value all: " if self.limit < most else ""
        room = f", {new} of them new ones" if new else ""
        less = "lower generation.max_new_tokens, " if new > 1 else ""
        return (
            f"{first}{MOST:.0%} of them need {self.most_need:,} tokens, and the model reads "
            f"{self.positions:,}{room}: {less}split or shorten the records, or take a model that "
            "reads more"
        )

    @property
    def facts(self) -> dict[str, float]:
        """The counts for a stage's result."""
        return {
            "examples": self.num_kept,
            "examples_changed": sum(self.changed.values()),
            "examples_left_out": sum(self.left_out.values()),
        }


def lost_characters(
    records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """For each record, the characters of its texts that the tokenizer cannot write."""
    present = [set[str]().union(*record_texts(record)) for record in records]
    lost = {char for char in set[str]().union(*present) if drops(tokenizer, char)}
    return ["".join(sorted(chars & lost)) for chars in present]


def drops(tokenizer: PreTrainedTokenizerFast, char: str) -> bool:
    """Whether a character is lost as tokens: nothing or the unknown token stands for it."""
    if char.isspace():
        return False
    ids = encode(tokenizer, char)
    return tokenizer.unk_token_id in ids or char not in decode(tokenizer, ids)
