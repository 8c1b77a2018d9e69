"""One writer of a run folder at a time: lock files that name its process, machine and start.

`chatllama run` holds one for all stages, rank 0 of a stage another; the stage gets the first one's
token on its command line, which shows that they belong together. Readers (chat, report) need none.
"""

import atexit
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import psutil

from chatllama.runs.folder import RunFolder, check_run_dir
from chatllama.runtime.command_line import duration
from chatllama.runtime.json_files import read_json

Holder = Literal["run", "stage"]
SAME_START_SECONDS = 5.0
"""Tolerance of a process's start time, since clocks are corrected."""

_held: set[Path] = set()


class InUse(ValueError):
    """Another process works in the run folder."""


@dataclass(frozen=True)
class Owner:
    """A process that holds a run folder."""

    host: str
    pid: int
    started: float
    """Seconds since 1970, of the process: distinguishes it from a later one with the same pid."""
    command: str
    since: float
    """Seconds since 1970, of the lock."""
    token: str

    @property
    def is_here(self) -> bool:
        """True for a process of this machine, running or ended."""
        return self.host == socket.gethostname()

    def is_gone(self) -> bool:
        """True for a process of this machine that has ended."""
        if not self.is_here:
            return False
        try:
            started = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            return True
        return abs(started - self.started) > SAME_START_SECONDS

    def __str__(self) -> str:
        age = duration(max(0.0, time.time() - self.since))
        return f"`{self.command}` (process {self.pid} on {self.host}, for {age})"


def lock_path(run: RunFolder, holder: Holder) -> Path:
    """The lock file of a kind of holder."""
    return run.root / f".lock-{holder}"


def read_owner(path: Path) -> Owner | None:
    """The process in a lock file, None without one; raises ValueError where it is damaged."""
    try:
        return read_json(path, Owner)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}: if nothing runs there, remove it") from error


def acquire(run: RunFolder, holder: Holder, token: str | None = None) -> str:
    """Locks the run folder until `release_all` or the end of this process; returns the token.

    Makes the folder. Takes over locks of processes of this machine that have ended, and ignores
    the lock whose token is given, since its owner started this process.

    Raises:
        InUse: another process works there: names it, its machine and since when.
    """
    check_run_dir(run.root)
    path = lock_path(run, holder)
    with _alone(run.root):
        for each in get_args(Holder):
            _check(run, lock_path(run, each), token)
        me = _this_process(token)
        path.unlink(missing_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(asdict(me), file)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:  # another machine that shares the disk was first
            raise InUse(f"{run.root} has just been locked by another machine") from None
    if not _held:
        atexit.register(release_all)
    _held.add(path)
    return me.token


@contextmanager
def locked(run: RunFolder, holder: Holder) -> Iterator[str]:
    """Locks the run folder inside the block; yields the token."""
    token = acquire(run, holder)
    try:
        yield token
    finally:
        release_all()


def release_all() -> None:
    """Releases every lock of this process."""
    for path in list(_held):
        _held.discard(path)
        owner = read_owner(path)
        if owner is not None and owner.is_here and owner.pid == os.getpid():
            path.unlink(missing_ok=True)


def _check(run: RunFolder, path: Path, token: str | None) -> None:
    """Raises ValueError if another process holds the lock file; removes that of an ended one."""
    owner = read_owner(path)
    if owner is None or owner.token == token:
        return
    if owner.is_here and owner.pid == os.getpid():
        return
    if owner.is_gone():
        print(f"{run.root} was left locked by {owner}, which has ended", file=sys.stderr)
        path.unlink(missing_ok=True)
        return
    remedy = f"wait for it, or stop it: kill {owner.pid}"
    if not owner.is_here:
        remedy = (
            f"this is {socket.gethostname()}, from where that process cannot be seen: if it has "
            f"ended, remove {path}"
        )
    raise InUse(f"{run.root} is in use by {owner}; {remedy}")


def _this_process(token: str | None) -> Owner:
    script = Path(sys.argv[0])
    name = script.parent.name if script.name == "__main__.py" else script.name  # python -m
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        command=shlex.join([name, *sys.argv[1:]]),
        since=time.time(),
        token=token or os.urandom(8).hex(),
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Excludes the other processes of this machine from the block, for the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # On network disks without such locks, creating the lock file decides alone.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
