"""Folders `checkpoints/step-N`: complete or absent, the newest found, old ones removed.

What stands in them is the business of whoever writes (`trainers/engine.py`, the Trainer).
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from chatllama.distributed import barrier, rank
from chatllama.export import replace_folder
from chatllama.run_folder import RunFolder, Stage

STEP = "step-"


def step_folders(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest step first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.glob(f"{STEP}*") if p.name.removeprefix(STEP).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of `step-N`."""
    return int(checkpoint.name.removeprefix(STEP))


def checkpoint_to_resume(run: RunFolder, stage: Stage, resume: bool) -> Path | None:
    """The newest checkpoint to go on from; None: start from the beginning.

    Raises:
        ValueError: there are checkpoints and no `--resume`: a fresh start would mix with them.
    """
    found = step_folders(run.checkpoints(stage))
    if not found:
        return None
    if not resume:
        raise ValueError(
            f"{found[-1]} exists from an earlier start. Go on from it with --resume, or remove "
            f"{run.checkpoints(stage)} to start afresh"
        )
    return found[-1]


def publish(written: Path, folder: Path, step: int, limit: int) -> None:
    """Makes the complete folder `written` the checkpoint of `step`; every rank must call.

    Args:
        written: all ranks have written their parts into it.
        folder: of the checkpoints.
        step: N of `step-N`.
        limit: checkpoints kept.
    """
    barrier()
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        replace_folder(written, folder / f"{STEP}{step}")
        for outdated in step_folders(folder)[:-limit]:
            shutil.rmtree(outdated)
    barrier()


def save_step(
    run: RunFolder, stage: Stage, step: int, limit: int, write: Callable[[Path], None]
) -> None:
    """Writes the checkpoint of `step` beside the others and publishes it; every rank must call.

    Args:
        run: whose checkpoints.
        stage: whose checkpoints.
        step: finished steps.
        limit: checkpoints kept.
        write: writes this rank's part into the folder it is given.
    """
    unfinished = run.stage(stage) / ".unfinished"
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    barrier()
    write(unfinished)
    publish(unfinished, run.checkpoints(stage), step, limit)
