"""The numbers of a finished run: summary.json, the table of base, SFT and PPO, and findings.

Table and findings are read from the summary only; the terminal and the page (`page.py`) show the
same.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typing_extensions import TypedDict

from chatllama.config.loader import load_config
from chatllama.config.schema import Config
from chatllama.reporting.statistics import INTERVAL, interval_text
from chatllama.runs.folder import STAGES, RunFolder
from chatllama.runtime.command_line import duration
from chatllama.runtime.files import write_json
from chatllama.runtime.json_files import read_json

COLUMNS = {
    "gold score": ("{:.2f} \N{PLUS-MINUS SIGN} {:.2f}", "gold_mean", "gold_se"),
    "reward score (raw)": ("{:.2f} \N{PLUS-MINUS SIGN} {:.2f}", "score_mean", "score_se"),
    "win rate vs {start}": (INTERVAL, "win_rate", "win_rate_low", "win_rate_high"),
    "KL to {start} (nats)": ("{:.2f}", "kl"),
    "tokens per answer": ("{:.1f}", "response_length"),
}
"""Head -> form, then names of the numbers in it; `{start}` is what PPO started from."""
REWARD_NUMBERS = ("accuracy", "accuracy_low", "accuracy_high", "bayes_accuracy")
BAYES_SLACK = 0.05


@dataclass(frozen=True)
class Finding:
    """One sentence about a run."""

    kind: Literal["good", "bad", "neutral"]
    text: str


class _Evaluation(TypedDict):
    roles: dict[str, dict[str, Any]]


def write_summary(run: RunFolder) -> None:
    """Writes summary.json."""
    write_json(run.summary, _gathered(run))


def _gathered(run: RunFolder) -> dict[str, Any]:
    """The results of the finished stages and of the evaluation.

    `base`, `sft`, `ppo`: the evaluation's numbers of each role. `reward`: accuracy on held-out
    pairs, its interval and, if known, the Bayes limit. `wall_seconds`: per stage, without the
    backbone that SFT makes; the evaluation comes after PPO's clock has stopped.
    """
    summary: dict[str, Any] = {}
    if run.evaluation.is_file():
        summary.update(read_json(run.evaluation, _Evaluation)["roles"])
    results = {s: run.read_result(s) for s in STAGES if run.result(s).is_file()}
    reward = {name: results.get("reward", {}).get(name) for name in REWARD_NUMBERS}
    summary["reward"] = {name: value for name, value in reward.items() if value is not None}
    seconds: dict[str, float] = {}
    for stage, numbers in results.items():
        if "backbone_seconds" in numbers:
            seconds["backbone"] = numbers["backbone_seconds"]
        seconds[stage] = numbers.get("wall_seconds", 0.0) - numbers.get("backbone_seconds", 0.0)
        if "evaluation_seconds" in numbers:
            seconds["evaluation"] = numbers["evaluation_seconds"]
    summary["wall_seconds"] = {**seconds, "total": sum(seconds.values())}
    return summary


def read_summary(run: RunFolder) -> dict[str, Any]:
    """The numbers of summary.json; of a run that has not finished, those of what has.

    With the `words` of its config: what the third stage is called, and what its reward is.
    """
    numbers = read_json(run.summary) if run.summary.is_file() else _gathered(run)
    cfg = config_of(run)
    return numbers if cfg is None else {**numbers, "words": _words(cfg)}


def config_of(run: RunFolder) -> Config | None:
    """The run's config; None where it is missing or of another version."""
    try:
        return load_config(run.config)
    except (OSError, ValueError):
        return None


def _words(cfg: Config) -> dict[str, str]:
    functions = [source.label for source in cfg.ppo.rewards if source.function is not None]
    names = ", ".join(source.label for source in cfg.ppo.rewards)
    if len(functions) == len(cfg.ppo.rewards):
        reward = f"the reward function{'s' * (len(functions) > 1)} {' and '.join(functions)}"
    else:
        reward = "the reward model" if len(cfg.ppo.rewards) == 1 else f"the reward ({names})"
    advantage = cfg.ppo.advantage
    return {"trainer": "PPO" if advantage == "gae" else advantage.upper(), "reward": reward}


def word_of(summary: dict[str, Any], name: Literal["trainer", "reward"]) -> str:
    """`trainer`: PPO, GRPO or RLOO; `reward`: what the answers are scored by."""
    return summary.get("words", {"trainer": "PPO", "reward": "the reward model"})[name]


def labels_of(summary: dict[str, Any]) -> dict[str, str]:
    """Role -> what it is called."""
    return {"base": "base", "sft": "SFT", "ppo": word_of(summary, "trainer")}


def number(summary: dict[str, Any], name: str) -> float | None:
    """The value at a dotted name; None where it is absent, ValueError where it is no number."""
    value: Any = summary
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    if value is not None and not isinstance(value, int | float):
        raise ValueError(f"summary.json is damaged: {name} must be a number, not {value!r:.60}")
    return None if value is None else float(value)


def start_of(summary: dict[str, Any]) -> Literal["sft", "base"]:
    """The role that PPO started from: the base where there was no SFT."""
    return "base" if "base" in summary and "sft" not in summary else "sft"


def result_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of roles, without columns that no role has and SFT's row if none.

    Rows are base, SFT (where PPO started from it) and PPO.
    """
    start, labels = start_of(summary), labels_of(summary)
    roles = [(role, label) for role, label in labels.items() if role != "sft" or start == "sft"]
    cells = {
        head.format(start=labels[start]): [
            _cell(summary, form, *(f"{role}.{name}" for name in names)) for role, _ in roles
        ]
        for head, (form, *names) in COLUMNS.items()
    }
    shown = {head: column for head, column in cells.items() if any(column)}
    rows = [
        [label, *(column[i] or "\N{EN DASH}" for column in shown.values())]
        for i, (_, label) in enumerate(roles)
    ]
    return (["model", *shown], rows) if shown else ([], [])


def reward_accuracy(summary: dict[str, Any]) -> str:
    """The reward model's accuracy with its interval and the Bayes limit, in one line; or ''."""
    accuracy = _cell(summary, INTERVAL, *(f"reward.{name}" for name in REWARD_NUMBERS[:3]))
    limit = _cell(summary, "{:.3f}", "reward.bayes_accuracy")
    return f"{accuracy}, Bayes limit {limit}" if accuracy and limit else accuracy


def _cell(summary: dict[str, Any], form: str, *names: str) -> str:
    """The values in `form`; the first alone where another is absent, '' where the first is."""
    values = [number(summary, name) for name in names]
    if values[0] is None:
        return ""
    return (form.split()[0] if None in values else form).format(*values)


def below_bayes(accuracy: float, limit: float | None) -> str:
    """A warning where the accuracy is more than `BAYES_SLACK` below its Bayes limit; else ''."""
    if limit is None or accuracy >= limit - BAYES_SLACK:
        return ""
    return (
        f"accuracy {accuracy:.3f} is far below the {limit:.3f} that is possible: PPO will exploit "
        "what the reward model has not learned"
    )


def judged_means(summary: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Title -> label of each role -> mean and standard error, of the scores that were measured."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for title, name in (("Gold score", "gold"), ("Reward score (raw)", "score")):
        for role, label in labels_of(summary).items():
            mean, error = (number(summary, f"{role}.{name}_{end}") for end in ("mean", "se"))
            if mean is not None:
                found.setdefault(title, {})[label] = mean, error or 0.0
    return found


def findings(summary: dict[str, Any]) -> list[Finding]:
    """What the numbers say about PPO and about the reward model."""
    found = [_about_gold(summary) or _about_win_rate(summary), _about_reward_model(summary)]
    return [each for each in found if each is not None]


def _about_gold(summary: dict[str, Any]) -> Finding | None:
    start, labels = start_of(summary), labels_of(summary)
    name = labels["ppo"]
    before, after = number(summary, f"{start}.gold_mean"), number(summary, "ppo.gold_mean")
    if before is None or after is None:
        return None
    errors = number(summary, f"{start}.gold_se"), number(summary, "ppo.gold_se")
    spread = math.hypot(*(error or 0.0 for error in errors))
    if spread <= 1e-6 * max(abs(before), abs(after)):  # rounding, or not known
        text = f"Gold score: {labels[start]} {before:.2f}, {name} {after:.2f}, errors unknown."
        return Finding("neutral", text)
    distance = (after - before) / spread
    change = f"from {before:.2f} to {after:.2f} ({abs(distance):.1f} standard errors)"
    if distance > 2:
        return Finding("good", f"{name} raised the gold score {change}.")
    if distance >= -2:
        return Finding(
            "neutral", f"{name} made no measurable difference to the gold score: {change}."
        )
    text = f"{name} lowered the gold score {change}."
    rm = number(summary, f"{start}.score_mean"), number(summary, "ppo.score_mean")
    if rm[0] is not None and rm[1] is not None and rm[1] > rm[0]:
        text += (
            f" The training reward rose from {rm[0]:.2f} to {rm[1]:.2f}: it is over-optimised."
            f" Raise ppo.kl_coef, lower ppo.steps or improve {word_of(summary, 'reward')}."
        )
    return Finding("bad", text)


def _about_win_rate(summary: dict[str, Any]) -> Finding | None:
    names = ("ppo.win_rate", "ppo.win_rate_low", "ppo.win_rate_high")
    rate, low, high = (number(summary, name) for name in names)
    if rate is None or low is None or high is None:
        return None
    text = (
        f"By the reward's own judgement {word_of(summary, 'trainer')}'s answers beat those of "
        f"{'SFT' if start_of(summary) == 'sft' else 'the base model'} at a rate of "
        f"{interval_text(rate, low, high)}. "
        f"No gold score is known, and the judge, {word_of(summary, 'reward')}, is what it was "
        "trained on: read the samples."
    )
    return Finding("good" if low > 0.5 else "bad" if high < 0.5 else "neutral", text)


def _about_reward_model(summary: dict[str, Any]) -> Finding | None:
    accuracy, low, _, limit = (number(summary, f"reward.{name}") for name in REWARD_NUMBERS)
    if accuracy is None:
        return None
    if text := below_bayes(accuracy, limit):
        return Finding("bad", f"The reward model's {text}.")
    if low is not None and low <= 0.5:
        text = f"The reward model's accuracy {accuracy:.3f} cannot be distinguished from guessing."
        return Finding("bad", text)
    return None


def print_results(run: RunFolder, report: Path) -> None:
    """Prints the closing table of a run."""
    summary = read_summary(run)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    heads, rows = result_table(summary)
    if rows:
        table = Table(title=f"{escape(str(run.root))}: held-out prompts", title_justify="left")
        for position, head in enumerate(heads):
            table.add_column(head, justify="right" if position else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if accuracy := reward_accuracy(summary):
        console.print(f"Reward model accuracy on held-out pairs: {accuracy}")
    times = {
        name: number(summary, f"wall_seconds.{name}") for name in summary.get("wall_seconds", {})
    }
    if times:
        parts = [f"{name} {duration(value)}" for name, value in times.items() if value is not None]
        console.print(f"Wall time: {', '.join(parts)}")
    for finding in findings(summary):
        console.print(finding.text, markup=False)
    console.print(f"Report: {report}", markup=False, soft_wrap=True)
