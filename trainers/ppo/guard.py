"""What protects a PPO run: health checks, checkpoints, rollbacks, stops. Trains nothing."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from chatllama.config.schema import Config
from chatllama.reporting.tracker import Tracker
from chatllama.runs import interruption
from chatllama.runs.checkpoints import newest_good
from chatllama.runs.folder import RunFolder, step_folders
from chatllama.runtime.distributed import from_rank_zero, rank
from trainers.engine.engine import Engine
from trainers.ppo.health.monitor import (
    Decision,
    HealthMonitor,
    decide,
    start_diagnoses,
    write_diagnoses,
)
from trainers.ppo.rollout import Rollout
from trainers.ppo.servers.pool import NoServerLeft
from trainers.ppo.state import PpoState, load_state, save_state
from trainers.stages.not_finite import dump_batch


class Guard:
    """Checks and saves the steps of a run; diagnoses go to RUN/ppo/health.jsonl and stderr."""

    def __init__(self, cfg: Config, run: RunFolder, engine: Engine) -> None:
        self.cfg, self.section, self.run, self.engine = cfg, cfg.ppo.health, run, engine
        self.monitor = HealthMonitor(self.section, cfg.backbone.dtype)
        self.path = run.stage("ppo") / "health.jsonl"
        self.fatal = False

    def begin(self, state: PpoState, new_run: bool = False) -> None:
        """Restores the monitor's state: at the start, on resuming and after a rollback."""
        self.monitor = HealthMonitor(self.section, self.cfg.backbone.dtype)
        if state.health:
            self.monitor.restore(state.health)
        if rank() == 0:
            start_diagnoses(self.path, None if new_run else state.step)

    def save(self, state: PpoState) -> None:
        """Writes a checkpoint; every rank must call."""
        state = replace(state, health=self.monitor.state())
        save_state(self.cfg, self.run, self.engine, state)

    @contextmanager
    def saving_without_servers(self, state: PpoState) -> Iterator[None]:
        """Saves the state before the run stops because no sampling server is left."""
        try:
            yield
        except NoServerLeft as error:
            self.save(state)
            raise ValueError(
                f"{error}. Step {state.step} is saved: start the servers, then go on with --resume"
            ) from error

    def after_step(
        self, tracker: Tracker, state: PpoState, metrics: dict[str, float], rollout: Rollout
    ) -> PpoState:
        """Checks and saves a step; returns the state to go on from.

        Raises:
            ValueError: the health monitor stops the run.
            Interrupted: a signal came; the step is saved.
        """
        every = self.cfg.ppo.save_every
        decision = self.check(state, metrics, rollout)
        if decision == "stop":
            raise self._stopped(state)
        stopping = interruption.stop_requested()
        if decision == "rollback":
            state = self._rolled_back(state)
            tracker.rewind(state.step)
        elif stopping or (every and state.step % every == 0):
            self.save(state)
        if stopping:
            interruption.stop(self.run, "ppo", state.step)
        return state

    def check(self, state: PpoState, metrics: dict[str, float], rollout: Rollout) -> Decision:
        """What to do after a step, the same on every rank.

        The rollout batch is written to a file where a metric is not finite.
        """
        diagnoses = self.monitor.observe(state.step, metrics)
        self.fatal = any(diagnosis.severity == "fatal" for diagnosis in diagnoses)
        decision = from_rank_zero(decide(self.section, diagnoses, state.rollbacks))
        if rank() == 0 and diagnoses:
            if any(diagnosis.name == "not_finite" for diagnosis in diagnoses):
                dump_batch(self.run.stage("ppo"), state.step, vars(rollout))
            write_diagnoses(self.path, diagnoses, decision)
            for diagnosis in diagnoses:
                print(diagnosis, file=sys.stderr, flush=True)
        return decision

    def _stopped(self, state: PpoState) -> ValueError:
        """The error that ends the stage, with what the user can do."""
        found = step_folders(self.run.checkpoints("ppo"))
        newest = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint"
        remedy = " and go on with --resume"
        remedy += "" if self.fatal else ", or set ppo.health.action: warn"
        return ValueError(
            f"stopped after step {state.step} by the health monitor (see above and {self.path}); "
            f"{newest}. Change the config keys named there{remedy}"
        )

    def _rolled_back(self, state: PpoState) -> PpoState:
        """The last good checkpoint restored, with lower learning rates from there on."""
        good = load_state(
            self.cfg, self.engine, newest_good(self.run.checkpoints("ppo"), state.step)[0]
        )
        scale = state.lr_scale * self.section.rollback_lr_factor
        good = replace(good, lr_scale=scale, rollbacks=state.rollbacks + 1)
        self.begin(good)
        if rank() == 0:
            print(f"back to step {good.step}, learning rates times {scale:g}", flush=True)
        return good
