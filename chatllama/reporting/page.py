"""RUN/report.html: one file that shows what a run did, without network and without scripts.

Reads only what the stages and the evaluation wrote into the run folder; what is missing is named
and left out, so that the page can be written at any time. The HTML is `report.html.jinja`.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup, escape

from chatllama import __version__
from chatllama.config.schema import Config
from chatllama.reporting.answers import Answers, read_answers
from chatllama.reporting.origin import origin
from chatllama.reporting.overoptimisation import overoptimisation_section
from chatllama.reporting.plots import (
    FIRST_ROW,
    PANELS,
    PRETRAINING,
    Panel,
    draw,
    draw_bars,
    ppo_panels,
)
from chatllama.reporting.reward_section import diagnosis_section, reward_terms
from chatllama.reporting.summary import (
    REWARD_NUMBERS,
    config_of,
    judged_means,
    labels_of,
    number,
    read_summary,
    result_table,
    start_of,
    word_of,
)
from chatllama.reporting.verdict import Health, no_gold, verdict
from chatllama.runs.folder import STAGES, RunFolder, Stage
from chatllama.runtime.command_line import duration
from chatllama.runtime.files import replace_text
from chatllama.runtime.json_files import held_to_be_whole, read_json
from chatllama.runtime.jsonl import read_lines

STAGE_TITLES: dict[Stage, str] = {"ppo": "PPO", "reward": "Reward model", "sft": "SFT"}
TRAINING_SAMPLES_SHOWN = 20
UNEVALUATED = "No evaluation: it comes at the end of PPO, which this run leaves out."
TERMS = {
    "Wilson interval": "The range that holds the true share with 95 % certainty, given how many "
    "were counted; it is right near 0 and 1 too (Wilson 1927).",
    "standard errors?": "How far a mean of so many samples typically is from the true mean: "
    "deviation / sqrt(count). Beyond 2 of them, chance is an unlikely explanation.",
    "nats?": "Unit of information with natural logarithms: 1 nat is a factor of 2.72 in "
    "probability, 0.69 nats are one bit.",
    "Bayes limit": "Accuracy of a judge that knows the true reward: labels are noisy, so it is "
    "below 1.",
    "KL": "How differently two models answer: mean log-ratio of the probabilities of the answers.",
    "[Ww]in rate": "Share of prompts on which the answer is judged better; a tie counts one half.",
}
"""Pattern of a term -> what its tooltip says."""
EVALUATED = {
    "score_mean": "ppo/eval_score_mean",
    "kl": "ppo/eval_kl_sequence",
    "response_length": "ppo/eval_response_length",
    "eos_rate": "ppo/eval_eos_rate",
}
"""Number of the evaluation -> metric of the same during PPO."""
SEVERITIES = ("fatal", "warning", "note")
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
    made.filters |= {"place": _place, "duration": duration, "terms": _terms, "code": _code}
    return made


def _content(run: RunFolder) -> dict[str, Any]:
    """What the template shows."""
    summary, cfg, health = read_summary(run), config_of(run), _health(run)
    stages, trainer = _stages(run, cfg), word_of(summary, "trainer")
    reward = {name: number(summary, f"reward.{name}") for name in REWARD_NUMBERS}
    ppo_lines = read_lines(run.metrics("ppo"))
    pretraining = RunFolder(run.root / "pretraining").metrics("sft")
    panels = PANELS | {"ppo": ppo_panels(cfg and cfg.ppo, ppo_lines)[FIRST_ROW:]}
    curves = {
        stage: _curves(run.metrics(stage), panels[stage], reward["bayes_accuracy"])
        for stage in STAGE_TITLES
        if stage in stages
    }
    diagnosis = diagnosis_section(run)
    return {
        "name": run.root.resolve().name,
        "titles": STAGE_TITLES | {"ppo": trainer},
        "trainer": trainer,
        "reward_words": word_of(summary, "reward"),
        "terms": reward_terms(cfg, ppo_lines) if "ppo" in stages else [],
        "verdict": verdict(run, cfg, stages, summary, health),
        "reward": reward,
        "diagnosis": diagnosis,
        "warnings": _warnings(health, diagnosis),
        "watched": health is not None and bool(ppo_lines),
        "decisions": DECISIONS,
        "ppo_steps": ppo_lines[-1]["step"] if ppo_lines else 0,
        "answers": _answers(run, summary),
        "training_samples": _training_samples(run),
        "first_row": _first_row(run, summary, ppo_lines) if ppo_lines else None,
        "stage_curves": curves,
        "overoptimisation": overoptimisation_section(run),
        "unevaluated": "" if "ppo" in stages else UNEVALUATED,
        "pretraining": pretraining.is_file() and _curves(pretraining, (PRETRAINING,), None),
        "finished": [stage for stage in STAGES if run.result(stage).is_file()],
        "results": {
            stage: json.dumps(run.read_result(stage), indent=2, ensure_ascii=False)
            for stage in STAGES
            if run.result(stage).is_file()
        },
        "config": run.config.read_text(encoding="utf-8") if run.config.is_file() else None,
        "version": __version__,
        "now": datetime.now(),
        **_results(summary),
        **origin(run, summary),
    }


def _results(summary: dict[str, Any]) -> dict[str, Any]:
    """The table of the roles, and the same as bars."""
    heads, rows = result_table(summary)
    names = ("ppo.win_rate", "ppo.win_rate_low", "ppo.win_rate_high")
    rate = [number(summary, name) for name in names]
    bars = [(title, draw_bars(title, means)) for title, means in judged_means(summary).items()]
    return {
        # One column per model: four columns fit a phone.
        "columns": list(zip(heads, *rows, strict=True)),
        "bars": bars,
        "win_rate": None if None in rate else rate,
        "start": {"sft": "SFT", "base": "base"}[start_of(summary)],
        "has_gold": any(title == "Gold score" for title, _ in bars),
        "no_gold": no_gold(summary),
    }


def _warnings(health: Health | None, diagnosis: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Diagnoses of PPO and warnings about the reward model, the gravest first."""
    found = [
        {
            "severity": min((d["severity"] for d in each), key=SEVERITIES.index),
            "name": name,
            "steps": [d["step"] for d in each],
            "decisions": {d["decision"] for d in each},
            **{key: each[-1][key] for key in ("message", "causes", "knob", "figure", "threshold")},
        }
        for name, each in (health or {}).items()
    ]
    for each in diagnosis["warnings"] if diagnosis else ():
        severity = "fatal" if each["name"] == "no_better_than_chance" else "warning"
        found.append({**each, "severity": severity, "steps": []})
    return sorted(found, key=lambda each: SEVERITIES.index(each["severity"]))


def _stages(run: RunFolder, cfg: Config | None) -> list[Stage]:
    """The stages that the page shows: those that the config has or that have begun; else all."""
    begun = [stage for stage in STAGES if run.stage(stage).is_dir()]
    known = STAGES if cfg is None else cfg.stages
    return [stage for stage in STAGES if stage in known or stage in begun] or list(STAGES)


def _terms(text: str) -> Markup:
    """The text with a tooltip at the first place of each term."""
    out = str(escape(text))
    for term, words in TERMS.items():
        tip = rf'<abbr tabindex="0" title="{escape(words)}">\g<0></abbr>'
        out = re.sub(rf"\b{term}\b(?![^<]*>)", tip, out, count=1)
    return Markup(out)


def _place(share: float, lowest: float) -> str:
    """Position of a share on the scale from `lowest` to 1."""
    return f"{(min(max(share, lowest), 1.0) - lowest) / (1.0 - lowest):.2%}"


def _code(text: str) -> Markup:
    """The text with what is between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _health(run: RunFolder) -> Health | None:
    """The diagnoses of `trainers/ppo/health/monitor.py` by name; None: no PPO run was watched."""
    path = run.stage("ppo") / "health.jsonl"
    if not path.is_file():
        return None
    by_name: dict[str, list[dict[str, Any]]] = {}
    with held_to_be_whole(path):
        for line in read_lines(path):
            by_name.setdefault(line["name"], []).append(line)
    return by_name


def _first_row(
    run: RunFolder, summary: dict[str, Any], lines: list[dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """Plots of PPO's score, KL, length and end, with the evaluation before and after as points."""
    if run.result("ppo").is_file() and lines:
        ends = [(0, start_of(summary)), (lines[-1]["step"], "ppo")]
        points = [
            {"step": step, **{m: number(summary, f"{role}.{n}") for n, m in EVALUATED.items()}}
            for step, role in ends
        ]
        lines = [points[0], *lines, points[1]]
    with held_to_be_whole(run.metrics("ppo")):
        drawn = [(panel, draw(panel, lines, small=True)) for panel in PANELS["ppo"][:FIRST_ROW]]
    return [(panel.title, panel.explanation, svg) for panel, svg in drawn if svg is not None]


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


def _answers(run: RunFolder, summary: dict[str, Any]) -> Answers | None:
    """Held-out prompts, each with the answers of the roles; None before the evaluation."""
    if not run.evaluation.is_file():
        return None
    content = read_json(run.evaluation)
    with held_to_be_whole(run.evaluation):
        return read_answers(content, start_of(summary), labels_of(summary))


def _training_samples(run: RunFolder) -> list[dict[str, Any]]:
    """Answers sampled evenly over the run, so that the change can be followed."""
    samples = read_lines(run.samples("ppo"))
    stride = max(1, -(-len(samples) // TRAINING_SAMPLES_SHOWN))
    return samples[::-stride][::-1]
