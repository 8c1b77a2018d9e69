import math
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import FORMS, VOCABULARY, Batch, ragged_batch, role_model, tiny_llama
from transformers import LlamaForCausalLM

from chatllama.generation import decoding_batch
from chatllama.generation.decoding_batch import DecodingBatch
from chatllama.generation.generate import generate, stream
from chatllama.generation.sampling import Sampling
from chatllama.model.packed_attention import registered
from chatllama.model.roles import acting_as
from chatllama.model.scoring import response_logprobs

PROMPTS = [[5, 9, 30], [7], [11, 40, 41, 42, 80, 3, 12], [20, 21], [33, 60, 61, 9], [8, 8]]
STOPS = [2, *range(10, 30)]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


def draw(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
def test_greedy_equals_transformers_for_ragged_prompts(form: str):
    llama = tiny_llama(form=form)
    lengths = torch.randint(1, 12, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = ragged_batch(prompt_lengths=tuple(lengths), response_lengths=(1,) * 50)
    width = batch.tokens.shape[1] - 1
    tokens, mask = batch.tokens[:, :width], batch.mask[:, :width]
    hugging_face: Any = llama
    out = hugging_face.generate(
        input_ids=tokens,
        attention_mask=mask.long(),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=STOPS,
        pad_token_id=0,
    )
    expected = []
    for row in out[:, width:].tolist():
        ends = [i for i, token in enumerate(row) if token in STOPS]
        expected.append(row[: ends[0] + 1] if ends else row)
    assert len({len(row) for row in expected}) > 1
    llama.set_attn_implementation(registered("sdpa"))
    actual = generate(llama, batch.prompts, Sampling(24, 0.0), STOPS, draw(50, 24), batch_size=8)
    assert actual == expected


@pytest.mark.parametrize(
    "sampling", [Sampling(40), Sampling(40, 0.7), Sampling(40, 1.0, 20, 0.9), Sampling(40, 0.0)]
)
def test_a_response_depends_on_nothing_but_its_prompt_and_numbers(
    llama: LlamaForCausalLM, sampling: Sampling, monkeypatch
):
    admitted: list[tuple[int, int]] = []
    admit = DecodingBatch.admit

    def spy(self, requests):
        admitted.append((len(self.running), len(requests)))
        return admit(self, requests)

    monkeypatch.setattr(DecodingBatch, "admit", spy)
    prompts = PROMPTS * 3
    uniforms = draw(len(prompts), 40)
    stops = STOPS[:8]
    alone = generate(llama, prompts, sampling, stops, uniforms, batch_size=1)
    assert admitted == [(0, 1)] * len(prompts)
    for batch_size in (4, 7, 18):
        together = generate(llama, prompts, sampling, stops, uniforms, batch_size)
        assert together == alone
    # Slots were refilled beside running rows, or there were enough for all.
    assert any(running for running, _ in admitted) and admitted[-1] == (0, len(prompts))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1))
    shuffled = generate(
        llama, [prompts[i] for i in order], sampling, stops, uniforms[order], batch_size=5
    )
    assert shuffled == [alone[i] for i in order]


def test_responses_end_with_their_stop_token_or_at_the_limit(llama: LlamaForCausalLM):
    responses = generate(llama, PROMPTS * 5, Sampling(12), STOPS, draw(30, 12), batch_size=30)
    assert {len(r) == 12 for r in responses} == {True, False}
    for response in responses:
        assert not set(response[:-1]) & set(STOPS)
        assert response[-1] in STOPS or len(response) == 12


def test_without_stop_ids_all_run_to_the_limit(llama: LlamaForCausalLM):
    responses = generate(llama, PROMPTS, Sampling(9), [], draw(6, 9), batch_size=4)
    assert [len(response) for response in responses] == [9] * 6


def test_no_prompts_no_responses(llama: LlamaForCausalLM):
    assert generate(llama, [], Sampling(4), [2], draw(0, 4), batch_size=4) == []


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_tokens_follow_the_scored_distribution(temperature: float):
    # PPO.md P1: transformers' generate stays at top-50 here (total variation .18).
    count, prompt = 20_000, [5, 9, 30]
    model = role_model(tiny_llama())
    tokens = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
    everything = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        scored = response_logprobs(
            model, "policy", tokens, everything, everything[:, -1:], temperature
        )
    expected = scored.logprobs[:, 0].double().exp()
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    assert expected.sort(descending=True).values[50:].sum() > 0.01  # top-50 would show
    with acting_as(model, "policy"):
        responses = generate(
            model.llama,
            [prompt] * count,
            Sampling(1, temperature),
            [2],
            draw(count, 1, seed=5),
            batch_size=5000,
        )
    seen = Counter(response[0] for response in responses)
    observed = torch.tensor([seen[token] for token in range(VOCABULARY)]).double()
    variation = 0.5 * (observed / count - expected).abs().sum()
    floor = 0.5 * (2 * expected * (1 - expected) / (math.pi * count)).sqrt().sum()
    assert variation < 1.3 * floor
    often = expected * count >= 5
    pooled = torch.cat([observed[often], observed[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]]) * count
    chi_square = ((pooled - wanted).square() / wanted.clamp(min=1)).sum()
    freedom = len(pooled) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("rope", ["default", "llama3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_decoding_and_scoring_agree_on_the_sampled_tokens(
    temperature: float, rope: str, monkeypatch
):
    # PPO.md P3: 3.8e-6 in float32 between the cache and the forward pass.
    model = role_model(tiny_llama(rope=rope))
    prompts = sorted(PROMPTS, key=lambda prompt: (len(prompt), prompt))  # as they are read
    steps: list[torch.Tensor] = []
    sample = decoding_batch.next_tokens

    def recorded(logits, uniforms, rows):
        chosen = sample(logits, uniforms, rows)
        logprobs = (logits / rows.temperature).log_softmax(-1)
        steps.append(logprobs.gather(1, chosen[:, None])[:, 0])
        return chosen

    monkeypatch.setattr(decoding_batch, "next_tokens", recorded)
    with acting_as(model, "policy"):
        responses = generate(
            model.llama, prompts, Sampling(30, temperature), [], draw(6, 30), batch_size=6
        )
    width = max(map(len, prompts))
    batch = Batch(
        tokens=torch.tensor(
            [[0] * (width - len(p)) + p + r for p, r in zip(prompts, responses, strict=True)]
        ),
        mask=torch.ones(6, width + 30, dtype=torch.bool),
        response_mask=torch.ones(6, 30, dtype=torch.bool),
        prompts=prompts,
        responses=responses,
    )
    for row, prompt in enumerate(prompts):
        batch.mask[row, : width - len(prompt)] = False
    with torch.no_grad():
        scored = response_logprobs(
            model, "policy", batch.tokens, batch.mask, batch.response_mask, temperature
        )
    torch.testing.assert_close(torch.stack(steps, 1), scored.logprobs, rtol=0, atol=1e-5)


def test_the_acting_role_speaks():
    model = role_model(tiny_llama())
    said = []
    for role in ("base", "reference", "policy"):
        with acting_as(model, role):
            said.append(generate(model.llama, PROMPTS, Sampling(12, 0.0), [], draw(6, 12), 6))
    assert said[0] != said[1] != said[2] != said[0]
    assert said[0] == generate(tiny_llama(), PROMPTS, Sampling(12, 0.0), [], draw(6, 12), 6)


# --- streaming and errors ------------------------------------------------------------------------


def test_stream_gives_the_same_tokens_without_the_stop(llama: LlamaForCausalLM):
    sampling = Sampling(30)
    lengths = set()
    for seed in range(6):
        expected = generate(llama, PROMPTS[:1], sampling, STOPS, draw(1, 30, seed), batch_size=1)[0]
        if expected[-1] in STOPS:
            expected = expected[:-1]
        generator = torch.Generator().manual_seed(seed)
        assert list(stream(llama, PROMPTS[0], sampling, STOPS, generator)) == expected
        lengths.add(len(expected))
    assert len(lengths) > 2
    assert torch.is_grad_enabled()


def test_stream_yields_while_it_samples(llama: LlamaForCausalLM):
    tokens = stream(llama, [5, 6], Sampling(30), [], torch.Generator().manual_seed(0))
    next(tokens)
    assert torch.is_grad_enabled()  # not switched off between two tokens
    del tokens
    assert torch.is_grad_enabled()


def test_prompts_that_cannot_be_answered_are_refused():
    llama = tiny_llama(max_positions=16)
    with pytest.raises(ValueError, match="a prompt holds no token"):
        generate(llama, [[1], []], Sampling(4), [2], draw(2, 4), batch_size=2)
    message = "a prompt of 13 tokens and max_new_tokens 4 do not fit the model's 16 positions"
    with pytest.raises(ValueError, match=message):
        generate(llama, [[1], [5] * 13], Sampling(4), [2], draw(2, 4), batch_size=2)
    assert len(generate(llama, [[5] * 12], Sampling(4), [], draw(1, 4), batch_size=2)[0]) == 4
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="a prompt holds no token"):
        next(stream(llama, [], Sampling(4), [2], generator))
    with pytest.raises(ValueError, match="do not fit the model's 16 positions"):
        next(stream(llama, [5] * 13, Sampling(4), [2], generator))
