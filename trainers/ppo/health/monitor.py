"""The health monitor: watches a PPO run step by step and says by name what is wrong with it.

It neither trains nor stops anything: the loop asks `decide` what to do. The rules are in
`health_rules.py`, the thresholds in `chatllama/config/ppo.py`, the table in docs/health.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from chatllama.config.ppo import HealthSection
from chatllama.runtime.jsonl import append_lines, keep_lines
from trainers.ppo.health.checks import History
from trainers.ppo.health.rules import RULES, Rule

Severity = Literal["warning", "fatal"]
Decision = Literal["go on", "stop", "rollback"]


@dataclass(frozen=True)
class Diagnosis:
    """One thing that is wrong at a step."""

    name: str
    step: int
    figure: float
    """What was measured."""
    threshold: float
    """What it should not have passed."""
    message: str
    """One or two sentences with the figures in words."""
    causes: tuple[str, ...]
    """Likeliest first."""
    knob: str
    """The config keys to turn, and which way."""
    severity: Severity
    """Fatal: nothing good can follow, whatever `action` says."""

    def __str__(self) -> str:
        """A block for the terminal."""
        return (
            f"{self.name} at step {self.step}: {self.figure:.4g}, threshold {self.threshold:.4g}\n"
            f"  {self.message}\n"
            f"  Likely causes: {'; '.join(self.causes)}.\n"
            f"  Turn: {self.knob}."
        )


class HealthMonitor:
    """Diagnoses of a run, from the metrics of one step after the other.

    Metrics are the same on every rank, so every rank comes to the same diagnoses by itself.

    Args:
        section: thresholds, and what to ignore.
    """

    def __init__(self, section: HealthSection) -> None:
        self.section = section
        self._rules = [rule for rule in RULES if rule.name not in section.ignore]
        self._tracked = {name for rule in self._rules for name in rule.needs}
        self._history = History()
        self._reported: dict[str, int] = {}

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Diagnosis]:
        """What is wrong after this step, worst first; what holds on is repeated only seldom.

        A rule whose metrics the step lacks, or has only as NaN or infinity, is not judged.

        Args:
            step: rollout batches done, from 1; each once and in order.
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
                diagnosis = self._judge(rule, step, metrics)
                if diagnosis is not None:
                    found[rule.name] = diagnosis
        self._keep_best_evaluation()
        return list(found.values())

    def not_judged(self, metrics: Mapping[str, float]) -> dict[str, list[str]]:
        """Diagnoses that cannot be made from such metrics -> the metrics that are missing.

        Evaluations come every `ppo.eval_every` steps only: give the names of all metrics that the
        run will ever log.
        """
        missing: dict[str, list[str]] = {}
        possible = {rule.name for rule in self._rules if all(n in metrics for n in rule.needs)}
        for rule in self._rules:
            if rule.name not in possible:
                absent = [name for name in rule.needs if name not in metrics]
                missing.setdefault(rule.name, []).extend(absent)
        return missing

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as JSON values."""
        return {"history": asdict(self._history), "reported": dict(self._reported)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned, exactly."""
        kept = state["history"]
        self._history = History(
            first={name: list(values) for name, values in kept["first"].items()},
            last={name: list(values) for name, values in kept["last"].items()},
            best=dict(kept["best"]),
            steps=kept["steps"],
        )
        self._reported = dict(state["reported"])

    def _judge(self, rule: Rule, step: int, metrics: Mapping[str, float]) -> Diagnosis | None:
        finding = rule.judge(self._history, self.section, metrics)
        if finding is None:
            return None
        reported = self._reported.get(rule.name)
        if reported is not None and step - reported < self.section.repeat_after and not rule.fatal:
            return None
        self._reported[rule.name] = step
        return Diagnosis(
            rule.name,
            step,
            finding.figure,
            finding.threshold,
            finding.meaning,
            rule.causes,
            rule.knob,
            "fatal" if rule.fatal else "warning",
        )

    def _keep_best_evaluation(self) -> None:
        """The evaluation with the highest gold score so far, for later ones to be held against."""
        names = ("ppo/eval_gold_mean", "ppo/eval_gold_se", "ppo/eval_score_mean")
        last = {n: self._history.last[n][-1] for n in names if n in self._history.last}
        best = self._history.best
        if len(last) == len(names) and (not best or last[names[0]] > best[names[0]]):
            self._history.best = last


def decide(section: HealthSection, diagnoses: Sequence[Diagnosis], rollbacks_done: int) -> Decision:
    """What the loop does about the diagnoses of a step.

    A fatal one never goes on. A rollback comes only where a lower learning rate may help, and
    `max_rollbacks` times; then the stage stops.

    Args:
        section: `action` and `max_rollbacks`.
        diagnoses: of `HealthMonitor.observe`.
        rollbacks_done: of this run so far.
    """
    fatal = any(diagnosis.severity == "fatal" for diagnosis in diagnoses)
    if not diagnoses or (section.action == "warn" and not fatal):
        return "go on"
    hopeless = {rule.name for rule in RULES if not rule.rollback_helps}
    helps = all(diagnosis.name not in hopeless for diagnosis in diagnoses)
    if section.action == "rollback" and helps and rollbacks_done < section.max_rollbacks:
        return "rollback"
    return "stop"


def start_diagnoses(path: Path, resumed_step: int) -> None:
    """Begins RUN/ppo/health.jsonl, or cuts it for a run that resumes.

    Steps after `resumed_step` are done again and judged again, so their lines go; what led to a
    rollback stays.

    Args:
        path: RUN/ppo/health.jsonl. That it exists says that the run was watched.
        resumed_step: the last step whose effect the restored state holds; 0 for a new run.
    """
    keep_lines(
        path,
        lambda line: (
            bool(resumed_step) and (line["step"] <= resumed_step or line["decision"] != "go on")
        ),
    )


def write_diagnoses(path: Path, diagnoses: Sequence[Diagnosis], decision: Decision) -> None:
    """Appends one JSON object a line to RUN/ppo/health.jsonl; figures not finite become null.

    Args:
        path: begun by `start_diagnoses`.
        diagnoses: of one step.
        decision: what was done about them.
    """
    lines = [{**asdict(diagnosis), "decision": decision} for diagnosis in diagnoses]
    for line in lines:
        if not math.isfinite(line["figure"]):
            line["figure"] = None
    append_lines(path, lines, finite=True)


def dump_batch(folder: Path, step: int, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Writes a step's tensors to folder/bad_batch-step-N.pt and says which rows are not finite.

    The file holds a dict for `torch.load`: the tensors by name, on the CPU, and `not_finite_rows`,
    name -> indices of the rows with NaN or infinity.

    Args:
        folder: RUN/ppo.
        step: goes into the name.
        tensors: of the rollout batch, rows first.
    """
    content: dict[str, Any] = {name: t.detach().cpu() for name, t in tensors.items()}
    content["not_finite_rows"] = {
        name: (~t.isfinite()).reshape(len(t), -1).any(1).nonzero().flatten().tolist()
        for name, t in content.items()
        if t.is_floating_point() and t.dim() > 0
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bad_batch-step-{step}.pt"
    torch.save(content, path)
    return path
