"""What the server's engine works on: one job a request, one row an answer, pieces coming back.

No tensors of the model's and no HTTP here.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerFast

from chatllama.generation.decoding_batch import Request, Sampled
from chatllama.model.roles import Role
from chatllama.serving.errors import ApiError
from chatllama.text.detokenizing import AnswerText

Ended = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one step, or several, added to one answer."""

    index: int
    """Of the answer within its job."""
    text: str
    tokens: list[Sampled]
    """Every sampled token, the one that ends it included."""
    ended: Ended | None


@dataclass(eq=False)
class Row:
    """One answer in the making."""

    job: "Job"
    index: int
    request: Request
    text: AnswerText

    @property
    def length(self) -> int:
        """Tokens that prompt and answer may come to."""
        return len(self.request.prompt) + self.request.sampling.max_new_tokens

    def advance(self, sampled: Sampled) -> Piece:
        """What a new token adds; a stop string may end the row before the model does."""
        ended: Ended | None = sampled.ended
        text = "" if ended == "stop" else self.text.push(sampled.token)
        if self.text.stopped:
            ended = "stop"
        if ended:
            text += self.text.finish()
        return Piece(self.index, text, [sampled], ended)


@dataclass(eq=False)
class Job:
    """One request's answers, all by one role."""

    role: Role
    deliver: Callable[["Job", list[Piece] | ApiError], None]
    """Called from the engine's thread, in order; an error is the last that comes."""
    deadline: float
    """`time.monotonic()` after which the job fails."""
    rows: list[Row] = field(default_factory=list)
    cancelled: bool = False
    """Nobody wants the rest; set from any thread."""
    failed: bool = False
    remaining: int = 0
    """Rows that have not ended."""
    submitted: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        """Nothing of it must be worked on any more."""
        return self.cancelled or self.failed or self.remaining == 0


def make_rows(
    job: Job,
    requests: Sequence[Request],
    tokenizer: PreTrainedTokenizerFast,
    stops: Sequence[str],
) -> None:
    """Gives a job its rows, in the order of the answers."""
    job.rows = [
        Row(job, index, request, AnswerText(tokenizer, stops))
        for index, request in enumerate(requests)
    ]
    job.remaining = len(job.rows)


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """The same pieces, one for each answer, in the order in which answers were first met."""
    kept: dict[int, Piece] = {}
    for piece in pieces:
        known = kept.get(piece.index)
        if known is not None:
            piece = Piece(
                piece.index, known.text + piece.text, [*known.tokens, *piece.tokens], piece.ended
            )
        kept[piece.index] = piece
    return list(kept.values())
