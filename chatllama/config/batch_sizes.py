"""Numbers derived from the config: microbatches, optimizer steps, learning-rate factors.

Every division is exact or refused with the nearest numbers that work. Step words: rollout batch ->
minibatch -> microbatch -> optimizer step.
"""

import math

from chatllama.config.base import Schedule
from chatllama.config.errors import ConfigError
from chatllama.config.model import FromScratch
from chatllama.config.schema import Config, PpoSection
from chatllama.config.stages import OptimizerSection

COSINE_FLOOR = 0.1
"""Share of the peak learning rate that the cosine schedule ends at."""


def microbatches_per_step(
    section: OptimizerSection | FromScratch | PpoSection, world_size: int, name: str
) -> int:
    """Forward passes of one rank per optimizer step (gradient accumulation steps).

    Raises:
        ValueError: the batch does not divide evenly; says which sizes near it do, with `name` as
            the section's.
    """
    assert world_size > 0, world_size
    if isinstance(section, PpoSection):
        key, batch = f"{name}.minibatch_size", section.minibatch_size
    else:
        key, batch = f"{name}.batch_size", section.batch_size
    microbatch = section.microbatch_size
    unit = microbatch * world_size
    if batch % unit == 0:
        return batch // unit
    below = batch // unit * unit
    remedies = f"{key} {_either([size for size in (below, below + unit) if size])}"
    if batch % world_size == 0:
        per_rank = batch // world_size
        divisors = [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        smaller = [d for d in divisors if d < microbatch]
        larger = [d for d in divisors if d > microbatch]
        remedies += f", or {name}.microbatch_size {_either(smaller[-1:] + larger[:1])}"
    raise ValueError(
        f"{key} {batch} is not a multiple of {name}.microbatch_size {microbatch} times "
        f"{_ranks(world_size)} (= {unit}); nearest that work: {remedies}"
    )


def optimizer_steps(section: OptimizerSection, num_examples: int) -> int:
    """Optimizer steps of the stage: `steps`, or enough for `epochs` passes (the last one filled).

    Args:
        num_examples: training sequences of one pass over the mixture, over all ranks.

    Raises:
        ValueError: there are no examples.
    """
    if num_examples < 1:
        raise ValueError(f"{num_examples} training examples: nothing to train on")
    if section.steps is not None:
        return section.steps
    return math.ceil(section.epochs * num_examples / section.batch_size)


def ppo_optimizer_steps(section: PpoSection) -> int:
    """Optimizer steps of the whole stage: one per minibatch of every epoch of every step."""
    minibatches = section.rollout_batch_size // section.minibatch_size
    return section.steps * section.epochs * minibatches


def policy_steps(section: PpoSection, steps: int) -> int:
    """Optimizer steps of the policy in the first `steps` PPO steps; it rests in critic warm-up."""
    each = ppo_optimizer_steps(section) // section.steps
    return each * max(0, steps - section.critic_warmup_steps)


def ppo_lr_factors(section: PpoSection, done: int) -> dict[str, float]:
    """Group -> share of its peak learning rate after `done` optimizer steps of the stage.

    While the critic warms up the policy is left out; its own warm-up and decay begin after that.
    """
    total, own = ppo_optimizer_steps(section), policy_steps(section, section.steps)
    schedule, warmup = section.lr_schedule, section.warmup_steps
    factors: dict[str, float] = {}
    if done >= total - own:
        factors["policy"] = lr_factor(done - (total - own), own, schedule, warmup)
    if section.advantage == "gae":
        factors["value"] = lr_factor(done, total, schedule, warmup)
    return factors


def check_batches(cfg: Config, world_size: int) -> None:
    """Raises ConfigError, with the problems of all trained stages, if a batch does not divide."""
    sections: dict[str, OptimizerSection | FromScratch | PpoSection | None] = {
        "backbone.from_scratch": cfg.backbone.from_scratch,
        "sft": cfg.sft if cfg.sft.data else None,
        "reward": cfg.reward if cfg.reward.data else None,
        "ppo": cfg.ppo if cfg.ppo.data else None,
    }
    problems: list[str] = []
    for name, section in sections.items():
        try:
            if section is not None:
                microbatches_per_step(section, world_size, name)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(f"batch sizes on {_ranks(world_size)}", problems)


def lr_factor(step: int, total: int, schedule: Schedule, warmup_steps: int = 0) -> float:
    """The share of the peak learning rate at optimizer step `step` (from 0) of `total`.

    Warm-up rises linearly and reaches 1 in its last step; the decay then starts from 1 and would
    reach its end (0, or 10 % for cosine) one step after the last. A run shorter than its warm-up
    never reaches the peak.
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


def _either(numbers: list[int]) -> str:
    return " or ".join(str(number) for number in numbers)


def _ranks(world_size: int) -> str:
    return "1 rank" if world_size == 1 else f"{world_size} ranks"
