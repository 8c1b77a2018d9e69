"""The run folder's lock: the second process is refused by name, dead owners are taken over."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from chatllama.runs.folder import RunFolder
from chatllama.runs.lock import acquire, lock_path, locked, read_owner, release_all


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    yield RunFolder(tmp_path / "run")
    release_all()


@pytest.fixture
def other() -> Iterator[subprocess.Popen]:
    """Another living process."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def leave_lock(run: RunFolder, pid: int, kind: Any = "run", **changes: Any) -> None:
    """A lock as process `pid` wrote it an hour ago."""
    started = psutil.Process(pid).create_time()
    owner = {
        "host": socket.gethostname(),
        "pid": pid,
        "started": started,
        "command": "chatllama run a.yaml",
        "since": time.time() - 3600,
        "token": "t",
    }
    run.root.mkdir(parents=True, exist_ok=True)
    lock_path(run, kind).write_text(json.dumps(owner | changes))


def test_the_lock_says_who_holds_it_and_goes_with_its_owner(run: RunFolder):
    with locked(run, "run") as token:
        owner = read_owner(lock_path(run, "run"))
        assert owner is not None and owner.token == token
        assert (owner.pid, owner.host) == (os.getpid(), socket.gethostname())
        assert shlex.join(sys.argv[1:]) in owner.command and not owner.is_gone()
        acquire(run, "stage")  # the same process again
    assert list(run.root.iterdir()) == []


@pytest.mark.parametrize("held", ["run", "stage"])
@pytest.mark.parametrize("wanted", ["run", "stage"])
def test_a_second_process_is_refused_by_name(
    run: RunFolder, other: subprocess.Popen, held: Any, wanted: Any
):
    leave_lock(run, other.pid, held)
    with pytest.raises(ValueError) as caught:
        acquire(run, wanted)
    message = str(caught.value)
    assert re.search(
        r"run is in use by `chatllama run a\.yaml` \(process \d+ on .*, for 1 h", message
    )
    assert f"kill {other.pid}" in message
    assert not lock_path(run, wanted).exists() or held == wanted
    acquire(run, "stage", token="t")  # a stage of that very `chatllama run`


def test_the_lock_of_an_ended_process_is_taken_over(
    run: RunFolder, other: subprocess.Popen, capsys: pytest.CaptureFixture[str]
):
    leave_lock(run, other.pid, "run")
    leave_lock(run, other.pid, "stage")
    other.kill()
    other.wait()
    acquire(run, "run")
    assert "was left locked by `chatllama run a.yaml`" in capsys.readouterr().err
    owner = read_owner(lock_path(run, "run"))
    assert owner is not None and owner.pid == os.getpid()
    assert not lock_path(run, "stage").exists()


def test_a_later_process_with_the_same_number_is_another(run: RunFolder, other: subprocess.Popen):
    leave_lock(run, other.pid, started=psutil.Process(other.pid).create_time() - 60)
    acquire(run, "run")


def test_another_machine_is_never_overruled(run: RunFolder):
    leave_lock(run, os.getpid(), host="elsewhere")
    path = lock_path(run, "run")
    with pytest.raises(ValueError, match=rf"on elsewhere, for .* cannot be seen.* remove {path}"):
        acquire(run, "stage")


def test_an_unreadable_lock_is_named(run: RunFolder):
    run.root.mkdir()
    lock_path(run, "stage").write_text("{")
    with pytest.raises(ValueError, match=r"lock-stage is damaged: .* remove it"):
        acquire(run, "run")


def test_of_many_processes_one_gets_the_lock(run: RunFolder, other: subprocess.Popen):
    leave_lock(run, other.pid)
    other.kill()
    other.wait()
    hear, tell = os.pipe()
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                acquire(run, "run")
                os.write(tell, b"y")
            except ValueError:
                os.write(tell, b"n")
            signal.pause()
        children.append(child)
    answers = b""
    while len(answers) < 8:
        answers += os.read(hear, 8)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert sorted(answers) == sorted(b"nnnnnnny")


def test_another_machine_that_locks_in_between_is_first(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    # On a shared disk it may make the file between our look and our own file.
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok: self.write_text("theirs"))
    with pytest.raises(ValueError, match="has just been locked by another machine"):
        acquire(run, "run")
    assert lock_path(run, "run").read_text() == "theirs"
    monkeypatch.undo()


@pytest.mark.parametrize(
    "content",
    ["null", "[]", "", "{", "{}", "[" * 100_000, '{"host": 5}']
    + [{key: value} for key, value in (("pid", "1"), ("pid", None), ("pid", 1e9), ("host", []),
       ("started", "x"), ("since", None), ("token", 5), ("command", {}))],
)  # fmt: skip
def test_a_lock_of_another_shape_is_refused_with_the_remedy(run: RunFolder, content: Any):
    leave_lock(run, os.getpid())
    path = lock_path(run, "run")
    whole = json.loads(path.read_text())
    path.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(
        ValueError, match=r"lock-run is damaged: .*: if nothing runs there, remove it"
    ):
        acquire(run, "stage")
