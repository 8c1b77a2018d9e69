"""The health monitor: checks every step of a PPO run and names what is wrong with it.

It neither trains nor stops anything: the training loop calls `decide`. The rules are in `rules.py`,
the thresholds in `chatllama/config/ppo.py`, the table in docs/health.md.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from chatllama.config.ppo import HealthSection
from chatllama.runtime.jsonl import append_lines, keep_lines
from trainers.ppo.health.history import History, TooFewSteps
from trainers.ppo.health.rules import RULES, Rule

Severity = Literal["note", "warning", "fatal"]
Decision = Literal["go on", "stop", "rollback"]


@dataclass(frozen=True)
class Diagnosis:
    """One thing that is wrong at a step."""

    name: str
    step: int
    figure: float
    """The measured value."""
    threshold: float
    """The limit that it is beyond."""
    message: str
    """One or two sentences with the figures in words."""
    causes: tuple[str, ...]
    """Likeliest first."""
    knob: str
    """Config keys to change, and how."""
    severity: Severity
    """Fatal: training cannot go on, whatever `action` says. note: no `action` follows."""

    def __str__(self) -> str:
        """A block for the terminal."""
        return (
            f"{self.name} at step {self.step}: {self.figure:.4g}, threshold {self.threshold:.4g}\n"
            f"  {self.message}\n"
            f"  Likely causes: {'; '.join(self.causes)}.\n"
            f"  Config keys to change: {self.knob}."
        )


class HealthMonitor:
    """Diagnoses of a run from the metrics of its steps; every rank computes the same ones.

    Args:
        dtype: of the backbone.
    """

    def __init__(
        self, section: HealthSection, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        self.section = section
        rules = (rule for rule in RULES if rule.name not in section.ignore)
        self._rules = [rule for rule in rules if rule.dtype in (None, dtype)]
        self._tracked = {name for rule in self._rules for name in rule.needs}
        self._history = History()
        self._reported: dict[str, int] = {}

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Diagnosis]:
        """Diagnoses of this step, worst first; one that holds on is repeated only seldom.

        A rule does not apply where the step lacks its metrics, or has only NaN or infinity for one.

        Args:
            step: PPO steps done, from 1; each once and in order.
            metrics: of the step, `ppo/...`, with `ppo/eval_...` where there was an evaluation.
        """
        assert step > self._history.steps, (step, self._history.steps)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._history.steps = step
        for name in sorted(self._tracked & finite.keys()):
            self._history.add(name, finite[name], self.section)
        found: dict[str, Diagnosis] = {}
        for rule in self._rules:
            if rule.name not in found and all(name in finite for name in rule.needs):
                diagnosis = self._diagnosis(rule, step, metrics)
                if diagnosis is not None:
                    found[rule.name] = diagnosis
        self._keep_best_evaluation()
        return list(found.values())

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""
        return {"history": asdict(self._history), "reported": dict(self._reported)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        state = copy.deepcopy(dict(state))
        self._history, self._reported = History(**state["history"]), state["reported"]

    def _diagnosis(self, rule: Rule, step: int, metrics: Mapping[str, float]) -> Diagnosis | None:
        try:
            finding = rule.check(self._history, self.section, metrics)
        except TooFewSteps:
            return None
        if finding is None:
            return None
        reported = self._reported.get(rule.name)
        if reported is not None and step - reported < self.section.repeat_after and not rule.fatal:
            return None
        self._reported[rule.name] = step
        severity = "fatal" if rule.fatal else "note" if rule.only_reported else "warning"
        numbers = (finding.figure, finding.threshold, finding.meaning)
        causes = tuple(rule.causes.split("; "))
        return Diagnosis(rule.name, step, *numbers, causes, rule.knob, severity)

    def _keep_best_evaluation(self) -> None:
        """Keeps the evaluation with the highest gold score, to compare later ones with."""
        names = ("ppo/eval_gold_mean", "ppo/eval_gold_se", "ppo/eval_score_mean")
        last = {n: self._history.last[n][-1] for n in names if n in self._history.last}
        best = self._history.best
        if len(last) == len(names) and (not best or last[names[0]] > best[names[0]]):
            self._history.best = last


def decide(section: HealthSection, diagnoses: Sequence[Diagnosis], rollbacks_done: int) -> Decision:
    """What the training loop does about the diagnoses of a step.

    It never goes on after a fatal one. A rollback needs diagnoses that a lower learning rate may
    avoid, and comes `max_rollbacks` times; then the stage stops.
    """
    diagnoses = [diagnosis for diagnosis in diagnoses if diagnosis.severity != "note"]
    fatal = any(diagnosis.severity == "fatal" for diagnosis in diagnoses)
    if not diagnoses or (section.action == "warn" and not fatal):
        return "go on"
    hopeless = {rule.name for rule in RULES if not rule.rollback_helps}
    helps = all(diagnosis.name not in hopeless for diagnosis in diagnoses)
    if section.action == "rollback" and helps and rollbacks_done < section.max_rollbacks:
        return "rollback"
    return "stop"


def start_diagnoses(path: Path, resumed_step: int | None) -> None:
    """Begins RUN/ppo/health.jsonl, or cuts it for a run that resumes or goes back.

    Steps after `resumed_step` (None for a new run) are done and checked again, so their lines go;
    what led to a rollback stays. That the file exists says that the run was checked.
    """
    keep_lines(
        path,
        lambda line: (
            resumed_step is not None
            and (line["step"] <= resumed_step or line["decision"] != "go on")
        ),
    )


def write_diagnoses(path: Path, diagnoses: Sequence[Diagnosis], decision: Decision) -> None:
    """Appends one JSON object a line to RUN/ppo/health.jsonl; figures not finite become null."""
    lines = [{**asdict(diagnosis), "decision": decision} for diagnosis in diagnoses]
    for line in lines:
        if not math.isfinite(line["figure"]):
            line["figure"] = None
    append_lines(path, lines, finite=True)
