"""The sampler: token ids in, token ids out, for rollouts, evaluation and chat alike.

Every random number is an argument, one per (response, position), so a response does not depend on
the rest of the batch, on its size or on the number of ranks. Nothing is scored here: log-
probabilities come afterwards from the training forward pass (`scoring.response_logprobs`). Rows
are decoded in a `DecodingBatch`; here is the queue in front of it.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import LlamaForCausalLM

from chatllama.generation.decoding_batch import DecodingBatch, Request, Sampled, check_request
from chatllama.generation.sampling import BROKEN, Sampling
from chatllama.generation.static_kv_cache import StaticKVCache

REFILL_SHARE = 8
PROMPT_TOKENS = 16384


def generate(
    llama: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    uniforms: torch.Tensor,
    batch_size: int,
    any_running: Callable[[bool], bool] = bool,
    ends_with: Callable[[int, int], bool] | None = None,
    compiled: StaticKVCache | None = None,
    show: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[int]]:
    """Sampled responses, each up to and including the token that ends it, in the prompts' order.

    Prompts run by length, equal ones are read once; as responses end, the next take their rows.

    Args:
        prompts: token ids; none may be empty.
        sampling: also bounds the response's length.
        uniforms: (N, max_new_tokens) float32 in [0, 1), one row a prompt.
        any_running: called before every forward pass with whether this rank still samples; returns
            whether any rank does. Under ZeRO-3 ranks must stay in step: a finished rank idles.
        ends_with: called with the number of a prompt and each new token of its response that is no
            stop id, in order; returns whether the response ends with it. None: never.
        compiled: of the same model, for compiled steps; reuse it in the next call.
        show: called at every step with the number of finished responses, and of all.

    Raises:
        ValueError: an empty prompt, prompt and response do not fit the model's positions, or its
            logits are NaN or infinite.
    """
    for prompt in prompts:
        check_request(llama, prompt, sampling.max_new_tokens)
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    batch = DecodingBatch(llama, min(batch_size, max(1, len(prompts))), compiled, longest)
    # The longest last: `pop` takes from the end, so prompts are read from the shortest on.
    queue = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i]), i))[::-1]
    taken: list[int] = []
    responses: list[list[int]] = [[] for _ in prompts]
    while any_running(bool(queue or batch.running)):
        if queue and batch.free >= min(len(queue), -(-batch_size // REFILL_SHARE)):
            chosen = _next_prompts(queue, prompts, batch.free)
            taken += chosen
            requests = [Request(prompts[i], sampling, stop_ids, uniforms[i]) for i in chosen]
            sampled = batch.admit(requests)
        elif batch.running:
            sampled = batch.step()
        else:
            sampled = []
            batch.idle()
        stopped: list[int] = []
        for one in _sound(sampled):
            number = taken[one.row]
            responses[number].append(one.token)
            if ends_with is not None and one.ended != "stop" and ends_with(number, one.token):
                stopped += [one.row] * (one.ended is None)
        batch.drop(stopped)
        show(len(prompts) - len(queue) - len(batch.running), len(prompts))
    return responses


def _sound(sampled: list[Sampled]) -> list[Sampled]:
    if any(one.ended == "failed" for one in sampled):
        raise ValueError(BROKEN)
    return sampled


def _next_prompts(queue: list[int], prompts: Sequence[Sequence[int]], most: int) -> list[int]:
    """Pops up to `most` prompts from the queue's end, and at most PROMPT_TOKENS with padding."""
    chosen = [queue.pop()]
    while queue and len(chosen) < most:
        if len(prompts[queue[-1]]) * (len(chosen) + 1) > PROMPT_TOKENS:
            break
        chosen.append(queue.pop())
    return chosen


def stream(
    llama: LlamaForCausalLM,
    prompt: Sequence[int],
    sampling: Sampling,
    stop_ids: Sequence[int],
    generator: torch.Generator,
) -> Iterator[int]:
    """Token ids of one response as they are sampled, without the stop token.

    Arguments and errors are those of `generate`; the random numbers come from `generator`, on the
    CPU.
    """
    batch = DecodingBatch(llama, 1)
    uniforms = torch.rand(sampling.max_new_tokens, generator=generator)
    sampled = batch.admit([Request(prompt, sampling, stop_ids, uniforms)])
    while True:
        (newest,) = _sound(sampled)
        if newest.ended == "stop":
            return
        yield newest.token
        if newest.ended:
            return
        sampled = batch.step()
