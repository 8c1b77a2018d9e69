"""Stage 3: PPO, in chronological order: roll out, shape rewards, estimate advantages, update.

The arithmetic is in `ppo_math.py`, sampling and scoring in `rollout.py`, scores in `rewards.py`,
the optimizer steps in `update.py`, models and exports in `model.py`.
"""

import math
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from importlib.util import find_spec

import torch

from chatllama.config.batch_sizes import policy_steps, ppo_lr_factors
from chatllama.config.ppo import PpoSection
from chatllama.config.schema import Config
from chatllama.model.roles import Role, adapter_parameters
from chatllama.reporting.tracker import Tracker, logged_metrics
from chatllama.runs import interruption
from chatllama.runs.checkpoints import checkpoint_to_resume, layout_of
from chatllama.runs.folder import RunFolder
from chatllama.runtime.distributed import device, rank
from data.batches import batch_indices
from trainers.engine.engine import Engine
from trainers.ppo.data import Prompts, PtxLoader, StopTokens
from trainers.ppo.evaluate import measure_policy
from trainers.ppo.guard import Guard
from trainers.ppo.metrics import rollout_metrics
from trainers.ppo.model import fold_into_value_head
from trainers.ppo.ppo_math import (
    adapted_kl_coef,
    explained_variance,
    gae,
    grpo_advantages,
    mean_and_variance,
    rewards_to_go,
    rloo_advantages,
    shape_rewards,
    whiten,
)
from trainers.ppo.rewards import Scorer, Statistics, shaped_scores
from trainers.ppo.rollout import Collector, Rollout
from trainers.ppo.servers.pool import ServerPool, compare
from trainers.ppo.state import PpoState, load_state
from trainers.ppo.update import Targets, Update
from trainers.stages.loop import warn_of_warmup

RESCORE_EVERY, RESCORED = 10, 16
"""Steps between second scorings, and answers of each."""


class PpoTrainer:
    """PPO over the roles of one engine."""

    def __init__(
        self,
        cfg: Config,
        run: RunFolder,
        engine: Engine,
        scorer: Scorer,
        prompts: Prompts,
        stop_tokens: StopTokens,
        ptx: PtxLoader | None = None,
    ) -> None:
        self.cfg, self.run, self.engine = cfg, run, engine
        self.scorer, self.prompts, self.stop_tokens, self.ptx = scorer, prompts, stop_tokens, ptx
        size = cfg.ppo.microbatch_size
        compiles = cfg.compiles_rollouts(device().type == "cuda" and bool(find_spec("triton")))
        generation = cfg.generation.model_copy(update={"compile": compiles})
        self.collector = Collector(engine, scorer, stop_tokens, generation, size)
        self.guard = Guard(cfg, run, engine)
        servers, model = cfg.generation.servers, engine.model
        self.servers = ServerPool(cfg, servers, run, model, stop_tokens) if servers else None
        self.sampler_gap: dict[str, float] = {}

    def train(self, resume: bool) -> dict[str, float]:
        """Trains policy and value in place; returns the stage's closing numbers.

        Raises:
            ValueError: the health monitor stopped the run, or no sampling server is left.
            Interrupted: a signal came; the step is saved.
        """
        section = self.cfg.ppo
        started = time.monotonic()
        layout = layout_of(self.cfg.deepspeed, section.microbatch_size)
        checkpoint = checkpoint_to_resume(self.run, "ppo", resume, layout, section.steps)
        metrics: dict[str, float] = {}
        with Tracker(self.run, "ppo", self.cfg.tracking, section.steps, rank()) as tracker:
            self.engine.show = tracker.phase
            if checkpoint is None:
                self.run.evaluations.unlink(missing_ok=True)
                state = self.start()
                if section.health.action == "rollback":
                    self.guard.save(state)
            else:
                state = load_state(self.cfg, self.engine, checkpoint)
                tracker.resume_from(state.step)
                metrics = logged_metrics(self.run, "ppo", state.step)  # no step may be left
            self.guard.begin(state, new_run=checkpoint is None)
            own = policy_steps(section, section.steps), policy_steps(section, state.step)
            warn_of_warmup("ppo", section.warmup_steps, *own)
            _say_where_the_kl_is(section)
            with interruption.steps(), closing(self.servers) if self.servers else nullcontext():
                while state.step < section.steps:
                    with self.guard.saving_without_servers(state):
                        state, rollout, texts, metrics = self.advance(state)
                    tracker.log(state.step, metrics)
                    prompt, statistics = self._prompts(state.step - 1)[0]["text"], state.statistics
                    score = (float(rollout.scores[0]) - statistics.mean) / statistics.deviation
                    tracker.sample(state.step, prompt, texts[0], score)
                    state = self.guard.after_step(tracker, state, metrics, rollout)
        return {
            **{name.removeprefix("ppo/"): value for name, value in metrics.items()},
            "steps": section.steps,
            "score_offset": state.statistics.mean,
            "score_scale": state.statistics.deviation,
            "train_seconds": time.monotonic() - started,
        }

    def start(self) -> PpoState:
        """Step 0: score statistics of the reference's answers, folded into the value head too.

        As in lm-human-preferences' `set_reward_norm`: a value head copied from a reward head then
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
        least = section.health.min_score_std * max(1.0, abs(statistics.mean))
        if not statistics.varies or statistics.deviation < least:
            spread = statistics.deviation if statistics.varies else 0.0
            raise ValueError(
                f"all {count} answers of the reference get about the same score: mean "
                f"{statistics.mean:g}, deviation {spread:.2g}, and {least:.2g} is the least "
                "(ppo.health.min_score_std). The rewards give PPO nothing to follow: check "
                "ppo.rewards and the reward model"
            )
        if self.scorer.roles and section.value_model == "adapter" and section.advantage == "gae":
            fold_into_value_head(self.engine, self.scorer, rollout, statistics.deviation)
        return replace(state, statistics=statistics)

    def advance(self, state: PpoState) -> tuple[PpoState, Rollout, list[str], dict[str, float]]:
        """One PPO step: the state after it, its rollout, the answers' texts, its metrics."""
        section = self.cfg.ppo
        rollout, texts = self._roll_out(state.step)
        if section.score_normalization == "running":
            state = replace(state, statistics=state.statistics.merged(rollout.scores))
        targets, metrics = self._targets(rollout, state)
        if state.step % RESCORE_EVERY == 0:
            metrics |= self._rescored(rollout, state.step)
        metrics |= self._update(rollout, targets, state) | self.sampler_gap
        step = state.step + 1
        if section.reference_refresh_every and step % section.reference_refresh_every == 0:
            self._copy_policy("reference", decay=0.0)
        broken = not all(map(math.isfinite, metrics.values()))  # the guard names it
        if section.eval_every and step % section.eval_every == 0 and not broken:
            metrics |= measure_policy(self.cfg, self.run, self.collector, self.prompts, step)
        state = replace(state, step=step, kl_coef=_next_kl_coef(section, state, metrics))
        return state, rollout, texts, metrics

    def _prompts(self, step: int) -> list[dict]:
        """The prompts of a step, each once."""
        count = self.cfg.ppo.rollout_batch_size // self.cfg.ppo.samples_per_prompt
        chosen = batch_indices(len(self.prompts.train), count, step, self.cfg.seed)
        return [self.prompts.train[i] for i in chosen]

    def _roll_out(self, step: int) -> tuple[Rollout, list[str]]:
        """The scored responses of a step; the samples of a prompt stand together."""
        times = self.cfg.ppo.samples_per_prompt
        records = [record for record in self._prompts(step) for _ in range(times)]
        return self._collect("policy", records, (self.cfg.seed, step + 1))

    def _collect(
        self, role: Role, records: list[dict], seed: tuple[int, ...]
    ) -> tuple[Rollout, list[str]]:
        if self.servers is None:
            return self.collector.collect(role, records, seed)
        served = self.servers.sample(role, [record["input_ids"] for record in records], seed)
        ids = [response.ids for response in served]
        rollout, texts = self.collector.collect(role, records, seed, responses=ids)
        limit = self.servers.section.max_logprob_gap
        self.sampler_gap = compare(role, served, rollout, limit)
        return rollout, texts

    def _rescored(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Share of the scores' variance that a second scoring of some answers does not find.

        They are scored in another order and company: 0 where each gets its own score again, about
        1 where its second score has nothing to do with its first. Nothing of scores that are dead.
        """
        scores, health = rollout.scores.double(), self.cfg.ppo.health
        least = health.min_score_std * max(1.0, abs(float(scores.mean())))
        if "scores_not_repeatable" in health.ignore or scores.std(correction=0) <= least:
            return {}
        last, prompts = len(scores) - 1, self._prompts(step)
        rows = torch.linspace(last, 0, min(RESCORED, last + 1)).round().long().tolist()
        records = [prompts[row // self.cfg.ppo.samples_per_prompt] for row in rows]
        responses = [rollout.response_ids(row) for row in rows]
        again, _ = self.collector.collect("policy", records, (), responses=responses)
        apart = (again.scores - scores[rows]).square().mean()
        return {"ppo/rescore_gap": float(apart / (2 * scores.var(correction=0)))}

    def _targets(self, rollout: Rollout, state: PpoState) -> tuple[Targets, dict[str, float]]:
        """Advantages and returns of a rollout, and its metrics."""
        section, mask = self.cfg.ppo, rollout.response_mask
        finished, lengths = rollout.finished, rollout.lengths
        scores = shaped_scores(section, rollout.scores, finished, lengths, state.statistics)
        rewards = shape_rewards(scores, rollout.kl, mask, state.kl_coef)
        if section.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        metrics = rollout_metrics(rollout, scores, rewards) | {"ppo/kl_coef": state.kl_coef}
        if (size := section.samples_per_prompt) > 1:
            groups = rollout.scores.double().view(-1, size)
            metrics["ppo/rm_score_group_std"] = float(groups.std(1, correction=0).mean())
        if section.advantage == "gae":
            values, gamma = rollout.values, section.gamma
            advantages, returns = gae(rewards, values, mask, gamma, section.lam)
            if section.critic_lam is not None:
                _, returns = gae(rewards, values, mask, gamma, section.critic_lam)
            to_go = rewards_to_go(rewards, mask, gamma)
            _, variance = mean_and_variance(to_go, mask)
            _, error = mean_and_variance(to_go - values, mask)
            metrics["ppo/explained_variance"] = explained_variance(error, variance)
        else:
            coef = state.kl_coef
            if section.advantage == "rloo":
                advantages = rloo_advantages(rewards, mask, size)
            else:
                advantages = grpo_advantages(scores, rollout.kl, mask, coef, size)
            returns = torch.zeros_like(advantages)
        if section.missing_eos == "filter":
            mask = mask & rollout.finished[:, None]
            if not mask.any() and rank() == 0:
                print(f"warning: step {state.step + 1} trains on nothing: ppo.missing_eos filter "
                      f"leaves out all {len(mask)} responses, as none ends with a stop token. "
                      "Raise generation.max_new_tokens, or use ppo.missing_eos penalty",
                      file=sys.stderr, flush=True)  # fmt: skip
        if section.whitens and mask.any():
            advantages = whiten(advantages, mask)
        metrics |= self.scorer.metrics(rollout.term_scores)
        disagreement = self.scorer.disagreement(rollout.member_scores)
        if disagreement is not None:
            metrics["ppo/ensemble_disagreement"] = float(disagreement.mean())
        return Targets(advantages, returns, mask), metrics

    def _update(self, rollout: Rollout, targets: Targets, state: PpoState) -> dict[str, float]:
        section = self.cfg.ppo

        def factors(done: int) -> dict[str, float]:
            shares = ppo_lr_factors(section, done)
            return {group: state.lr_scale * share for group, share in shares.items()}

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
            lr_factors=factors,
            ptx=self.ptx,
            after_step=average,
        ).run()

    def _copy_policy(self, role: Role, decay: float) -> None:
        model = self.engine.model
        policy = adapter_parameters(model, "policy")
        self.engine.blend(adapter_parameters(model, role), policy, decay)


def _say_where_the_kl_is(section: PpoSection) -> None:
    """Prints, on rank 0, that the KL counts twice where two coefficients are set."""
    if rank() == 0 and section.kl_coef and section.kl_loss_coef:
        print(
            f"note: the KL to the reference counts twice: ppo.kl_coef {section.kl_coef:g} in the "
            f"reward (k1) and ppo.kl_loss_coef {section.kl_loss_coef:g} in the loss "
            f"({section.kl_loss_estimator})",
            file=sys.stderr,
            flush=True,
        )


def _next_kl_coef(section: PpoSection, state: PpoState, metrics: dict[str, float]) -> float:
    if section.kl_controller == "fixed":
        return state.kl_coef
    kl, count = metrics["ppo/kl_sequence"], section.rollout_batch_size
    return adapted_kl_coef(state.kl_coef, kl, section.kl_target, count, section.kl_horizon)
