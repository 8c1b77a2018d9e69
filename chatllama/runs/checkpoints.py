"""Folders `checkpoints/step-N`: complete or absent, verified when read, old ones removed.

A checkpoint is written beside the others, listed in a manifest with sizes and hashes, flushed to
disk and only then renamed, so that a kill at any moment leaves the last good one as it was. What
is in it is up to the writer (`trainers/engine/engine.py`).
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from typing_extensions import NotRequired, TypedDict

from chatllama.config.schema import DeepSpeedSection
from chatllama.runs.folder import STEP, RunFolder, Stage, step_folders, step_of
from chatllama.runtime.distributed import all_gather_objects, barrier, is_launched, rank, world_size
from chatllama.runtime.files import file_hash, put_back, replace_folder, write_json
from chatllama.runtime.json_files import MORE_KEYS, read_json

DAMAGED, REMOVED = "damaged-", ".removed"
MANIFEST = "manifest.json"
HASHING_THREADS = 4
FileEntry = tuple[int, str]
"""Bytes and SHA-256."""


class DamagedError(ValueError):
    """A folder does not hold what its manifest lists."""


class NotFiniteError(ValueError):
    """A tensor that was to be written holds NaN or infinity."""


class _File(TypedDict):
    bytes: int
    sha256: str


class _Layout(TypedDict):
    ranks: int
    zero_stage: int | None
    microbatch_size: int


class _Manifest(TypedDict):
    __pydantic_config__ = MORE_KEYS  # pyright: ignore[reportGeneralTypeIssues]
    files: dict[str, _File]
    layout: NotRequired[_Layout]


def layout_of(section: DeepSpeedSection, microbatch_size: int) -> dict[str, Any]:
    """How this start splits a batch: `ranks`, `zero_stage` (null: no launcher), `microbatch_size`.

    The same layout resumes bit for bit, another one up to rounding.
    """
    return {
        "ranks": world_size(),
        "zero_stage": section.stage if is_launched() else None,
        "microbatch_size": microbatch_size,
    }


def checkpoint_to_resume(
    run: RunFolder, stage: Stage, resume: bool, layout: dict[str, Any], steps: int | None = None
) -> Path | None:
    """The newest good checkpoint; None: start from the beginning. Every rank must call.

    Those beyond `steps`, the steps of the whole stage, are left alone. A damaged one is set aside
    as `damaged-step-N`, with a warning; another layout is reported.

    Raises:
        ValueError: there are checkpoints, and no `--resume` or none that can be used.
    """
    folder = run.checkpoints(stage)
    if rank() == 0:
        _clean_up(folder)
    barrier()
    found = step_folders(folder)
    if not found:
        return None
    check_resume(found[-1], resume)
    checkpoint, manifest = newest_good(folder, steps)
    if manifest["layout"] != layout and rank() == 0:
        print(
            f"{checkpoint} was written by {_words(manifest['layout'])}; going on with "
            f"{_words(layout)}: the same batches, but not bit for bit the same weights",
            flush=True,
        )
    return checkpoint


def check_resume(existing: Path, resume: bool) -> None:
    """Raises ValueError unless `resume`, since a fresh start would mix with what exists."""
    if not resume:
        raise ValueError(
            f"{existing} exists from an earlier start. Go on from it with --resume, or remove "
            f"{existing.parent} to start afresh"
        )


def newest_good(folder: Path, last: int | None = None) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint whose files are as they were written, and its manifest.

    Every rank must call; rank 0 reads, and sets damaged ones aside. None is of a step after `last`.

    Raises:
        ValueError: all of them are later or damaged: names what is wrong with each.
    """
    chosen = all_gather_objects(_newest_good(folder, last) if rank() == 0 else None)[0]
    if isinstance(chosen, str):
        raise ValueError(chosen)
    return chosen


def _newest_good(folder: Path, last: int | None) -> tuple[Path, dict[str, Any]] | str:
    """The result of `newest_good`, or the message of its error."""
    wrong, found = [], step_folders(folder)
    early = [path for path in found if last is None or step_of(path) <= last]
    if not early:
        names = ", ".join(path.name for path in found)
        return f"{folder} holds {names}, all beyond the stage's {last} steps: raise its `steps`"
    for checkpoint in reversed(early):
        try:
            manifest = verify(checkpoint)
        except (DamagedError, OSError) as error:
            wrong.append((checkpoint, str(error)))
            continue
        for damaged, text in wrong:
            aside = folder / f"{DAMAGED}{damaged.name}"
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
            print(f"warning: {text}. {damaged.name} is set aside as {aside.name}; going on from "
                  f"{checkpoint}", file=sys.stderr, flush=True)  # fmt: skip
        return checkpoint, manifest
    texts = "; ".join(text for _, text in wrong)
    return (
        f"no checkpoint in {folder} can be used: {texts}. Remove {folder} to start the stage "
        "afresh, or bring an undamaged copy back"
    )


def _words(layout: dict[str, Any]) -> str:
    size = f"microbatches of {layout['microbatch_size']}"
    if layout["zero_stage"] is None:
        return f"one process without the deepspeed launcher, {size}"
    ranks = f"{layout['ranks']} rank{'s' if layout['ranks'] > 1 else ''}"
    return f"{ranks} under ZeRO-{layout['zero_stage']}, {size}"


def save_step(
    run: RunFolder,
    stage: Stage,
    step: int,
    limit: int,
    layout: dict[str, Any],
    write: Callable[[Path], Sequence[str] | None],
) -> None:
    """Writes the checkpoint of `step` and removes all but the newest `limit`; every rank must call.

    Args:
        layout: of `layout_of`.
        write: writes this rank's part into a folder, which replaces `step-N` once it is complete;
            returns the names of the files that this rank has written.

    Raises:
        ValueError: the disk is full or cannot be written; older checkpoints are as they were.
    """
    unfinished, folder = run.stage(stage) / ".unfinished", run.checkpoints(stage)
    if rank() == 0:
        with _explained(unfinished, folder, step):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    barrier()
    with _explained(unfinished, folder, step):
        own = list(write(unfinished) or [])
        hashed = _hashed(unfinished, [name for name in own if (unfinished / name).is_file()])
        written = all_gather_objects(dict.fromkeys(own) | hashed)
    if rank() == 0:
        with _explained(unfinished, folder, step):
            folder.mkdir(parents=True, exist_ok=True)
            known = {name: entry for part in written for name, entry in part.items()}
            write_manifest(unfinished, {"step": step, "layout": layout}, known)
            replace_folder(unfinished, folder / f"{STEP}{step}")
            for outdated in step_folders(folder)[:-limit]:
                # Renamed first: what a kill leaves half removed is no checkpoint.
                doomed = outdated.with_name(f".{outdated.name}{REMOVED}")
                shutil.rmtree(doomed, ignore_errors=True)
                outdated.rename(doomed)
                shutil.rmtree(doomed)
    barrier()


@contextmanager
def _explained(unfinished: Path, folder: Path, step: int) -> Iterator[None]:
    """Removes `unfinished` after a failed write, and raises a ValueError that says what is left."""
    try:
        yield
    except NotFiniteError as error:
        raise ValueError(
            f"stopped after step {step}: {error}, so no checkpoint was written; "
            f"{_newest_words(folder)}. Lower the stage's learning_rate, and go on with --resume"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free  # before `unfinished` is removed
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            f"the checkpoint of step {step} could not be written below {unfinished.parent}: "
            f"{reason.strip().splitlines()[0]} ({free / 1e9:.2f} GB free there). "
            f"{_newest_words(folder)}. Make room or give the right to write, and go on "
            "with --resume"
        ) from error


def _newest_words(folder: Path) -> str:
    good = step_folders(folder)
    return f"{good[-1]} is as it was" if good else "there is no earlier one"


def _clean_up(folder: Path) -> None:
    """Completes what a killed process left half done among the checkpoints."""
    for old in sorted(folder.glob(f".{STEP}*.old")):
        put_back(folder / old.name.removeprefix(".").removesuffix(".old"))
    for doomed in folder.glob(f".{STEP}*{REMOVED}"):
        shutil.rmtree(doomed, ignore_errors=True)


def write_manifest(
    folder: Path, about: dict[str, Any], known: Mapping[str, FileEntry | None] | None = None
) -> None:
    """Writes manifest.json: `about`, and size and SHA-256 of every file below `folder`.

    Args:
        known: files that must be there; those with an entry are not read again.

    Raises:
        DamagedError: there is no file, or one of those `known` is missing or of another size.
    """
    known, names = known or {}, _names(folder)
    if missing := sorted({*known, *([] if names else ["all files"])} - set(names)):
        raise DamagedError(f"{folder} lacks {', '.join(missing)} and is not published")
    entries = {name: entry for name, entry in known.items() if entry is not None}
    for name, (size, _) in entries.items():
        if (found := (folder / name).stat().st_size) != size:
            raise DamagedError(f"{folder / name} has {found} bytes; {size} were written")
    entries |= _hashed(folder, [name for name in names if name not in entries])
    files = {name: {"bytes": entries[name][0], "sha256": entries[name][1]} for name in names}
    write_json(folder / MANIFEST, {**about, "files": files})


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all as they were written.

    Raises:
        DamagedError: the manifest is missing or damaged, or the first file that is missing, cut
            off or different.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path, _Manifest)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: this is no complete checkpoint") from None
    except ValueError as error:
        raise DamagedError(str(error)) from error
    expected = manifest["files"]
    if not expected:
        raise DamagedError(f"{path} is damaged: it lists no files")
    for name, entry in expected.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise DamagedError(f"{path} has {size} bytes; {entry['bytes']} were written")
    found = _hashed(folder, list(expected))
    for name, entry in expected.items():
        if found[name][1] != entry["sha256"]:
            raise DamagedError(f"{folder / name} is corrupted: its content is not what was written")
    return manifest


def _names(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _hashed(folder: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = list(pool.map(lambda name: file_hash(folder / name), names))
    sizes = [(folder / name).stat().st_size for name in names]
    return dict(zip(names, zip(sizes, hashes, strict=True), strict=True))
