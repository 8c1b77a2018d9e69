"""What the routes do: requests checked and turned into work for the engine, answers written."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import torch
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from chatllama.generation.decoding_batch import Request
from chatllama.generation.sampling import Sampling
from chatllama.inference.answerer import Answerer, random_numbers
from chatllama.inference.load import LoadedRun
from chatllama.serving.engine import Engine, EngineLimits
from chatllama.serving.errors import ApiError
from chatllama.serving.metrics import Metrics
from chatllama.serving.models import Models
from chatllama.serving.requests import Call, EventStream, unless_gone
from chatllama.serving.responses import Kind, Writer
from chatllama.serving.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Sampled,
    Scored,
    TokenKlRequest,
)
from chatllama.serving.settings import ServerSettings
from chatllama.serving.votes import VoteFile
from chatllama.text.chat_format import (
    Message,
    check_messages,
    end_of_turn_ids,
    render,
)
from chatllama.text.detokenizing import TokenTexts
from chatllama.text.encoding import control_tokens, encode

SCORED_TOKENS = 16384
"""Tokens, padding included, that are scored in one forward pass."""


class Service:
    """A run, opened and at work.

    Args:
        settings: limits and files.
        run: opened with every adapter.
    """

    def __init__(self, settings: ServerSettings, run: LoadedRun) -> None:
        self.settings, self.run = settings, run
        self.metrics = Metrics()
        limits = EngineLimits(settings.max_rows, settings.cache_tokens, settings.max_queue)
        self.engine = Engine(run.model, limits, self.metrics)
        root = settings.adapter_root or settings.run
        self.models = Models(run, self.engine, root, settings.max_adapters)
        self.votes = VoteFile(settings.votes_file)
        self.max_positions = int(run.model.llama.config.max_position_embeddings)
        self.vocabulary = int(run.model.llama.config.vocab_size)
        self.texts = TokenTexts(run.tokenizer)
        self._turn_ends = end_of_turn_ids(run.tokenizer, run.chat)
        self.engine.start()

    # --- answers ---------------------------------------------------------------------------------

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        """The response to /v1/chat/completions."""
        messages = [message.plain() for message in body.messages]
        prompt = await asyncio.to_thread(self.check_prompt, messages)
        room = self._room([prompt])
        wanted = body.max_completion_tokens or body.max_tokens
        if wanted is None:
            wanted = min(room, self.run.config.generation.max_new_tokens)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", "logprobs")
        stop_ids = [*self._turn_ends, *(body.stop_token_ids or [])]
        return await self._answer(
            "chat", body, [prompt], self._checked(wanted, room), stop_ids, logprobs, http
        )

    async def complete(self, body: CompletionRequest, http: HttpRequest) -> Response:
        """The response to /v1/completions."""
        prompts = await asyncio.to_thread(self._prompt_ids, body.prompts())
        room = self._room(prompts)
        eos = self.run.tokenizer.eos_token_id
        stop_ids = [eos, *(body.stop_token_ids or [])]
        length = self._checked(body.max_tokens, room)
        return await self._answer(
            "completion", body, prompts, length, stop_ids, body.logprobs, http
        )

    async def _answer(
        self,
        kind: Kind,
        body: Sampled,
        prompts: list[list[int]],
        max_tokens: int,
        stop_ids: Sequence[Any],
        logprobs: int | None,
        http: HttpRequest,
    ) -> Response:
        served = self.models.find(body.model)
        most = self.settings.max_rows + self.settings.max_queue
        if len(prompts) * body.n > most:
            raise ApiError(
                400, f"{len(prompts)} prompts with n={body.n}: at most {most} answers at a time",
                "invalid_value", "n",
            )  # fmt: skip
        sampling = Sampling(max_tokens, body.temperature, max(0, body.top_k), body.top_p)
        seed = secrets.randbits(62) if body.seed is None else body.seed
        requests = [
            Request(prompt, sampling, stop_ids, random_numbers(seed, i, j, max_tokens), logprobs)
            for i, prompt in enumerate(prompts)
            for j in range(body.n)
        ]
        seconds = self.settings.timeout
        call = Call(
            self.engine, served.role, requests, self.run.tokenizer, body.stops, seconds,
            self.metrics,
        )  # fmt: skip
        self.metrics.count("prompt_tokens", sum(map(len, prompts)))
        writer = Writer(
            kind, served.name, prompts, body.n, self.texts, logprobs is not None,
            body.return_token_ids,
        )  # fmt: skip
        if body.stream:
            options = body.stream_options
            events = writer.stream(call, options is not None and options.include_usage)
            return EventStream(events, call.close, self.metrics, seconds)
        try:
            pieces = await unless_gone(http, call.all_pieces(), self.metrics, seconds + 1)
        finally:
            call.close()
        return JSONResponse(writer.whole(pieces))

    # --- prompts ---------------------------------------------------------------------------------

    def check_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the assistant is to answer.

        Raises:
            ApiError: messages out of order, too long, or no Unicode.
        """
        self._check_length(sum(len(message["content"]) for message in messages))
        try:
            rendered = render(
                self.run.tokenizer, self.run.chat, messages, add_generation_prompt=True
            )
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", "messages") from error
        return rendered.ids

    def _conversation(self, messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
        """Token ids of what was asked and of the answer at the end."""
        plain = [message.plain() for message in messages]
        if plain[-1]["role"] != "assistant":
            raise ApiError(
                400, "the conversation must end with the assistant's answer", "invalid_value",
                "messages",
            )  # fmt: skip
        prompt = self.check_prompt(plain[:-1])
        try:
            check_messages(plain)
            whole = render(self.run.tokenizer, self.run.chat, plain).ids
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", "messages") from error
        if len(whole) > self.max_positions:
            raise self._too_long(len(whole))
        return prompt, whole[len(prompt) :]

    def _prompt_ids(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        tokenizer = self.run.tokenizer
        found: list[list[int]] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_length(len(prompt))
                start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
                try:
                    prompt = [*start, *encode(tokenizer, prompt)]
                except ValueError as error:
                    raise ApiError(400, str(error), "invalid_value", "prompt") from error
            elif max(prompt) >= self.vocabulary:
                raise ApiError(
                    400, f"token id {max(prompt)}: the vocabulary has {self.vocabulary}",
                    "invalid_value", "prompt",
                )  # fmt: skip
            if not prompt:
                raise ApiError(400, "the prompt is empty", "invalid_value", "prompt")
            found.append(prompt)
        return found

    def _check_length(self, characters: int) -> None:
        """Refuses, without reading it, a text that no tokenisation could make fit."""
        least = characters // self.texts.longest
        if least > self.max_positions:
            raise self._too_long(least)

    def _room(self, prompts: Sequence[Sequence[int]]) -> int:
        longest = max(map(len, prompts))
        if longest >= self.max_positions:
            raise self._too_long(longest)
        kept = self.settings.cache_tokens
        if longest >= kept:
            raise ApiError(
                400, f"a prompt of {longest} tokens: this server keeps {kept} in all",
                "context_length_exceeded",
            )  # fmt: skip
        return min(self.max_positions, kept) - longest

    def _too_long(self, tokens: int) -> ApiError:
        return ApiError(
            400,
            f"at least {tokens} tokens: the model's context has {self.max_positions}, and an "
            "answer needs some of them",
            "context_length_exceeded",
        )

    def _checked(self, max_tokens: int, room: int) -> int:
        """`max_tokens`, where prompt and answer fit."""
        most = self.settings.max_tokens
        if most is not None and max_tokens > most:
            raise ApiError(
                400, f"max_tokens {max_tokens}: this server allows {most}", "invalid_value",
                "max_tokens",
            )  # fmt: skip
        if max_tokens > room:
            of = f"the model's {self.max_positions} tokens"
            if self.settings.cache_tokens < self.max_positions:
                of = f"the {self.settings.cache_tokens} tokens that this server keeps"
            raise ApiError(
                400, f"max_tokens {max_tokens}: the prompt leaves {room} of {of}",
                "context_length_exceeded", "max_tokens",
            )  # fmt: skip
        return max_tokens

    # --- judgements ------------------------------------------------------------------------------

    async def score(self, body: Scored, http: HttpRequest) -> dict[str, Any]:
        """The answer of /v1/score."""
        if (body.messages is None) == (body.conversations is None):
            raise ApiError(
                400, "give one of messages and conversations", "invalid_value", "messages"
            )
        if body.model != "reward" or not self.models.has_reward:
            names = "reward" if self.models.has_reward else "none: the run has no reward model"
            raise ApiError(404, f"scores come from: {names}", "model_not_found", "model")
        conversations = body.conversations or [body.messages or []]
        pairs = [await asyncio.to_thread(self._conversation, each) for each in conversations]
        sequences = [[*prompt, *answer] for prompt, answer in pairs]
        answerer = Answerer.of(self.run, "base")
        scores: list[float] = []
        rows = max(1, SCORED_TOKENS // max(map(len, sequences)))
        for start in range(0, len(sequences), rows):
            some = sequences[start : start + rows]
            scores += await self._in_engine(lambda some=some: answerer.scores(some), http)
        data = [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores)]
        count = sum(map(len, sequences))
        return {
            "id": f"score-{secrets.token_hex(16)}",
            "object": "list",
            "model": "reward",
            "data": data,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }

    async def token_kl(self, body: TokenKlRequest, http: HttpRequest) -> dict[str, Any]:
        """The answer of /v1/token_kl."""
        names = [self.models.find(body.model), self.models.find(body.reference)]
        prompt, answer = await asyncio.to_thread(self._conversation, body.messages)

        def both() -> list[list[float]]:
            return [
                Answerer.of(self.run, served.role).logprobs([prompt], [answer], 1.0)[0]
                for served in names
            ]

        own, other = await self._in_engine(both, http)
        special = set(control_tokens(self.run.tokenizer).values())
        tokens = [
            {
                "text": self.texts.text_of(token),
                "special": token in special,
                "logprob": p,
                "reference_logprob": q,
                "kl": p - q,
            }
            for token, p, q in zip(answer, own, other, strict=True)
        ]
        return {
            "object": "token_kl",
            "model": names[0].name,
            "reference": names[1].name,
            "kl": sum(own) - sum(other),
            "tokens": tokens,
        }

    async def _in_engine(self, function: Any, http: HttpRequest) -> Any:
        work = asyncio.wrap_future(self.engine.run(torch.no_grad()(function)))
        return await unless_gone(http, work, self.metrics, self.settings.timeout)
