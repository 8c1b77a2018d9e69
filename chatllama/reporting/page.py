"""RUN/report.html: one file that shows what a run did, without network and without scripts.

Reads only what the stages and the evaluation wrote into the run folder; what is missing is named
and left out, so that the page can be written at any time. The HTML is `report.html.jinja`.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from chatllama import __version__
from chatllama.config.loader import load_config
from chatllama.reporting.plots import PANELS, PRETRAINING, Panel, draw
from chatllama.reporting.reward_section import diagnosis_section
from chatllama.reporting.summary import (
    REWARD_NUMBERS,
    ROWS,
    findings,
    number,
    read_summary,
    result_table,
)
from chatllama.runs.folder import STAGES, RunFolder, Stage
from chatllama.runtime.command_line import duration
from chatllama.runtime.files import replace_text
from chatllama.runtime.json_files import held_to_be_whole, read_json
from chatllama.runtime.jsonl import read_lines

STAGE_TITLES: dict[Stage, str] = {"ppo": "PPO", "reward": "Reward model", "sft": "SFT"}
WALL_ROWS = {
    "backbone": "backbone",
    "sft": "SFT",
    "reward": "reward model",
    "ppo": "PPO",
    "evaluation": "evaluation",
}
SAMPLES_SHOWN, TRAINING_SAMPLES_SHOWN = 16, 20
UNEVALUATED = "No evaluation: it comes at the end of PPO, which this run leaves out."
DECISIONS = {"rollback": "Rolled back to a checkpoint.", "stop": "The stage was stopped."}


def write_report(run: RunFolder) -> Path:
    """Writes the page of a run, finished or not; gives its path.

    Raises:
        ValueError: `run` is no run folder, or a file in it is damaged.
    """
    run.check_readable()
    if not run.config.is_file() and not any(run.metrics(stage).is_file() for stage in STAGES):
        raise ValueError(f"{run.root} is not a run folder: it holds no config.yaml and no metrics")
    try:
        page = environment().get_template("report.html.jinja").render(_content(run))
    except (ArithmeticError, LookupError, TypeError, UndefinedError) as error:
        raise ValueError(f"{run.root}: a file to be shown is damaged: {error!r}") from error
    replace_text(run.report, page)
    return run.report


def environment() -> Environment:
    """Where pages are made; all values are escaped."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"place": _place, "duration": duration}
    return made


def _content(run: RunFolder) -> dict[str, Any]:
    """What the template shows."""
    summary, stages = read_summary(run), _stages(run)
    heads, rows = result_table(summary)
    reward = {name: number(summary, f"reward.{name}") for name in REWARD_NUMBERS}
    wall = {label: number(summary, f"wall_seconds.{key}") for key, label in WALL_ROWS.items()}
    ppo_lines = read_lines(run.metrics("ppo"))
    pretraining = RunFolder(run.root / "pretraining").metrics("sft")
    return {
        "name": run.root.resolve().name,
        "titles": STAGE_TITLES,
        "findings": findings(summary),
        # One column per model: four columns fit a phone.
        "columns": list(zip(heads, *rows, strict=True)),
        "reward": reward,
        "diagnosis": diagnosis_section(run),
        "health": _health(run),
        "decisions": DECISIONS,
        "ppo_steps": ppo_lines[-1]["step"] if ppo_lines else 0,
        "samples": _samples(run),
        "training_samples": _training_samples(run),
        "stage_curves": {
            stage: _curves(run.metrics(stage), PANELS[stage], reward["bayes_accuracy"])
            for stage in STAGE_TITLES
            if stage in stages
        },
        "unevaluated": "" if "ppo" in stages else UNEVALUATED,
        "pretraining": pretraining.is_file() and _curves(pretraining, (PRETRAINING,), None),
        "wall_seconds": {label: value for label, value in wall.items() if value is not None},
        "total_seconds": number(summary, "wall_seconds.total"),
        "results": {
            stage: json.dumps(run.read_result(stage), indent=2, ensure_ascii=False)
            for stage in STAGES
            if run.result(stage).is_file()
        },
        "config": run.config.read_text(encoding="utf-8") if run.config.is_file() else None,
        "version": __version__,
        "now": datetime.now(),
    }


def _stages(run: RunFolder) -> list[Stage]:
    """The stages that the page shows: those that the config has or that have begun; else all."""
    begun = [stage for stage in STAGES if run.stage(stage).is_dir()]
    try:
        known = load_config(run.config).stages
    except (OSError, ValueError):  # of another version; what has begun is shown all the same
        known = STAGES
    return [stage for stage in STAGES if stage in known or stage in begun] or list(STAGES)


def _place(accuracy: float) -> str:
    """Position of an accuracy on the scale from 0.5 to 1."""
    return f"{min(max(accuracy - 0.5, 0.0), 0.5) * 200:.2f}%"


def _health(run: RunFolder) -> dict[str, list[dict[str, Any]]] | None:
    """The diagnoses of `trainers/ppo/health/monitor.py` by name; None: no PPO run was watched."""
    path = run.stage("ppo") / "health.jsonl"
    if not path.is_file():
        return None
    by_name: dict[str, list[dict[str, Any]]] = {}
    with held_to_be_whole(path):
        for line in read_lines(path):
            by_name.setdefault(line["name"], []).append(line)
    return by_name


def _curves(metrics: Path, panels: Sequence[Panel], limit: float | None) -> dict[str, Any]:
    """The plots of a stage, and the titles of those whose metrics were not logged."""
    lines = read_lines(metrics)
    plots, left_out = [], []
    for panel in panels if lines else ():
        shows_accuracy = "reward/accuracy" in panel.curves.values()
        with held_to_be_whole(metrics):
            svg = draw(panel, lines, limit if shows_accuracy else None)
        if svg is None:
            left_out.append(panel.title.lower())
        else:
            plots.append((panel.title, panel.explanation, svg))
    file = f"{metrics.parent.name}/{metrics.name}"
    return {"file": file, "has_lines": bool(lines), "plots": plots, "left_out": left_out}


def _samples(run: RunFolder) -> list[dict[str, Any]] | None:
    """Held-out prompts, each with the answers of the roles; None before the evaluation."""
    if not run.evaluation.is_file():
        return None
    found = []
    content = read_json(run.evaluation)
    with held_to_be_whole(run.evaluation):
        for sample in content["samples"][:SAMPLES_SHOWN]:
            kind = "gold" if sample.get("gold") else "RM score"
            scores = sample.get("gold") or sample.get("score") or {}
            answers = [
                (label, str(sample[role]), scores.get(role))
                for role, label in ROWS
                if sample.get(role) is not None
            ]
            found.append({"prompt": sample["prompt"], "kind": kind, "answers": answers})
    return found


def _training_samples(run: RunFolder) -> list[dict[str, Any]]:
    """Answers sampled evenly over the run, so that the change can be followed."""
    samples = read_lines(run.samples("ppo"))
    stride = max(1, -(-len(samples) // TRAINING_SAMPLES_SHOWN))
    return samples[::-stride][::-1]
