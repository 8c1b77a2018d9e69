import math

import pytest
import torch
from torch import nn

from trainers.losses import head_chunks, token_loss


def test_two_tokens_by_hand():
    # Head = identity, so hidden states are logits over 2 tokens.
    # Row 0: logits (ln 3, 0), target 0: p = 3/4. Row 1: logits (0, 0), target 1: p = 1/2.
    hidden = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    losses = token_loss(hidden, nn.Identity(), torch.tensor([0, 1]))
    assert losses.loss_sum.item() == pytest.approx(math.log(4 / 3) + math.log(2))
    assert losses.num_correct.item() == 1  # row 1 is a tie: argmax takes token 0


def test_gradient_is_probability_minus_one_hot():
    hidden = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    token_loss(hidden, nn.Identity(), torch.tensor([0])).loss_sum.backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.25, 0.25]]))


@pytest.mark.parametrize("num_chunks", [2, 3, 9])
def test_chunks_change_neither_loss_nor_gradients(num_chunks: int):
    torch.manual_seed(0)
    head = nn.Linear(5, 11, bias=False)
    hidden, targets = torch.randn(7, 5), torch.randint(11, (7,))
    results = []
    for chunks in (1, num_chunks):
        rows = hidden.clone().requires_grad_()
        head.zero_grad()
        losses = token_loss(rows, head, targets, chunks)
        losses.loss_sum.backward()
        assert rows.grad is not None and head.weight.grad is not None
        results.append((losses.loss_sum, losses.num_correct, rows.grad, head.weight.grad.clone()))
    for whole, split in zip(*results, strict=True):
        torch.testing.assert_close(split, whole)


def test_the_head_is_called_equally_often_whatever_the_batch_holds():
    # ZeRO-3 gathers the head's weight at every call, on all ranks together.
    calls = []
    head = nn.Linear(5, 11)
    head.register_forward_hook(lambda *_: calls.append(1))
    for num_tokens in (0, 1, 20):
        calls.clear()
        token_loss(torch.randn(num_tokens, 5), head, torch.zeros(num_tokens, dtype=torch.long), 4)
        assert len(calls) == 4


def test_no_tokens_give_zero_loss_and_zero_gradient():
    head = nn.Linear(5, 11)
    losses = token_loss(torch.zeros(0, 5), head, torch.zeros(0, dtype=torch.long))
    losses.loss_sum.backward()
    assert losses.loss_sum.item() == 0.0
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_bfloat16_logits_are_summed_in_float32():
    hidden = torch.zeros(3000, 2, dtype=torch.bfloat16)
    losses = token_loss(hidden, nn.Identity(), torch.zeros(3000, dtype=torch.long))
    assert losses.loss_sum.item() == pytest.approx(3000 * math.log(2), rel=1e-5)


def test_chunks_by_hand():
    assert head_chunks(num_positions=2048, vocab_size=512) == 1
    assert head_chunks(num_positions=8 * 512, vocab_size=32_000, max_logits=2**25) == 4
    assert head_chunks(num_positions=100, vocab_size=10, max_logits=100) == 10
