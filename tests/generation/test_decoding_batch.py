"""Rows that come and go: each is what it would be alone."""

import gc
import weakref
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM

from chatllama.generation.decoding_batch import DecodingBatch, Request, Sampled
from chatllama.generation.generate import generate, stream
from chatllama.generation.kv_cache import KVCache
from chatllama.generation.sampling import Sampling
from chatllama.generation.static_kv_cache import StaticKVCache

WIDE = [2, *range(10, 30)]
SAMPLINGS = (
    Sampling(20),
    Sampling(9, 0.0),
    Sampling(30, 0.7),
    Sampling(25, 1.0, top_k=5),
    Sampling(40, 1.3, top_p=0.8),
    Sampling(1),
    Sampling(15, 0.9, top_k=30, top_p=0.95),
)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


def requests(count: int) -> list[Request]:
    """Prompts of 1 to 60 tokens, every kind of sampling, some with stop ids."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length = int(torch.randint(1, 60 if i % 5 == 0 else 8, (1,), generator=generator))
        prompt = torch.randint(3, 96, (length,), generator=generator).tolist()
        sampling = SAMPLINGS[i % len(SAMPLINGS)]
        uniforms = torch.rand(sampling.max_new_tokens, generator=generator)
        made.append(Request(prompt, sampling, WIDE if i % 3 else [], uniforms))
    return made


def alone(llama: LlamaForCausalLM, request: Request) -> list[int]:
    stops = list(request.stop_ids)
    return generate(llama, [request.prompt], request.sampling, stops, request.uniforms[None], 1)[0]


def note(produced: dict[int, list[int]], sampled: list[Sampled]) -> None:
    for one in sampled:
        produced.setdefault(one.row, []).append(one.token)


def test_rows_are_what_they_would_be_alone_however_they_come_and_go(llama: LlamaForCausalLM):
    wanted = requests(21)
    batch = DecodingBatch(llama, 5)
    produced: dict[int, list[int]] = {}
    rows: list[int] = []
    dropped: set[int] = set()
    ended: dict[int, str] = {}
    numbers = torch.Generator().manual_seed(1)
    while len(rows) < len(wanted) or batch.running:
        left = min(batch.free, len(wanted) - len(rows))
        if left and int(torch.randint(2, (1,), generator=numbers)):
            sampled = batch.admit(wanted[len(rows) : len(rows) + left])
            rows += [one.row for one in sampled]
        elif batch.running:
            sampled = batch.step()
        else:
            continue
        note(produced, sampled)
        ended |= {one.row: one.ended for one in sampled if one.ended}
        assert not set(ended) & set(batch.running)
        if len(rows) > 7 * (len(dropped) + 1) and batch.running and len(dropped) < 2:
            dropped.add(batch.running[0])
            batch.drop([batch.running[0]])
        assert batch.free == 5 - len(batch.running)
    assert rows == list(range(21)) and len(dropped) == 2
    for row, request in enumerate(wanted):
        expected = alone(llama, request)
        if row in dropped:
            assert produced[row] == expected[: len(produced[row])]
        else:
            assert produced[row] == expected, row
            assert ended[row] == ("stop" if expected[-1] in request.stop_ids else "length")
    assert set(ended.values()) == {"stop", "length"}


BAD = 94


def broken_llama() -> LlamaForCausalLM:
    """A model whose token BAD is NaN."""
    llama = tiny_llama()
    llama.model.embed_tokens.weight.data[BAD] = torch.nan
    return llama


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("logprobs", "order"), [(None, "gbgh"), (2, "gghb"), (1, "bhgg")])
def test_a_row_that_cannot_be_sampled_leaves_alone(
    compiled: bool, logprobs: int | None, order: str
) -> None:
    """Others move to where bad and hot rows were, or are admitted there."""
    llama = broken_llama()
    zeros = torch.zeros(40)
    good = [Request([5, 9, 30], Sampling(20, 0.0), [], zeros, logprobs),
            Request([7, *range(20, 40)], Sampling(16), [], zeros, logprobs)]  # fmt: skip
    bad = Request([8, BAD, *range(3, 30)], Sampling(9, top_k=3), [], zeros, logprobs)
    hot = Request([8, 9], Sampling(9, 1e-39), [], zeros, logprobs)
    static = StaticKVCache(llama, "eager") if compiled else None
    batch = DecodingBatch(llama, 4, static)
    produced: dict[int, list[int]] = {}
    waiting = {"g": list(good), "b": [bad], "h": [hot]}
    first = batch.admit([waiting[kind].pop(0) for kind in order])
    failed = [one for one in first if one.ended == "failed"]
    assert [one.row for one in failed] == [i for i, kind in enumerate(order) if kind in "bh"]
    assert all(one.logprob is None and one.top == [] for one in failed)
    note(produced, first)
    note(produced, batch.step())
    late = Request([5, 9], Sampling(30, 0.0), [], zeros, logprobs)  # takes a place with NaN in it
    note(produced, batch.admit([Request([4] * 12, Sampling(3), [], zeros), late]))
    while batch.running:
        note(produced, batch.step())
    assert all(produced[one.row] == [-1] for one in failed)
    rows = [i for i, kind in enumerate(order) if kind == "g"]
    assert [produced[row] for row in (*rows, 5)] == [alone(llama, each) for each in (*good, late)]


def test_a_model_that_breaks_ends_generate_and_stream() -> None:
    llama = broken_llama()
    with pytest.raises(ValueError, match="its weights are broken"):
        generate(llama, [[5], [BAD]], Sampling(4), [], torch.zeros(2, 4), 2)
    with pytest.raises(ValueError, match="its weights are broken"):
        list(stream(llama, [BAD], Sampling(4, 0.0), [], torch.Generator()))


def test_a_prompt_longer_than_all_that_runs_may_join(llama: LlamaForCausalLM):
    short = Request([5, 9], Sampling(30, 0.0), [], torch.zeros(30))
    long = Request(list(range(3, 90)), Sampling(30, 0.0), [], torch.zeros(30))
    batch = DecodingBatch(llama, 2)
    produced: dict[int, list[int]] = {}
    note(produced, batch.admit([short]))
    note(produced, batch.step())
    note(produced, batch.admit([long]))
    while batch.running:
        note(produced, batch.step())
    assert produced == {0: alone(llama, short), 1: alone(llama, long)}


def test_rows_that_come_one_by_one_for_ever_take_no_more_memory(llama: LlamaForCausalLM):
    # Two rows overlap at any time, so the columns in use move on and on.
    batch = DecodingBatch(llama, 2)
    request = Request([5, 9, 30], Sampling(24, 0.0), [], torch.zeros(24))
    expected = alone(llama, request)
    produced: dict[int, list[int]] = {}
    note(produced, batch.admit([request]))
    for _ in range(20):
        for _ in range(12):
            note(produced, batch.step())
        note(produced, batch.admit([request]))
    assert batch._cache.capacity == 27 + 64
    assert [produced[row] for row in range(19)] == [expected] * 19


def test_equal_prompts_are_read_once(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    shapes = []
    forward: Any = llama.model.forward

    def spy(**kwargs: Any) -> object:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(**kwargs)

    prompts = [[7, 8, 9], [7, 8, 9], [4], [7, 8, 9]]
    uniforms = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    expected = [
        generate(llama, [p], Sampling(6), [], u[None], 1)[0]
        for p, u in zip(prompts, uniforms, strict=True)
    ]
    monkeypatch.setattr(llama.model, "forward", spy)
    assert generate(llama, prompts, Sampling(6), [], uniforms, 4) == expected
    assert shapes == [(2, 3)] + [(4, 1)] * 5
    assert len({tuple(response) for response in expected}) == 4


def test_log_probabilities_of_the_token_and_of_the_likeliest(llama: LlamaForCausalLM):
    prompt, tempered = [5, 9, 30], Sampling(4, 0.5, top_k=3)
    uniforms = torch.rand(4, generator=torch.Generator().manual_seed(2))
    asked = Request(prompt, tempered, [], uniforms, logprobs=2)
    silent = Request(prompt, Sampling(4, 0.0), [], uniforms)
    bare = Request(prompt, Sampling(4, 0.0), [], uniforms, logprobs=0)
    batch = DecodingBatch(llama, 3)
    steps = [batch.admit([asked, silent, bare])]
    while batch.running:
        steps.append(batch.step())
    text, greedy = list(prompt), list(prompt)
    for first, second, third in steps:
        with torch.no_grad():
            expected = (llama(torch.tensor([text])).logits[0, -1] / 0.5).log_softmax(-1)
            plain = llama(torch.tensor([greedy])).logits[0, -1].log_softmax(-1)
        assert first.logprob == pytest.approx(float(expected[first.token]), abs=1e-5)
        best = expected.topk(2)
        assert [token for token, _ in first.top] == best.indices.tolist()
        assert [value for _, value in first.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert second.logprob is None and second.top == []
        assert third.logprob == pytest.approx(float(plain.max()), abs=1e-5) and third.top == []
        text.append(first.token)
        greedy.append(third.token)


def test_every_way_of_attention_sees_the_same_columns(llama: LlamaForCausalLM):
    # Rows of several lengths side by side: a mask that is misread shows at once.
    wanted = [Request(list(range(3, n)), Sampling(12, 0.0), [], torch.zeros(12)) for n in (5, 30)]
    expected = [alone(llama, request) for request in wanted]
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    batch, produced = DecodingBatch(eager, 2), {}
    note(produced, batch.admit(wanted[:1]))
    note(produced, batch.step())
    note(produced, batch.admit(wanted[1:]))
    while batch.running:
        note(produced, batch.step())
    assert [produced[0], produced[1]] == expected


def test_rows_that_do_not_run_cannot_be_dropped(llama: LlamaForCausalLM):
    batch = DecodingBatch(llama, 2)
    batch.admit([Request([5], Sampling(5), [], torch.rand(5))])
    with pytest.raises(AssertionError, match="not all of rows"):
        batch.drop([7])


def test_memory_is_let_go_when_a_wide_batch_is_followed_by_a_narrow_one(llama: LlamaForCausalLM):
    batch = DecodingBatch(llama, 8)
    wide = Request(list(range(3, 80)), Sampling(150, 0.0), [], torch.zeros(150))
    batch.admit([wide] * 8)
    cache = batch._cache
    assert isinstance(cache, KVCache) and (cache.allocated, cache.capacity) == (8, 227)
    batch.drop(list(range(8)))
    batch.admit([Request([5], Sampling(5, 0.0), [], torch.zeros(5))])
    assert (cache.allocated, cache.capacity) == (1, 6)


def test_memory_is_let_go_with_the_batch(llama: LlamaForCausalLM):
    gc.disable()  # an update must not have the rollout's keys and values beside it
    try:
        batch = DecodingBatch(llama, 2)
        batch.admit([Request([5, 9], Sampling(5), [], torch.zeros(5))])
        layer: Any = batch._cache.cache.layers[0]
        keys = weakref.ref(layer.keys)
        assert keys() is not None
        del batch, layer
        assert keys() is None
    finally:
        gc.enable()


def test_an_idle_pass_changes_nothing(llama: LlamaForCausalLM):
    request = Request(
        [5, 9], Sampling(8), [], torch.rand(8, generator=torch.Generator().manual_seed(0))
    )
    batch = DecodingBatch(llama, 1)
    produced: dict[int, list[int]] = {}
    note(produced, batch.admit([request]))
    while batch.running:
        batch.idle()
        note(produced, batch.step())
    assert produced[0] == alone(llama, request)
