"""What `chatllama` alone shows: the commands by what they are for, and the runs that lie here."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from chatllama.start.runs import find_runs, run_lines

NEWCOMER = (
    "New here? `chatllama init` writes a config for your model and data; "
    "`chatllama run configs/quickstart.yaml` is the demo, some minutes on a CPU."
)
MOST_RUNS = 5


def home_text(groups: Mapping[str, Sequence[tuple[str, str]]], folder: Path) -> str:
    """The page.

    Args:
        groups: heading -> (command, what it does).
        folder: below which runs are looked for.
    """
    lines = ["chatllama: SFT, reward model and PPO on one frozen LLaMA", ""]
    for heading, commands in groups.items():
        lines.append(f"{heading}:")
        lines += [f"  {name:<10} {about}" for name, about in commands]
    runs = find_runs(folder)
    if runs:
        lines += ["", f"runs in {folder}, the newest first:"]
        for run in runs[:MOST_RUNS]:
            lines += run_lines(run)
        if len(runs) > MOST_RUNS:
            lines.append(f"  and {len(runs) - MOST_RUNS} more: chatllama runs")
    return "\n".join([*lines, "", NEWCOMER, "`chatllama COMMAND --help` explains a command."])
