"""How each stage of a run stands, from the files that it left."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from typing_extensions import TypedDict

from chatllama.runs.folder import RunFolder, Stage
from chatllama.runs.lock import Holder, lock_path, read_owner
from chatllama.runtime.files import write_json
from chatllama.runtime.json_files import read_json
from chatllama.runtime.jsonl import read_lines

LONGEST_REASON = 2000


class _Failure(TypedDict):
    reason: str
    code: int


class Interruption(TypedDict):
    """What `interruption.py` writes."""

    step: int
    signal: str


@dataclass(frozen=True)
class StageState:
    """How a stage stands."""

    kind: Literal["to do", "running", "finished", "refused", "failed", "interrupted", "killed"]
    """refused: the user can put it right; failed: an error of the code; killed: it said nothing."""
    step: int = 0
    """The last that was made and logged; 0 before the first."""
    saved: int = 0
    """That of the newest checkpoint; 0 without one."""
    reason: str = ""
    """Of a refusal or failure, or the signal of an interruption."""

    def __str__(self) -> str:
        if self.kind in ("to do", "running", "finished"):
            return self.kind
        if self.kind == "interrupted":
            return f"saved at step {self.step} ({self.reason})"
        after = f" after step {self.step}" if self.step else ""
        if self.kind == "killed":
            return f"killed or crashed{after or ' before its first step'}"
        first = self.reason.splitlines()[0]
        first = f"{first[:97]}{'...' * (len(first) > 97)}"
        if first.startswith("stopped "):  # it says after which step
            return first
        word = "stopped" if self.kind == "refused" and self.step else self.kind
        return f"{word}{after} ({first})"


def stage_states(run: RunFolder, stages: Sequence[Stage]) -> dict[Stage, StageState]:
    """How each stage stands; of a running run, only the first that is not finished runs."""
    states: dict[Stage, StageState] = {stage: stage_state(run, stage) for stage in stages}
    running: list[Stage] = [stage for stage in stages if states[stage].kind == "running"]
    for stage in running[1:]:
        states[stage] = StageState("to do")
    return states


def stage_state(run: RunFolder, stage: Stage) -> StageState:
    """How a stage stands; `running` where a process holds the folder, if it is not finished.

    Raises:
        ValueError: a file of it is damaged.
    """
    if run.result(stage).is_file():
        return StageState("finished")
    names = (path.name.removeprefix("step-") for path in run.checkpoints(stage).rglob("step-*"))
    saved = max((int(name) for name in names if name.isdecimal()), default=0)
    lines = read_lines(run.metrics(stage)) if run.metrics(stage).is_file() else []
    step = lines[-1]["step"] if lines else saved
    if in_use(run):
        return StageState("running", step, saved)
    if run.failed(stage).is_file():
        found = read_json(run.failed(stage), _Failure)
        return StageState("refused" if found["code"] == 2 else "failed", step, saved,
                          found["reason"])  # fmt: skip
    if run.interrupted(stage).is_file():
        signal = read_json(run.interrupted(stage), Interruption)
        return StageState("interrupted", signal["step"], saved, signal["signal"])
    begun = saved or lines or run.was_begun(stage)
    return StageState("killed" if begun else "to do", step, saved)


def in_use(run: RunFolder) -> bool:
    """Whether a process trains there."""
    owners = [read_owner(lock_path(run, holder)) for holder in get_args(Holder)]
    return any(owner is not None and not owner.is_gone() for owner in owners)


def record_failure(run: RunFolder, stage: Stage, reason: str, code: int) -> None:
    """Writes why a stage has no result, for its page and for `chatllama runs`.

    Args:
        code: exit code; where it is 1, what another rank said before is kept.
    """
    path = run.failed(stage)
    if not run.result(stage).is_file() and (code == 2 or not path.is_file()):
        write_json(path, {"reason": reason.strip()[:LONGEST_REASON] or "unknown", "code": code})
