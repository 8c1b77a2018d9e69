"""Continuous batching: a batch of responses, one token a step, with rows joining and leaving.

Each row has its own random numbers, sampling, stop ids and limit, and is independent of the other
rows. The caller decides when to admit and when to step; queues are elsewhere.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from chatllama.generation.kv_cache import KVCache, attention_mask
from chatllama.generation.sampling import NO_TOKEN, RowSampling, Sampling, next_tokens
from chatllama.generation.static_kv_cache import StaticKVCache
from chatllama.generation.transfer import upload, upload_ids


@dataclass(frozen=True)
class Request:
    """One response to sample."""

    prompt: Sequence[int]
    sampling: Sampling
    stop_ids: Collection[int]
    """Ids that end it."""
    uniforms: torch.Tensor
    """(at least max_new_tokens,) float32 in [0, 1): all of its randomness."""
    logprobs: int | None = None
    """Likeliest tokens to return beside the sampled one's log-probability. None: no log-probs."""


class Sampled(NamedTuple):
    """One new token of one row."""

    row: int
    """Number of the row, from `admit`."""
    token: int
    ended: Literal["stop", "length", "failed"] | None
    """Why this token is the row's last; the row is removed then. failed: there is no token, since
    its logits are NaN or infinite."""
    logprob: float | None
    """Under softmax(logits / temperature) of all tokens (temperature 1 where greedy)."""
    top: list[tuple[int, float]]
    """Likeliest tokens with their log-probabilities, the likeliest first."""


@dataclass
class _Row:
    number: int
    request: Request
    uniforms: list[float]
    stops: frozenset[int]
    produced: list[int] = field(default_factory=list)


class DecodingBatch:
    """Rows that are being sampled. All calls need the same active adapter, in eval mode.

    `admit`, `step` and `idle` are one forward pass of the whole model each: under ZeRO-3 with
    sharded weights, ranks must make equally many calls.

    Args:
        llama: the model.
        max_rows: that run at a time.
        compiled: of the same model, for compiled steps; rows of another batch in it are lost.
        longest: tokens of the longest row, prompt and response, where that is known: the KV cache
            is then allocated once. None: it grows.
    """

    def __init__(
        self,
        llama: LlamaForCausalLM,
        max_rows: int,
        compiled: StaticKVCache | None = None,
        longest: int | None = None,
    ) -> None:
        assert not llama.training and max_rows > 0
        self._llama = llama
        self.max_rows = max_rows
        if compiled is None:
            self._cache = KVCache(llama.config.num_hidden_layers, max_rows, llama.device)
            if longest is not None:
                self._cache.reserve(longest)
        else:
            assert compiled.llama is llama
            compiled.clear()
            compiled.reserve(max_rows, max(compiled.capacity, longest or 0))
            self._cache = compiled
        self._rows: list[_Row] = []
        self._sampling: RowSampling | None = None
        self._next_number = 0

    @property
    def running(self) -> list[int]:
        """Numbers of the rows that have not ended."""
        return [row.number for row in self._rows]

    @property
    def free(self) -> int:
        """Rows that can be admitted now."""
        return self.max_rows - len(self._rows)

    @torch.no_grad()
    def admit(self, requests: Sequence[Request]) -> list[Sampled]:
        """The first token of each request, in order; rows are numbered from 0 as they are admitted.

        Equal prompts are computed once. ValueError if a prompt is empty or does not fit. After any
        error the rows that ran before go on, but not in a compiled cache.
        """
        assert 0 < len(requests) <= self.free
        for request in requests:
            check_request(self._llama, request.prompt, request.sampling.max_new_tokens)
            assert len(request.uniforms) >= request.sampling.max_new_tokens
        sampling = RowSampling([r.sampling for r in requests], self._llama.device)
        first = len(self._rows)
        try:
            hidden = self._read_prompts(requests)
            for request in requests:
                uniforms, stops = request.uniforms.tolist(), frozenset(request.stop_ids)
                self._rows.append(_Row(self._next_number, request, uniforms, stops))
                self._next_number += 1
            return self._sample(hidden, first, sampling)
        except Exception:
            if isinstance(self._cache, KVCache):
                del self._rows[first:]
                self._sampling = None
                self._cache.abandon_prompts(first)
            raise

    @torch.no_grad()
    def step(self) -> list[Sampled]:
        """The next token of every running row."""
        assert self._rows
        newest = [row.produced[-1] for row in self._rows]
        if isinstance(self._cache, StaticKVCache):
            hidden = self._cache.step(newest)
        else:
            hidden = self._read_tokens(self._cache, newest)
        if self._sampling is None:
            rows = [row.request.sampling for row in self._rows]
            self._sampling = RowSampling(rows, self._llama.device)
        return self._sample(hidden, 0, self._sampling)

    def drop(self, rows: Collection[int]) -> None:
        """Removes rows that have not ended, by number."""
        dropped = set(rows)
        places = [place for place, row in enumerate(self._rows) if row.number in dropped]
        assert len(places) == len(dropped), f"not all of rows {sorted(dropped)} are running"
        self._remove(places)

    @torch.no_grad()
    def idle(self) -> None:
        """Dummy forward pass that keeps ZeRO-3's gathers in step across ranks."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self._llama.device)
        hidden = self._llama.model(input_ids=token, use_cache=False).last_hidden_state[:, -1]
        self._llama.lm_head(hidden)

    def _read_prompts(self, requests: Sequence[Request]) -> torch.Tensor:
        """Last hidden states (N, H) of the prompts; caches their keys and values."""
        prompts = [tuple(request.prompt) for request in requests]
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        prompt_of = [number[prompt] for prompt in prompts]
        rows = [torch.tensor(prompt) for prompt in number]
        masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        tokens = pad_sequence(rows, batch_first=True, padding_side="left")
        mask = pad_sequence(masks, batch_first=True, padding_side="left")
        longest = max(len(r.prompt) + r.sampling.max_new_tokens for r in requests)
        lengths = [len(prompt) for prompt in prompts]
        self._cache.open_prompts(prompt_of, lengths, longest)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        device = self._llama.device
        seen = None if bool(mask.all()) else upload(mask, device)
        hidden = self._llama.model(
            input_ids=upload(tokens, device),
            attention_mask=attention_mask(self._llama, seen, tokens.shape[1]),
            position_ids=upload(positions, device),
            past_key_values=self._cache.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        self._cache.close_prompts(lengths)
        return hidden[upload_ids(prompt_of, device)]

    def _read_tokens(self, cache: KVCache, newest: Sequence[int]) -> torch.Tensor:
        """Last hidden states (N, H) of all rows; caches their newest tokens."""
        seen, positions = cache.open_token()
        hidden = self._llama.model(
            input_ids=upload_ids(newest, self._llama.device)[:, None],
            attention_mask=attention_mask(self._llama, seen, 1),
            position_ids=positions,
            past_key_values=cache.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        cache.close_token()
        return hidden

    def _sample(self, hidden: torch.Tensor, first: int, sampling: RowSampling) -> list[Sampled]:
        """Samples for the rows from `first` on; removes those that end.

        The one place that waits for the device.
        """
        rows = self._rows[first:]
        logits = self._llama.lm_head(hidden)
        next_uniforms = [row.uniforms[len(row.produced)] for row in rows]
        uniforms = upload(torch.tensor(next_uniforms, dtype=torch.float32), logits.device)
        chosen = next_tokens(logits, uniforms, sampling)
        tokens, details = _read(chosen, logits, [row.request for row in rows])
        sampled = []
        for row, token, (logprob, top) in zip(rows, tokens, details, strict=True):
            row.produced.append(token)
            ended = None
            if token == NO_TOKEN:
                ended = "failed"
            elif token in row.stops:
                ended = "stop"
            elif len(row.produced) == row.request.sampling.max_new_tokens:
                ended = "length"
            sampled.append(Sampled(row.number, token, ended, logprob, top))
        if first:
            self._sampling = None
        # What a later row finds in the cache is multiplied by 0, which leaves NaN as it is.
        self._cache.wipe([first + i for i, one in enumerate(sampled) if one.ended == "failed"])
        self._remove([first + i for i, one in enumerate(sampled) if one.ended])
        return sampled

    def _remove(self, places: Sequence[int]) -> None:
        if not places:
            return
        for source, target in self._cache.remove(places):
            self._rows[target] = self._rows[source]
        del self._rows[len(self._rows) - len(places) :]
        self._sampling = None


Details = tuple[float | None, list[tuple[int, float]]]
"""Log-probability of a row's token, and its likeliest tokens with theirs."""


def _read(
    chosen: torch.Tensor, logits: torch.Tensor, requests: Sequence[Request]
) -> tuple[list[int], list[Details]]:
    """Tokens and, for the rows that request them, log-probabilities, in one copy to the CPU.

    Args:
        chosen: (n,) int64, the sampled tokens.
        logits: (n, V) float, that they were sampled from.
        requests: of the n rows.
    """
    details: list[Details] = [(None, []) for _ in requests]
    asking = [i for i, request in enumerate(requests) if request.logprobs is not None]
    if not asking:
        return chosen.tolist(), details
    temperatures = [[requests[i].sampling.temperature or 1.0] for i in asking]
    places = upload_ids(asking, logits.device)
    scaled = logits[places].float() / upload(torch.tensor(temperatures), logits.device)
    normalizer = scaled.logsumexp(-1, keepdim=True)
    likelihood = scaled.gather(1, chosen[places, None].clamp(min=0)) - normalizer
    best = scaled.topk(min(max(requests[i].logprobs or 0 for i in asking), scaled.shape[1]))
    columns = (likelihood, best.values - normalizer, best.indices)
    table = torch.cat([part.double() for part in columns], dim=1)  # exact: ids are below 2^53
    numbers = torch.cat([chosen.double(), table.flatten()]).tolist()
    tokens = [int(number) for number in numbers[: len(chosen)]]
    count = best.values.shape[1]
    for place, i in enumerate(asking):
        start = len(chosen) + place * (1 + 2 * count)
        logprob, values = numbers[start], numbers[start + 1 : start + 1 + count]
        ids = [int(number) for number in numbers[start + 1 + count : start + 1 + 2 * count]]
        if tokens[i] != NO_TOKEN:
            top = list(zip(ids, values, strict=True))[: requests[i].logprobs]
            details[i] = (logprob, top)
    return tokens, details


def check_request(llama: LlamaForCausalLM, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raises ValueError if the prompt is empty or does not fit the model with its response."""
    limit = llama.config.max_position_embeddings
    if not prompt:
        raise ValueError("a prompt holds no token")
    if len(prompt) + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens {max_new_tokens} "
            f"do not fit the model's {limit} positions"
        )
