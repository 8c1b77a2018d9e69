"""Identities that PPO rests on, each compared with its definition."""

from typing import Literal

import torch

from chatllama.model.roles import Adapter, RoleModel, adapter_parameters
from chatllama.model.scoring import score_sequences
from chatllama.runtime.distributed import device
from trainers.ppo.model import build_engine, build_roles
from trainers.ppo.ppo_math import gae, kl_loss, masked, policy_loss
from trainers.ppo.rollout import Rollout, arrange, sample_responses, score
from trainers.reward.loss import pairwise_loss
from trainers.selftest.exact import DenseRole, Enumeration
from trainers.selftest.world import LORA, PROMPTS, STOP, World, reward


def gae_error(num_batches: int = 50) -> float:
    """Largest difference between `gae` and its O(T^2) definition, over random masked batches."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(num_batches):
        rewards, values = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
        gamma, lam = torch.rand(2, generator=generator).tolist()
        lengths = torch.randint(1, 7, (4,), generator=generator).tolist()
        mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
        found, _ = gae(rewards, values, mask, gamma, lam)
        for row, length in enumerate(lengths):
            value = [*values[row, :length].tolist(), 0.0]
            delta = [
                float(rewards[row, t]) + gamma * value[t + 1] - value[t] for t in range(length)
            ]
            for t in range(length):
                exact = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
                worst = max(worst, abs(float(found[row, t]) - exact))
    return worst


def reinforce_error() -> float:
    """Largest difference of the policy loss' gradient from -A / tokens where every ratio is 1."""
    generator = torch.Generator().manual_seed(1)
    logprobs = torch.randn(6, 5, generator=generator).requires_grad_()
    advantages = torch.randn(6, 5, generator=generator)
    mask = torch.arange(5)[None] < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]
    count = 16.0  # a power of 2, so that nothing is rounded
    loss = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, count).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return float((gradient + masked(advantages, mask) / count).abs().max())


def _scored(every: Enumeration, model: RoleModel, temperature: float) -> Rollout:
    prompts, responses = zip(*every.rows, strict=True)
    return score(model, arrange(prompts, responses, [STOP], STOP), temperature, 64, [])


def kl_errors(world: World) -> dict[str, float]:
    """Relative errors of expected KL estimates of two real roles, against the sum over states.

    Policy and reference are the adapters of the reward model and of SFT. k1 and k3 must give the KL
    itself, k2 its own expectation, which is another number.
    """
    cfg, every = world.config({"microbatch_size": 64}), Enumeration(world)
    model = build_roles(cfg, world.run, world.tokenizer).model
    for to, source in (("policy", "reward"), ("value", "reference")):
        pairs = zip(adapter_parameters(model, to), adapter_parameters(model, source), strict=True)
        for own, other in pairs:
            own.data.copy_(other)
    rollout = _scored(every, model, 1.0)
    with torch.no_grad():
        folders = world.run.reward_adapter, world.run.sft_adapter
        policy, reference = (every.logprobs(DenseRole.saved(world, f), 1.0) for f in folders)
    beginnings: dict[tuple, tuple[float, float]] = {}
    for (prompt, response), own, other in zip(every.rows, policy, reference, strict=True):
        for t in range(len(response)):
            probability = float(own[: t + 1].sum().exp()) / len(every.prompts)
            beginnings[prompt, response[: t + 1]] = probability, float(own[t] - other[t])
    exact = sum(p * k for p, k in beginnings.values())
    squares = sum(p * k**2 / 2 for p, k in beginnings.values())
    weights = every.probabilities(policy).float()
    k1 = float(weights @ masked(rollout.kl, rollout.response_mask).sum(1))

    def expected(estimator: Literal["k2", "k3"]) -> float:
        tensors = (rollout.logprobs, rollout.ref_logprobs, rollout.response_mask)
        rows = zip(*(tensor.split(1) for tensor in tensors), strict=True)
        each = [kl_loss(new, ref, mask, estimator, 1.0) for new, ref, mask in rows]
        return float(weights @ torch.stack(each))

    found = {"k1": k1, "k2": expected("k2"), "k3": expected("k3")}
    truth = {"k1": exact, "k2": squares, "k3": exact}
    return {name: abs(found[name] / truth[name] - 1) for name in found}


def sampler_distance(world: World, num_samples: int = 16_000) -> float:
    """Total variation of sampled responses from the scored distribution, over its noise floor.

    At temperature 0.7. About 1 where both are the same; the floor is what `num_samples` leave.
    """
    cfg, every = world.config(temperature=0.7), Enumeration(world)
    roles = build_roles(cfg, world.run, world.tokenizer)
    engine = build_engine(cfg, roles.model)
    prompts = [list(prompt) for prompt in PROMPTS] * (num_samples // len(PROMPTS))
    seed = (world.seed, 1)
    sampled = sample_responses(engine, "policy", prompts, cfg.generation, [STOP], seed)
    scored = _scored(every, roles.model, 0.7).logprobs.sum(1).exp() / len(every.prompts)
    place = {row: i for i, row in enumerate(every.rows)}
    counts = torch.zeros(len(scored))
    for prompt, response in zip(prompts, sampled, strict=True):
        counts[place[tuple(prompt), tuple(response)]] += 1
    # Mean of |x - p| is sqrt(2 p (1 - p) / (pi n)) for a share x of n draws.
    floor = (2 * scored * (1 - scored) / (torch.pi * len(prompts))).sqrt().sum() / 2
    return float((counts / len(prompts) - scored).abs().sum() / 2 / floor)


def start_errors(world: World) -> dict[str, float]:
    """Differences of log-probabilities, nats, of the roles as PPO starts.

    `policy` and `reference`: largest from SFT's adapter, by hand on the base. `base`: how far SFT
    is from the bare base, without which the other two would prove nothing.
    """
    cfg, every = world.config(), Enumeration(world)
    model = build_roles(cfg, world.run, world.tokenizer).model
    rollout = _scored(every, model, 1.0)
    with torch.no_grad():
        sft = every.logprobs(DenseRole.saved(world, world.run.sft_adapter), 1.0)
        base = every.logprobs(DenseRole(world, None), 1.0)
    return {
        "policy": float((rollout.logprobs - sft).abs().max()),
        "reference": float((rollout.ref_logprobs - sft).abs().max()),
        "base": float((base - sft).abs().max()),
    }


def bradley_terry(world: World, steps: int = 300, answers: int = 32) -> dict[str, float]:
    """How well a reward adapter recovers known scores from noisy preferences.

    Each step draws `answers` responses to every prompt; all their pairs are labelled with
    probability sigmoid(2 (r_1 - r_2)) of the known reward r. `lost` is the Bayes limit's expected
    accuracy less the model's, over all pairs of responses to a prompt; `correlation` and `slope`
    are those of its score differences with the true ones.
    """
    every, scale, peak = Enumeration(world), 2.0, 1e-2
    count, num_prompts = len(every.rows) // len(every.prompts), len(every.prompts)
    prompts, responses = zip(*every.rows, strict=True)
    listed = arrange(prompts, responses, [STOP], STOP)
    known = [scale * reward(world.text(p), world.text(r)) for p, r in every.rows]
    gold = torch.tensor(known, device=device())
    first, second = torch.combinations(torch.arange(answers)).T
    weight = torch.full((num_prompts * len(first),), 1 / len(first), device=device())
    with torch.random.fork_rng():
        torch.manual_seed(world.seed)
        adapter = Adapter(LORA, trainable=True)
        model = RoleModel(world.new_llama(), {"reward": adapter}, heads=("reward",)).to(device())
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        for step in range(steps):
            drawn = torch.randint(count, (num_prompts, answers))
            rows = drawn + count * torch.arange(num_prompts)[:, None]
            scores = score_sequences(
                model, listed.tokens[rows.flatten()], listed.mask[rows.flatten()]
            )
            scores, true = scores.view(num_prompts, answers), gold[rows]
            preferred = (true[:, first] - true[:, second]).sigmoid().bernoulli() > 0
            better = torch.where(preferred, scores[:, first], scores[:, second]).flatten()
            worse = torch.where(preferred, scores[:, second], scores[:, first]).flatten()
            loss = pairwise_loss(better, worse, torch.zeros_like(better), weight, num_prompts)
            optimizer.param_groups[0]["lr"] = peak * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        scores = score_sequences(model, listed.tokens, listed.mask).view(-1, count).double()
    gold = gold.view(-1, count).double()
    first, second = torch.combinations(torch.arange(count)).T
    true = (gold[:, first] - gold[:, second]).flatten()
    found = (scores[:, first] - scores[:, second]).flatten()
    right = (true * found.sign()).sigmoid()
    return {
        "lost": float(true.abs().sigmoid().mean() - right.mean()),
        "correlation": float(torch.corrcoef(torch.stack([true, found]))[0, 1]),
        "slope": float((true * found).sum() / (true * true).sum()),
    }
