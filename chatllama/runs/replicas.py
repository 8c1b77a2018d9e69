"""Replication of the run folder to machines that do not share rank 0's disk.

Rank 0 writes results. Machines with a disk of their own get copies at the end of a stage, so that
the next one finds its parents everywhere. Checkpoints, which all ranks write, are not replicated.
"""

import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from chatllama.config.schema import Config
from chatllama.runs.folder import STAGES, RunFolder
from chatllama.runtime import distributed
from chatllama.runtime.files import replace_text

CHUNK = 64 * 2**20
"""Bytes sent at a time."""
NOT_COPIED = ("checkpoints", "tensorboard", ".unfinished")
"""Folders of a stage that no later stage reads."""


def views_of(folder: Path) -> list[tuple[str, bool]]:
    """Each rank's machine, and whether it sees rank 0's `folder`; every rank must call."""
    if distributed.nodes() == 1:
        return []
    name: str = distributed.from_rank_zero(f".shared-{uuid.uuid4().hex}")
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    distributed.barrier()
    views = distributed.all_gather_objects((socket.gethostname(), (folder / name).is_file()))
    if distributed.rank() == 0:
        (folder / name).unlink()
    return views


def check_run_folder(cfg: Config, run: RunFolder) -> None:
    """Prints which machines have run folders of their own; every rank must call.

    Raises:
        ValueError: there are some, and the config asks for checkpoints.
    """
    lacking = list(dict.fromkeys(host for host, sees in views_of(run.root) if not sees))
    if not lacking:
        return
    saving = [name for name in STAGES if cfg.model_dump()[name]["save_every"]]
    where = f"{run.root} of rank 0 is not shared by {', '.join(lacking)}"
    if saving:
        keys = ", ".join(f"{name}.save_every=0" for name in saving)
        raise ValueError(
            f"{where}, and every rank writes a part of a checkpoint: put run_dir on a file system "
            f"that all machines share, or do without checkpoints ({keys})"
        )
    if distributed.rank() == 0:
        print(f"{where}: they get copies of the stage's results at its end", flush=True)


def replicate_folder(run: RunFolder, folder: Path) -> None:
    """Copies rank 0's files below `folder` to every machine without them; every rank must call.

    Args:
        folder: inside the run folder. `result.json`, which marks a finished stage, comes last.
    """
    views = views_of(run.root)
    if all(sees for _, sees in views):
        return
    writes = distributed.leads_node() and not views[distributed.rank()][1]
    names: list[str] = distributed.from_rank_zero(_files(folder))
    for name in names:
        path = folder / name
        beside = path.with_name(f".{path.name}.incoming")
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)
        for chunk in _chunks(path):
            if writes:
                with beside.open("ab") as file:
                    file.write(chunk)
        if writes:
            beside.replace(path)
    distributed.barrier()


def replicate_file(path: Path) -> None:
    """Copies a small text file of rank 0 to every machine; every rank must call."""
    if distributed.nodes() == 1:
        return
    is_main = distributed.rank() == 0
    text: str = distributed.from_rank_zero(path.read_text(encoding="utf-8") if is_main else "")
    lacks = not path.is_file() or path.read_text(encoding="utf-8") != text
    if lacks and not is_main and distributed.leads_node():
        replace_text(path, text)
    distributed.barrier()


def _files(folder: Path) -> list[str]:
    """The files to copy, as this machine sees them."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = [str(path) for path in found if path.parts[0] not in NOT_COPIED]
    return sorted(kept, key=lambda name: (name == "result.json", name))


def _chunks(path: Path) -> Iterator[bytes]:
    """The content of rank 0's file, on every rank; an empty file is one empty chunk."""
    size: int = distributed.from_rank_zero(path.stat().st_size if distributed.rank() == 0 else 0)
    source = path.open("rb") if distributed.rank() == 0 else None
    for _ in range(max(1, -(-size // CHUNK))):
        yield distributed.from_rank_zero(source.read(CHUNK) if source else b"")
    if source:
        source.close()
