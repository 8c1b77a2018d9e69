import math
from collections import Counter
from typing import Any

import pytest
import torch
from core_models import VOCABULARY, Batch, ragged_batch, role_model, tiny_llama
from transformers import LlamaForCausalLM

from chatllama import generate as module
from chatllama.config import GenerationSection
from chatllama.generate import Sampling, generate, next_tokens, stream
from chatllama.roles import acting_as, response_logprobs

PROMPTS = [[5, 9, 30], [7], [11, 40, 41, 42, 80, 3, 12], [20, 21], [33, 60, 61, 9], [8, 8]]
STOPS = [2, *range(10, 30)]
ALMOST_ONE = 1 - 2**-24  # the largest number that torch.rand gives


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


def draw(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


def grid_counts(logits: torch.Tensor, sampling: Sampling, rows: int = 6000) -> torch.Tensor:
    """How often each token comes up over evenly spaced uniforms: rows * p, give or take one."""
    counts = torch.zeros(len(logits), dtype=torch.long)
    for chunk in ((torch.arange(rows) + 0.5) / rows).split(1500):
        chosen = next_tokens(logits.expand(len(chunk), -1), chunk, sampling)
        counts += chosen.bincount(minlength=len(logits))
    return counts


def assert_distribution(counts: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((counts - expected * counts.sum()).abs() <= 1.1).all()
    assert (counts[expected == 0] == 0).all()


# --- one token -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_next_tokens_follow_the_softmax_over_the_whole_vocabulary(temperature: float):
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
    expected = (logits.double() / temperature).softmax(-1)
    assert_distribution(grid_counts(logits, Sampling(1, temperature)), expected)


@pytest.mark.parametrize("top_k", [1, 5, 50, 96, 1000])
def test_top_k(top_k: int):
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2))
    kept = logits.sort(descending=True).indices[:top_k]
    expected = torch.zeros(VOCABULARY, dtype=torch.float64)
    expected[kept] = logits.double()[kept].softmax(-1)
    assert_distribution(grid_counts(logits, Sampling(1, top_k=top_k)), expected)


def test_top_p_by_hand():
    # p = .5, .3, .15, .05 (in another order): .7 keeps .5 and .3, as .5 alone does not reach it;
    # renormalised 5/8 and 3/8.
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    counts = grid_counts(logits, Sampling(1, top_p=0.7))
    assert_distribution(counts, torch.tensor([0, 5 / 8, 0, 3 / 8]))
    # .45 keeps the first only, .96 all.
    assert_distribution(grid_counts(logits, Sampling(1, top_p=0.45)), torch.tensor([0.0, 1, 0, 0]))
    everything = torch.tensor([0.15, 0.5, 0.05, 0.3])
    assert_distribution(grid_counts(logits, Sampling(1, top_p=0.96)), everything)


def test_top_p_after_top_k():
    # top_k 2 leaves .5 and .3 = .625 and .375 of what is left; top_p .6 keeps the first only.
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    counts = grid_counts(logits, Sampling(1, top_k=2, top_p=0.6))
    assert_distribution(counts, torch.tensor([0.0, 1, 0, 0]))
    counts = grid_counts(logits, Sampling(1, top_k=2, top_p=0.65))
    assert_distribution(counts, torch.tensor([0, 5 / 8, 0, 3 / 8]))


def test_top_p_with_temperature_cuts_the_tempered_distribution():
    # Temperature .5 squares: .25, .09, .0225, .0025 of .365: .685, .247, ...: .6 keeps one token.
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    counts = grid_counts(logits, Sampling(1, temperature=0.5, top_p=0.6))
    assert_distribution(counts, torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.995])
def test_top_p_is_exact_where_the_first_candidates_do_not_suffice(top_p: float):
    vocabulary = 1500
    assert vocabulary > module.NUCLEUS_CANDIDATES
    # Nearly flat, shuffled: .9 needs about 1,340 tokens.
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(3))
    logits = (-0.0002 * torch.arange(vocabulary, dtype=torch.float64))[order]
    probabilities = logits.softmax(-1)
    total, kept = 0.0, []
    for token in probabilities.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept.append(token)
        total += float(probabilities[token])
    assert (len(kept) > module.NUCLEUS_CANDIDATES) == (top_p > 0.8)
    expected = torch.zeros(vocabulary, dtype=torch.float64)
    expected[kept] = probabilities[kept] / total
    assert_distribution(grid_counts(logits.float(), Sampling(1, top_p=top_p)), expected)


def test_rows_of_one_batch_do_not_share_their_nucleus():
    flat, sharp = torch.zeros(1500), torch.zeros(1500)
    sharp[7] = 20.0
    uniforms = torch.full((2,), 0.999)
    chosen = next_tokens(torch.stack([sharp, flat]), uniforms, Sampling(1, top_p=0.9))
    assert chosen[0] == 7
    alone = next_tokens(flat[None], uniforms[:1], Sampling(1, top_p=0.9))
    assert chosen[1] == alone[0]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1), Sampling(1, top_k=3), Sampling(1, top_p=0.9), Sampling(1, 0.7, 4, 0.8)],
)
@pytest.mark.parametrize("seed", range(5))
def test_tokens_of_probability_zero_are_never_sampled(sampling: Sampling, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(200, 5000, generator=generator)
    forbidden = torch.rand(logits.shape, generator=generator) < 0.5
    forbidden[:, :3], forbidden[:, -3:] = True, True
    logits[forbidden] = -math.inf
    for uniform in (0.0, ALMOST_ONE, 2**-24, 0.5):
        chosen = next_tokens(logits, torch.full((200,), uniform), sampling)
        assert not forbidden.gather(1, chosen[:, None]).any()


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, 1.0, 1.0]])
    assert next_tokens(logits, torch.tensor([0.0, 0.9]), Sampling(1, 0.0)).tolist() == [1, 0]


# --- whole responses -----------------------------------------------------------------------------


def test_greedy_equals_transformers_for_ragged_prompts(llama: LlamaForCausalLM):
    batch = ragged_batch(prompt_lengths=(3, 1, 7, 2, 4), response_lengths=(1,) * 5)
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
    actual = generate(llama, batch.prompts, Sampling(24, 0.0), STOPS, draw(5, 24), batch_size=8)
    assert actual == expected


@pytest.mark.parametrize(
    "sampling", [Sampling(40), Sampling(40, 0.7), Sampling(40, 1.0, 20, 0.9), Sampling(40, 0.0)]
)
def test_a_response_depends_on_nothing_but_its_prompt_and_numbers(
    llama: LlamaForCausalLM, sampling: Sampling, monkeypatch
):
    kept: list[int] = []
    keep_rows = module._Slots.keep_rows

    def spy(self, rows):
        kept.append(len(rows))
        return keep_rows(self, rows)

    monkeypatch.setattr(module._Slots, "keep_rows", spy)
    prompts = PROMPTS * 3
    uniforms = draw(len(prompts), 40)
    stops = STOPS[:8]
    alone = generate(llama, prompts, sampling, stops, uniforms, batch_size=1)
    assert not kept
    for batch_size in (4, 18):
        together = generate(llama, prompts, sampling, stops, uniforms, batch_size)
        assert together == alone
    assert len(set(kept)) > 2  # batches did thin out
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
    prompts = sorted(PROMPTS, key=len)
    steps: list[torch.Tensor] = []
    sample = module.next_tokens

    def recorded(logits, uniforms, sampling):
        chosen = sample(logits, uniforms, sampling)
        logprobs = (logits / sampling.temperature).log_softmax(-1)
        steps.append(logprobs.gather(1, chosen[:, None])[:, 0])
        return chosen

    monkeypatch.setattr(module, "next_tokens", recorded)
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


def test_sampling_is_read_from_the_config():
    section = GenerationSection(max_new_tokens=7, temperature=0.5, top_k=3, top_p=0.8)
    assert Sampling.of(section) == Sampling(7, 0.5, 3, 0.8)
    assert Sampling.of(GenerationSection()) == Sampling(256, 1.0, 0, 1.0)


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
