"""What sampling asks of a GPU: waits of a step, allocations of the cache."""

from typing import Any

import pytest
import torch
from kernel_counts import KernelCounts, llama_7b
from tiny_models import tiny_llama

from chatllama.generation import kv_cache, sampling
from chatllama.generation.decoding_batch import DecodingBatch, Request, Sampled
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.generation.static_kv_cache import StaticKVCache

SAMPLINGS = {
    "whole": [Sampling(9)],
    "tempered": [Sampling(9, 0.7)],
    "greedy": [Sampling(9, 0.0)],
    "truncated": [Sampling(9, top_k=5), Sampling(9, 0.6, top_p=0.9)],
    "mixed": [Sampling(9), Sampling(9, 0.0), Sampling(9, 0.5, 3, 0.8), Sampling(9, top_k=2000)],
}


def requests(samplings: list[Sampling], logprobs: int | None) -> list[Request]:
    return [
        Request(
            list(range(3, 5 + i)),
            samplings[i % len(samplings)],
            [],
            torch.rand(9),
            logprobs if i % 2 else None,
        )
        for i in range(5)
    ]


@pytest.mark.parametrize("logprobs", [None, 0, 3])
@pytest.mark.parametrize("kind", SAMPLINGS)
def test_a_step_waits_for_the_device_once(kind: str, logprobs: int | None):
    batch = DecodingBatch(llama_7b(1), 6, longest=20)
    with KernelCounts() as counts:
        batch.admit(requests(SAMPLINGS[kind], logprobs))
    assert counts.syncs == {"tolist": 1}
    for dropped in ([], [0, 3]):  # then rows move, and their settings are uploaded anew
        batch.drop(dropped)
        with KernelCounts() as counts:
            batch.step()
        assert counts.syncs == {"tolist": 1}


@pytest.mark.slow
def test_a_compiled_step_waits_once(monkeypatch: pytest.MonkeyPatch):
    llama = llama_7b(1)
    static = StaticKVCache(llama)
    batch = DecodingBatch(llama, 6, static, longest=20)
    with KernelCounts() as counts:
        batch.admit(requests(SAMPLINGS["mixed"], 3))
    assert counts.syncs == {"tolist": 1}
    hidden = torch.empty(6, 4096, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(static, "_decode", lambda *_: hidden)
    batch.drop([1])
    with KernelCounts() as counts:
        batch.step()
    assert counts.syncs == {"tolist": 1}


@pytest.mark.parametrize("seed", range(4))
def test_by_sorting_the_tokens_are_the_same(seed: int):
    """The way of a GPU, on the CPU: ties, flat and sharp rows, limits inside and outside."""
    generator = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(64, 3000, generator=generator)
        * torch.tensor([0.01, 1, 4, 9]).repeat(16)[:, None]
    )
    weights = (logits * 4).round().div(4).softmax(-1)  # ties, as in bfloat16
    uniforms = torch.rand(64, generator=generator)
    top_k = (
        torch.randint(0, 3500, (64, 1), generator=generator) * (torch.arange(64) % 3 > 0)[:, None]
    )
    top_p = torch.rand(64, 1, generator=generator).clamp(max=0.999)
    wanted = sampling._truncated(weights, uniforms, top_k, top_p, int(top_k.max()))
    limit = torch.where(top_k > 0, top_k, 3000).clamp(max=3000)
    assert torch.equal(sampling._by_sorting(weights, uniforms, limit, top_p), wanted)


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the cache's tensors, an entry each time that a layer allocates them."""
    shapes: list[tuple[int, ...]] = []
    allocate = kv_cache.RowLayer.lazy_initialization

    def noted(layer: kv_cache.RowLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        allocate(layer, keys, values)
        shapes.append(tuple(layer.tensors[0].shape))

    monkeypatch.setattr(kv_cache.RowLayer, "lazy_initialization", noted)
    return shapes


CASES: dict[str, dict[str, Any]] = {
    "ragged": {"stop_ids": [2, *range(10, 17)]},
    "to the end": {"stop_ids": []},
    "stopped by the caller": {"stop_ids": [], "ends_with": lambda i, token: token % 9 == i % 9},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("longest_prompt", [3, 30])
def test_the_cache_is_allocated_once(
    case: str, longest_prompt: int, allocations: list[tuple[int, ...]]
):
    llama, count, new = tiny_llama(), 41, 24
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, longest_prompt + 1, (count,), generator=generator).tolist()
    lengths[7] = longest_prompt
    prompts = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]
    uniforms = torch.rand(count, new, generator=generator)
    given: dict[str, Any] = {"uniforms": uniforms, "batch_size": 8, **CASES[case]}
    responses = generate(llama, prompts, Sampling(new), **given)
    assert allocations == [(8, 2, longest_prompt + new, 8)] * 2  # of two layers
    assert len(responses) == count


def test_a_reserved_cache_moves_its_rows_as_often_as_it_must():
    """Rows one step apart, each to its end: all columns in use, and hardly one free on the left."""
    llama, new = tiny_llama(), 12
    prompt, zeros = [5, 9, 30], torch.zeros(12)
    expected = generate(llama, [prompt], Sampling(new, 0.0), [], zeros[None], 1)[0]
    batch = DecodingBatch(llama, new, longest=len(prompt) + new)
    produced: dict[int, list[int]] = {}

    def note(news: list[Sampled]) -> None:
        for one in news:
            produced.setdefault(one.row, []).append(one.token)

    for _ in range(30):
        if batch.free:
            note(batch.admit([Request(prompt, Sampling(new, 0.0), [], zeros)]))
        note(batch.step())
    while batch.running:
        note(batch.step())
    assert batch._cache.capacity == len(prompt) + new
    assert len(produced) == 30 and all(tokens == expected for tokens in produced.values())
