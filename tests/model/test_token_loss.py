import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from chatllama.model.lm_head import token_loss

IDENTITY = torch.eye(2)


def test_two_tokens_by_hand():
    # Weight = identity, so hidden states are logits over 2 tokens.
    # Row 0: logits (ln 3, 0), target 0: p = 3/4. Row 1: logits (0, 0), target 1: p = 1/2.
    hidden = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    losses = token_loss(hidden, IDENTITY, torch.tensor([0, 1]))
    assert losses.loss_sum.item() == pytest.approx(math.log(4 / 3) + math.log(2))
    assert losses.num_correct.item() == 1  # row 1 is a tie: argmax takes token 0


def test_gradient_is_probability_minus_one_hot():
    hidden = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    token_loss(hidden, IDENTITY, torch.tensor([0])).loss_sum.backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.25, 0.25]]))


def test_both_gradients_are_autograds_own():
    torch.manual_seed(0)
    hidden, targets = torch.randn(7, 5), torch.randint(11, (7,))
    weight = torch.randn(11, 5)
    rows, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = cross_entropy(rows @ head.t(), targets, reduction="sum")
    (3 * expected).backward()
    rows2, head2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = token_loss(rows2, head2, targets)
    (3 * losses.loss_sum).backward()
    torch.testing.assert_close(losses.loss_sum, expected)
    torch.testing.assert_close(rows2.grad, rows.grad)
    torch.testing.assert_close(head2.grad, head.grad)


@pytest.mark.parametrize("max_logits", [11, 40, 76])
def test_chunks_change_neither_loss_nor_gradients(max_logits: int):
    torch.manual_seed(0)
    weight = torch.randn(11, 5)
    hidden, targets = torch.randn(7, 5), torch.randint(11, (7,))
    results = []
    for size in (1000, max_logits):
        rows, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = token_loss(rows, head, targets, size)
        losses.loss_sum.backward()
        results.append((losses.loss_sum, losses.num_correct, rows.grad, head.grad))
    for whole, split in zip(*results, strict=True):
        torch.testing.assert_close(split, whole)


def test_a_frozen_head_gets_no_gradient_and_evaluation_none_at_all():
    hidden = torch.randn(3, 2, requires_grad=True)
    token_loss(hidden, IDENTITY, torch.tensor([0, 1, 1])).loss_sum.backward()
    assert hidden.grad is not None and IDENTITY.grad is None
    with torch.no_grad():
        assert not token_loss(hidden, IDENTITY, torch.tensor([0, 1, 1])).loss_sum.requires_grad


def test_no_tokens_give_zero_loss_and_zero_gradient():
    weight = torch.randn(11, 5, requires_grad=True)
    losses = token_loss(torch.zeros(0, 5), weight, torch.zeros(0, dtype=torch.long))
    losses.loss_sum.backward()
    assert losses.loss_sum.item() == 0.0
    assert weight.grad is not None and not weight.grad.any()


def test_a_hopeless_target_costs_its_distance_and_stays_finite():
    # p(target) = e^-200 is no float32; its loss is 200 all the same.
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    losses = token_loss(hidden, IDENTITY, torch.tensor([1]))
    losses.loss_sum.backward()
    assert losses.loss_sum.item() == pytest.approx(200.0)
    torch.testing.assert_close(hidden.grad, torch.tensor([[1.0, -1.0]]))


def test_bfloat16_logits_are_summed_in_float32():
    hidden = torch.zeros(3000, 2, dtype=torch.bfloat16, requires_grad=True)
    losses = token_loss(hidden, IDENTITY.bfloat16(), torch.zeros(3000, dtype=torch.long))
    losses.loss_sum.backward()
    assert losses.loss_sum.item() == pytest.approx(3000 * math.log(2), rel=1e-5)
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
