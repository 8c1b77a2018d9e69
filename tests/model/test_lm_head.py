"""Log-probabilities in chunks, against the whole table of logits and autograd."""

import pytest
import torch
from kernel_counts import KernelCounts
from torch import nn

from chatllama.model import lm_head
from chatllama.model.lm_head import float32_logits, token_logprobs, token_loss

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


# --- float32 sums of 16-bit products -------------------------------------------------------------


@pytest.fixture(scope="module")
def low() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A head whose logits reach 13, of which a 16-bit sum is off by up to 1/32."""
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(256, 5000, bias=False).requires_grad_(False)
    head.weight.data = torch.randn(5000, 256, generator=generator).bfloat16()
    hidden = (torch.randn(40, 256, generator=generator) * 0.2).bfloat16()
    return head, hidden, torch.randint(5000, (40,), generator=generator)


def exact(head: nn.Linear, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T
    assert logits.abs().max() > 12
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_of_16_bit_numbers_are_those_of_float64(
    low: tuple, gradient: bool, temperature: float, autocast: bool
):
    head, hidden, targets = low
    wanted = exact(head, hidden, temperature)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(gradient):
        own = hidden.clone().requires_grad_(gradient)
        logprobs, entropy = token_logprobs(head, own, targets, temperature)
    picked = wanted.gather(1, targets[:, None])[:, 0]
    assert (logprobs - picked).abs().max() < 1e-3
    assert (entropy + (wanted.exp() * wanted).sum(-1)).abs().max() < 1e-3
    if gradient:
        logprobs.sum().backward()
        slopes = (nn.functional.one_hot(targets, 5000) - wanted.exp()) @ head.weight.double()
        torch.testing.assert_close(own.grad.double(), slopes / temperature, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_the_loss_of_16_bit_numbers_is_that_of_float64(low: tuple, kind: torch.dtype, trains: bool):
    head, hidden, targets = low
    weight = head.weight.detach().to(kind).requires_grad_(trains)
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_loss(hidden.to(kind).requires_grad_(), weight, targets).loss_sum
    wanted = exact(head, hidden, 1.0).gather(1, targets[:, None]).sum()
    assert float((loss + wanted).detach()) == pytest.approx(0, abs=40 * 1e-3)


def test_float32_logits_are_torchs_to_the_bit():
    head, hidden, _ = head_and_inputs()
    assert torch.equal(float32_logits(hidden, head.weight), head(hidden))


@pytest.mark.parametrize(("vocabulary", "chunks"), [(32_000, 2), (128_256, 8), (512, 1)])
def test_on_a_gpu_few_chunks_are_computed_in_float32(vocabulary: int, chunks: int):
    head = nn.Linear(64, vocabulary, bias=False, device="meta", dtype=torch.bfloat16)
    head.requires_grad_(False)
    hidden = torch.empty(2000, 64, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), KernelCounts() as counts:
        token_logprobs(head, hidden, torch.zeros(2000, dtype=torch.long, device="meta"), 0.7)
    assert counts.kernels["mm"] == chunks and not counts.syncs
    assert float32_logits(hidden, head.weight).dtype == torch.float32
