"""Log-probabilities in chunks, against the whole table of logits and autograd."""

import pytest
import torch
from torch import nn

from chatllama.model import lm_head
from chatllama.model.lm_head import token_logprobs

TOKENS, WIDTH, VOCABULARY = 23, 12, 50


def head_and_inputs() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight.data = torch.randn(VOCABULARY, WIDTH, generator=generator)
    head.requires_grad_(False)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    return head, hidden, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [1, 5, 23, 1000])
def test_chunks_give_what_the_whole_table_gives(
    monkeypatch: pytest.MonkeyPatch, rows: int, temperature: float
):
    monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", rows * VOCABULARY)
    head, hidden, targets = head_and_inputs()
    own, plain = (hidden.clone().requires_grad_() for _ in range(2))
    logprobs, entropy = token_logprobs(head, own, targets, temperature)
    table = (plain @ head.weight.T / temperature).log_softmax(-1)
    expected = table[torch.arange(TOKENS), targets]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    uncertainty = torch.distributions.Categorical(logits=table).entropy()
    torch.testing.assert_close(entropy, uncertainty, rtol=0, atol=1e-5)
    assert logprobs.requires_grad and not entropy.requires_grad
    weights = torch.linspace(-1, 2, TOKENS)
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(own.grad, plain.grad, rtol=0, atol=1e-5)


def test_with_and_without_gradient_the_numbers_are_the_same_bits():
    head, hidden, targets = head_and_inputs()
    with torch.no_grad():
        expected = token_logprobs(head, hidden, targets, 0.7)
    actual = token_logprobs(head, hidden.requires_grad_(), targets, 0.7)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_it_happens_inside_the_heads_own_call():
    head, hidden, targets = head_and_inputs()
    expected = token_logprobs(head, hidden, targets, 0.7)
    whole = head.weight.data

    def fetch(*_: object) -> None:
        head.weight.data = whole

    def drop(*_: object) -> None:
        head.weight.data = torch.empty(0)

    head.register_forward_pre_hook(fetch)  # as ZeRO-3 does
    head.register_forward_hook(drop)
    drop()
    actual = token_logprobs(head, hidden.requires_grad_(), targets, 0.7)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    actual[0].sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    fetch()
    assert head(hidden).shape == (TOKENS, VOCABULARY)  # the head itself is as before


def test_a_head_that_trains_gives_all_logits():
    head, hidden, targets = head_and_inputs()
    expected = token_logprobs(head, hidden, targets, 0.7)
    head.requires_grad_(True)
    actual = token_logprobs(head, hidden, targets, 0.7)
    actual[0].sum().backward()
    assert head.weight.grad is not None and head.weight.grad.abs().sum() > 0
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_bfloat16_weights_under_autocast_give_float32():
    head, hidden, targets = head_and_inputs()
    exact, _ = token_logprobs(head, hidden, targets, 1.0)
    head.to(torch.bfloat16)
    low = hidden.to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = token_logprobs(head, low, targets, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, exact, rtol=0, atol=0.1)
    logprobs.sum().backward()
    assert low.grad is not None and low.grad.dtype == torch.bfloat16 and low.grad.isfinite().all()


def test_no_tokens_no_numbers():
    head, hidden, targets = head_and_inputs()
    logprobs, entropy = token_logprobs(head, hidden[:0], targets[:0], 1.0)
    assert logprobs.shape == entropy.shape == (0,)
