"""OpenAI's answer bodies and stream chunks, made of what the engine sampled."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from chatllama.generation.decoding_batch import Sampled
from chatllama.serving.errors import ApiError
from chatllama.serving.jobs import Piece
from chatllama.serving.requests import Call
from chatllama.text.detokenizing import TokenTexts

Kind = Literal["chat", "completion"]


@dataclass
class Writer:
    """How the answers to one request are written.

    Args:
        kind: which of OpenAI's two shapes.
        model: name in the answer.
        prompts: token ids, one list for every `choices_each` choices.
        choices_each: answers to each prompt.
        texts: of single tokens.
        with_logprobs: whether choices carry log-probabilities.
        with_token_ids: whether they carry token ids.
    """

    kind: Kind
    model: str
    prompts: Sequence[Sequence[int]]
    choices_each: int
    texts: TokenTexts
    with_logprobs: bool
    with_token_ids: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {
            **self._head(name),
            "choices": [self._choice(piece) for piece in pieces],
            "usage": self.usage(sum(len(piece.tokens) for piece in pieces)),
        }

    async def stream(self, call: Call, include_usage: bool) -> AsyncIterator[str]:
        """Chunks as JSON, `[DONE]` last; an error on the way is a chunk of its own."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        head = self._head(name) | ({"usage": None} if include_usage else {})
        begun: set[int] = set()
        count = 0
        offsets: dict[int, int] = {}
        try:
            async for pieces in call.pieces():
                for piece in pieces:
                    count += len(piece.tokens)
                    for choice in self._chunks(piece, piece.index not in begun, offsets):
                        yield json.dumps({**head, "choices": [choice]}, ensure_ascii=False)
                    begun.add(piece.index)
        except ApiError as error:
            yield json.dumps(error.body())
        else:
            if include_usage:
                yield json.dumps({**head, "choices": [], "usage": self.usage(count)})
        yield "[DONE]"

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Token counts; a prompt counts once, however many answers it gets."""
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def _head(self, name: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": name,
            "created": self.created,
            "model": self.model,
        }

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": piece.index}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
        else:
            choice["text"] = piece.text
        choice["logprobs"] = self._logprobs(piece.tokens, {}, piece.index)
        choice["finish_reason"] = piece.ended
        return choice | self._token_ids(piece, first=True)

    def _chunks(self, piece: Piece, first: bool, offsets: dict[int, int]) -> list[dict[str, Any]]:
        """The choices that tell of a piece: the opening, what is new, the end."""
        logprobs = self._logprobs(piece.tokens, offsets, piece.index)
        extra = self._token_ids(piece, first)
        base = {"index": piece.index}
        if self.kind == "completion":
            told = {"text": piece.text, "logprobs": logprobs, "finish_reason": piece.ended}
            return [{**base, **told, **extra}]
        opening = {"role": "assistant", "content": ""}
        chunks: list[dict[str, Any]] = []
        if first:
            chunks.append({**base, "delta": opening, "logprobs": None, "finish_reason": None})
        if piece.text or logprobs or extra:
            told = {"delta": {"content": piece.text}, "logprobs": logprobs, "finish_reason": None}
            chunks.append({**base, **told, **extra})
        if piece.ended:
            chunks.append({**base, "delta": {}, "logprobs": None, "finish_reason": piece.ended})
        return chunks

    def _token_ids(self, piece: Piece, first: bool) -> dict[str, Any]:
        if not self.with_token_ids:
            return {}
        told: dict[str, Any] = {"token_ids": [one.token for one in piece.tokens]}
        if first:
            told["prompt_token_ids"] = list(self.prompts[piece.index // self.choices_each])
        return told

    def _logprobs(
        self, tokens: Sequence[Sampled], offsets: dict[int, int], index: int
    ) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        if self.kind == "chat":
            return {"content": [self._chat_logprob(one) for one in tokens], "refusal": None}
        places: list[int] = []
        place = offsets.get(index, 0)
        for one in tokens:
            places.append(place)
            place += len(self.texts.text_of(one.token))
        offsets[index] = place
        return {
            "tokens": [self.texts.text_of(one.token) for one in tokens],
            "token_logprobs": [_finite(one.logprob) for one in tokens],
            "top_logprobs": [
                {self.texts.text_of(token): _finite(value) for token, value in one.top}
                for one in tokens
            ],
            "text_offset": places,
        }

    def _chat_logprob(self, one: Sampled) -> dict[str, Any]:
        likeliest = [self._token(token, value) for token, value in one.top]
        return {**self._token(one.token, one.logprob), "top_logprobs": likeliest}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self.texts.bytes_of(token)
        return {
            "token": raw.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(raw),
        }


def _finite(logprob: float | None) -> float | None:
    """JSON knows no infinity: a token of probability 0 gets what OpenAI writes for one."""
    return None if logprob is None else max(logprob, -9999.0)
