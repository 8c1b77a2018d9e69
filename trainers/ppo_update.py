"""One PPO update: epochs of minibatches of microbatches over a rollout batch.

The arithmetic is in `ppo_math.py`, the optimiser in `engine.py`. The rows of a microbatch stay
together from scoring to the last epoch; minibatches are drawn anew from them, by the seed alone,
so that the number of ranks changes nothing.
"""

from dataclasses import dataclass

import torch

from chatllama.batching import lr_factor
from chatllama.config import PpoSection
from chatllama.distributed import all_max, all_sum, device, rank, world_size
from trainers.engine import Engine
from trainers.ppo_math import policy_loss, value_loss
from trainers.rollout import Rollout


@dataclass(frozen=True)
class Targets:
    """What the update pulls towards, on every rank alike."""

    advantages: torch.Tensor
    """(B, R) float32, whitened or not."""
    returns: torch.Tensor
    """(B, R) float32."""


def minibatches(section: PpoSection, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Microbatch numbers of each minibatch, in random order.

    Microbatch m holds rows [m * microbatch_size, (m + 1) * microbatch_size).
    """
    generator = torch.Generator().manual_seed(hash((seed, step, epoch)) % 2**63)
    count = section.rollout_batch_size // section.microbatch_size
    order = torch.randperm(count, generator=generator).tolist()
    size = section.minibatch_size // section.microbatch_size
    return [order[start : start + size] for start in range(0, count, size)]


def update(
    engine: Engine,
    rollout: Rollout,
    targets: Targets,
    section: PpoSection,
    *,
    temperature: float,
    step: int,
    total_steps: int,
    seed: int,
) -> dict[str, float]:
    """Trains policy and value on the rollout; returns metrics over tokens, epochs and ranks.

    Args:
        engine: holds policy and value.
        rollout: scored.
        targets: of the same shape.
        section: sizes, clipping, coefficients.
        temperature: at which the rollout was sampled.
        step: of PPO, from 0.
        total_steps: optimizer steps of the whole stage, for the schedule.
        seed: of the minibatches.
    """
    engine.model.train()
    size = section.microbatch_size
    sums = torch.zeros(7, device=device())
    peaks = torch.zeros(2, device=device())
    norms: list[float] = []
    factor = 0.0
    done = step * section.epochs * (section.rollout_batch_size // section.minibatch_size)
    for epoch in range(section.epochs):
        for number, members in enumerate(minibatches(section, seed, step, epoch)):
            first = epoch == 0 and number == 0
            all_rows = [row for m in members for row in range(m * size, (m + 1) * size)]
            num_tokens = float(rollout.response_mask[all_rows].sum())
            for member in members[rank() :: world_size()]:
                rows = list(range(member * size, (member + 1) * size))
                part = rollout.select(rows)
                width = part.response_mask.shape[1]
                scores, values = engine(
                    "policy_and_value", part.tokens, part.mask, part.response_mask, temperature
                )
                policy = policy_loss(
                    scores.logprobs,
                    part.logprobs,
                    targets.advantages[rows, :width],
                    part.response_mask,
                    section.clip_range,
                    num_tokens,
                )
                critic = value_loss(
                    values,
                    part.values,
                    targets.returns[rows, :width],
                    part.response_mask,
                    section.value_clip_range,
                    num_tokens,
                )
                engine.backward(policy.loss + section.vf_coef * critic.loss)
                with torch.no_grad():
                    tokens = part.response_mask.sum()
                    sums += torch.stack(
                        [
                            policy.loss * num_tokens,
                            critic.loss * num_tokens,
                            policy.clipped,
                            critic.clipped,
                            policy.approx_kl,
                            scores.entropy.sum(),
                            tokens,
                        ]
                    )
                    peaks[0] = torch.maximum(peaks[0], policy.ratio_max)
                    if first:
                        off = (scores.logprobs - part.logprobs).abs().max()
                        peaks[1] = torch.maximum(peaks[1], off)
            factor = lr_factor(done, total_steps, section.lr_schedule, section.warmup_steps)
            norms.append(engine.step(factor))
            done += 1
    totals, tops = all_sum(sums).tolist(), all_max(peaks).tolist()
    tokens = totals[6]
    return {
        "ppo/policy_loss": totals[0] / tokens,
        "ppo/value_loss": totals[1] / tokens,
        "ppo/clip_fraction": totals[2] / tokens,
        "ppo/value_clip_fraction": totals[3] / tokens,
        "ppo/approx_kl": totals[4] / tokens,
        "ppo/entropy": totals[5] / tokens,
        "ppo/ratio_max": tops[0],
        "ppo/first_log_ratio": tops[1],
        "ppo/grad_norm": sum(norms) / len(norms),
        "ppo/lr": section.learning_rate * factor,
    }
