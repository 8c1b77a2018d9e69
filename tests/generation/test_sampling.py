import math

import pytest
import torch
from tiny_models import VOCABULARY

from chatllama.config.schema import GenerationSection
from chatllama.generation import sampling as module
from chatllama.generation.sampling import RowSampling, Sampling
from chatllama.generation.sampling import next_tokens as next_tokens_of_rows

ALMOST_ONE = 1 - 2**-24  # the largest number that torch.rand gives


def next_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling | list[Sampling]
) -> torch.Tensor:
    rows = sampling if isinstance(sampling, list) else [sampling]
    return next_tokens_of_rows(logits, uniforms, RowSampling(rows))


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
    assert vocabulary > module.CANDIDATES
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
    assert (len(kept) > module.CANDIDATES) == (top_p > 0.8)
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


def test_of_equally_likely_tokens_the_first_are_kept():
    # bfloat16 logits tie all the time. Weights 4, 1, 1, 1, 1: top_k 3 keeps tokens 2, 0 and 1;
    # top_p .6 wants 4.8 of 8, so one of the ones.
    logits = torch.tensor([1.0, 1.0, 4.0, 1.0, 1.0]).log()
    counts = grid_counts(logits, Sampling(1, top_k=3))
    assert_distribution(counts, torch.tensor([1 / 6, 1 / 6, 4 / 6, 0, 0]))
    counts = grid_counts(logits, Sampling(1, top_p=0.6))
    assert_distribution(counts, torch.tensor([1 / 5, 0, 4 / 5, 0, 0]))


def test_every_row_in_its_own_way():
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(4)) * 3
    uniforms = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.99, 0.7])
    rows = [
        Sampling(1),
        Sampling(1, 0.0),
        Sampling(1, 0.5, top_k=2000),
        Sampling(1, top_p=0.999),
        Sampling(1, 2.0, top_k=7, top_p=0.5),
        Sampling(1, 1.0, top_k=5000, top_p=0.9),
    ]
    together = next_tokens(logits, uniforms, rows).tolist()
    assert together == [
        int(next_tokens(logits[i : i + 1], uniforms[i : i + 1], row)) for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, 0.0), Sampling(1, top_p=0.5)])
def test_broken_logits_give_no_token_and_spoil_no_other_row(bad: float, sampling: Sampling):
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    uniforms = torch.tensor([0.3, 0.5, 0.7])
    alone = [int(next_tokens(logits[i : i + 1], uniforms[i : i + 1], sampling)) for i in (0, 2)]
    logits[1] = bad
    assert next_tokens(logits, uniforms, sampling).tolist() == [alone[0], -1, alone[1]]
    logits[1] = torch.tensor([0.0] * 9 + [bad])
    if bad != -math.inf:  # that one token is impossible
        assert next_tokens(logits, uniforms, sampling).tolist() == [alone[0], -1, alone[1]]


def test_logits_that_overflow_at_their_temperature_give_no_token():
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    rows = [Sampling(1), Sampling(1, 1e-39), Sampling(1, 0.0)]
    assert next_tokens(logits, torch.zeros(3), rows).tolist() == [2, -1, 2]


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, 1.0, 1.0]])
    assert next_tokens(logits, torch.tensor([0.0, 0.9]), Sampling(1, 0.0)).tolist() == [1, 0]


def test_sampling_is_read_from_the_config():
    section = GenerationSection(max_new_tokens=7, temperature=0.5, top_k=3, top_p=0.8)
    assert Sampling.of(section) == Sampling(7, 0.5, 3, 0.8)
    assert Sampling.of(GenerationSection()) == Sampling(256, 1.0, 0, 1.0)
