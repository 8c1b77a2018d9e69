"""The runs below a folder: how far each is, and the command that continues or uses it."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from chatllama.config.loader import WRITTEN, load_config
from chatllama.config.nearest import files_like
from chatllama.config.schema import Config
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runs.outcome import in_use, stage_states

DEPTH = 3
"""Folders between the one that is searched and a run folder, at most."""


@dataclass(frozen=True)
class RunState:
    """What a listing says of a run."""

    state: str
    next: str
    """A command, or what is to be done."""


def find_runs(folder: Path) -> list[RunFolder]:
    """The run folders at or below a folder, the newest first."""
    places = ["config.yaml", *("*/" * depth + "config.yaml" for depth in range(1, DEPTH + 1))]
    files = [file for place in places for file in folder.glob(place) if _is_ours(file)]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    return [RunFolder(file.parent) for file in files]


def list_runs(folder: Path) -> str:
    """The listing as text.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        if folder == Path("runs"):
            return "no runs here: there is no folder `runs`. `chatllama init` begins one"
        raise ValueError(f"{folder}: no such folder{files_like(folder)}")
    lines = [line for run in find_runs(folder) for line in run_lines(run)]
    return "\n".join(lines) or f"no run folder in {folder}"


def run_lines(run: RunFolder) -> list[str]:
    """Two lines: the run with its stages, and the next command."""
    found = run_state(run)
    return [f"  {run.root}: {found.state}", f"    next: {found.next}"]


def run_state(run: RunFolder) -> RunState:
    """How far a run is."""
    try:
        return _state(run, load_config(run.config))
    except ValueError as error:  # of another version, or damaged
        return RunState("cannot be read", " ".join(str(error).split()))


def _state(run: RunFolder, cfg: Config) -> RunState:
    wanted = cfg.stages
    states = stage_states(run, wanted)
    state = ", ".join(f"{stage} {each}" for stage, each in states.items()) or "empty"
    again = f"chatllama run {shlex.quote(str(run.config))}"
    if in_use(run):
        return RunState(state, f"wait for it; metrics are in {run.root}")
    pending: list[Stage] = [stage for stage, each in states.items() if each.kind != "finished"]
    if pending:
        resume = " --resume" if run.was_begun(pending[0]) else ""
        more = ""
        if states[pending[0]].kind in ("refused", "failed"):
            more = f" (why, and what to do: chatllama report {shlex.quote(str(run.root))})"
        return RunState(state, again + resume + more)
    return RunState(state, f"chatllama chat {shlex.quote(str(run.root))}" if wanted else again)


def _is_ours(file: Path) -> bool:
    """Whether a config.yaml is the record of a run rather than somebody's own."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(WRITTEN)) == WRITTEN.encode()
    except OSError:
        return False
