"""RUN/report.html: one file that shows what a run did, without network and without scripts.

Reads only what the stages and the evaluation wrote into the run folder. Whatever is missing is
named and left out, so that the page can be made at any time.
"""

import json
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from chatllama import __version__
from chatllama.reporting.plots import (
    PANELS,
    PRETRAINING,
    Panel,
    draw,
)
from chatllama.reporting.reward_section import doctor_body
from chatllama.reporting.summary import (
    findings,
    number,
    read_summary,
    result_table,
)
from chatllama.runs.folder import STAGES, RunFolder, Stage
from chatllama.runtime.command_line import duration
from chatllama.runtime.jsonl import read_lines

STAGE_TITLES: dict[Stage, str] = {"ppo": "PPO", "reward": "Reward model", "sft": "SFT"}
WALL_ROWS = (
    ("backbone", "backbone"),
    ("sft", "SFT"),
    ("reward", "reward model"),
    ("ppo", "PPO"),
    ("evaluation", "evaluation"),
)
SAMPLES_OPEN, SAMPLES_SHOWN = 4, 16
TRAINING_SAMPLES_SHOWN = 20
DECISIONS = {"rollback": "Rolled back to a checkpoint.", "stop": "The stage was stopped."}


def write_report(run: RunFolder) -> Path:
    """Writes the page of a run, finished or not; gives its path.

    Raises:
        ValueError: `run` is no run folder, or a file in it is damaged.
    """
    if not run.root.is_dir():
        raise ValueError(f"{run.root} is not a folder; give the run_dir of a run")
    if not run.config.is_file() and not any(run.metrics(stage).is_file() for stage in STAGES):
        raise ValueError(f"{run.root} is not a run folder: it holds no config.yaml and no metrics")
    summary = read_summary(run)
    parts = (
        _header(run, summary),
        "<main>",
        _results(summary),
        _reward_model(summary),
        _reward_check(run),
        _health(run),
        _samples(run),
        _training_samples(run),
        *(_stage_curves(run, stage, summary) for stage in STAGE_TITLES),
        _pretraining_curves(run),
        _wall_time(summary),
        _closing_numbers(run),
        _config(run),
        "</main>",
        f"<footer><p>Made by chatllama {__version__} on {datetime.now():%Y-%m-%d %H:%M}.</p>"
        "</footer>",
    )
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.root.resolve().name)} \N{MIDDLE DOT} chatllama</title>\n"
        f"<style>\n{css}</style>\n</head>\n<body>\n{chr(10).join(parts)}\n</body>\n</html>\n"
    )
    beside = run.report.with_name(run.report.name + ".tmp")
    beside.write_text(page, encoding="utf-8")
    beside.replace(run.report)
    return run.report


def _header(run: RunFolder, summary: dict[str, Any]) -> str:
    finished = [STAGE_TITLES[stage] for stage in STAGES if run.result(stage).is_file()]
    state = f"Finished stages: {', '.join(finished)}." if finished else "No stage has finished yet."
    items = "".join(f'<li class="{x.kind}">{escape(x.text)}</li>' for x in findings(summary))
    found = f'<ul class="findings">{items}</ul>' if items else ""
    name = escape(run.root.resolve().name)
    return f'<header><h1>{name}</h1><p class="muted">{state}</p>{found}</header>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>"


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def _table(heads: list[str], rows: list[list[str]], caption: str = "") -> str:
    """A table whose first column holds row heads; cells are escaped."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    foot = f'<p class="muted">{escape(caption)}</p>' if caption else ""
    return (
        '<div class="card"><div class="scroll" tabindex="0" role="region" aria-label="table">'
        f'<table class="results"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
        f"</div>{foot}</div>"
    )


def _results(summary: dict[str, Any]) -> str:
    heads, rows = result_table(summary)
    if not rows:
        return _section("Results", _missing("No evaluation yet: summary.json holds no results."))
    notes = []
    if "gold score" in heads:
        notes.append("Gold score: mean over held-out prompts \N{PLUS-MINUS SIGN} standard error.")
    if "win rate vs SFT" in heads:
        judge = "gold score" if "gold score" in heads else "reward model"
        notes.append(f"Win rate: judged by the {judge}, 0.5 is a tie.")
    # One column per model: four columns fit a phone.
    columns = [list(column) for column in zip(heads, *rows, strict=True)]
    return _section("Results", _table(columns[0], columns[1:], " ".join(notes)))


def _reward_model(summary: dict[str, Any]) -> str:
    accuracy = number(summary, "reward.accuracy")
    if accuracy is None:
        return ""
    low, high = number(summary, "reward.accuracy_low"), number(summary, "reward.accuracy_high")
    limit = number(summary, "reward.bayes_accuracy")
    marks = f'<b style="left:{_percent(accuracy)}"></b>'
    words = f"accuracy {accuracy:.3f}"
    if low is not None and high is not None:
        width = _percent(0.5 + high - max(low, 0.5))
        marks = f'<i style="left:{_percent(low)};width:{width}"></i>{marks}'
        words += f", 95 % Wilson interval {low:.3f} to {high:.3f}"
    if limit is not None:
        marks += f'<b class="limit" style="left:{_percent(limit)}"></b>'
        words += f", Bayes limit {limit:.3f}"
    limit_text = (
        f'<p><span class="key">Bayes limit {limit:.3f}</span>: no model can do better, because '
        "the preference labels are noisy.</p>"
        if limit is not None
        else ""
    )
    return _section(
        "Reward model",
        f'<div class="card"><p class="big">{accuracy:.3f}</p>'
        f'<p class="muted">Held-out {escape(words)}.</p>'
        f'<div class="scale" role="img" aria-label="{escape(words)}">{marks}</div>'
        f'<div class="ends"><span>0.5 guessing</span><span>1.0</span></div>{limit_text}</div>',
    )


def _reward_check(run: RunFolder) -> str:
    body = doctor_body(run)
    return _section("Reward model check", body) if body else ""


def _health(run: RunFolder) -> str:
    """The diagnoses of `trainers/ppo/health/monitor.py`; nothing where no PPO run was watched."""
    path = run.stage("ppo") / "health.jsonl"
    lines = read_lines(run.metrics("ppo"))
    if not path.is_file() or not lines:
        return ""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(path):
        by_name.setdefault(line["name"], []).append(line)
    if not by_name:
        count = lines[-1]["step"]
        none = f'<p class="muted">No diagnosis in {count} step{"" if count == 1 else "s"}.</p>'
        return _section("Health", none)
    items = "".join(_diagnosis(name, found) for name, found in by_name.items())
    return _section("Health", f'<ul class="findings">{items}</ul>')


def _diagnosis(name: str, found: list[dict[str, Any]]) -> str:
    """One diagnosis with all the steps at which it was made, in the words of the last."""
    last = found[-1]
    steps = ", ".join(str(each["step"]) for each in found)
    figure = "not finite" if last["figure"] is None else f"{last['figure']:.4g}"
    limit = "" if last["figure"] is None else f", threshold {last['threshold']:.4g}"
    done = " ".join(dict.fromkeys(DECISIONS.get(each["decision"], "") for each in found)).strip()
    kind = "bad" if any(each["severity"] == "fatal" for each in found) else "neutral"
    return (
        f'<li class="{kind}"><strong>{escape(name)}</strong> at step {steps}: '
        f"{figure}{limit}. {escape(last['message'])} {done}<br>"
        f'<span class="muted">Likely causes: {escape("; ".join(last["causes"]))}. '
        f"Turn: {escape(last['knob'])}.</span></li>"
    )


def _percent(accuracy: float) -> str:
    """Place of an accuracy on the scale from 0.5 to 1."""
    return f"{min(max(accuracy - 0.5, 0.0), 0.5) * 200:.2f}%"


def _stage_curves(run: RunFolder, stage: Stage, summary: dict[str, Any]) -> str:
    panels = [panel for panel in PANELS if panel.stage == stage]
    limit = number(summary, "reward.bayes_accuracy")
    return _curves(f"{STAGE_TITLES[stage]} curves", run.metrics(stage), panels, limit)


def _pretraining_curves(run: RunFolder) -> str:
    """The loss of a backbone made from scratch, whose metrics lie in a run folder of its own."""
    metrics = RunFolder(run.root / "pretraining").metrics("sft")
    return _curves("Backbone", metrics, [PRETRAINING], None) if metrics.is_file() else ""


def _curves(title: str, metrics: Path, panels: list[Panel], limit: float | None) -> str:
    lines = read_lines(metrics)
    if not lines:
        where = f"{metrics.parent.name}/{metrics.name}"
        return _section(title, _missing(f"{where} has no lines yet."))
    figures, left_out = [], []
    for panel in panels:
        svg = draw(panel, lines, limit if _shows_accuracy(panel) else None)
        if svg is None:
            left_out.append(panel.title.lower())
            continue
        figures.append(
            f'<figure class="card"><h3>{escape(panel.title)}</h3>'
            f"<figcaption>{escape(panel.explanation)}</figcaption>{svg}</figure>"
        )
    note = _missing(f"Not logged: {', '.join(left_out)}.") if left_out else ""
    return _section(title, f'<div class="plots">{"".join(figures)}</div>{note}')


def _shows_accuracy(panel: Panel) -> bool:
    return "reward/accuracy" in panel.curves.values()


def _samples(run: RunFolder) -> str:
    title = "Answers before and after"
    if not run.evaluation.is_file():
        return _section(title, _missing("No evaluation yet: evaluation.json is missing."))
    samples = json.loads(run.evaluation.read_text(encoding="utf-8"))["samples"]
    if not samples:
        return _section(title, _missing("evaluation.json holds no samples."))
    blocks = [_sample(sample) for sample in samples[:SAMPLES_SHOWN]]
    open_ones, folded = blocks[:SAMPLES_OPEN], blocks[SAMPLES_OPEN:]
    more = f"<details><summary>{len(folded)} more</summary>{''.join(folded)}</details>"
    return _section(title, "".join(open_ones) + (more if folded else ""))


def _sample(sample: dict[str, Any]) -> str:
    """One prompt with the answers of the roles side by side."""
    kind = "gold" if sample.get("gold") else "RM score"
    scores = sample.get("gold") or sample.get("score") or {}
    answers = ""
    for role, label in (("base", "base"), ("sft", "SFT"), ("ppo", "PPO")):
        if sample.get(role) is None:
            continue
        value = scores.get(role)
        score = f"<span>{kind} {value:.2f}</span>" if value is not None else ""
        text = escape(sample[role]) if sample[role].strip() else "<em>(empty)</em>"
        answers += f'<div class="answer"><h4><span>{label}</span>{score}</h4><p>{text}</p></div>'
    return (
        f'<article class="card sample"><p><strong>Prompt</strong> {escape(sample["prompt"])}</p>'
        f'<div class="answers">{answers}</div></article>'
    )


def _training_samples(run: RunFolder) -> str:
    samples = read_lines(run.samples("ppo"))
    if not samples:
        return ""
    # Evenly over the run, so that the change can be followed.
    stride = -(-len(samples) // TRAINING_SAMPLES_SHOWN)
    rows = ""
    for sample in samples[::-stride][::-1]:
        score = "\N{EN DASH}" if sample["score"] is None else f"{sample['score']:.2f}"
        cells = (str(sample["step"]), sample["prompt"], sample["response"], score)
        rows += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("step", "prompt", "answer", "RM score"))
    return (
        f'<details class="card"><summary>Answers sampled during PPO</summary>'
        f'<div class="scroll"><table class="log"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _wall_time(summary: dict[str, Any]) -> str:
    seconds = {label: number(summary, f"wall_seconds.{key}") for key, label in WALL_ROWS}
    known = {label: value for label, value in seconds.items() if value is not None}
    if not known:
        return ""
    longest = max(known.values()) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{label}</th><td>{duration(value)}</td>'
        f'<td><span class="bar" style="width:{100 * value / longest:.1f}%"></span></td></tr>'
        for label, value in known.items()
    )
    total = number(summary, "wall_seconds.total")
    if total is not None:
        rows += f'<tr><th scope="row">total</th><td>{duration(total)}</td><td></td></tr>'
    return _section(
        "Wall time", f'<div class="card"><table class="bars"><tbody>{rows}</tbody></table></div>'
    )


def _closing_numbers(run: RunFolder) -> str:
    """Every stage's result.json, folded away."""
    blocks = ""
    for stage in STAGES:
        if run.result(stage).is_file():
            text = json.dumps(run.read_result(stage), indent=2, ensure_ascii=False)
            blocks += f"<h3>{STAGE_TITLES[stage]}</h3><pre>{escape(text)}</pre>"
    if not blocks:
        return ""
    return (
        f'<details class="card"><summary>Closing numbers of the stages</summary>{blocks}</details>'
    )


def _config(run: RunFolder) -> str:
    if not run.config.is_file():
        return _missing("config.yaml is missing.")
    text = escape(run.config.read_text(encoding="utf-8"))
    return (
        f'<details class="card"><summary>Configuration</summary><pre tabindex="0">{text}</pre>'
        "</details>"
    )
