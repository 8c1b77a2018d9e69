import math
import statistics

import pytest
import torch

from chatllama.config.ppo import HealthSection
from trainers.ppo.health.monitor import HealthMonitor
from trainers.ppo.ppo_math import (
    PolicyLoss,
    ValueLoss,
    adapted_kl_coef,
    explained_variance,
    gae,
    grpo_advantages,
    kl_loss,
    last_index,
    masked,
    mean_and_variance,
    policy_loss,
    rewards_to_go,
    rloo_advantages,
    shape_rewards,
    value_loss,
    whiten,
)

GARBAGE = [7.0, math.inf, -math.inf, math.nan]


def rows(*lines: str) -> torch.Tensor:
    """'110' -> [True, True, False]."""
    return torch.tensor([[letter == "1" for letter in line] for line in lines])


def random_batch(seed: int, batch: int = 5, length: int = 7):
    """Rewards, values, mask (each row a prefix of 1 to `length` tokens), gamma and lambda."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    mask = torch.arange(length)[None] < lengths[:, None]
    rewards = torch.randn(batch, length, generator=generator, dtype=torch.float64)
    values = torch.randn(batch, length, generator=generator, dtype=torch.float64)
    gamma, lam = torch.rand(2, generator=generator).tolist()
    return rewards, values, mask, gamma, lam


def test_masked_replaces_even_nan():
    x = torch.tensor([[1.0, math.nan, -math.inf]])
    assert masked(x, rows("100")).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_mean_and_variance_by_hand(garbage: float):
    x = torch.tensor([[1.0, 2.0, garbage], [6.0, garbage, garbage]])
    # inside: 1, 2, 6: mean 3; biased variance ((1-3)^2 + (2-3)^2 + (6-3)^2) / 3 = 14/3
    mean, variance = mean_and_variance(x, rows("110", "100"))
    assert mean == 3.0 and variance == pytest.approx(14 / 3)


def test_variance_is_never_negative():
    x = torch.full((1, 3), 1e6 / 3)
    assert mean_and_variance(x, rows("111"))[1] >= 0.0


def test_whiten_by_hand():
    # inside: 1, 2, 6, mean 3, deviation sqrt(14/3)
    x = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, 5.0]])
    mask = rows("110", "100")
    sd = math.sqrt(14 / 3)
    shifted = whiten(x, mask)
    expected = torch.tensor([[-2 / sd, -1 / sd, 0], [3 / sd, 0, 0]])
    torch.testing.assert_close(shifted, expected)
    kept = whiten(x, mask, shift_mean=False)
    expected = torch.tensor([[3 - 2 / sd, 3 - 1 / sd, 0], [3 + 3 / sd, 0, 0]])
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_numbers_have_variance_1(shift_mean: bool):
    x, _, mask, _, _ = random_batch(2, batch=8)
    new_mean, new_variance = mean_and_variance(whiten(x, mask, shift_mean), mask)
    mean = 0.0 if shift_mean else mean_and_variance(x, mask)[0]
    assert new_mean == pytest.approx(mean, abs=1e-12)
    assert new_variance == pytest.approx(1.0, rel=1e-6)


def test_whitening_equal_numbers_gives_zeros():
    x = torch.full((2, 2), 4.0)
    assert whiten(x, rows("11", "10")).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("size", [0.1, 7.3, -1234.5])
def test_rounding_is_not_whitened(size: float):
    x = torch.full((2, 3), size)
    x[0, 1] = torch.nextafter(x[0, 1], torch.tensor(math.inf))  # one unit in the last place
    mask = rows("111", "110")
    assert mean_and_variance(x, mask)[1] == 0.0
    assert not whiten(x, mask).any()
    kept = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask], torch.full((5,), size), rtol=1e-6, atol=0)
    x[0, 1] += 1e-4 * size  # a difference that means something
    assert whiten(x, mask).any()


@pytest.mark.parametrize("size", [0.7, 13.1, -2500.3])
def test_grpo_takes_scores_that_hardly_differ_for_equal(size: float):
    mask, no_kl = rows("11", "10", "11", "11"), torch.zeros(4, 2)
    near = torch.full((4,), size)
    near[1] += 1e-4 * max(1.0, abs(size))  # the deviation of one among four is half of that
    assert not grpo_advantages(near, no_kl, mask, 0.0, 4).any()
    # A second group stands by itself: 1 and 3, mean 2, unbiased deviation sqrt(2).
    scores = torch.tensor([size, size, 1.0, 3.0])
    found = grpo_advantages(scores, no_kl, mask, 0.0, 2)
    high = 1 / (math.sqrt(2) + 1e-4)
    expected = torch.tensor([[0.0, 0.0], [0.0, 0.0], [-high, -high], [high, high]])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    broken = grpo_advantages(torch.tensor([math.nan, 1.0]), no_kl[:2], rows("1", "1"), 0.0, 2)
    assert broken.isnan().all()  # a fault is never taken for rounding


@pytest.mark.parametrize("size", [1e5, -3e5, 2.0**20])
def test_groups_far_from_zero_are_centred_in_float64(size: float):
    numbers = [size, size + 100, size + 250]  # exact in float32, and their mean is not
    mean, deviation = statistics.fmean(numbers), statistics.stdev(numbers)
    centred, mask = [number - mean for number in numbers], rows("1", "1", "1")
    given, zero = torch.tensor(numbers), torch.zeros(3)
    for found, factor in (
        (grpo_advantages(given, zero[:, None], mask, 0.0, 3), 1 / (deviation + 1e-4)),
        (grpo_advantages(zero, given[:, None], mask, 0.5, 3), -0.5),
        (rloo_advantages(given[:, None], mask, 3), 3 / 2),
    ):
        assert found[:, 0].tolist() == pytest.approx([factor * each for each in centred], rel=1e-6)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_grpo_adds_the_kl_after_dividing(garbage: float):
    # Scores 2, 4, 9: mean 5, deviation sqrt((9 + 1 + 16) / 2) = sqrt(13). KL of the responses
    # .3 + .1 = .4, .6, -.1 + .3 = .2: mean .4, so 0, .2, -.2 above it; kl_coef .5.
    scores = torch.tensor([2.0, 4.0, 9.0])
    kl = torch.tensor([[0.3, 0.1], [0.6, garbage], [-0.1, 0.3]])
    mask = rows("11", "10", "11")
    found = grpo_advantages(scores, kl, mask, 0.5, 3)
    deviation = math.sqrt(13) + 1e-4
    each = [-3 / deviation - 0, -1 / deviation - 0.1, 4 / deviation + 0.1]
    expected = torch.tensor([[each[0]] * 2, [each[1], 0.0], [each[2]] * 2])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    # Equal scores: the KL alone, in its own size.
    equal = grpo_advantages(torch.full((3,), 7.0), kl, mask, 0.5, 3)
    expected = torch.tensor([[0.0, 0.0], [-0.1, 0.0], [0.1, 0.1]])
    torch.testing.assert_close(equal, expected, atol=1e-6, rtol=0)


def test_rloo_by_hand():
    # Totals 3, 5 and 1, 8: less the other's.
    rewards = torch.tensor([[1.0, 2.0], [5.0, math.nan], [1.0, math.inf], [0.0, 8.0]])
    found = rloo_advantages(rewards, rows("11", "10", "10", "11"), 2)
    assert found.tolist() == [[-2.0, -2.0], [2.0, 0.0], [-7.0, 0.0], [7.0, 7.0]]


def test_last_index():
    assert last_index(rows("1110", "1000", "1111")).tolist() == [2, 0, 3]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_the_score_goes_to_the_last_true_position(garbage: float):
    # kl_coef 0.5:
    # row 0 (2 tokens): -.5*.4, -.5*-.2 + 10      = -.2, 10.1, 0
    # row 1 (3 tokens): -.5*1,  -.5*0, -.5*2 - 3  = -.5, 0, -4
    # row 2 (1 token):  -.5*.6 + 1                = .7, 0, 0
    kl = torch.tensor([[0.4, -0.2, garbage], [1.0, 0.0, 2.0], [0.6, garbage, garbage]])
    rewards = shape_rewards(torch.tensor([10.0, -3.0, 1.0]), kl, rows("110", "111", "100"), 0.5)
    expected = torch.tensor([[-0.2, 10.1, 0.0], [-0.5, 0.0, -4.0], [0.7, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_gae_three_by_three_by_hand():
    # gamma .5, lambda .5; d_t = R_t + .5 V_{t+1} - V_t; A_t = d_t + .25 A_{t+1}
    # row 0 (3): R 1 2 3, V 2 4 6: d = 1+2-2 = 1, 2+3-4 = 1, 3+0-6 = -3
    #            A_2 = -3, A_1 = 1 - .75 = .25, A_0 = 1 + .0625 = 1.0625
    # row 1 (2): R 0 4, V 2 2: d = 0+1-2 = -1, 4+0-2 = 2; A_1 = 2, A_0 = -1 + .5 = -.5
    # row 2 (1): R 5, V 1: A_0 = 4
    # returns = A + V
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 9.0], [5.0, 9.0, 9.0]])
    values = torch.tensor([[2.0, 4.0, 6.0], [2.0, 2.0, 9.0], [1.0, 9.0, 9.0]])
    advantages, returns = gae(rewards, values, rows("111", "110", "100"), 0.5, 0.5)
    assert advantages.tolist() == [[1.0625, 0.25, -3.0], [-0.5, 2.0, 0.0], [4.0, 0.0, 0.0]]
    assert returns.tolist() == [[3.0625, 4.25, 3.0], [1.5, 4.0, 0.0], [5.0, 0.0, 0.0]]


def test_gae_is_its_quadratic_definition():
    for seed in range(20):
        rewards, values, mask, gamma, lam = random_batch(seed)
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        for row in range(len(mask)):
            length = int(mask[row].sum())
            reward, value = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
            for t in range(length):
                expected = sum(
                    (gamma * lam) ** (k - t) * (reward[k] + gamma * value[k + 1] - value[k])
                    for k in range(t, length)
                )
                assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
                assert returns[row, t].item() == pytest.approx(expected + value[t], abs=1e-12)
            assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_returns_are_the_lambda_mixture_of_n_step_returns():
    # Independent of deltas: G(n) = sum_{k<n} gamma^k R + gamma^n V; the lambda return weighs
    # G(n) by (1 - lambda) lambda^(n-1), and the last one, to the end, by lambda^(N-1).
    for seed in range(20):
        rewards, values, mask, gamma, lam = random_batch(seed + 100)
        _, returns = gae(rewards, values, mask, gamma, lam)
        for row in range(len(mask)):
            length = int(mask[row].sum())
            reward, value = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
            for t in range(length):
                steps = length - t
                mixture = 0.0
                for n in range(1, steps + 1):
                    total = sum(gamma**k * reward[t + k] for k in range(n))
                    weight = (1 - lam) * lam ** (n - 1) if n < steps else lam ** (n - 1)
                    mixture += weight * (total + gamma**n * value[t + n])
                assert returns[row, t].item() == pytest.approx(mixture, abs=1e-12)


def test_lambda_one_and_zero():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    values = torch.tensor([[10.0, 20.0, 30.0]])
    everything = rows("111")
    # lambda 1: returns are sums of rewards to come; lambda 0: R_t + V_{t+1}
    assert gae(rewards, values, everything, 1.0, 1.0)[1].tolist() == [[7.0, 6.0, 4.0]]
    assert gae(rewards, values, everything, 1.0, 0.0)[1].tolist() == [[21.0, 32.0, 4.0]]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_gae_ignores_what_stands_after_the_end(garbage: float):
    rewards, values, mask, gamma, lam = random_batch(5)
    clean = gae(rewards, values, mask, gamma, lam)
    dirty = gae(
        rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage), mask, gamma, lam
    )
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_gae_carries_no_gradient():
    rewards, values, mask, gamma, lam = random_batch(6)
    advantages, returns = gae(rewards, values.requires_grad_(), mask, gamma, lam)
    assert not advantages.requires_grad and not returns.requires_grad


# --- policy loss ---------------------------------------------------------------------------------

# Ratio 1.5 and .5 for each sign of the advantage, clip .2, one token each:
#   A = +2, r = 1.5: -A r = -3, -A clip = -2.4: the larger (worse) is -2.4, no gradient
#   A = +2, r = .5:  -A r = -1, -A clip = -1.6: -1, gradient d(-A r)/dlogp = -A r = -1
#   A = -2, r = 1.5: -A r = 3,  -A clip = 2.4:  3, gradient 3
#   A = -2, r = .5:  -A r = 1,  -A clip = 1.6:  1.6, no gradient
CLIP_CASES = [
    (2.0, 1.5, -2.4, 0.0, 1),
    (2.0, 0.5, -1.0, -1.0, 0),
    (-2.0, 1.5, 3.0, 3.0, 0),
    (-2.0, 0.5, 1.6, 0.0, 1),
    (2.0, 1.0, -2.0, -2.0, 0),
    (-2.0, 1.1, 2.2, 2.2, 0),
]


@pytest.mark.parametrize(("advantage", "ratio", "loss", "gradient", "clipped"), CLIP_CASES)
def test_clipping_takes_the_pessimistic_branch(advantage, ratio, loss, gradient, clipped):
    logprobs = torch.tensor([[math.log(ratio) - 3]], requires_grad=True)
    out = policy_loss(
        logprobs, torch.tensor([[-3.0]]), torch.tensor([[advantage]]), rows("1"), 0.2, 1.0
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert out.clipped.item() == clipped
    assert out.ratio_max.item() == pytest.approx(ratio, rel=1e-5)
    assert out.approx_kl.item() == pytest.approx(0.5 * math.log(ratio) ** 2, rel=1e-4, abs=1e-12)


def test_policy_loss_sums_tokens_and_divides_by_the_given_number():
    # ratio 1 everywhere: loss = -(1 + 2 + 3) / 10
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, math.nan]])
    advantages = torch.tensor([[1.0, 2.0], [3.0, math.inf]])
    out = policy_loss(logprobs, logprobs.clone(), advantages, rows("11", "10"), 0.2, 10.0)
    assert out.loss.item() == pytest.approx(-0.6)


def test_at_ratio_one_it_is_reinforce_exactly():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(4, 6, generator=generator, requires_grad=True)
    advantages = torch.randn(4, 6, generator=generator)
    mask = rows("111111", "111000", "100000", "111110")
    policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, 16.0).loss.backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad, masked(-advantages, mask) / 16.0)


def test_ratio_max_looks_inside_the_mask_only():
    # The only token has ratio 1/2; the padded one would have 1.
    old = torch.tensor([[math.log(0.5), 0.0]])
    out = policy_loss(old + math.log(0.5), old, torch.ones(1, 2), rows("10"), 0.2, 1.0)
    assert out.ratio_max.item() == pytest.approx(0.5)


def losses(
    kind: str, tensors: list[torch.Tensor], mask: torch.Tensor, num_tokens: float
) -> PolicyLoss | ValueLoss:
    function = policy_loss if kind == "policy" else value_loss
    first, second, third = tensors
    return function(first, second, third, mask, 0.2, num_tokens)


@pytest.mark.parametrize("kind", ["policy", "value"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_outside_the_mask_gets_gradient_zero(kind: str, garbage: float):
    generator = torch.Generator().manual_seed(4)
    mask = rows("1110", "1000", "1111")
    tensors = [torch.randn(3, 4, generator=generator) for _ in range(3)]
    clean = losses(kind, tensors, mask, 8.0)
    dirty = [tensor.masked_fill(~mask, garbage) for tensor in tensors]
    dirty[0].requires_grad_()
    out = losses(kind, dirty, mask, 8.0)
    out.loss.backward()
    assert torch.equal(out.loss, clean.loss) and torch.equal(out.clipped, clean.clipped)
    assert dirty[0].grad is not None
    assert (dirty[0].grad[~mask] == 0).all()
    assert dirty[0].grad[mask].any() and dirty[0].grad.isfinite().all()


@pytest.mark.parametrize("kind", ["policy", "value"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_split_into_microbatches_gives_the_same_loss_and_gradient(kind: str, size: int):
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(6)[None] < torch.tensor([6, 1, 3, 2, 5, 1, 4, 2])[:, None]
    tensors = [torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    count = float(mask.sum())
    whole = tensors[0].clone().requires_grad_()
    expected = losses(kind, [whole, *tensors[1:]], mask, count)
    expected.loss.backward()
    split = tensors[0].clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    clipped = 0
    for start in range(0, 8, size):
        part = slice(start, start + size)
        out = losses(kind, [x[part] for x in (split, *tensors[1:])], mask[part], count)
        out.loss.backward()
        total, clipped = total + out.loss.detach(), clipped + int(out.clipped)
    torch.testing.assert_close(total, expected.loss.detach())
    torch.testing.assert_close(split.grad, whole.grad)
    assert clipped == int(expected.clipped) > 0


# --- value loss ----------------------------------------------------------------------------------

# Clip .2, V_old 1: 0.5 max((V - R)^2, (V_old +- .2 - R)^2)
#   V 2,   R 0: plain 4, clipped 1.2^2 = 1.44: 0.5 * 4 = 2, gradient V - R = 2
#   V 2,   R 3: plain 1, clipped 1.8^2 = 3.24: 1.62, no gradient
#   V 0,   R 0: plain 0, clipped .8^2 = .64: .32, no gradient
#   V 1.1, R 2: not clipped: 0.5 * .81 = .405, gradient -.9
VALUE_CASES = [
    (2.0, 0.0, 2.0, 2.0, 0),
    (2.0, 3.0, 1.62, 0.0, 1),
    (0.0, 0.0, 0.32, 0.0, 1),
    (1.1, 2.0, 0.405, -0.9, 0),
]


@pytest.mark.parametrize(("value", "target", "loss", "gradient", "clipped"), VALUE_CASES)
def test_value_loss_by_hand(value, target, loss, gradient, clipped):
    values = torch.tensor([[value]], requires_grad=True)
    out = value_loss(values, torch.tensor([[1.0]]), torch.tensor([[target]]), rows("1"), 0.2, 1.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert out.clipped.item() == clipped


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_rewards_to_go_by_hand(gamma: float):
    # gamma 1: 7, 6, 4 and 5, 3; gamma .5: 1 + .5 (2 + .5 * 4) = 3, 4, 4 and 2 + 1.5, 3
    rewards = torch.tensor([[1.0, 2.0, 4.0], [2.0, 3.0, math.nan]])
    found = rewards_to_go(rewards, rows("111", "110"), gamma)
    first, second = ([7.0, 6.0, 4.0], [5.0, 3.0]) if gamma == 1 else ([3.0, 4.0, 4.0], [3.5, 3.0])
    assert found.tolist() == [first, [*second, 0.0]]


@pytest.mark.parametrize("far", [25.0, 89.0, 1e4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ratios_beyond_all_reason_stay_finite(far: float, sign: float):
    old, mask = torch.zeros(1, 3), rows("110")
    logprobs = torch.tensor([[sign * far, -0.5, math.nan]], requires_grad=True)
    advantages = torch.tensor([[0.0, 1.0, math.nan]])  # 0 times infinity is NaN
    out = policy_loss(logprobs, old, advantages, mask, 0.2, 1.0)
    third = kl_loss(logprobs, old, mask, "k3", 1.0)
    (out.loss + third).backward()
    assert out.loss.item() == pytest.approx(-math.exp(-0.5), rel=1e-6)
    assert out.ratio_max.item() == pytest.approx(math.exp(20) if sign > 0 else math.exp(-0.5), 1e-5)
    assert out.approx_kl.item() == pytest.approx(0.5 * far**2 + 0.125, rel=1e-6)
    k = 20 * sign
    expected = math.exp(-k) - 1 + k + math.exp(0.5) - 1 - 0.5
    assert third.item() == pytest.approx(expected, rel=1e-6)
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()
    assert logprobs.grad[0, 0] == 0 and logprobs.grad[0, 1] != 0


def test_a_critic_that_explains_only_itself_has_no_explained_variance():
    # One random number per response, returns at lambda .95: they contain that number.
    generator = torch.Generator().manual_seed(3)
    scores, guesses = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    mask = torch.ones(64, 200, dtype=torch.bool)
    rewards = shape_rewards(scores, torch.zeros(64, 200).double(), mask, 0.0)
    values = guesses[:, None].expand(64, 200)

    def explained(target: torch.Tensor) -> float:
        variances = (mean_and_variance(x, mask)[1] for x in (target - values, target))
        return explained_variance(*variances)

    _, returns = gae(rewards, values, mask, 1.0, 0.95)
    assert explained(returns) > 0.8
    # Every reward to come is the score: 1 - Var(score - guess) / Var(score), by plain Python.
    pairs = list(zip(scores.tolist(), guesses.tolist(), strict=True))
    error = statistics.pvariance([score - guess for score, guess in pairs])
    expected = 1 - error / statistics.pvariance([score for score, _ in pairs])
    found = explained(rewards_to_go(rewards, mask, 1.0))
    assert found == pytest.approx(expected) and expected < -1
    for figure, names in (
        (found, ["critic_explained_variance_negative"]),
        (explained(returns), []),
    ):
        monitor = HealthMonitor(HealthSection())
        steps = [monitor.observe(n, {"ppo/explained_variance": figure}) for n in range(1, 21)]
        assert [each.name for step in steps for each in step] == names


def test_explained_variance():
    assert explained_variance(1.0, 4.0) == 0.75
    assert explained_variance(8.0, 4.0) == -1.0
    assert explained_variance(1.0, 0.0) == 0.0


def adapt(kl: float, updates: int) -> float:
    kl_coef = 0.15
    for _ in range(updates):
        kl_coef = adapted_kl_coef(kl_coef, kl, target=6.0, num_responses=512, horizon=10_000)
    return kl_coef


def test_adaptive_controller():
    # One update: error clipped to .2; .15 * (1 + .2 * 512 / 10000) = .15 * 1.01024
    assert adapt(12.0, 1) == pytest.approx(0.151536)
    # error (6.6/6 - 1) = .1, not clipped: .15 * 1.00512
    assert adapt(6.6, 1) == pytest.approx(0.150768)
    assert adapt(6.0, 100) == pytest.approx(0.15)
    # 1.01024^100 = 2.770, .98976^100 = .3574
    assert adapt(12.0, 100) == pytest.approx(0.4155, abs=5e-5)
    assert adapt(0.0, 100) == pytest.approx(0.0536, abs=5e-5)
