"""The report's section on the health of the PPO run, from RUN/ppo/health.jsonl.

The diagnoses are made by `trainers/health.py`; their table is docs/health.md.
"""

from html import escape
from typing import Any

from chatllama.run_folder import RunFolder
from chatllama.tracking import read_lines

DECISIONS = {"rollback": "Rolled back to a checkpoint.", "stop": "The stage was stopped."}


def health_body(run: RunFolder) -> str:
    """HTML below the section's heading; empty where no PPO run was watched."""
    path = run.stage("ppo") / "health.jsonl"
    lines = read_lines(run.metrics("ppo"))
    if not path.is_file() or not lines:
        return ""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(path):
        by_name.setdefault(line["name"], []).append(line)
    if not by_name:
        count = lines[-1]["step"]
        return f'<p class="muted">No diagnosis in {count} step{"" if count == 1 else "s"}.</p>'
    items = "".join(_item(name, found) for name, found in by_name.items())
    return f'<ul class="findings">{items}</ul>'


def _item(name: str, found: list[dict[str, Any]]) -> str:
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
