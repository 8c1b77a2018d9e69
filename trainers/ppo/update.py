"""One PPO update: epochs of minibatches of microbatches over a rollout batch.

The arithmetic is in `ppo_math.py`, the optimiser in `engine.py`. The rows of a microbatch, of which
all have about as many tokens, stay together from scoring to the last epoch; minibatches are drawn
anew from them, by the seed alone, so that the number of ranks changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from chatllama.config.schema import PpoSection
from chatllama.model.roles import RoleModel
from chatllama.model.scoring import (
    TokenScores,
    policy_and_value,
    response_logprobs,
    response_values,
    shares_trunk,
)
from chatllama.runtime.distributed import (
    all_max,
    all_sum,
    device,
    rank,
    to_device,
    world_size,
)
from trainers.engine.engine import Engine
from trainers.ppo.data import PtxLoader, PtxMicrobatch
from trainers.ppo.ppo_math import (
    ValueLoss,
    kl_loss,
    policy_loss,
    value_loss,
)
from trainers.ppo.rollout import Rollout

COMPARED = ("logprobs", "ref_logprobs", "values")
"""What the losses read of a rollout."""


@dataclass(frozen=True)
class Targets:
    """What the update pulls towards, on every rank alike, on the CPU until it is cut up."""

    advantages: torch.Tensor
    """(B, R) float32, whitened or not."""
    returns: torch.Tensor
    """(B, R) float32; unused without a critic."""
    mask: torch.Tensor
    """(B, R) bool: tokens that are learnt from."""

    def select(self, rows: Sequence[int], width: int) -> "Targets":
        """The given rows, their first `width` columns."""
        index = list(rows)
        return Targets(
            self.advantages[index, :width], self.returns[index, :width], self.mask[index, :width]
        )

    def on_device(self) -> "Targets":
        """The same where the losses are computed."""
        return Targets(*(to_device(x) for x in (self.advantages, self.returns, self.mask)))


@dataclass(frozen=True)
class Part:
    """One microbatch, cut out once for all epochs."""

    rollout: Rollout
    """Its numbers on the device; tokens and masks on the CPU, as `scoring.py` likes them."""
    targets: Targets
    """On the device."""
    num_tokens: int
    """Tokens that are learnt from."""


@dataclass
class Tally:
    """Sums over tokens, and peaks, of the update so far on this rank."""

    sums: torch.Tensor
    """(9,): policy loss, value loss, clipped, value clipped, approx KL, entropy, KL loss, tokens,
    text loss."""
    peaks: torch.Tensor
    """(2,): ratio, first |log ratio|."""


class _Known(torch.autograd.Function):
    """A loss whose gradients have been found: backward only hands them on."""

    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, gradients: Sequence[torch.Tensor], *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(slopes[0] * gradient for gradient in ctx.gradients)


def backward_now(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same loss with the same gradients, whose graph has been walked and freed.

    Args:
        loss: () with a graph.
        parameters: all that the loss is to train.
    """
    gradients = torch.autograd.grad(loss, parameters)
    # Views, as in `lora_layer.py`: all gradients at once would come in an order of chance.
    return _Known.apply(loss.detach(), gradients, *(p.view_as(p) for p in parameters))


def minibatches(section: PpoSection, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Numbers of `Rollout.microbatches` in each minibatch, in random order."""
    generator = torch.Generator().manual_seed(hash((seed, step, epoch)) % 2**63)
    count = section.rollout_batch_size // section.microbatch_size
    order = torch.randperm(count, generator=generator).tolist()
    size = section.minibatch_size // section.microbatch_size
    return [order[start : start + size] for start in range(0, count, size)]


@dataclass(frozen=True)
class Update:
    """The update of one rollout batch; call `run` once.

    Attributes:
        engine: holds policy and value.
        rollout: scored.
        targets: of the same shape.
        section: sizes, clipping, coefficients.
        temperature: at which the rollout was sampled.
        step: of PPO, from 0.
        seed: of the minibatches.
        lr_factor: from the number of finished optimizer steps to the learning rate's factor.
        text: other text to be predicted (ptx), or None.
        after_step: called after each optimizer step (EMA).
    """

    engine: Engine
    rollout: Rollout
    targets: Targets
    section: PpoSection
    temperature: float
    step: int
    seed: int
    lr_factor: Callable[[int], float]
    text: PtxLoader | None
    after_step: Callable[[], None]

    def run(self) -> dict[str, float]:
        """Trains; returns metrics over tokens, epochs and ranks."""
        section = self.section
        self.engine.model.train()
        warming_up = self.step < section.critic_warmup_steps
        resting = ("policy",) if warming_up else ()
        tally = Tally(torch.zeros(9, device=device()), torch.zeros(2, device=device()))
        norms: list[float] = []
        parts = self._parts()
        per_epoch = section.rollout_batch_size // section.minibatch_size
        done = self.step * section.epochs * per_epoch
        factor, stopped = 0.0, False
        for epoch in range(section.epochs):
            for number, members in enumerate(minibatches(section, self.seed, self.step, epoch)):
                first = epoch == 0 and number == 0
                position = done + epoch * per_epoch + number
                chosen = [parts[m] for m in members]
                approx_kl = self._accumulate(chosen, position, tally, warming_up, first)
                factor = self.lr_factor(position)
                norms.append(self.engine.step(factor, resting))
                self.after_step()
                stopped = section.target_kl is not None and approx_kl > section.target_kl
                if stopped:
                    break
            if stopped:
                break
        return self._metrics(tally, norms, factor, per_epoch * section.epochs)

    def _parts(self) -> list[Part]:
        """The microbatches."""
        counts = self.targets.mask.sum(1).tolist()
        parts = []
        for rows in self.rollout.microbatches(self.section.microbatch_size):
            rollout = self.rollout.select(rows)
            targets = self.targets.select(rows, rollout.response_mask.shape[1])
            numbers = {n: to_device(rollout.__dict__[n]) for n in COMPARED}
            num_tokens = sum(counts[row] for row in rows)
            parts.append(Part(replace(rollout, **numbers), targets.on_device(), num_tokens))
        return parts

    def _accumulate(
        self, parts: list[Part], position: int, tally: Tally, warming_up: bool, first: bool
    ) -> float:
        """Backward passes of one minibatch; its approximate KL per token if that is asked for."""
        # A minibatch of which nothing is learnt (all filtered) still steps, with gradient 0.
        num_tokens = float(max(1, sum(part.num_tokens for part in parts)))
        text = self.text.batch(position, len(parts)) if self.text is not None else None
        before = tally.sums[4].clone()
        for place in range(rank(), len(parts), world_size()):
            share = text.share(place) if text is not None else None
            loss = self._loss(parts[place], num_tokens, share, tally, warming_up, first)
            self.engine.backward(loss)
        if self.section.target_kl is None:
            return 0.0
        return float(all_sum(tally.sums[4] - before)) / num_tokens

    def _loss(
        self,
        microbatch: Part,
        num_tokens: float,
        text: PtxMicrobatch | None,
        tally: Tally,
        warming_up: bool,
        first: bool,
    ) -> torch.Tensor:
        """The loss of one microbatch, a share of the minibatch's."""
        section, part, goal = self.section, microbatch.rollout, microbatch.targets
        scores, critic, text_logprob = self.engine(self._passes, microbatch, num_tokens, text)
        policy = policy_loss(
            scores.logprobs,
            part.logprobs,
            goal.advantages,
            goal.mask,
            section.clip_range,
            num_tokens,
        )
        estimator = section.kl_loss_estimator
        drift = kl_loss(scores.logprobs, part.ref_logprobs, goal.mask, estimator, num_tokens)
        text_loss = -text_logprob / (text.num_tokens if text is not None else 1)
        loss = policy.loss + section.kl_loss_coef * drift + section.ptx_coef * text_loss
        if warming_up:
            loss = 0.0 * loss
        value, value_clipped = loss.new_zeros(()), loss.new_zeros(())
        if critic is not None:
            value, value_clipped = critic.loss, critic.clipped
            loss = loss + section.vf_coef * value
        with torch.no_grad():
            tally.sums += torch.stack(
                [
                    policy.loss * num_tokens,
                    value * num_tokens,
                    policy.clipped,
                    value_clipped,
                    policy.approx_kl,
                    torch.where(goal.mask, scores.entropy, 0.0).sum(),
                    drift * num_tokens,
                    goal.mask.sum(),
                    text_loss,
                ]
            )
            tally.peaks[0] = torch.maximum(tally.peaks[0], policy.ratio_max)
            if first:
                off = (scores.logprobs - part.logprobs).abs().max()
                tally.peaks[1] = torch.maximum(tally.peaks[1], off)
        return loss

    def _passes(
        self, model: RoleModel, microbatch: Part, num_tokens: float, text: PtxMicrobatch | None
    ) -> tuple[TokenScores, ValueLoss | None, torch.Tensor]:
        """What the model says: policy scores, the critic's loss, the text's log-probability ().

        One call of the engine, because ZeRO wants one forward pass per backward pass. Of two
        trunks, the value's is done with before the policy's is begun, so that only one of their
        graphs is in memory; not where ZeRO-3 has split the weights.
        """
        part, goal = microbatch.rollout, microbatch.targets
        inputs = (part.tokens, part.mask, part.response_mask)

        def critic_loss(values: torch.Tensor) -> ValueLoss:
            clip = self.section.value_clip_range
            return value_loss(values, part.values, goal.returns, goal.mask, clip, num_tokens)

        if "value" in model.heads and not shares_trunk(model) and not self.engine.partitions():
            critic = critic_loss(response_values(model, *inputs))
            critic = replace(critic, loss=backward_now(critic.loss, self.engine.trained["value"]))
            scores = response_logprobs(model, "policy", *inputs, self.temperature)
        else:
            scores, values = policy_and_value(model, *inputs, self.temperature)
            critic = critic_loss(values) if values is not None else None
        text_logprob = torch.zeros((), device=device())
        if text is not None:  # every token but the first is a response to those before it
            inputs = (text.tokens, text.mask, text.trains[:, 1:])
            text_logprob = response_logprobs(model, "policy", *inputs, 1.0).logprobs.sum()
        return scores, critic, text_logprob

    def _metrics(
        self, tally: Tally, norms: list[float], factor: float, planned: int
    ) -> dict[str, float]:
        totals, tops = all_sum(tally.sums).tolist(), all_max(tally.peaks).tolist()
        tokens = max(totals[7], 1.0)
        metrics = {
            "ppo/policy_loss": totals[0] / tokens,
            "ppo/clip_fraction": totals[2] / tokens,
            "ppo/approx_kl": totals[4] / tokens,
            "ppo/entropy": totals[5] / tokens,
            "ppo/ratio_max": tops[0],
            "ppo/first_log_ratio": tops[1],
            "ppo/grad_norm": sum(norms) / len(norms),
            "ppo/lr": self.section.learning_rate * factor,
            "ppo/optimizer_steps": float(len(norms)),
        }
        if "value" in self.engine.model.heads:
            metrics["ppo/value_loss"] = totals[1] / tokens
            metrics["ppo/value_clip_fraction"] = totals[3] / tokens
        if self.section.kl_loss_coef:
            metrics["ppo/kl_loss"] = totals[6] / tokens
        if self.text is not None:
            metrics["ppo/ptx_loss"] = totals[8] / len(norms)
        if self.section.target_kl is not None:
            metrics["ppo/update_share"] = len(norms) / planned
        return metrics
