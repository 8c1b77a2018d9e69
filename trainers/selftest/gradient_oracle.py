"""The gradient of one real PPO step compared with the exact one.

The step is `PpoTrainer.advance`: rollout layout, scoring by the four roles, rewards, advantages,
losses, microbatches, the engine's backward pass. Only the sampler is replaced: every response comes
once, and its advantages are multiplied by its probability (and by the loss' own normaliser, the
number of tokens), so that the sum is an expectation. It must be the gradient of
J = E[score] - beta KL, which float64 autograd computes by enumeration (`exact.py`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from datasets import Dataset
from torch import Tensor, nn

from chatllama.model.roles import Role, RoleModel, adapter_parameters
from trainers.ppo.data import Prompts, prompt_row
from trainers.ppo.model import build_engine, build_roles
from trainers.ppo.rewards import Statistics
from trainers.ppo.rollout import Rollout
from trainers.ppo.state import PpoState
from trainers.ppo.train import PpoTrainer
from trainers.ppo.update import Targets
from trainers.selftest.exact import DenseRole, Enumeration, Optimum
from trainers.selftest.world import PROMPTS, World, relative_error

BETA = 0.3
VF_COEF = 0.5
KL_LOSS_COEF = 0.2
CLIP, VALUE_CLIP = 0.2, 0.3


@dataclass(frozen=True)
class Setting:
    """One way of making the step."""

    name: str
    lam: float = 1.0
    critic_lam: float | None = None
    temperature: float = 1.0
    exact_values: bool = False
    """Advantages from V^pi, instead of the value model's baseline."""
    old_policy: bool = False
    """As in a later epoch: the rollout's policy and values were others, so that losses clip."""
    estimator: str = "gae"
    kl_loss: str | None = None
    """Estimator of a KL term in the loss."""


SETTINGS = (
    Setting("lambda 1, the value model's baseline"),
    Setting("lambda 1, temperature 0.7", temperature=0.7),
    Setting("lambda 0.95, exact values", lam=0.95, critic_lam=1.0, exact_values=True),
    Setting("lambda 0, exact values", lam=0.0, exact_values=True),
    Setting("clipped losses, other old policy", old_policy=True),
    Setting("KL loss k2", kl_loss="k2"),
    Setting("KL loss k3", kl_loss="k3"),
    Setting("rloo, all pairs", estimator="rloo"),
    Setting("grpo, all pairs", estimator="grpo"),
)


@dataclass(frozen=True)
class Outcome:
    """The differences between the real step and the exact one."""

    policy_error: float
    """Relative, of the gradient of the policy's adapter."""
    value_error: float | None
    """Relative, of the gradient of value adapter and head; None where it is not compared."""
    first_log_ratio: float | None
    """Largest |log ratio| before the step; None where the old policy is another."""
    explained_error: float | None
    """Absolute, of the explained variance that is logged; None without a critic."""
    reference_error: float
    """Largest difference of the reference's log-probabilities from SFT's, nats."""


@dataclass(frozen=True)
class Listing:
    """The responses of a rollout batch, in groups of one row or an ordered pair of one prompt.

    Rows are numbered as in `every`.
    """

    every: Enumeration
    group_size: int

    @cached_property
    def groups(self) -> list[tuple[int, ...]]:
        """Every group once."""
        count = len(self.every.rows) // len(self.every.prompts)
        return [
            tuple(start + i for i in members)
            for start in range(0, len(self.every.rows), count)
            for members in itertools.product(range(count), repeat=self.group_size)
        ]

    @cached_property
    def rows(self) -> list[int]:
        """Of all groups, one after another."""
        return [row for members in self.groups for row in members]

    def weights(self, logprobs: Tensor) -> Tensor:
        """(B,) float64: probability of a row's group and prompt, over the group's size.

        Times the number of tokens, because the loss divides by it.
        """
        own = logprobs.detach().sum(1).exp()
        joint = own[torch.tensor(self.groups)].prod(1)
        weight = joint / (self.group_size * len(self.every.prompts))
        num_tokens = sum(len(self.every.rows[row][1]) for row in self.rows)
        return num_tokens * weight.repeat_interleave(self.group_size)

    def prompts(self) -> Prompts:
        """One record a group."""
        world, rows = self.every.world, self.every.rows
        first = [rows[members[0]][0] for members in self.groups]
        data = Dataset.from_list([prompt_row(p, world.text(p)) for p in first])
        return Prompts(data, data.select([]))


class EnumeratingTrainer(PpoTrainer):
    """A trainer whose rollout batch is a given list of responses; set the attributes first."""

    listing: Listing
    weights: Tensor
    """(B,) float64, factors of the advantages, in the listing's order like the next two."""
    values: Tensor | None
    """(B, R) from which advantages are made, instead of the value model's."""
    noise: Tensor | None
    """(2, B, R) added to the old log-probabilities and values before the update."""
    order: list[int]
    """Set by the step: the place in the listing of each row of the rollout."""
    seen: Rollout
    """Set by the step: the rollout as it was scored."""

    def _collect(
        self, role: Role, records: list[dict], seed: tuple[int, ...]
    ) -> tuple[Rollout, list[str]]:
        waiting: dict[tuple[int, ...], list[int]] = {}
        listed = [self.listing.every.rows[row] for row in self.listing.rows]
        for place, (prompt, _) in reversed(list(enumerate(listed))):
            waiting.setdefault(prompt, []).append(place)
        self.order = [waiting[tuple(record["input_ids"])].pop() for record in records]
        responses = [list(listed[place][1]) for place in self.order]
        return self.collector.collect(role, records, seed, responses=responses)

    def _targets(self, rollout: Rollout, state: PpoState) -> tuple[Targets, dict[str, float]]:
        self.seen = rollout
        if self.values is not None:
            # Values after a response's end must not matter.
            own = self.values[self.order].float()
            rollout = replace(rollout, values=torch.where(rollout.response_mask, own, 7.0))
        targets, metrics = super()._targets(rollout, state)
        weights = self.weights[self.order].float()[:, None]
        return replace(targets, advantages=targets.advantages * weights), metrics

    def _update(self, rollout: Rollout, targets: Targets, state: PpoState) -> dict[str, float]:
        if self.noise is not None:
            logprobs, values = self.noise[:, self.order].float()
            rollout = replace(
                rollout, logprobs=rollout.logprobs + logprobs, values=rollout.values + values
            )
        return super()._update(rollout, targets, state)


class Truth:
    """Losses of the step by their definitions, on dense float64 roles.

    Policy and value are those of `model`; reference and reward come from their adapter files.
    """

    def __init__(self, listing: Listing, setting: Setting, model: RoleModel) -> None:
        every, self.listing, self.setting = listing.every, listing, setting
        world = every.world
        self.policy = DenseRole.of(world, model, "policy")
        self.logprobs = every.logprobs(self.policy, setting.temperature)
        with torch.no_grad():
            sft = DenseRole.saved(world, world.run.sft_adapter)
            self.reference = every.logprobs(sft, setting.temperature)
            self.scores = every.scores(DenseRole.saved(world, world.run.reward_adapter))
        last = torch.zeros_like(self.reference)
        last[torch.arange(len(last)), every.mask.sum(1) - 1] = self.scores
        self.rewards = last - BETA * (self.logprobs.detach() - self.reference)
        generator = torch.Generator().manual_seed(5)
        self.noise = torch.randn((2, *last.shape), generator=generator).double() * 0.4
        if setting.estimator == "gae":
            self.value = DenseRole.of(world, model, "value")
            self.values = every.values(self.value)

    def state_values(self) -> Tensor:
        """(N, L) float64: V^pi."""
        return self.listing.every.state_values(self.logprobs.detach(), self.rewards)

    @cached_property
    def optimum(self) -> Optimum:
        """Of the whole problem."""
        prompts = len(self.listing.every.prompts)
        return Optimum(self.reference.sum(1), self.scores, BETA, prompts)

    def policy_loss(self) -> Tensor:
        """() whose gradient the policy's adapter must get: -J, with the setting's other terms."""
        setting, mask = self.setting, self.listing.every.mask
        if setting.old_policy:
            return self._clipped_loss()
        if setting.estimator == "grpo":
            return self._grpo_loss()
        loss = -self.optimum.objective(self.logprobs.sum(1))
        if setting.kl_loss is not None:
            k = self.logprobs - self.reference
            estimate = k.square() / 2 if setting.kl_loss == "k2" else (-k).exp() - 1 + k
            loss = loss + KL_LOSS_COEF * torch.where(mask, estimate, 0.0).sum() / mask.sum()
        return loss

    def _clipped_loss(self) -> Tensor:
        """-E[min(A r, clip(r) A)] over the current policy's responses."""
        every = self.listing.every
        advantages = self._rewards_to_go() - self.values.detach()
        ratio = (self.logprobs - self.logprobs.detach() - self.noise[0]).exp()
        gain = torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
        gain = torch.where(every.mask, gain, 0.0).sum(1)
        return -(every.probabilities(self.logprobs.detach()) * gain).sum()

    def _grpo_loss(self) -> Tensor:
        """-E[A log pi] over pairs: A is of the scores, written for two numbers, and then the KL."""
        pairs = torch.tensor(self.listing.groups)
        scores, kl = self.scores[pairs], (self.logprobs.detach() - self.reference).sum(1)[pairs]
        gap = scores[:, 0] - scores[:, 1]
        deviation, size = gap.abs() / 2**0.5, scores.abs().amax(1).clamp(min=1.0)
        advantage = torch.where(deviation > 1e-4 * size, gap / 2 / (deviation + 1e-4), 0.0)
        advantage = advantage - BETA * (kl[:, 0] - kl[:, 1]) / 2
        own = self.logprobs.sum(1)[pairs]
        joint = own.detach().exp().prod(1) / len(self.listing.every.prompts)
        return -(joint * advantage * (own[:, 0] - own[:, 1]) / 2).sum()

    def _rewards_to_go(self) -> Tensor:
        return self.rewards.flip(1).cumsum(1).flip(1)

    def explained_variance(self) -> float:
        """1 - Var(rewards to come - values) / Var(rewards to come), over all tokens."""
        mask = self.listing.every.mask
        values = self.state_values() if self.setting.exact_values else self.values.detach()
        to_go = self._rewards_to_go()[mask]
        return float(1 - (to_go - values[mask]).var() / to_go.var())

    def value_loss(self) -> Tensor:
        """() whose gradient value adapter and head must get, with lambda 1 for the critic."""
        mask, returns = self.listing.every.mask, self._rewards_to_go()
        loss = (self.values - returns).square()
        if self.setting.old_policy:
            old = self.values.detach() + self.noise[1]
            near = torch.clamp(self.values, min=old - VALUE_CLIP, max=old + VALUE_CLIP)
            loss = torch.maximum(loss, (near - returns).square())
        return VF_COEF * torch.where(mask, loss, 0.0).sum() / 2 / mask.sum()


def check_gradient(world: World, setting: Setting) -> Outcome:
    """The real step's gradients compared with the exact ones, in one setting."""
    if setting.estimator == "gae":
        listing = Listing(Enumeration(world), 1)
    else:
        listing = Listing(Enumeration(world, 2, (PROMPTS[1], PROMPTS[3])), 2)
    trainer = _trainer(world, setting, listing)
    model = trainer.engine.model
    truth = Truth(listing, setting, model)
    rows = listing.rows
    trainer.weights = listing.weights(truth.logprobs)
    trainer.values = truth.state_values()[rows] if setting.exact_values else None
    trainer.noise = truth.noise[:, rows] if setting.old_policy else None
    gradients, metrics = _step(trainer)

    def found(parameters: Sequence[nn.Parameter]) -> Tensor:
        return torch.cat([gradients[id(p)].flatten() for p in parameters])

    policy = found(adapter_parameters(model, "policy"))
    expected = truth.policy.gradient(truth.policy_loss())
    value_error = explained_error = None
    if setting.estimator == "gae":
        explained_error = abs(metrics["ppo/explained_variance"] - truth.explained_variance())
    if setting.estimator == "gae" and 1.0 in (setting.lam, setting.critic_lam):
        critic = [*adapter_parameters(model, "value"), *model.heads["value"].parameters()]
        value_error = relative_error(found(critic), truth.value.gradient(truth.value_loss()))
    width = trainer.seen.response_mask.shape[1]
    reference = truth.reference[rows][trainer.order][:, :width]
    return Outcome(
        relative_error(policy, expected),
        value_error,
        None if setting.old_policy else metrics["ppo/first_log_ratio"],
        explained_error,
        float((trainer.seen.ref_logprobs - reference).abs().max()),
    )


def _trainer(world: World, setting: Setting, listing: Listing) -> EnumeratingTrainer:
    """A trainer in the middle of a run: policy and value have left the reference."""
    batch = len(listing.rows)
    section = {
        "steps": 2,
        "rollout_batch_size": batch,
        "minibatch_size": batch,
        "microbatch_size": batch // 13 if listing.group_size == 1 else batch // 31,
        "samples_per_prompt": listing.group_size,
        "epochs": 1,
        "learning_rate": 1e-30,  # weights stay
        "max_grad_norm": 1e9,
        "kl_coef": BETA,
        "advantage": setting.estimator,
        "lam": setting.lam,
        "critic_lam": setting.critic_lam,
        "whiten_advantages": False,
        "clip_range": CLIP,
        "value_clip_range": VALUE_CLIP,
        "vf_coef": VF_COEF,
    }
    if setting.kl_loss is not None:
        section |= {"kl_loss_estimator": setting.kl_loss, "kl_loss_coef": KL_LOSS_COEF}
    cfg = world.config(
        section, temperature=setting.temperature, max_new_tokens=listing.every.max_new_tokens
    )
    roles = build_roles(cfg, world.run, world.tokenizer)
    generator = torch.Generator().manual_seed(9)
    for parameter in roles.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    engine = build_engine(cfg, roles.model)
    prompts, stop = listing.prompts(), world.stop_tokens
    trainer = EnumeratingTrainer(cfg, world.run, engine, roles.scorer, prompts, stop)
    trainer.listing = listing
    return trainer


def _step(trainer: EnumeratingTrainer) -> tuple[dict[int, Tensor], dict[str, float]]:
    """Gradients by the parameters' identity, and metrics, of one step over all responses."""
    gradients: dict[int, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            gradients.update({id(p): p.grad.clone() for p in group["params"]})

    trainer.engine.optimizer.register_step_pre_hook(keep)
    state = PpoState(step=1, kl_coef=BETA, statistics=Statistics())
    return gradients, trainer.advance(state)[-1]
