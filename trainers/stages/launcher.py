"""A stage's ranks and machines, command line and environment.

Which stages run is decided in `pipeline.py`; `processes.py` runs the command.
"""

import os
import runpy
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from chatllama.config.batch_sizes import check_batches
from chatllama.config.errors import ConfigError
from chatllama.config.schema import Config
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runtime.command_line import printable
from chatllama.runtime.gpu import has_gpu_driver

SCRIPTS: dict[Stage, str] = {"sft": "train_sft.py", "reward": "train_rm.py", "ppo": "train_ppo.py"}
CPU_RANKS = 2
START = "--- "
"""Begins a start in the log of a stage."""
LAST_LINES = 8
"""Of the log, shown after a failure."""


@dataclass(frozen=True)
class Launch:
    """How the stages are started.

    Raises:
        ValueError: a number or the hostfile is invalid.
    """

    num_gpus: int | None = None
    """Processes on this machine (per machine, with a hostfile). None: see `choose_ranks`."""
    hostfile: Path | None = None
    """DeepSpeed's list of machines, `name slots=N` a line."""
    master_port: int | None = None
    """Port of rank 0. None: a free one (with a hostfile: DeepSpeed's default)."""
    node_rank: int | None = None
    """Start only the processes of this line of the hostfile, from 0. None: all, over ssh."""
    master_addr: str | None = None
    """Name or address at which the other machines reach the first one."""
    in_process: bool = False
    """The stages run in this process, without the launcher (`chatllama.train`)."""

    @property
    def arguments(self) -> list[str]:
        """The same as flags of `chatllama run`."""
        values = {name: value for name, value in vars(self).items() if name != "in_process"}
        given = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
        return [w for flag, value in given.items() if value is not None for w in (flag, str(value))]

    def __post_init__(self) -> None:
        if self.num_gpus is not None and self.num_gpus < 1:
            raise ValueError(f"--num-gpus {self.num_gpus}: must be at least 1")
        if self.master_port is not None and not 1 <= self.master_port <= 65535:
            raise ValueError(f"--master-port {self.master_port}: must be within 1 to 65535")
        if self.hostfile is not None and not self.hostfile.is_file():
            raise ValueError(f"--hostfile {self.hostfile}: no such file")
        if self.node_rank is None:
            if self.master_addr is not None and self.hostfile is None:
                raise ValueError("--master-addr is for several machines: give --hostfile too")
            return
        if self.hostfile is None or self.master_addr is None:
            raise ValueError("--node-rank needs --hostfile and --master-addr, equal on all nodes")
        machines = len(hostfile_slots(self.hostfile))
        if not 0 <= self.node_rank < machines:
            raise ValueError(
                f"--node-rank {self.node_rank}: {self.hostfile} names {machines} machines, which "
                f"are 0 to {machines - 1}"
            )

    @property
    def leads(self) -> bool:
        """Whether this machine writes the run folder's common files."""
        return not self.node_rank


def count_gpus() -> int:
    """GPUs that this process may use."""
    if not has_gpu_driver():
        return 0  # without importing torch, which takes seconds
    from chatllama.runtime.distributed import visible_gpus

    return visible_gpus()


def choose_ranks(cfg: Config, wanted: int | None, gpus: int, cores: int) -> int:
    """Processes on this machine: one per GPU, or up to two on a CPU.

    They are fewer if the batches do not divide by so many; `wanted` is honoured or refused.

    Raises:
        ValueError: the batches do not divide, or more GPUs are wanted than there are.
    """
    if wanted is not None:
        if gpus and wanted > gpus:
            raise ValueError(f"--num-gpus {wanted}: this machine has {gpus}")
        check_batches(cfg, wanted)
        return wanted
    for ranks in range(gpus or min(CPU_RANKS, cores), 1, -1):
        with suppress(ConfigError):
            check_batches(cfg, ranks)
            return ranks
    check_batches(cfg, 1)
    return 1


def hostfile_slots(hostfile: Path) -> list[int]:
    """Slots of each machine, in the order of the file.

    Raises:
        ValueError: names the first line that is not `name slots=N`.
    """
    slots = []
    for number, line in enumerate(hostfile.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        count = words[-1].removeprefix("slots=")
        if len(words) != 2 or not words[1].startswith("slots=") or not count.isdecimal():
            raise ValueError(f"{hostfile}, line {number}: {line!r} is not `name slots=N`")
        slots.append(int(count))
    if not slots:
        raise ValueError(f"{hostfile} names no machine")
    return slots


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def script_path(stage: Stage) -> Path:
    """The stage's script, which lies beside the chatllama package.

    Raises:
        ValueError: it is missing (a broken installation).
    """
    path = Path(__file__).resolve().parents[2] / SCRIPTS[stage]
    if not path.is_file():
        raise ValueError(f"{path} is missing: install chatllama again")
    return path


def run_here(stage: Stage, config: Sequence[str], resume: bool, lock: str) -> None:
    """Runs a stage in this process, as its script does without a launcher."""
    main = runpy.run_path(str(script_path(stage)))["main"]
    main([*config, "--run-lock", lock, *(["--resume"] if resume else [])])


def stage_command(
    stage: Stage,
    config: Sequence[str],
    ranks: int,
    gpus: int,
    launch: Launch,
    resume: bool,
    lock: str,
) -> list[str]:
    """The command line that runs a stage through the `deepspeed` launcher.

    Args:
        config: the YAML, and settings that replace its own.
        gpus: of this machine; 0 means CPU.
        resume: whether to go on from the newest checkpoint.
        lock: token of the run folder's lock, which the stage shares; empty: none.

    Raises:
        ValueError: the launcher or the script is missing.
    """
    command = [_deepspeed()]
    port = launch.master_port
    if launch.hostfile is not None:
        command += ["--hostfile", str(launch.hostfile)]
        if launch.num_gpus is not None:
            command += ["--num_gpus", str(launch.num_gpus)]
        if launch.master_addr is not None:
            command += ["--master_addr", launch.master_addr]
        if launch.node_rank is not None:
            command += ["--no_ssh", "--node_rank", str(launch.node_rank)]
        elif len(hostfile_slots(launch.hostfile)) > 1 and shutil.which("pdsh") is None:
            raise ValueError(
                "deepspeed starts the processes of other machines through pdsh, which is not "
                "installed here (Debian: apt install pdsh). Without it start `chatllama run` on "
                "every machine, with --node-rank and --master-addr (docs/multinode.md)"
            )
    else:
        # With --num_gpus the launcher would ignore CUDA_VISIBLE_DEVICES and take the first GPUs.
        visible = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.isdigit()]
        if gpus and len(visible) >= ranks:
            command += ["--include", f"localhost:{','.join(visible[:ranks])}"]
        else:
            command += ["--num_gpus", str(ranks)]
        port = port or free_port()
    if port is not None:
        command += ["--master_port", str(port)]
    command += ["--log_level", "error"]  # the stage prints what matters
    command += [str(script_path(stage)), *config]
    if lock:
        command += ["--run-lock", lock]
    return [*command, "--resume"] if resume else command


def _deepspeed() -> str:
    """The launcher of this Python's environment, else the one on the PATH."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise ValueError(f"no `deepspeed` beside {sys.executable} nor on the PATH: pip install it")
    return found


def stage_environment(ranks: int, cores: int, cpu_only: bool) -> dict[str, str]:
    """This process's environment with the cores divided over the ranks.

    This Python's tools are put on the PATH, where DeepSpeed looks for `ninja`. DS_ACCELERATOR keeps
    it from warning of a missing GPU in every process.
    """
    environment = dict(os.environ)
    if cpu_only:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    tools = str(Path(sys.executable).parent)
    path = environment.get("PATH", "")
    if tools not in path.split(os.pathsep):
        environment["PATH"] = tools + os.pathsep + path
    return environment


def open_log(run: RunFolder, stage: Stage, command: Sequence[str]) -> Path:
    """The file for what launcher and libraries say, with the command of this start at its end."""
    log = run.log(stage)
    log.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"{START}{now}\n{shlex.join(command)}\n")
    return log


def log_end(log: Path | None) -> str:
    """A sentence that names the log, and what its last start said at last; empty without one."""
    if log is None:
        return ""
    text = log.read_text(encoding="utf-8", errors="replace").rpartition(START)[2]
    lines = [printable(line) for line in text.splitlines()[2:][-LAST_LINES:]]
    if not lines:
        return f"Launcher and libraries said nothing else ({log}). "
    return (
        "\n  ".join([f"What launcher and libraries said is in {log}, which ends:", *lines]) + "\n"
    )
