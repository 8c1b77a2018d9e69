"""Stage 3: PPO, in chronological order: roll out, shape rewards, estimate advantages, update.

The arithmetic is in `ppo_math.py`, sampling and scoring in `rollout.py`, scores in
`ppo_rewards.py`, the optimiser's steps in `ppo_update.py`, models and files in `ppo_setup.py`.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from chatllama.batching import lr_factor, ppo_batches
from chatllama.checkpoint import checkpoint_to_resume, save_step
from chatllama.config import Config, PpoSection
from chatllama.distributed import rank, world_size
from chatllama.roles import adapter_parameters, adapter_state
from chatllama.run_folder import RunFolder
from chatllama.tracking import Tracker
from data.collate import batch_indices
from trainers.engine import Engine, gathered
from trainers.evaluate import measure_policy
from trainers.ppo_math import (
    adapted_kl_coef,
    explained_variance,
    gae,
    group_advantages,
    masked,
    mean_and_variance,
    moments,
    shape_rewards,
    whiten,
)
from trainers.ppo_rewards import Scorer, Statistics, scaled_rewards, shaped_scores
from trainers.ppo_setup import Prompts, adapters_that_change, fold_into_value_head
from trainers.ppo_text import TextStream
from trainers.ppo_update import Targets, Update
from trainers.rollout import Rollout, TurnEnds, collect_rollout

RATIO_TOLERANCE = 1e-3
"""Nats by which log-probabilities that must be equal may differ (they come out exactly equal)."""


@dataclass(frozen=True)
class PpoState:
    """What a resumed run needs beside weights and optimizer."""

    step: int
    """Finished rollout batches."""
    kl_coef: float
    """Reward per nat, now."""
    statistics: Statistics
    """Of raw scores, for their normalisation."""


class PpoTrainer:
    """PPO over the roles of one engine.

    Args:
        cfg: the whole config.
        run: for checkpoints and metrics.
        engine: over policy and value.
        scorer: of answers.
        prompts: tokenised.
        ends: stop and pad ids.
        text: for the ptx loss, or None.
    """

    def __init__(
        self,
        cfg: Config,
        run: RunFolder,
        engine: Engine,
        scorer: Scorer,
        prompts: Prompts,
        ends: TurnEnds,
        text: TextStream | None = None,
    ) -> None:
        self.cfg, self.run, self.engine = cfg, run, engine
        self.scorer, self.prompts, self.ends, self.text = scorer, prompts, ends, text
        self.total_optimizer_steps = ppo_batches(cfg.ppo, world_size()).total_optimizer_steps

    def train(self, resume: bool) -> dict[str, float]:
        """Trains policy and value in place; returns the stage's closing numbers.

        Args:
            resume: go on from the newest checkpoint.

        Raises:
            ValueError: at the start policy and reference differ, or the ratio is not 1.
        """
        section = self.cfg.ppo
        started = time.monotonic()
        checkpoint = checkpoint_to_resume(self.run, "ppo", resume)
        metrics: dict[str, float] = {}
        with Tracker(self.run, "ppo", self.cfg.tracking, section.steps, rank()) as tracker:
            state = self.start() if checkpoint is None else self.load(checkpoint)
            if checkpoint is not None:
                tracker.resume_from(state.step)
            while state.step < section.steps:
                state, rollout, texts, metrics = self.advance(state)
                tracker.log(state.step, metrics)
                self._show_sample(tracker, state, rollout, texts)
                if section.save_every and state.step % section.save_every == 0:
                    self.save(state)
        return {
            **{name.removeprefix("ppo/"): value for name, value in metrics.items()},
            "steps": section.steps,
            "score_offset": state.statistics.mean,
            "score_scale": state.statistics.deviation,
            "train_seconds": time.monotonic() - started,
        }

    def advance(self, state: PpoState) -> tuple[PpoState, Rollout, list[str], dict[str, float]]:
        """One PPO step: the next state, the rollout, its texts, the metrics."""
        section = self.cfg.ppo
        rollout, texts = self._roll_out(state.step)
        if section.score_normalization == "running":
            state = replace(state, statistics=state.statistics.merged(rollout.scores))
        if state.step == 0:
            _check_start(rollout)
        targets, metrics = self._targets(rollout, state)
        metrics |= self._update(rollout, targets, state)
        if state.step == 0:
            _check_first_ratio(metrics)
        step = state.step + 1
        if section.reference_refresh_every and step % section.reference_refresh_every == 0:
            self._copy_policy("reference", decay=0.0)
        if section.eval_every and step % section.eval_every == 0:
            metrics |= measure_policy(self.cfg, self.engine, self.scorer, self.prompts, self.ends)
        state = replace(state, step=step, kl_coef=_next_kl_coef(section, state, metrics))
        return state, rollout, texts, metrics

    def start(self) -> PpoState:
        """Step 0: score statistics of the reference's answers, folded into the value head too.

        As in lm-human-preferences' `set_reward_norm`; a value head copied from a reward head then
        predicts normalised scores from the first step on. One that starts from 0 does so anyway.
        """
        section = self.cfg.ppo
        state = PpoState(step=0, kl_coef=section.kl_coef, statistics=Statistics())
        if section.score_normalization == "none":
            return state
        count = section.score_normalization_samples
        chosen = batch_indices(len(self.prompts.train), count, 0, self.cfg.seed)
        records = [self.prompts.train[i] for i in chosen]
        rollout, _ = self._collect("reference", records, (self.cfg.seed, 0))
        statistics = Statistics().merged(rollout.scores)
        if statistics.squares == 0:
            raise ValueError(
                f"all {count} answers of the reference get the same score {statistics.mean:g}: "
                "the rewards have nothing in them that PPO could follow"
            )
        if self.scorer.roles and section.value_model == "adapter" and section.advantage == "gae":
            fold_into_value_head(self.engine, self.scorer, rollout, statistics.deviation)
        return replace(state, statistics=statistics)

    def save(self, state: PpoState) -> None:
        """Writes the checkpoint of `state`; every rank must call."""

        def write(folder: Path) -> None:
            self.engine.save(folder, asdict(state))
            for role in adapters_that_change(self.cfg):
                with gathered(adapter_parameters(self.engine.model, role)):
                    if rank() == 0:
                        tensors = adapter_state(self.engine.model, role)
                        save_file(
                            {name: t.cpu().contiguous() for name, t in tensors.items()},
                            folder / f"{role}.safetensors",
                        )

        section = self.cfg.ppo
        save_step(self.run, "ppo", state.step, section.save_total_limit, write)

    def load(self, checkpoint: Path) -> PpoState:
        """Restores what `save` wrote."""
        saved = self.engine.load(checkpoint)
        for role in adapters_that_change(self.cfg):
            tensors = load_file(checkpoint / f"{role}.safetensors")
            parameters = adapter_parameters(self.engine.model, role)
            with torch.no_grad(), gathered(parameters, modified=True):
                for name, tensor in adapter_state(self.engine.model, role).items():
                    tensor.copy_(tensors[name])
        return PpoState(saved["step"], saved["kl_coef"], Statistics(**saved["statistics"]))

    def _roll_out(self, step: int) -> tuple[Rollout, list[str]]:
        """The scored responses of a step; the samples of a prompt stand together."""
        section = self.cfg.ppo
        count = section.rollout_batch_size // section.samples_per_prompt
        chosen = batch_indices(len(self.prompts.train), count, step, self.cfg.seed)
        records = [self.prompts.train[i] for i in chosen for _ in range(section.samples_per_prompt)]
        return self._collect("policy", records, (self.cfg.seed, step + 1))

    def _collect(
        self, role: str, records: list[dict], seed: tuple[int, ...]
    ) -> tuple[Rollout, list[str]]:
        return collect_rollout(
            self.engine,
            role,
            [record["input_ids"] for record in records],
            [record["text"] for record in records],
            self.cfg.generation,
            self.ends,
            self.scorer,
            seed,
            self.cfg.ppo.microbatch_size,
        )

    def _targets(self, rollout: Rollout, state: PpoState) -> tuple[Targets, dict[str, float]]:
        """Advantages and returns of a rollout, and what there is to log about it."""
        section, mask = self.cfg.ppo, rollout.response_mask
        scores = shaped_scores(
            section, rollout.scores, rollout.finished, rollout.lengths, state.statistics
        )
        rewards = shape_rewards(scores, rollout.kl, mask, state.kl_coef)
        if section.whiten_rewards:
            rewards = scaled_rewards(rewards, mask)
        metrics = rollout_metrics(rollout, scores, rewards) | {"ppo/kl_coef": state.kl_coef}
        if section.advantage == "gae":
            advantages, returns = gae(rewards, rollout.values, mask, section.gamma, section.lam)
            _, spread = mean_and_variance(moments(returns, mask))
            _, missed = mean_and_variance(moments(returns - rollout.values, mask))
            metrics["ppo/explained_variance"] = explained_variance(missed, spread)
        else:
            divide = section.advantage == "grpo"
            size = section.samples_per_prompt
            advantages = group_advantages(rewards, mask, size, divide)
            returns = torch.zeros_like(advantages)
        if section.missing_eos == "filter":
            mask = mask & rollout.finished[:, None]
        if section.whitens and mask.any():
            advantages = whiten(advantages, mask, *mean_and_variance(moments(advantages, mask)))
        disagreement = self.scorer.disagreement(rollout.member_scores)
        if disagreement is not None:
            metrics["ppo/ensemble_disagreement"] = float(disagreement.mean())
        return Targets(advantages, returns, mask), metrics

    def _update(self, rollout: Rollout, targets: Targets, state: PpoState) -> dict[str, float]:
        section = self.cfg.ppo

        def factor(done: int) -> float:
            return lr_factor(
                done, self.total_optimizer_steps, section.lr_schedule, section.warmup_steps
            )

        def average() -> None:
            if section.ema_decay is not None:
                self._copy_policy("ema", section.ema_decay)

        return Update(
            engine=self.engine,
            rollout=rollout,
            targets=targets,
            section=section,
            temperature=self.cfg.generation.temperature,
            step=state.step,
            seed=self.cfg.seed,
            lr_factor=factor,
            text=self.text,
            after_step=average,
        ).run()

    def _copy_policy(self, role: str, decay: float) -> None:
        model = self.engine.model
        policy = adapter_parameters(model, "policy")
        self.engine.blend(adapter_parameters(model, role), policy, decay)

    def _show_sample(
        self, tracker: Tracker, state: PpoState, rollout: Rollout, texts: list[str]
    ) -> None:
        every = self.cfg.tracking.sample_every
        if rank() == 0 and every and (state.step == 1 or state.step % every == 0):
            section = self.cfg.ppo
            count = section.rollout_batch_size // section.samples_per_prompt
            first = batch_indices(len(self.prompts.train), count, state.step - 1, self.cfg.seed)[0]
            value = (float(rollout.scores[0]) - state.statistics.mean) / state.statistics.deviation
            tracker.sample(state.step, self.prompts.train[first]["text"], texts[0], value)


def rollout_metrics(
    rollout: Rollout, scores: torch.Tensor, rewards: torch.Tensor
) -> dict[str, float]:
    """What a rollout batch says about the policy that sampled it.

    The KL estimates are k1: per response (summed over its tokens, with the standard error of the
    mean over responses) and per token.

    Args:
        rollout: scored.
        scores: (B,) float32, shaped.
        rewards: (B, R) float32.
    """
    kl = masked(rollout.kl, rollout.response_mask).sum(1)
    return {
        "ppo/score_mean": float(scores.mean()),
        "ppo/score_std": float(scores.std(correction=0)),
        "ppo/rm_score_mean": float(rollout.scores.mean()),
        "ppo/reward_mean": float(rewards.sum(1).mean()),
        "ppo/kl_sequence": float(kl.mean()),
        "ppo/kl_sequence_se": float(kl.std() / len(kl) ** 0.5),
        "ppo/kl_token": float(kl.sum() / rollout.response_mask.sum()),
        "ppo/response_length": float(rollout.lengths.float().mean()),
        "ppo/eos_rate": float(rollout.finished.float().mean()),
    }


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
