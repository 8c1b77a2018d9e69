"""Units of the engine's work: one job a request, one row an answer; text deltas come back.

No tensors of the model's and no HTTP here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerFast

from chatllama.generation.decoding_batch import Request, Sampled
from chatllama.generation.sampling import BROKEN
from chatllama.model.roles import Role
from chatllama.serving.errors import ApiError
from chatllama.text.detokenizing import AnswerText

Ended = Literal["stop", "length"]


@dataclass(frozen=True)
class Delta:
    """What one step, or several, added to one answer."""

    index: int
    """Of the answer within its job."""
    text: str
    tokens: list[Sampled]
    """Every sampled token, the one that ends it included."""
    ended: Ended | None


@dataclass(eq=False)
class Row:
    """One answer that is being generated."""

    job: "Job"
    index: int
    request: Request
    text: AnswerText

    @property
    def length(self) -> int:
        """Upper bound on the tokens of prompt and answer."""
        return len(self.request.prompt) + self.request.sampling.max_new_tokens

    def advance(self, sampled: Sampled) -> Delta:
        """What a new token adds; a stop string may end the row before the model does.

        ApiError: the row could not be sampled.
        """
        if sampled.ended == "failed":
            raise ApiError(500, BROKEN, "broken_model")
        ended: Ended | None = sampled.ended
        text = "" if ended == "stop" else self.text.push(sampled.token)
        if self.text.stopped:
            ended = "stop"
        if ended:
            text += self.text.finish()
        return Delta(self.index, text, [sampled], ended)


@dataclass(eq=False)
class Job:
    """One request's answers, all by one role."""

    role: Role
    deliver: Callable[["Job", list[Delta] | ApiError], None]
    """Called from the engine's thread, in order; after an error nothing more comes."""
    deadline: float
    """`time.monotonic()` after which the job fails."""
    rows: list[Row] = field(default_factory=list)
    cancelled: bool = False
    """The rest is not needed; set from any thread."""
    failed: bool = False
    remaining: int = 0
    """Rows that have not ended."""
    submitted: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Whether no work is left."""
        return self.cancelled or self.failed or self.remaining == 0

    def add_rows(
        self,
        requests: Sequence[Request],
        tokenizer: PreTrainedTokenizerFast,
        stops: Sequence[str],
        continues: bool,
    ) -> None:
        """One row for each request, in order; the others are arguments of `AnswerText`."""
        for index, request in enumerate(requests):
            self.rows.append(Row(self, index, request, AnswerText(tokenizer, stops, continues)))
        self.remaining = len(self.rows)


def merged(deltas: Sequence[Delta]) -> list[Delta]:
    """One delta for each answer, in the order in which answers first appear."""
    kept: dict[int, Delta] = {}
    for new in deltas:
        old = kept.get(new.index, Delta(new.index, "", [], None))
        tokens = [*old.tokens, *new.tokens]
        kept[new.index] = Delta(new.index, old.text + new.text, tokens, new.ended)
    return list(kept.values())
