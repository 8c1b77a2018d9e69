"""The reward model's loss, by hand."""

import math

import pytest
import torch

from data.batches import answer_pairs
from trainers.reward.loss import pairwise_loss

ZERO = torch.zeros(2)
ONE = torch.ones(2)
BETTER, WORSE = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 1.5])  # gaps 1 and -1
SOFT1, SOFT_MINUS1 = 0.3132617, 1.3132617  # log(1 + e^-1), log(1 + e)


def test_by_hand():
    loss = pairwise_loss(BETTER, WORSE, ZERO, ONE, 2)
    assert float(loss) == pytest.approx((SOFT1 + SOFT_MINUS1) / 2, rel=1e-6)


def test_margin_is_subtracted_from_the_gap():
    loss = pairwise_loss(BETTER, WORSE, torch.tensor([2.0, 0.0]), ONE, 2)
    assert float(loss) == pytest.approx(SOFT_MINUS1, rel=1e-6)  # both gaps are -1 now
    assert torch.equal(
        pairwise_loss(BETTER, WORSE, 0.0 * torch.tensor([2.0, 3.0]), ONE, 2),
        pairwise_loss(BETTER, WORSE, ZERO, ONE, 2),
    )


def test_centring_pulls_the_sum_of_both_scores_to_zero():
    plain = pairwise_loss(BETTER, WORSE, ZERO, ONE, 2)
    centred = pairwise_loss(BETTER, WORSE, ZERO, ONE, 2, center_coef=0.1)
    assert float(centred - plain) == pytest.approx(0.1 * (3.0**2 + 2.0**2) / 2, rel=1e-5)
    # Opposite scores are centred however far apart: the margin does not shrink.
    apart = torch.tensor([5.0])
    far = pairwise_loss(apart, -apart, ZERO[:1], ONE[:1], 1, center_coef=9.0)
    assert float(far) == pytest.approx(math.log1p(math.exp(-10)), rel=1e-4)


def test_label_smoothing_weighs_the_opposite_label():
    loss = pairwise_loss(BETTER[:1], WORSE[:1], ZERO[:1], ONE[:1], 1, label_smoothing=0.1)
    assert float(loss) == pytest.approx(0.9 * SOFT1 + 0.1 * SOFT_MINUS1, rel=1e-6)
    # The best gap is finite: log(0.9 / 0.1).
    best = torch.tensor([math.log(9.0)], requires_grad=True)
    pairwise_loss(best, ZERO[:1], ZERO[:1], ONE[:1], 1, label_smoothing=0.1).backward()
    assert best.grad is not None and abs(float(best.grad)) < 1e-6


def test_a_constant_added_to_all_scores_changes_nothing():
    better = BETTER.clone().requires_grad_()
    shifted = (BETTER + 3.0).requires_grad_()
    losses = [pairwise_loss(b, WORSE + c, ZERO, ONE, 2) for b, c in ((better, 0.0), (shifted, 3.0))]
    assert torch.equal(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(better.grad, shifted.grad)


def test_huge_gaps_stay_finite():
    better = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = pairwise_loss(better, -better.detach(), ZERO, ONE, 2, label_smoothing=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(1e4, rel=1e-6)
    assert better.grad is not None and torch.isfinite(better.grad).all()


def ranked_loss(scores: torch.Tensor, examples: list[dict], num_prompts: int) -> torch.Tensor:
    pairs = answer_pairs(examples)
    return pairwise_loss(
        scores[pairs.better], scores[pairs.worse], pairs.margin, pairs.weight, num_prompts
    )


def test_k_answers_by_hand_and_a_long_list_does_not_weigh_more():
    three = {"ranks": [0, 1, 2], "ratings": [0.0] * 3}
    two = {"ranks": [0, 1], "ratings": [0.0] * 2}
    scores = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0])  # gaps 1, 2, 1, and 0
    soft2 = math.log1p(math.exp(-2.0))
    expected = ((2 * SOFT1 + soft2) / 3 + math.log(2)) / 2
    assert float(ranked_loss(scores, [three, two], 2)) == pytest.approx(expected, rel=1e-6)


def test_two_answers_are_exactly_a_pair():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, generator=generator)
    examples = [{"ranks": [0, 1], "ratings": [0.25 * i, 0.0]} for i in range(10)]
    margin = torch.tensor([0.25 * i for i in range(10)])
    plain = -torch.nn.functional.logsigmoid(scores[::2] - scores[1::2] - margin).sum() / 10
    assert torch.equal(ranked_loss(scores, examples, 10), plain)


def test_microbatches_add_up_to_the_batch():
    generator = torch.Generator().manual_seed(1)
    sizes = [2, 4, 3, 2, 5, 3]
    examples = [{"ranks": list(range(k)), "ratings": [0.0] * k} for k in sizes]
    scores = torch.randn(sum(sizes), generator=generator, requires_grad=True)
    ranked_loss(scores, examples, 6).backward()
    whole, scores.grad = scores.grad, None
    starts = [sum(sizes[:i]) for i in range(7)]
    for first, last in ((0, 1), (1, 4), (4, 6)):
        part = scores[starts[first] : starts[last]]
        ranked_loss(part, examples[first:last], 6).backward()
    assert whole is not None
    torch.testing.assert_close(scores.grad, whole, rtol=1e-6, atol=1e-7)
