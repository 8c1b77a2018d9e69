"""The health monitor in a PPO run: checks every step, writes diagnoses, decides what follows."""

import sys

from chatllama.config.ppo import PpoSection
from chatllama.runs.checkpoints import step_folders
from chatllama.runs.folder import RunFolder
from chatllama.runtime.distributed import from_rank_zero, rank
from trainers.ppo.health.monitor import (
    Decision,
    HealthMonitor,
    decide,
    dump_batch,
    start_diagnoses,
    write_diagnoses,
)
from trainers.ppo.rollout import Rollout
from trainers.ppo.state import PpoState


class Guard:
    """Checks every step; rank 0 prints diagnoses and writes them to RUN/ppo/health.jsonl."""

    def __init__(self, section: PpoSection, run: RunFolder) -> None:
        self.section, self.run = section, run
        self.monitor = HealthMonitor(section.health)
        self.path = run.stage("ppo") / "health.jsonl"

    def begin(self, state: PpoState) -> None:
        """Restores the monitor's state: at the start, on resuming and after a rollback."""
        self.monitor = HealthMonitor(self.section.health)
        if state.health:
            self.monitor.restore(state.health)
        if rank() == 0:
            start_diagnoses(self.path, state.step)

    def check(self, state: PpoState, metrics: dict[str, float], rollout: Rollout) -> Decision:
        """What to do after a step, the same on every rank.

        The rollout batch is written to a file where a metric is not finite.
        """
        diagnoses = self.monitor.observe(state.step, metrics)
        decision = decide(self.section.health, diagnoses, state.rollbacks)
        decision = from_rank_zero(decision)
        if rank() == 0 and diagnoses:
            if any(diagnosis.name == "not_finite" for diagnosis in diagnoses):
                dump_batch(self.run.stage("ppo"), state.step, vars(rollout))
            write_diagnoses(self.path, diagnoses, decision)
            for diagnosis in diagnoses:
                print(diagnosis, file=sys.stderr, flush=True)
        return decision

    def stopped(self, state: PpoState) -> ValueError:
        """The error that ends the stage, with what the user can do."""
        found = step_folders(self.run.checkpoints("ppo"))
        newest = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint"
        return ValueError(
            f"stopped after step {state.step} by the health monitor (see above and {self.path}); "
            f"{newest}. Change the config keys named there, or set ppo.health.action: warn"
        )
