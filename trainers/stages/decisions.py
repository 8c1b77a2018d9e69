"""Which stages of a run are kept, run or run again, and why; decided from lineage.json.

Running them is the business of `pipeline.py`.
"""

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from chatllama.config.schema import Config
from chatllama.model.integrity import check_base_files, check_outputs, tell_unknown
from chatllama.runs.folder import INFO, STAGES, RunFolder, Stage, step_folders, step_of
from chatllama.runtime.json_files import read_json
from trainers.stages import lineage

Action = Literal["keep", "do", "go on", "prolong", "again", "forget"]


@dataclass(frozen=True)
class Decision:
    """What to do about a stage."""

    action: Action
    """keep the result; do it; go on with it; prolong a finished one by more steps; do it again with
    the old result set aside; or forget result and checkpoints and do it again (`--from`)."""
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Changes that are no reason to run it again."""


def decide(
    cfg: Config, run: RunFolder, redo_from: Stage | None, resume: bool
) -> dict[Stage, Decision]:
    """What to do about every stage that the config has.

    A finished stage runs again if its settings, data, base or parents have changed, and with it
    every later one that is made from it.

    Raises:
        ValueError: the user must choose: a stage was interrupted, and `resume` is off or its
            settings have changed; results have changed; an earlier stage is missing; the folder
            has a stage that the config leaves out; or the backbone was built here under other
            settings.
    """
    _check_backbone(cfg, run)
    _check_left_out(cfg, run)
    records = lineage.read_lineage(run)
    decisions: dict[Stage, Decision] = {}
    for stage in cfg.stages:
        begun = _is_begun(run, stage)
        earlier = {s: decisions[s] for s in lineage.made_from(cfg, stage)}
        anew = ("prolong", "again", "forget")
        made_anew = [s for s, each in earlier.items() if each.action in anew]
        if redo_from is not None and STAGES.index(stage) >= STAGES.index(redo_from):
            why = f"--from {redo_from}"
            decisions[stage] = Decision("forget", (why,)) if begun else Decision("do")
        elif not begun:
            decisions[stage] = Decision("do")
        elif made_anew:
            decisions[stage] = Decision("again", (f"{made_anew[-1]} is made anew",))
        else:
            record = records.get(stage)
            unfinished = [s for s, each in earlier.items() if each.action != "keep"]
            if unfinished:
                raise ValueError(
                    f"{run.root}: stage {stage} is begun or finished, but {unfinished[0]}, which "
                    f"it is made from, is not. Use --from {unfinished[0]} to do both again, or "
                    "another run_dir"
                )
            decisions[stage] = _decide_begun(cfg, run, stage, record, resume)
    return decisions


def _is_begun(run: RunFolder, stage: Stage) -> bool:
    return run.result(stage).is_file() or run.was_begun(stage)


def _check_left_out(cfg: Config, run: RunFolder) -> None:
    """Raises ValueError if the folder has a stage that the config leaves out.

    What opens the folder later would take it for a part of this run.
    """
    for stage in STAGES:
        if stage not in cfg.stages and _is_begun(run, stage):
            raise ValueError(
                f"{run.stage(stage)} holds stage {stage}, which the config leaves out. Give "
                f"{stage}.data as it was to keep it (`--only` names the stages to run), or use "
                "another run_dir"
            )


def check_earlier(cfg: Config, run: RunFolder, stage: Stage) -> None:
    """Raises ValueError if the stage starts from another that has not finished."""
    for earlier in lineage.made_from(cfg, stage):
        run.read_result(earlier)


def _decide_begun(
    cfg: Config, run: RunFolder, stage: Stage, record: dict[str, Any] | None, resume: bool
) -> Decision:
    """What to do about a stage that is finished or interrupted and whose parents are kept."""
    finished = run.result(stage).is_file()
    if record is None:
        notes = (f"{run.lineage} has no record of it: kept as it is",)
        decision = Decision("keep" if finished else "go on", (), notes)
    else:
        now = lineage.gather(cfg, run, stage, record)
        check_base_files(run, now["base"], [stage])
        if finished:
            return _decide_finished(run, stage, record, now, resume)
        reasons = lineage.differences(record, now, _resumable(run, stage, record, now))
        if reasons:
            raise ValueError(
                f"stage {stage} of {run.root} was interrupted, and it cannot go on:\n"
                f"{_lines(reasons)}\nPut that right, use --from {stage} to start the stage anew, "
                "or another run_dir"
            )
        decision = Decision("go on", (), tuple(lineage.other_versions(record, now)))
    if not finished and not resume:
        raise ValueError(
            f"stage {stage} of {run.root} was interrupted and has checkpoints: add "
            f"--resume to go on from the newest, or --from {stage} to start it anew"
        )
    return decision


def _decide_finished(
    run: RunFolder, stage: Stage, record: dict[str, Any], now: dict[str, Any], resume: bool
) -> Decision:
    """What to do about a finished stage that has a record."""
    notes, reasons = tuple(lineage.other_versions(record, now)), lineage.differences(record, now)
    if not reasons:
        check_outputs(run, [stage])
        return Decision("keep", (), notes)
    made = run.read_result(stage).get("steps", math.inf)
    more = lineage.more_steps(record, now, stage, made)
    if more and not lineage.differences(record, now, _resumable(run, stage, record, now)):
        if resume and saved_steps(run, stage):
            return Decision("prolong", tuple(reasons), notes)
        if resume:
            raise ValueError(
                f"stage {stage} of {run.root} has finished after {made:g} steps, and it cannot be "
                f"prolonged, since no checkpoint of it is left ({stage}.save_every; members of a "
                "reward ensemble are not prolonged). Without --resume `chatllama run` does it "
                "again from its start"
            )
        reasons.append("(with --resume it would be prolonged from its newest checkpoint instead)")
    return Decision("again", tuple(reasons), notes)


def finished_before(cfg: Config, run: RunFolder, stage: Stage, resume: bool) -> bool:
    """Whether a stage has finished, its results are still valid, and `resume` does not prolong it.

    Raises:
        ValueError: it must run again, which only `chatllama run` does, or its results are damaged.
    """
    if not run.result(stage).is_file():
        return False
    record = lineage.read_lineage(run).get(stage)
    decision = _decide_begun(cfg, run, stage, record, resume)
    if decision.action == "again":
        raise ValueError(
            f"stage {stage} of {run.root} has finished before, and it must be done again:\n"
            f"{_lines(decision.reasons)}\n`chatllama run` does so and keeps what there is; or use "
            "another run_dir"
        )
    return decision.action == "keep"


def check_resumed(cfg: Config, run: RunFolder, stage: Stage) -> dict[str, Any]:
    """The lineage record with which a stage begins or goes on; prints the settings that changed.

    A result that it prolongs is removed; adapters and evaluation stay until it has finished again.

    Raises:
        ValueError: it has checkpoints from other settings, data, base or parents, or what it
            starts from is not as the earlier stages read or wrote it.
    """
    record = lineage.read_lineage(run).get(stage)
    now = lineage.gather(cfg, run, stage, record or {}, fresh=True)
    goes_on = record is not None and run.was_begun(stage)
    earlier = STAGES[: STAGES.index(stage)]
    tell_unknown(run, earlier)
    for name in now["parents"]:
        check_outputs(run, earlier, name)
    check_base_files(run, now["base"], (*earlier, stage) if goes_on else earlier)
    if record is None or not goes_on:
        return now
    changed = _resumable(run, stage, record, now)
    if reasons := lineage.differences(record, now, changed):
        raise ValueError(
            f"stage {stage} of {run.root} was begun otherwise, and it cannot go on:\n"
            f"{_lines(reasons)}\nPut that right, or remove {run.checkpoints(stage)} to start the "
            "stage anew"
        )
    changes = [f"{key}: {was!r} before, {is_!r} now" for key, (was, is_) in changed.items()]
    if changes:
        print(f"stage {stage} goes on with other settings:", *changes, sep="\n  ", flush=True)
    run.result(stage).unlink(missing_ok=True)
    kept = {name: record[name] for name in ("begun", "hardware") if name in record}
    return now | kept | {"changed": record.get("changed", []) + ([changes] if changes else [])}


def _resumable(
    run: RunFolder, stage: Stage, record: dict[str, Any], now: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """`lineage.resumable` with the checkpoints that the stage has."""
    saved = saved_steps(run, stage)
    members = run.finished_members() + bool(saved) if stage == "reward" else 1
    return lineage.resumable(record, now, stage, saved, members)


def saved_steps(run: RunFolder, stage: Stage) -> set[int]:
    """Steps of the stage's checkpoints, in an ensemble of those of its unfinished member."""
    if stage == "reward":
        run = run.reward_run(run.finished_members())
    return {step_of(path) for path in step_folders(run.checkpoints(stage))}


class _BackboneInfo(TypedDict, total=False):
    config: dict[str, Any] | None


def _check_backbone(cfg: Config, run: RunFolder) -> None:
    """Raises ValueError if the backbone was built here under other settings than those of `cfg`."""
    info = run.backbone / INFO
    if cfg.backbone.from_scratch is None or not info.is_file():
        return
    old = read_json(info, _BackboneInfo).get("config")
    if old is None:
        return
    new = backbone_config(cfg)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if keys:
        raise ValueError(
            f"{run.backbone} was made with other settings, and every stage is based on it:\n"
            + _lines(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in keys)
            + f"\nUse run_dir=... for a new run, or remove {run.root}"
        )


def backbone_config(cfg: Config) -> dict[str, Any]:
    """Dotted key -> value of the settings that determine a backbone made from text."""
    content = json.loads(cfg.model_dump_json())
    section = {"from_scratch": content["backbone"]["from_scratch"]}
    return lineage.flat({"backbone": section, "seed": content["seed"]})


def _lines(reasons: Iterable[str]) -> str:
    return "\n".join(f"  {reason}" for reason in reasons)


def forget(run: RunFolder, stage: Stage, with_record: bool = True) -> None:
    """Removes the result, checkpoints and summary of a stage.

    Args:
        with_record: also its record in lineage.json; one machine of several that share it does so.
    """
    run.result(stage).unlink(missing_ok=True)
    if run.checkpoints(stage).is_dir():
        shutil.rmtree(run.checkpoints(stage))
    run.summary.unlink(missing_ok=True)
    if with_record:
        lineage.write_record(run, stage, None)


def set_aside(run: RunFolder, stage: Stage) -> Path:
    """Moves the folder of a stage, with its record, to RUN/previous/<stage>-N; returns that."""
    number = 1
    while (aside := run.root / "previous" / f"{stage}-{number}").exists():
        number += 1
    aside.parent.mkdir(parents=True, exist_ok=True)
    record = lineage.read_lineage(run).get(stage)
    run.stage(stage).rename(aside)
    if record is not None:
        (aside / "lineage.json").write_text(json.dumps({stage: record}, indent=2), "utf-8")
    for path in (run.summary, run.evaluation) if stage == "ppo" else (run.summary,):
        if path.is_file():
            path.rename(aside / path.name)
    lineage.write_record(run, stage, None)
    return aside
