"""PPO compared with the best possible policy pi* = pi_ref exp(r / beta) / Z.

Trainer, sampler, the four LoRA roles, critic and optimizer are the real ones. J of every policy and
J* = beta log Z are known by enumeration.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from trainers.ppo.model import build_engine, build_roles
from trainers.ppo.train import PpoTrainer
from trainers.selftest.exact import DenseRole, Enumeration, Optimum
from trainers.selftest.world import World

SECTION: dict[str, Any] = {
    "steps": 40,
    "rollout_batch_size": 256,
    "minibatch_size": 64,
    "microbatch_size": 64,
    "epochs": 4,
    "learning_rate": 5e-3,
    "adam_betas": [0.9, 0.95],
    "max_grad_norm": 1.0,
    "lam": 0.95,
    "vf_coef": 0.5,
    "value_clip_range": 1.0,
    "kl_coef": 0.3,
}


@dataclass(frozen=True)
class Progress:
    """How far a policy is from the best one."""

    objective: float
    """J, the mean over prompts."""
    share_closed: float
    """Of the gap from J(pi_ref) to J*: 0 at the start, 1 for the best policy."""
    kl_to_best: float
    """KL(pi || pi*), nats."""
    episodes: int
    """Responses sampled so far."""
    seconds: float
    """Training time so far, wall clock."""


@dataclass(frozen=True)
class Convergence:
    """A finished run."""

    seed: int
    start: float
    """J(pi_ref)."""
    best: float
    """J*."""
    progress: list[Progress]


def converge(
    world: World, section: dict[str, Any] | None = None, measurements: int = 4
) -> Convergence:
    """Trains PPO in `world` and measures the policy exactly `measurements` times on the way.

    Args:
        section: keys of `ppo` that replace those of `SECTION`.
    """
    cfg = world.config(SECTION | (section or {}))
    steps, beta = cfg.ppo.steps, cfg.ppo.kl_coef
    every, temperature = Enumeration(world), cfg.generation.temperature
    with torch.no_grad():
        sft = every.logprobs(DenseRole.saved(world, world.run.sft_adapter), temperature)
        scores = every.scores(DenseRole.saved(world, world.run.reward_adapter))
    optimum = Optimum(sft.sum(1), scores, beta, len(every.prompts))
    start = float(optimum.objective(sft.sum(1)))
    roles = build_roles(cfg, world.run, world.tokenizer)
    engine = build_engine(cfg, roles.model)
    prompts = world.prompts(cfg.ppo.rollout_batch_size // len(every.prompts))
    trainer = PpoTrainer(cfg, world.run, engine, roles.scorer, prompts, world.stop_tokens)
    state, progress, seconds = trainer.start(), [], 0.0
    for step in range(1, steps + 1):
        began = time.perf_counter()
        state, *_ = trainer.advance(state)
        seconds += time.perf_counter() - began
        if step % max(1, steps // measurements) and step < steps:
            continue
        with torch.no_grad():
            policy = DenseRole.of(world, roles.model, "policy")
            logprobs = every.logprobs(policy, temperature).sum(1)
        objective = float(optimum.objective(logprobs))
        share = (objective - start) / (optimum.best - start)
        kl, episodes = optimum.kl_to_best(logprobs), step * cfg.ppo.rollout_batch_size
        progress.append(Progress(objective, share, kl, episodes, seconds))
    return Convergence(world.seed, start, optimum.best, progress)
