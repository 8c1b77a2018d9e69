"""The sampler: token ids in, token ids out, for rollouts, evaluation and chat alike.

Every random number is handed in, one per (response, position), so a response does not depend on
its batch neighbours, on the batch size or on the number of ranks. It scores nothing: log-
probabilities are taken afterwards by the training forward pass (`roles.response_logprobs`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from chatllama.config import GenerationSection

NUCLEUS_CANDIDATES = 1024
COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    """1: all tokens."""

    @classmethod
    def of(cls, section: GenerationSection) -> "Sampling":
        """The sampling that the config asks for."""
        return cls(section.max_new_tokens, section.temperature, section.top_k, section.top_p)


class _Slots(CacheLayerMixin):
    """Keys and values of one layer in memory taken once, read as far as they are written."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.used = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, width = key_states.shape
        shape = (batch, heads, self.length, width)
        self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.used + key_states.shape[2]
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep_rows(self, rows: torch.Tensor) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        return self.used

    def get_max_length(self) -> int:
        return self.length


def next_tokens(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """One token id per row by inverting the cumulative distribution: (B,) int64.

    Exact for any top_p: the likeliest 1,024 tokens are sorted first, the whole vocabulary only if
    they do not hold that much probability.

    Args:
        logits: (B, V) float, of the next position.
        uniforms: (B,) float32 in [0, 1).
        sampling: temperature, top_k, top_p.
    """
    if not torch.isfinite(logits).any(-1).all():
        raise ValueError("the model's logits are NaN or infinite: its weights are broken")
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    vocabulary = probabilities.shape[-1]
    if sampling.top_k or sampling.top_p < 1:
        candidates = min(sampling.top_k or NUCLEUS_CANDIDATES, vocabulary)
        best, ids = probabilities.topk(candidates)
        if not sampling.top_k and bool((best.sum(-1) < sampling.top_p).any()):
            best, ids = probabilities.sort(descending=True)
        # Tokens are kept until their total reaches top_p of what top_k left.
        total = best.sum(-1, keepdim=True) if sampling.top_k else torch.ones_like(best[:, :1])
        before = best.cumsum(-1) - best
        best = torch.where(before < sampling.top_p * total, best, torch.zeros_like(best))
        probabilities = torch.zeros_like(probabilities).scatter(1, ids, best)
    cumulative = probabilities.cumsum(-1)
    # 1 - u lies in (0, 1]: the first token whose cumulative probability reaches it is never one
    # of probability 0, whatever the rounding of the sum.
    goal = (1 - uniforms[:, None]) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goal).squeeze(-1)


@torch.no_grad()
def _decode(
    llama: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    uniforms: torch.Tensor,
    any_running: Callable[[bool], bool] = bool,
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields, step by step, the rows still running and the token that each just got."""
    device = llama.device
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    tokens, mask, uniforms = tokens.to(device), mask.to(device), uniforms.to(device)
    length = width + sampling.max_new_tokens
    layers = [_Slots(length) for _ in range(llama.config.num_hidden_layers)]
    cache = Cache(layers=list(layers))
    seen = torch.ones(len(prompts), length, dtype=torch.bool, device=device)
    seen[:, :width] = mask
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    rows = torch.arange(len(prompts), device=device)
    live = torch.ones_like(rows, dtype=torch.bool)  # stopped rows are dropped once it pays
    stops = torch.tensor(list(stop_ids), device=device)
    for step in range(sampling.max_new_tokens):
        hidden = llama.model(
            input_ids=tokens,
            attention_mask=seen[:, : width + step].long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        chosen = next_tokens(llama.lm_head(hidden), uniforms[rows, step], sampling)
        yield rows[live].tolist(), chosen[live].tolist()
        live = live & ~torch.isin(chosen, stops)
        alive = int(live.sum())
        if not any_running(alive > 0):
            return
        if alive < COMPACT_BELOW * len(rows) and len(rows) > 1:
            kept = live.nonzero().squeeze(-1) if alive else rows.new_zeros(1)
            rows, seen, positions = rows[kept], seen[kept], positions[kept]
            chosen, live = chosen[kept], live[kept]
            for layer in layers:
                layer.keep_rows(kept)
        tokens, positions = chosen[:, None], positions[:, -1:] + 1


def _check_prompts(
    llama: LlamaForCausalLM, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> None:
    limit = llama.config.max_position_embeddings
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt holds no token")
        if len(prompt) + sampling.max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens {sampling.max_new_tokens} "
                f"do not fit the model's {limit} positions"
            )


def generate(
    llama: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    uniforms: torch.Tensor,
    batch_size: int,
    any_running: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """Sampled responses, each up to and including its stop token, in the order of the prompts.

    Prompts of similar length share a batch; finished rows are dropped as the batch thins out.

    Args:
        llama: in eval mode, with the wanted role acting.
        prompts: token ids; none may be empty.
        sampling: how to choose tokens.
        stop_ids: ids that end a response.
        uniforms: (N, max_new_tokens) float32 in [0, 1), one row a prompt.
        batch_size: rows at a time.
        any_running: asked after every token whether any rank still samples, given whether this
            one does. Under ZeRO-3 ranks must stay in step, so a rank that is done goes on idly.

    Raises:
        ValueError: an empty prompt, or prompt and response do not fit the model's positions.
    """
    assert not llama.training
    _check_prompts(llama, prompts, sampling)
    responses: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        rows_prompts, rows_uniforms = [prompts[i] for i in batch], uniforms[torch.tensor(batch)]
        steps = _decode(llama, rows_prompts, sampling, stop_ids, rows_uniforms, any_running)
        for rows, chosen in steps:
            for row, token in zip(rows, chosen, strict=True):
                responses[batch[row]].append(token)
    return responses


def stream(
    llama: LlamaForCausalLM,
    prompt: Sequence[int],
    sampling: Sampling,
    stop_ids: Sequence[int],
    generator: torch.Generator,
) -> Iterator[int]:
    """Token ids of one response as they are sampled, without the stop token.

    Args:
        llama: in eval mode, with the wanted role acting.
        prompt: token ids.
        sampling: how to choose tokens.
        stop_ids: ids that end the response.
        generator: CPU generator of the random numbers.

    Raises:
        ValueError: as `generate`, when the first token is asked for.
    """
    assert not llama.training
    _check_prompts(llama, [prompt], sampling)
    uniforms = torch.rand(1, sampling.max_new_tokens, generator=generator)
    for _, chosen in _decode(llama, [prompt], sampling, stop_ids, uniforms):
        if chosen[0] in stop_ids:
            return
        yield chosen[0]
