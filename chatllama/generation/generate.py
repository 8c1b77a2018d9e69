"""The sampler: token ids in, token ids out, for rollouts, evaluation and chat alike.

Every random number is handed in, one per (response, position), so a response does not depend on
its batch neighbours, on the batch size or on the number of ranks. It scores nothing: log-
probabilities are taken afterwards by the training forward pass (`scoring.response_logprobs`).
Rows come and go in a `DecodingBatch`; here is the queue in front of it.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import LlamaForCausalLM

from chatllama.generation.decoding_batch import DecodingBatch, Request, check_request
from chatllama.generation.sampling import Sampling
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
) -> list[list[int]]:
    """Sampled responses, each up to and including the token that ends it, in the prompts' order.

    Prompts of similar length run together, equal ones are read once; as responses end, the next
    prompts take their places.

    Args:
        llama: in eval mode, with the wanted role acting.
        prompts: token ids; none may be empty.
        sampling: how to choose tokens.
        stop_ids: ids that end a response.
        uniforms: (N, max_new_tokens) float32 in [0, 1), one row a prompt.
        batch_size: rows at a time.
        any_running: asked before every forward pass whether any rank still samples, given whether
            this one does. Under ZeRO-3 ranks must stay in step, so a rank that is done goes on
            idly.
        ends_with: asked with the number of a prompt and each new token of its response that is no
            stop id, in order, whether the response ends with it. None: no.
        compiled: of the same model: steps are compiled, and the next call finds them so.

    Raises:
        ValueError: an empty prompt, or prompt and response do not fit the model's positions.
    """
    for prompt in prompts:
        check_request(llama, prompt, sampling.max_new_tokens)
    if compiled is not None:
        longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        compiled.reserve(min(batch_size, len(prompts)), longest)
    batch = DecodingBatch(llama, min(batch_size, max(1, len(prompts))), compiled)
    # The longest last: `pop` takes from the end, so prompts are read from the shortest on.
    order = range(len(prompts))
    queue = sorted(order, key=lambda i: (len(prompts[i]), tuple(prompts[i]), i), reverse=True)
    taken: list[int] = []
    responses: list[list[int]] = [[] for _ in prompts]
    while any_running(bool(queue or batch.running)):
        if queue and batch.free >= min(len(queue), -(-batch_size // REFILL_SHARE)):
            chosen = _next_prompts(queue, prompts, batch.free)
            taken += chosen
            sampled = batch.admit(
                [Request(prompts[i], sampling, stop_ids, uniforms[i]) for i in chosen]
            )
        elif batch.running:
            sampled = batch.step()
        else:
            sampled = []
            batch.idle()
        over: list[int] = []
        for one in sampled:
            number = taken[one.row]
            responses[number].append(one.token)
            if ends_with is None or one.ended == "stop" or not ends_with(number, one.token):
                continue
            if one.ended is None:
                over.append(one.row)
        batch.drop(over)
    return responses


def _next_prompts(queue: list[int], prompts: Sequence[Sequence[int]], most: int) -> list[int]:
    """Takes prompts from the queue's end, up to what one forward pass should read."""
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

    Args:
        llama: in eval mode, with the wanted role acting.
        prompt: token ids.
        sampling: how to choose tokens.
        stop_ids: ids that end the response.
        generator: CPU generator of the random numbers.

    Raises:
        ValueError: as `generate`, when the first token is asked for.
    """
    batch = DecodingBatch(llama, 1)
    uniforms = torch.rand(sampling.max_new_tokens, generator=generator)
    sampled = batch.admit([Request(prompt, sampling, stop_ids, uniforms)])
    while True:
        newest = sampled[0]
        if newest.ended == "stop":
            return
        yield newest.token
        if newest.ended:
            return
        sampled = batch.step()
