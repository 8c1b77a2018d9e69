"""What the routes do: check requests, submit them to the engine, build the responses."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from chatllama.generation.decoding_batch import Request
from chatllama.generation.sampling import Sampling
from chatllama.inference.answerer import Answerer, random_numbers
from chatllama.inference.introduction import example_prompts, what_it_knows
from chatllama.inference.load import LoadedRun
from chatllama.runs.folder import RunFolder
from chatllama.serving.engine import Engine, EngineLimits
from chatllama.serving.errors import ApiError, invalid
from chatllama.serving.metrics import Metrics
from chatllama.serving.models import Models
from chatllama.serving.requests import EventStream, PendingAnswers, unless_gone
from chatllama.serving.responses import Kind, ResponseWriter
from chatllama.serving.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    ScoreRequest,
    TokenKlRequest,
)
from chatllama.serving.settings import ServerSettings
from chatllama.serving.votes import VoteFile
from chatllama.text.chat_format import Message, end_of_turn_ids, render
from chatllama.text.detokenizing import TokenTexts
from chatllama.text.encoding import control_tokens, encode_text

Result = TypeVar("Result")
SCORED_TOKENS = 16384
"""Tokens, padding included, that are scored in one forward pass."""


class Service:
    """A served run, which is opened with every adapter."""

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
        self.introduction = {
            "run": settings.run.absolute().name,
            "knows": what_it_knows(run.config),
            "examples": example_prompts(RunFolder(settings.run)),
        }
        self._stop_ids = end_of_turn_ids(run.tokenizer, run.chat)
        self.engine.start()

    # --- answers ---------------------------------------------------------------------------------

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        """The response to /v1/chat/completions."""
        messages = [message.plain() for message in body.messages]
        prompt = await asyncio.to_thread(self.check_prompt, messages, body.continue_final_message)
        room = self._room([prompt], "messages")
        length = body.max_completion_tokens or body.max_tokens
        if length is None:
            length = min(room, self.run.config.generation.max_new_tokens)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self._check_max_tokens(length, room)
        return await self._answer("chat", body, [prompt], length, self._stop_ids, logprobs, http)

    async def complete(self, body: CompletionRequest, http: HttpRequest) -> Response:
        """The response to /v1/completions."""
        prompts = await asyncio.to_thread(self._prompt_ids, body.prompts())
        length, eos = body.max_tokens, [self.run.tokenizer.eos_token_id]
        self._check_max_tokens(length, self._room(prompts, "prompt"))
        return await self._answer("completion", body, prompts, length, eos, body.logprobs, http)

    async def _answer(
        self,
        kind: Kind,
        body: GenerationRequest,
        prompts: list[list[int]],
        max_tokens: int,
        stop_ids: Sequence[Any],
        logprobs: int | None,
        http: HttpRequest,
    ) -> Response:
        served = self.models.find(body.model)
        most = self.settings.max_rows + self.settings.max_queue
        if len(prompts) * body.n > most:
            total = f"{len(prompts)} prompts with n={body.n}"
            raise invalid(f"{total}: at most {most} answers at a time", "n")
        sampling = Sampling(max_tokens, body.temperature, max(0, body.top_k), body.top_p)
        stop_ids = [*stop_ids, *(body.stop_token_ids or [])]
        seed = secrets.randbits(62) if body.seed in (None, -1) else body.seed % 2**64
        requests = [
            Request(prompt, sampling, stop_ids, random_numbers(seed, i, j, max_tokens), logprobs)
            for i, prompt in enumerate(prompts)
            for j in range(body.n)
        ]
        seconds, tokenizer = self.settings.timeout, self.run.tokenizer
        continues = isinstance(body, ChatRequest) and body.continue_final_message
        follows = continues or kind == "completion"
        pending = PendingAnswers(
            self.engine, served.role, requests, tokenizer, body.stops, follows, seconds,
            self.metrics,
        )  # fmt: skip
        self.metrics.count("prompt_tokens", sum(map(len, prompts)))
        flags = (logprobs is not None, body.return_token_ids)
        writer = ResponseWriter(kind, served.name, prompts, body.n, self.texts, *flags)
        if body.stream:
            options = body.stream_options
            events = writer.stream(pending, options is not None and options.include_usage)
            return EventStream(events, pending.close, self.metrics, seconds)
        try:
            deltas = await unless_gone(http.receive, pending.whole(), self.metrics, seconds + 1)
        finally:
            pending.close()
        return JSONResponse(writer.whole(deltas))

    # --- prompts ---------------------------------------------------------------------------------

    def check_prompt(self, messages: Sequence[Message], continues: bool = False) -> list[int]:
        """Token ids of a conversation that the assistant is to answer; ApiError if invalid.

        With `continues` it goes on with the last message, which is its own.
        """
        self._check_length(sum(len(message["content"]) for message in messages), "messages")
        return self._render(messages, not continues, continues)

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, continues: bool = False
    ) -> list[int]:
        layout = (self.run.tokenizer, self.run.chat)
        opens = {"add_generation_prompt": add_generation_prompt, "last_answer_only": True}
        try:
            return render(*layout, messages, **opens, continue_final_message=continues).ids
        except ValueError as error:
            raise invalid(str(error), "messages") from error

    def _conversation(self, messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer at the end."""
        plain = [message.plain() for message in messages]
        if plain[-1]["role"] != "assistant":
            raise invalid("the conversation must end with the assistant's answer", "messages")
        prompt = self.check_prompt(plain[:-1])
        whole = self._render(plain, add_generation_prompt=False)
        if len(whole) > self.max_positions:
            raise self._too_long(len(whole), "messages")
        return prompt, whole[len(prompt) :]

    def _prompt_ids(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        tokenizer = self.run.tokenizer
        found: list[list[int]] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_length(len(prompt), "prompt")
                try:
                    prompt = encode_text(tokenizer, prompt)
                except ValueError as error:
                    raise invalid(str(error), "prompt") from error
            elif max(prompt) >= self.vocabulary:
                size = self.vocabulary
                raise invalid(f"token id {max(prompt)}: the vocabulary has {size}", "prompt")
            if not prompt:
                raise invalid("the prompt is empty", "prompt")
            found.append(prompt)
        return found

    def _check_length(self, characters: int, param: str) -> None:
        """Refuses a text that no tokenisation could make fit, without tokenising it."""
        least = characters // self.texts.longest
        if least > self.max_positions:
            raise self._too_long(least, param)

    def _room(self, prompts: Sequence[Sequence[int]], param: str) -> int:
        """Tokens that the longest prompt leaves for the answer."""
        longest, kept = max(map(len, prompts)), self.settings.cache_tokens
        if longest >= self.max_positions:
            raise self._too_long(longest, param)
        if longest >= kept:
            text = f"a prompt of {longest} tokens: this server keeps {kept} in all"
            raise ApiError(400, text, "context_length_exceeded", param)
        return min(self.max_positions, kept) - longest

    def _too_long(self, tokens: int, param: str) -> ApiError:
        text = (
            f"at least {tokens} tokens: the model's context has {self.max_positions}, and an "
            "answer needs some of them"
        )
        return ApiError(400, text, "context_length_exceeded", param)

    def _check_max_tokens(self, max_tokens: int, room: int) -> None:
        most, kept = self.settings.max_tokens, self.settings.cache_tokens
        if most is not None and max_tokens > most:
            raise invalid(f"max_tokens {max_tokens}: this server allows {most}", "max_tokens")
        if max_tokens > room:
            of = f"the model's {self.max_positions} tokens"
            if kept < self.max_positions:
                of = f"the {kept} tokens that this server keeps"
            text = f"max_tokens {max_tokens}: the prompt leaves {room} of {of}"
            raise ApiError(400, text, "context_length_exceeded", "max_tokens")

    # --- scores ----------------------------------------------------------------------------------

    async def score(self, body: ScoreRequest, http: HttpRequest) -> dict[str, object]:
        """The response to /v1/score."""
        if (body.messages is None) == (body.conversations is None):
            raise invalid("give one of messages and conversations", "messages")
        if body.model != "reward" or not self.models.has_reward:
            names = "reward" if self.models.has_reward else "none: the run has no reward model"
            raise ApiError(404, f"scores come from: {names}", "model_not_found", "model")
        conversations = body.conversations or [body.messages or []]
        pairs = [await asyncio.to_thread(self._conversation, each) for each in conversations]
        sequences = [[*prompt, *answer] for prompt, answer in pairs]
        answerer = Answerer(self.run, "base")
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

    async def token_kl(self, body: TokenKlRequest, http: HttpRequest) -> dict[str, object]:
        """The response to /v1/token_kl."""
        models = [
            self.models.find(body.model),
            self.models.find(body.reference or self.models.start),
        ]
        prompt, answer = await asyncio.to_thread(self._conversation, body.messages)

        def both() -> list[list[float]]:
            answerers = [Answerer(self.run, model.role) for model in models]
            return [each.logprobs([prompt], [answer], 1.0)[0] for each in answerers]

        own, other = await self._in_engine(both, http)
        special = set(control_tokens(self.run.tokenizer).values())
        tokens = [
            {
                "text": self.texts.text_of(token),
                "bytes": list(self.texts.bytes_of(token)),
                "special": token in special,
                "logprob": p,
                "reference_logprob": q,
                "kl": p - q,
            }
            for token, p, q in zip(answer, own, other, strict=True)
        ]
        return {
            "object": "token_kl",
            "model": models[0].name,
            "reference": models[1].name,
            "kl": sum(own) - sum(other),
            "tokens": tokens,
        }

    async def _in_engine(self, function: Callable[[], Result], http: HttpRequest) -> Result:
        work = asyncio.wrap_future(self.engine.run(torch.no_grad()(function)))
        return await unless_gone(http.receive, work, self.metrics, self.settings.timeout)
