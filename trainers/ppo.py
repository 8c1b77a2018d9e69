"""Stage 3: PPO, in chronological order: roll out, shape rewards, estimate advantages, update.

The arithmetic is in `ppo_math.py`, sampling and scoring in `rollout.py`, the optimiser's steps in
`ppo_update.py`, models and files of the stage in `ppo_setup.py`.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch

from chatllama.batching import ppo_batches
from chatllama.checkpoint import checkpoint_to_resume, save_step
from chatllama.config import Config, PpoSection
from chatllama.distributed import rank, world_size
from chatllama.roles import ScalarHead
from chatllama.run_folder import RunFolder
from chatllama.tracking import Tracker
from data.collate import batch_indices
from trainers.engine import Engine
from trainers.ppo_math import (
    adapted_kl_coef,
    explained_variance,
    gae,
    masked,
    mean_and_variance,
    moments,
    shape_rewards,
    whiten,
)
from trainers.ppo_setup import Prompts, TurnEnds
from trainers.ppo_update import Targets, update
from trainers.rollout import Rollout, arrange, collect_rollout, sample_responses, score

RATIO_TOLERANCE = 1e-3
"""Nats by which log-probabilities that must be equal may differ (they come out exactly equal)."""


@dataclass(frozen=True)
class PpoState:
    """What a resumed run needs beside weights and optimizer."""

    step: int
    """Finished rollout batches."""
    kl_coef: float
    """Reward per nat, now."""
    score_mean: float
    """Subtracted from the reward model's scores."""
    score_deviation: float
    """Then divides them."""


def train_ppo(
    cfg: Config, run: RunFolder, engine: Engine, prompts: Prompts, ends: TurnEnds, resume: bool
) -> dict[str, float]:
    """Trains policy and value in place; returns the stage's closing numbers.

    Args:
        cfg: the whole config.
        run: for checkpoints and metrics.
        engine: over policy and value of the four roles.
        prompts: tokenised.
        ends: stop and pad ids.
        resume: go on from the newest checkpoint.

    Raises:
        ValueError: at the start policy and reference differ, or the ratio is not 1.
    """
    section = cfg.ppo
    started = time.monotonic()
    checkpoint = checkpoint_to_resume(run, "ppo", resume)
    metrics: dict[str, float] = {}
    with Tracker(run, "ppo", cfg.tracking, section.steps, rank()) as tracker:
        if checkpoint is not None:
            state = PpoState(**engine.load(checkpoint))
            tracker.resume_from(state.step)
        else:
            state = _normalised_start(cfg, engine, prompts, ends)
        for step in range(state.step, section.steps):
            rollout, texts = _roll_out(cfg, engine, prompts, ends, step)
            if step == 0:
                _check_start(rollout)
            metrics = _learn(cfg, engine, rollout, state, step)
            if step == 0:
                _check_first_ratio(metrics)
            state = replace(state, step=step + 1, kl_coef=_next_kl_coef(section, state, metrics))
            if state.step % cfg.tracking.log_every == 0 or state.step == section.steps:
                tracker.log(state.step, metrics)
            _show_sample(cfg, tracker, rollout, texts, prompts, state)
            if section.save_every and state.step % section.save_every == 0:
                _save(run, engine, state, section)
    return {
        **{name.removeprefix("ppo/"): value for name, value in metrics.items()},
        "steps": section.steps,
        "score_offset": state.score_mean,
        "score_scale": state.score_deviation,
        "train_seconds": time.monotonic() - started,
    }


def _roll_out(
    cfg: Config, engine: Engine, prompts: Prompts, ends: TurnEnds, step: int
) -> tuple[Rollout, list[str]]:
    """The scored responses of a step and the texts of their prompts."""
    section = cfg.ppo
    chosen = batch_indices(len(prompts.train), section.rollout_batch_size, step, cfg.seed)
    records = [prompts.train[i] for i in chosen]
    rollout = collect_rollout(
        engine,
        [record["input_ids"] for record in records],
        cfg.generation,
        ends.stop_ids,
        ends.pad_id,
        (cfg.seed, step + 1),
        section.microbatch_size,
    )
    return rollout, [record["text"] for record in records]


def _learn(
    cfg: Config, engine: Engine, rollout: Rollout, state: PpoState, step: int
) -> dict[str, float]:
    """Rewards, advantages and the update of one rollout batch; its metrics."""
    section, mask = cfg.ppo, rollout.response_mask
    scores = shaped_scores(section, rollout, state)
    rewards = shape_rewards(scores, rollout.kl, mask, state.kl_coef)
    advantages, returns = gae(rewards, rollout.values, mask, section.gamma, section.lam)
    _, returns_variance = mean_and_variance(moments(returns, mask))
    _, error_variance = mean_and_variance(moments(returns - rollout.values, mask))
    if section.whiten_advantages:
        advantages = whiten(advantages, mask, *mean_and_variance(moments(advantages, mask)))
    updated = update(
        engine,
        rollout,
        Targets(advantages, returns),
        section,
        temperature=cfg.generation.temperature,
        step=step,
        total_steps=ppo_batches(section, world_size()).total_optimizer_steps,
        seed=cfg.seed,
    )
    kl = masked(rollout.kl, mask).sum(1)
    return {
        "ppo/score_mean": float(scores.mean()),
        "ppo/score_std": float(scores.std(correction=0)),
        "ppo/rm_score_mean": float(rollout.scores.mean()),
        "ppo/reward_mean": float(rewards.sum(1).mean()),
        "ppo/kl_sequence": float(kl.mean()),
        "ppo/kl_token": float(kl.sum() / mask.sum()),
        "ppo/kl_coef": state.kl_coef,
        "ppo/response_length": float(rollout.lengths.float().mean()),
        "ppo/eos_rate": float(rollout.finished.float().mean()),
        "ppo/explained_variance": explained_variance(error_variance, returns_variance),
        **updated,
    }


def shaped_scores(section: PpoSection, rollout: Rollout, state: PpoState) -> torch.Tensor:
    """Scores as PPO sees them: normalised, clipped, less the missing-EOS penalty: (B,) float32."""
    scores = (rollout.scores - state.score_mean) / state.score_deviation
    if section.score_clip is not None:
        scores = scores.clamp(-section.score_clip, section.score_clip)
    return scores - section.missing_eos_penalty * (~rollout.finished).float()


def _normalised_start(cfg: Config, engine: Engine, prompts: Prompts, ends: TurnEnds) -> PpoState:
    """Step 0: score statistics of the reference's answers, folded into the value head too.

    As in lm-human-preferences' `set_reward_norm`; the value head, copied from the reward head,
    then predicts normalised scores from the first step on.
    """
    section = cfg.ppo
    fresh = PpoState(step=0, kl_coef=section.kl_coef, score_mean=0.0, score_deviation=1.0)
    if section.score_normalization == "none":
        return fresh
    count = section.score_normalization_samples
    asked = [
        prompts.train[i]["input_ids"] for i in batch_indices(len(prompts.train), count, 0, cfg.seed)
    ]
    seed = (cfg.seed, 0)
    responses = sample_responses(engine, "reference", asked, cfg.generation, ends.stop_ids, seed)
    unscored = arrange(asked, responses, ends.stop_ids, ends.pad_id)
    scored = score(engine.model, unscored, cfg.generation.temperature, section.microbatch_size)
    deviation, mean = torch.std_mean(scored.scores.double())
    if not deviation > 0:
        raise ValueError(
            f"the reward model gives all {count} answers of the reference the same score "
            f"({float(mean):g}): it has learnt nothing that PPO could follow"
        )
    head = cast(ScalarHead, engine.model.heads["value"])
    weight, bias = head.parameters()
    engine.assign(weight, engine.whole_value(weight) / deviation)
    engine.assign(bias, (engine.whole_value(bias) - mean) / deviation)
    return replace(fresh, score_mean=float(mean), score_deviation=float(deviation))


def _check_start(rollout: Rollout) -> None:
    """Policy and reference must be the same model before the first step.

    Raises:
        ValueError: with the largest difference.
    """
    off = float(masked(rollout.kl, rollout.response_mask).abs().max())
    if not off <= RATIO_TOLERANCE:
        raise ValueError(
            f"before step 1 policy and reference differ by up to {off:g} nats a token, so the KL "
            "penalty would pull towards another model. Are RUN/sft/adapter and the base those "
            "that the policy started from?"
        )


def _check_first_ratio(metrics: dict[str, float]) -> None:
    """The first minibatch's ratios must be 1: sampler and update score alike.

    Raises:
        ValueError: with the largest difference.
    """
    off = metrics["ppo/first_log_ratio"]
    if not off <= RATIO_TOLERANCE:
        raise ValueError(
            f"in the first minibatch log-probabilities differ from the rollout's by {off:g} nats: "
            "dropout or a forward pass that is not deterministic"
        )


def _next_kl_coef(section: PpoSection, state: PpoState, metrics: dict[str, float]) -> float:
    if section.kl_controller == "fixed":
        return state.kl_coef
    return adapted_kl_coef(
        state.kl_coef,
        metrics["ppo/kl_sequence"],
        section.kl_target,
        section.rollout_batch_size,
        section.kl_horizon,
    )


def _show_sample(
    cfg: Config,
    tracker: Tracker,
    rollout: Rollout,
    texts: list[str],
    prompts: Prompts,
    state: PpoState,
) -> None:
    every = cfg.tracking.sample_every
    if rank() == 0 and every and (state.step == 1 or state.step % every == 0):
        value = (float(rollout.scores[0]) - state.score_mean) / state.score_deviation
        tracker.sample(state.step, texts[0], prompts.decode(rollout.response_ids(0)), value)


def _save(run: RunFolder, engine: Engine, state: PpoState, section: PpoSection) -> None:
    save_step(
        run,
        "ppo",
        state.step,
        section.save_total_limit,
        lambda folder: engine.save(folder, asdict(state)),
    )
