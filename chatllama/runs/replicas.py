"""Run folders of jobs on several machines: do all see the same one, and what if not.

Rank 0 writes results. Where other machines have a disk of their own they get copies, so that the
next stage finds its parents on every machine.
"""

import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from chatllama.config.schema import Config
from chatllama.runs.folder import RunFolder
from chatllama.runtime import distributed
from chatllama.runtime.files import replace_text

PIECE = 64 * 2**20
"""Bytes sent at a time."""
NOT_COPIED = ("checkpoints", "tensorboard", ".unfinished")
"""Folders of a stage that no later stage reads."""


def views_of(folder: Path) -> list[tuple[str, bool]]:
    """Each rank's machine, and whether it sees rank 0's `folder`; every rank calls."""
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
    """Says once when some machines have run folders of their own; all ranks call.

    Raises:
        ValueError: there are some, and checkpoints are wanted.
    """
    lacking = list(dict.fromkeys(host for host, sees in views_of(run.root) if not sees))
    if not lacking:
        return
    saving = [name for name in ("sft", "reward", "ppo") if cfg.model_dump()[name]["save_every"]]
    where = f"{run.root} of rank 0 is not shared by {', '.join(lacking)}"
    if saving:
        keys = ", ".join(f"{name}.save_every=0" for name in saving)
        raise ValueError(
            f"{where}, and checkpoints are in parts written by all ranks: put run_dir on a file "
            f"system that all machines share, or do without checkpoints ({keys})"
        )
    if distributed.rank() == 0:
        print(f"{where}: they get copies of the stage's results at its end", flush=True)


def copy_to_nodes(run: RunFolder, folder: Path) -> None:
    """Files that rank 0 has below `folder` are there on every machine; all ranks call.

    Args:
        run: whose folder; machines that share it are left alone.
        folder: inside the run folder. `result.json`, which says that a stage is finished, is last.
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
        for piece in _sent(path):
            if writes:
                with beside.open("ab") as file:
                    file.write(piece)
        if writes:
            beside.replace(path)
    distributed.barrier()


def copy_file_to_nodes(path: Path) -> None:
    """A small text file of rank 0 is there on every machine; all ranks call."""
    if distributed.nodes() == 1:
        return
    text: str = distributed.from_rank_zero(
        path.read_text(encoding="utf-8") if distributed.rank() == 0 else ""
    )
    lacks = not path.is_file() or path.read_text(encoding="utf-8") != text
    if lacks and distributed.rank() != 0 and distributed.leads_node():
        replace_text(path, text)
    distributed.barrier()


def _files(folder: Path) -> list[str]:
    """What to copy, as this machine sees it."""
    found = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in NOT_COPIED
    ]
    return sorted(map(str, found), key=lambda name: (name == "result.json", name))


def _sent(path: Path) -> Iterator[bytes]:
    """The pieces of rank 0's file, on every rank; an empty file is one empty piece."""
    size: int = distributed.from_rank_zero(path.stat().st_size if distributed.rank() == 0 else 0)
    source = path.open("rb") if distributed.rank() == 0 else None
    for _ in range(max(1, -(-size // PIECE))):
        yield distributed.from_rank_zero(source.read(PIECE) if source else b"")
    if source:
        source.close()
