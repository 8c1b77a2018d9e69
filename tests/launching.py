"""Jobs through the deepspeed launcher, on the CPU and without a compiler; simulated machines."""

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parent.parent
LAUNCHER = Path(sys.executable).with_name("deepspeed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(ranks: int, script: Path, *arguments: object) -> list[str]:
    """`ranks` processes of a script on this machine."""
    launcher = [str(LAUNCHER), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return [*launcher, str(script), *map(str, arguments)]


def gone(pids: Iterable[int], seconds: float = 60) -> bool:
    """Whether all processes end within a time; one that only waits to be collected has ended."""
    deadline = time.monotonic() + seconds
    left = list(pids)
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [pid for pid in left if _runs(pid)]
    return not left


def _runs(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def launch(script: Path | str, *arguments: object) -> None:
    """A script on two ranks of this machine, to its good end; a name is looked for in the project.

    Raises:
        AssertionError: it failed.
    """
    done = subprocess.run(
        command(2, PROJECT / script, *arguments),
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CXX": "/nonexistent",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}",
        "PATH": f"{LAUNCHER.parent}:{os.environ['PATH']}",
        **more,
    }


@dataclass(frozen=True)
class Machine:
    """One of two: what to put before a command, into its environment, and where rank 0 is."""

    prefix: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    master_addr: str = "127.0.0.1"


@contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """Network namespaces joined by a cable, where they can be made; else this machine twice."""
    tag = uuid.uuid4().hex[:6]
    spaces, ends = [f"cl{tag}a", f"cl{tag}b"], [f"v{tag}a", f"v{tag}b"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (space, end) in enumerate(zip(spaces, ends, strict=True), start=1):
            ip("link", "set", end, "netns", space)
            ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", space, "link", "set", end, "up")
            ip("-n", space, "link", "set", "lo", "up")
        found = [
            Machine(["ip", "netns", "exec", space], {"GLOO_SOCKET_IFNAME": end}, "10.77.0.1")
            for space, end in zip(spaces, ends, strict=True)
        ]
    except (FileNotFoundError, subprocess.CalledProcessError):
        found = [Machine([]), Machine([])]
    try:
        yield found
    finally:
        if shutil.which("ip"):
            for space in spaces:
                with suppress(subprocess.CalledProcessError):
                    ip("netns", "del", space)


def start_on(machine: Machine, words: list[str], folder: Path) -> subprocess.Popen[str]:
    """The command on a machine, in a folder, with its output together."""
    return subprocess.Popen(
        [*machine.prefix, *words],
        env=environment(**machine.variables),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
