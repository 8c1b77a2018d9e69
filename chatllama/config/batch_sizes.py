"""Numbers derived from the config: microbatches, optimizer steps, learning-rate factors.

Every division is exact or refused with the nearest numbers that work. Step words: rollout batch ->
minibatch -> microbatch -> optimizer step.
"""

import math
from dataclasses import dataclass

from chatllama.config.base import Schedule
from chatllama.config.errors import ConfigError
from chatllama.config.model import FromScratch
from chatllama.config.schema import Config, PpoSection
from chatllama.config.stages import OptimizerSection

COSINE_FLOOR = 0.1
"""Share of the peak learning rate that the cosine schedule ends at."""


@dataclass(frozen=True)
class PpoBatches:
    """How one PPO step is divided on one rank."""

    responses_per_rank: int
    """Responses (and prompts: one response each) that a rank samples per PPO step."""
    minibatches: int
    """Minibatches of a rollout batch, per epoch; equal on every rank."""
    responses_per_minibatch: int
    """Responses of a minibatch on one rank."""
    microbatches: int
    """Microbatches of a minibatch on one rank."""
    optimizer_steps_per_rollout: int
    """Optimizer steps of one PPO step: epochs * minibatches."""
    total_optimizer_steps: int
    """Optimizer steps of the whole stage."""


def microbatches_per_step(
    section: OptimizerSection | FromScratch, world_size: int, name: str
) -> int:
    """Forward passes of one rank per optimizer step (gradient accumulation steps).

    Args:
        section: gives batch_size and microbatch_size.
        world_size: number of ranks.
        name: of the section, for the message (`sft`).

    Raises:
        ValueError: the batch does not divide evenly.
    """
    return _split(name, "batch_size", section.batch_size, section.microbatch_size, world_size)


def optimizer_steps(section: OptimizerSection, num_examples: int) -> int:
    """Optimizer steps of the stage: `steps`, or enough for `epochs` passes (the last one filled).

    Args:
        section: gives steps, epochs and batch_size.
        num_examples: training sequences of one pass over the mixture, over all ranks.

    Raises:
        ValueError: there are no examples.
    """
    if num_examples < 1:
        raise ValueError(f"{num_examples} training examples: nothing to train on")
    if section.steps is not None:
        return section.steps
    return math.ceil(section.epochs * num_examples / section.batch_size)


def ppo_batches(section: PpoSection, world_size: int) -> PpoBatches:
    """How the rollout batch is divided into minibatches and microbatches on one rank.

    Raises:
        ValueError: something does not divide evenly.
    """
    microbatches = _split(
        "ppo", "minibatch_size", section.minibatch_size, section.microbatch_size, world_size
    )
    minibatches = section.rollout_batch_size // section.minibatch_size
    assert minibatches * section.minibatch_size == section.rollout_batch_size, section
    steps_per_rollout = section.epochs * minibatches
    return PpoBatches(
        responses_per_rank=section.rollout_batch_size // world_size,
        minibatches=minibatches,
        responses_per_minibatch=section.minibatch_size // world_size,
        microbatches=microbatches,
        optimizer_steps_per_rollout=steps_per_rollout,
        total_optimizer_steps=section.steps * steps_per_rollout,
    )


def check_batches(cfg: Config, world_size: int) -> None:
    """Nothing, when every stage's batches divide evenly over the ranks.

    Raises:
        ConfigError: with the problems of all stages.
    """
    problems: list[str] = []
    sections: list[tuple[str, OptimizerSection | FromScratch]] = []
    if cfg.backbone.from_scratch is not None:
        sections.append(("backbone.from_scratch", cfg.backbone.from_scratch))
    sections += [("sft", cfg.sft), ("reward", cfg.reward)]
    for name, section in sections:
        try:
            microbatches_per_step(section, world_size, name)
        except ValueError as error:
            problems.append(str(error))
    try:
        ppo_batches(cfg.ppo, world_size)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(f"batch sizes on {_ranks(world_size)}", problems)


def lr_factor(step: int, total: int, schedule: Schedule, warmup_steps: int = 0) -> float:
    """The share of the peak learning rate at optimizer step `step`.

    Warm-up rises linearly and reaches 1 in its last step; the decay then starts from 1 and would
    reach its end (0, or 10 % for cosine) one step after the last. A run shorter than its warm-up
    never reaches the peak.

    Args:
        step: optimizer steps done before this one, from 0.
        total: optimizer steps of the stage.
        schedule: linear to 0, cosine to 10 %, or constant.
        warmup_steps: optimizer steps of linear warm-up.
    """
    assert total > 0 and step >= 0, (step, total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return COSINE_FLOOR + (1.0 - COSINE_FLOOR) * (1.0 + math.cos(math.pi * done)) / 2


def _split(name: str, key: str, batch: int, microbatch: int, world_size: int) -> int:
    """Microbatches per rank of a batch over all ranks.

    Raises:
        ValueError: not a whole number; names the nearest batch and microbatch that work.
    """
    assert world_size > 0, world_size
    unit = microbatch * world_size
    if batch % unit == 0:
        return batch // unit
    below = batch // unit * unit
    remedies = [f"{name}.{key} {' or '.join(str(b) for b in (below, below + unit) if b)}"]
    if batch % world_size == 0:
        remedies.append(
            f"{name}.microbatch_size {_nearest_divisors(batch // world_size, microbatch)}"
        )
    raise ValueError(
        f"{name}.{key} {batch} is not a multiple of {name}.microbatch_size {microbatch} times "
        f"{_ranks(world_size)} (= {unit}); nearest that work: {', or '.join(remedies)}"
    )


def _nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` next to `wanted` on both sides, as `a or b`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(str(d) for d in below + above)


def _ranks(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size} ranks"
