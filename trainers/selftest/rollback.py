"""A rollback compared with a run that never went wrong: the same steps, at a lower rate."""

import contextlib
import io
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from chatllama.runs.folder import RunFolder
from trainers.ppo.model import build_engine, build_roles
from trainers.ppo.rollout import Rollout
from trainers.ppo.state import PpoState
from trainers.ppo.train import PpoTrainer
from trainers.selftest.world import World

FACTOR = 0.25
FAULT_STEP, STEPS = 3, 4
SECTION: dict[str, Any] = {
    "steps": STEPS,
    "rollout_batch_size": 32,
    "minibatch_size": 16,
    "microbatch_size": 16,
    "epochs": 2,
    "learning_rate": 1e-3,
    "critic_warmup_steps": 1,
    "ema_decay": 0.9,
    "kl_controller": "adaptive",
    "kl_target": 0.1,
    "kl_horizon": 200,
    "score_normalization": "running",
    "save_every": 1,
    "health": {"action": "rollback", "rollback_lr_factor": FACTOR},
}


class FaultyTrainer(PpoTrainer):
    """A trainer one of whose steps looks like an explosion when it is made for the first time."""

    rates: list[float]
    """Learning rate of the policy in each step made."""

    def advance(self, state: PpoState) -> tuple[PpoState, Rollout, list[str], dict[str, float]]:
        """One step; the fault is in its metrics."""
        state, rollout, texts, metrics = super().advance(state)
        if state.step == FAULT_STEP and len(self.rates) < FAULT_STEP:
            metrics["ppo/approx_kl"] = 1.0
        self.rates.append(metrics["ppo/lr"])
        return state, rollout, texts, metrics


def rollback_errors(world: World) -> dict[str, float]:
    """Differences between a run with a rollback and its steps made without one.

    `weights`: largest, of policy, critic and average. `rate`: relative, of the learning rates. Both
    are infinite where no rollback happened.
    """
    with tempfile.TemporaryDirectory(prefix="chatllama-rollback-") as folder:
        faulty, plain = (_trainer(world, Path(folder) / name) for name in ("faulty", "plain"))
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            faulty.train(resume=False)
    state = plain.start()
    for _ in range(STEPS):
        if state.step == FAULT_STEP - 1:
            state = replace(state, lr_scale=FACTOR)
        state = plain.advance(state)[0]
    expected = [*plain.rates[: FAULT_STEP - 1], plain.rates[FAULT_STEP - 1] / FACTOR]
    expected += plain.rates[FAULT_STEP - 1 :]
    if len(faulty.rates) != len(expected):
        return {"weights": float("inf"), "rate": float("inf")}
    pairs = zip(faulty.engine.model.parameters(), plain.engine.model.parameters(), strict=True)
    rates = zip(faulty.rates, expected, strict=True)
    return {
        "weights": max(float((mine - theirs).detach().abs().max()) for mine, theirs in pairs),
        "rate": max(abs(mine - theirs) / (theirs or 1.0) for mine, theirs in rates),
    }


def _trainer(world: World, folder: Path) -> FaultyTrainer:
    """A trainer of the world's adapters that writes into a folder of its own."""
    cfg = world.config(SECTION)
    roles = build_roles(cfg, world.run, world.tokenizer)
    engine, prompts = build_engine(cfg, roles.model), world.prompts(8)
    run, stop = RunFolder(folder), world.stop_tokens
    trainer = FaultyTrainer(cfg, run, engine, roles.scorer, prompts, stop)
    trainer.rates = []
    return trainer
