"""OpenAI's response bodies and stream chunks, made of what the engine sampled."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from chatllama.generation.decoding_batch import Sampled
from chatllama.serving.errors import ApiError
from chatllama.serving.jobs import Delta
from chatllama.serving.requests import PendingAnswers
from chatllama.text.detokenizing import TokenTexts

Kind = Literal["chat", "completion"]


@dataclass
class ResponseWriter:
    """The form of one request's response."""

    kind: Kind
    model: str
    """Its name in the response."""
    prompts: Sequence[Sequence[int]]
    """Token ids, one list for every `choices_each` choices."""
    choices_each: int
    texts: TokenTexts
    with_logprobs: bool
    with_token_ids: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """The body of a response that is not streamed, from one delta for each choice."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {
            **self._head(name),
            "choices": [self._choice(delta) for delta in deltas],
            "usage": self.usage(sum(len(delta.tokens) for delta in deltas)),
        }

    async def stream(self, pending: PendingAnswers, include_usage: bool) -> AsyncIterator[str]:
        """Chunks as JSON, `[DONE]` last; an error on the way is a chunk of its own."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        head = self._head(name) | ({"usage": None} if include_usage else {})
        begun: set[int] = set()
        count = 0
        offsets: dict[int, int] = {}
        try:
            async for deltas in pending.deltas():
                for delta in deltas:
                    count += len(delta.tokens)
                    for choice in self._chunks(delta, delta.index not in begun, offsets):
                        yield json.dumps({**head, "choices": [choice]}, ensure_ascii=False)
                    begun.add(delta.index)
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
        id = f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{self.id}"
        return {"id": id, "object": name, "created": self.created, "model": self.model}

    def _choice(self, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": delta.index}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": delta.text, "refusal": None}
        else:
            choice["text"] = delta.text
        choice["logprobs"] = self._logprobs(delta, {})
        choice["finish_reason"] = delta.ended
        return choice | self._token_ids(delta, first=True)

    def _chunks(self, delta: Delta, first: bool, offsets: dict[int, int]) -> list[dict[str, Any]]:
        """The choices that a delta becomes: in a chat the opening, the new text, the end."""
        logprobs = self._logprobs(delta, offsets)
        extra = self._token_ids(delta, first)

        def chunk(content: dict[str, Any], logprobs: Any, ended: str | None) -> dict[str, Any]:
            return {"index": delta.index, **content, "logprobs": logprobs, "finish_reason": ended}

        if self.kind == "completion":
            return [chunk({"text": delta.text}, logprobs, delta.ended) | extra]
        chunks: list[dict[str, Any]] = []
        if first:
            chunks.append(chunk({"delta": {"role": "assistant", "content": ""}}, None, None))
        if delta.text or logprobs or extra:
            chunks.append(chunk({"delta": {"content": delta.text}}, logprobs, None) | extra)
        if delta.ended:
            chunks.append(chunk({"delta": {}}, None, delta.ended))
        return chunks

    def _token_ids(self, delta: Delta, first: bool) -> dict[str, Any]:
        if not self.with_token_ids:
            return {}
        ids: dict[str, Any] = {"token_ids": [one.token for one in delta.tokens]}
        if first:
            ids["prompt_token_ids"] = list(self.prompts[delta.index // self.choices_each])
        return ids

    def _logprobs(self, delta: Delta, offsets: dict[int, int]) -> dict[str, Any] | None:
        """OpenAI's log-probabilities; `offsets`: characters of each choice so far, updated."""
        if not self.with_logprobs:
            return None
        if self.kind == "chat":
            return {"content": [self._chat_logprob(one) for one in delta.tokens], "refusal": None}
        text_of = self.texts.text_of
        places: list[int] = []
        place = offsets.get(delta.index, 0)
        for one in delta.tokens:
            places.append(place)
            place += self.texts.width(one.token)
        offsets[delta.index] = place
        return {
            "tokens": [text_of(one.token) for one in delta.tokens],
            "token_logprobs": [_finite(one.logprob) for one in delta.tokens],
            "top_logprobs": [
                {text_of(token): _finite(logprob) for token, logprob in one.top}
                for one in delta.tokens
            ],
            "text_offset": places,
        }

    def _chat_logprob(self, one: Sampled) -> dict[str, Any]:
        likeliest = [self._token(token, logprob) for token, logprob in one.top]
        return {**self._token(one.token, one.logprob), "top_logprobs": likeliest}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self.texts.bytes_of(token)
        text = raw.decode(errors="replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity: a token of probability 0 gets -9999, as OpenAI's API writes it."""
    return None if logprob is None else max(logprob, -9999.0)
