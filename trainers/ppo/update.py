"""One PPO update: epochs of minibatches of microbatches over a rollout batch.

The arithmetic is in `ppo_math.py`, the optimizer in `trainers/engine/engine.py`. Microbatches are
cut once and hold about equally many tokens; every epoch draws its minibatches from them anew, by
the seed alone, so that the number of ranks changes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chatllama.config.ppo import PpoSection
from chatllama.model.roles import RoleModel
from chatllama.model.scoring import (
    TokenScores,
    policy_and_value,
    response_logprobs,
    response_values,
    shares_trunk,
)
from chatllama.runtime.distributed import all_sum, device, rank, to_device, world_size
from trainers.engine.engine import Engine
from trainers.ppo.data import PtxLoader, PtxMicrobatch
from trainers.ppo.metrics import UpdateSums
from trainers.ppo.ppo_math import ValueLoss, kl_loss, policy_loss, value_loss
from trainers.ppo.rollout import Rollout


@dataclass(frozen=True)
class Targets:
    """Advantages, returns and loss mask of a rollout batch.

    Identical on all ranks; on the CPU until split into microbatches.
    """

    advantages: Tensor
    """(B, R) float32, whitened or not."""
    returns: Tensor
    """(B, R) float32; unused without a critic."""
    mask: Tensor
    """(B, R) bool: tokens that count in the loss."""

    def select(self, rows: list[int], width: int) -> "Targets":
        """The given rows and their first `width` columns, on the device."""
        tensors = (self.advantages, self.returns, self.mask)
        return Targets(*(to_device(x[rows, :width]) for x in tensors))


@dataclass(frozen=True)
class Microbatch:
    """Responses of one forward pass."""

    rollout: Rollout
    """Tokens and masks on the CPU, as `scoring.py` needs them; the losses' inputs on the device."""
    targets: Targets
    num_tokens: int
    """Tokens that count in the loss."""


class _Known(torch.autograd.Function):
    """A loss whose gradients are known; backward returns them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(slopes[0] * gradient for gradient in ctx.gradients)


def backward_now(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The same loss with the same gradients for `parameters`; its graph is computed and freed."""
    gradients = torch.autograd.grad(loss, parameters)
    # Views, as in `chatllama/model/lora.py`: else the order of all gradients would be random.
    return _Known.apply(loss.detach(), gradients, *(p.view_as(p) for p in parameters))


def minibatches(section: PpoSection, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Numbers of `Rollout.microbatches` in each minibatch, in random order."""
    generator = torch.Generator().manual_seed(hash((seed, step, epoch)) % 2**63)
    count = section.rollout_batch_size // section.microbatch_size
    order = torch.randperm(count, generator=generator).tolist()
    size = section.minibatch_size // section.microbatch_size
    return [order[start : start + size] for start in range(0, count, size)]


@dataclass
class Update:
    """The update of one rollout batch; call `run` once."""

    engine: Engine
    rollout: Rollout
    targets: Targets
    section: PpoSection
    temperature: float
    """At which the rollout was sampled."""
    step: int
    """PPO steps before this one."""
    seed: int
    lr_factors: Callable[[int], Mapping[str, float]]
    """Share of its peak learning rate of each group that moves, after a number of optimizer steps
    of the stage; groups that it leaves out rest."""
    ptx: PtxLoader | None
    """Other text whose likelihood counts too."""
    after_step: Callable[[], None]
    """Called after each optimizer step (EMA)."""

    def __post_init__(self) -> None:
        self.sums = UpdateSums(device())
        self.warming_up = self.step < self.section.critic_warmup_steps

    def run(self) -> dict[str, float]:
        """Trains; returns metrics over tokens, epochs and ranks."""
        section = self.section
        self.engine.model.train()
        norms, factors = list[float](), dict[str, float]()
        microbatches = self._microbatches()
        drawn = [
            minibatch
            for epoch in range(section.epochs)
            for minibatch in minibatches(section, self.seed, self.step, epoch)
        ]
        for number, minibatch in enumerate(drawn):
            self.engine.show("update", number, len(drawn))
            position = self.step * len(drawn) + number
            chosen = [microbatches[m] for m in minibatch]
            approx_kl = self._accumulate(chosen, position, first=number == 0)
            factors = self.lr_factors(position)
            norms.append(self.engine.step(factors))
            self.after_step()
            if section.target_kl is not None and approx_kl > section.target_kl:
                break
        return self.sums.metrics(section, norms, factors, len(drawn))

    def _microbatches(self) -> list[Microbatch]:
        counts, found = self.targets.mask.sum(1).tolist(), []
        for rows in self.rollout.microbatches(self.section.microbatch_size):
            rollout = self.rollout.select(rows)
            names = ("logprobs", "ref_logprobs", "values")
            rollout = replace(rollout, **{n: to_device(vars(rollout)[n]) for n in names})
            targets = self.targets.select(rows, rollout.response_mask.shape[1])
            found.append(Microbatch(rollout, targets, sum(counts[row] for row in rows)))
        return found

    def _accumulate(self, microbatches: list[Microbatch], position: int, first: bool) -> float:
        """Backward passes of one minibatch; returns its KL per token if `target_kl` needs it."""
        # A minibatch whose tokens are all filtered out still steps, with gradient 0.
        num_tokens = float(max(1, sum(microbatch.num_tokens for microbatch in microbatches)))
        texts = self.ptx.microbatches(position, len(microbatches)) if self.ptx is not None else None
        before = self.sums.approx_kl
        for place in range(rank(), len(microbatches), world_size()):
            text = texts[place] if texts is not None else None
            self.engine.backward(self._loss(microbatches[place], num_tokens, text, first))
        if self.section.target_kl is None:
            return 0.0
        return float(all_sum(self.sums.approx_kl - before)) / num_tokens

    def _loss(
        self, microbatch: Microbatch, num_tokens: float, text: PtxMicrobatch | None, first: bool
    ) -> Tensor:
        """The microbatch's part of the minibatch's loss."""
        section, rollout, targets = self.section, microbatch.rollout, microbatch.targets
        mask, clip_range = targets.mask, section.clip_range
        scores, critic, text_logprob = self.engine(self._passes, microbatch, num_tokens, text)
        new, old, ref = scores.logprobs, rollout.logprobs, rollout.ref_logprobs
        policy = policy_loss(new, old, targets.advantages, mask, clip_range, num_tokens)
        drift = kl_loss(new, ref, mask, section.kl_loss_estimator, num_tokens)
        ptx_loss = -text_logprob / (text.num_tokens if text is not None else 1)
        loss = policy.loss + section.kl_loss_coef * drift + section.ptx_coef * ptx_loss
        if self.warming_up:  # its gradient is dropped, but ZeRO needs one of every parameter
            loss = 0.0 * loss
        if critic is not None:
            loss = loss + section.vf_coef * critic.loss
        log_ratio = (new - old).detach().abs() if first else None
        numbers = (scores.entropy, mask, num_tokens, log_ratio)
        self.sums.add(policy, critic, drift, ptx_loss, *numbers)
        return loss

    def _passes(
        self,
        model: RoleModel,
        microbatch: Microbatch,
        num_tokens: float,
        text: PtxMicrobatch | None,
    ) -> tuple[TokenScores, ValueLoss | None, Tensor]:
        """Policy scores, the critic's loss and the ptx text's log-probability: ().

        One call of the engine, because ZeRO needs one forward pass per backward pass. With separate
        adapters the value's backward pass runs first, so that only one graph is alive; not where
        ZeRO-3 has split the weights.
        """
        rollout, targets = microbatch.rollout, microbatch.targets
        inputs = (rollout.tokens, rollout.mask, rollout.response_mask)

        def critic_loss(values: Tensor) -> ValueLoss:
            old, clip_range = rollout.values, self.section.value_clip_range
            return value_loss(values, old, targets.returns, targets.mask, clip_range, num_tokens)

        if "value" in model.heads and not shares_trunk(model) and not self.engine.is_zero3():
            critic = critic_loss(response_values(model, *inputs))
            critic = replace(critic, loss=backward_now(critic.loss, self.engine.trained["value"]))
            scores = response_logprobs(model, "policy", *inputs, self.temperature)
        else:
            scores, values = policy_and_value(model, *inputs, self.temperature)
            critic = critic_loss(values) if values is not None else None
        text_logprob = torch.zeros((), device=device())
        if text is not None:  # every token but the first is a response to those before it
            inputs = (text.tokens, text.mask, text.loss_mask[:, 1:])
            text_logprob = response_logprobs(model, "policy", *inputs, 1.0).logprobs.sum()
        return scores, critic, text_logprob
