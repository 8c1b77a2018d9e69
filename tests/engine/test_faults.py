"""One rank of a job fails: the job ends, and the first error is what the user sees."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import (
    LAUNCHER,
    PROJECT,
    command,
    environment,
    free_port,
    gone,
    start_on,
    two_machines,
)

from chatllama.runtime import distributed
from trainers.stages import arguments

WORKER = PROJECT / "tests" / "workers" / "fault_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "faulty", "code", "told"),
    [
        ("mistake", 1, 2, "fault_worker.py (rank 1): error: the first mistake"),
        ("crash", 0, 1, "fault_worker.py: error: RuntimeError: the first crash"),
        ("kill", 1, 256 - 9, "exits with return code = -9"),
    ],
)
def test_a_rank_that_fails_ends_the_job(
    tmp_path: Path, fault: str, faulty: int, code: int, told: str
):
    done = subprocess.run(
        command(2, WORKER, fault, faulty, tmp_path),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,  # a rank that waits would wait for half an hour
    )
    failed = (tmp_path / f"pid-{faulty}").stat().st_mtime
    assert time.time() - failed < 60  # takes about two seconds
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert output.count(told) == 1, output
    assert output.count("error: ") == (fault != "kill"), output  # nothing of the one that waited
    assert output.count("Traceback") == (fault == "crash"), output
    assert gone(pid_of(tmp_path, rank) for rank in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_for_good_ends_the_job(tmp_path: Path, stopped: int):
    done = subprocess.run(
        command(2, WORKER, "stop", stopped, tmp_path),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=150,  # 6 s are the limit; the launcher gives a rank 30 s to end
    )
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "another rank did not answer within 0.1 minutes (deepspeed.timeout_minutes)" in output
    assert "Traceback" not in output and "--resume" in output
    assert gone(pid_of(tmp_path, rank) for rank in (0, 1))


def pid_of(folder: Path, rank: int) -> int:
    return int((folder / f"pid-{rank}").read_text())


def pids_of(folder: Path) -> list[int]:
    """The two ranks' processes, once they have met."""
    deadline = time.monotonic() + 120
    while not all((folder / f"pid-{rank}").is_file() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)
    return [pid_of(folder, rank) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["deepspeed", "its launcher", "both"])
def test_ranks_whose_launcher_is_killed_are_named_by_the_next_start(tmp_path: Path, killed: str):
    started = subprocess.Popen(
        command(2, WORKER, "none", 0, tmp_path),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    pids = pids_of(tmp_path)
    try:
        launcher = psutil.Process(pids[0]).parent()
        assert launcher is not None and launcher.ppid() == started.pid
        if killed != "deepspeed":
            launcher.kill()
        if killed != "its launcher":
            started.kill()
        started.wait(60)
        time.sleep(1)
        again = subprocess.run(
            [sys.executable, str(WORKER), "mistake", "0", str(tmp_path)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert again.returncode == 2, again.stderr
        assert f"(process {pids[0]} on {socket.gethostname()}" in again.stderr
        assert f"wait for it, or stop it: kill {pids[0]}" in again.stderr
        psutil.Process(pids[0]).terminate()  # as that says; the other rank then ends by itself
        assert gone(pids) and not list(tmp_path.glob(".lock*"))
    finally:
        for pid in filter(psutil.pid_exists, pids):
            psutil.Process(pid).kill()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "early"])
def test_a_machine_that_fails_does_not_leave_the_other_waiting(tmp_path: Path, fault: str):
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    port = free_port()
    with two_machines() as machines:
        started = [
            start_on(
                machine,
                [
                    *(str(LAUNCHER), "--hostfile", "hosts", "--no_ssh", "--node_rank", str(number)),
                    *("--master_addr", machine.master_addr, "--master_port", str(port)),
                    *(str(WORKER), fault, "1", "."),
                ],
                tmp_path,
            )
            for number, machine in enumerate(machines)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in started]
    if fault == "kill":
        assert time.time() - (tmp_path / "pid-1").stat().st_mtime < 60
    host = socket.gethostname()
    assert [p.returncode for p in started] == [1, 256 - 9 if fault == "kill" else 2], outputs
    assert f"fault_worker.py (rank 0 on {host}): error: another rank has gone (" in outputs[0]
    assert "Traceback" not in outputs[0] + outputs[1]
    if fault == "early":
        told = f"fault_worker.py (rank 1 on {host}): error: a mistake before the ranks have met"
        assert told in outputs[1]
    else:
        assert (tmp_path / "views-0").read_text() == "[True, True]"  # one folder for both


def test_a_rank_that_outlives_its_launcher_s_patience_says_what_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    # On another node than the one that failed no launcher notices.
    codes: list[int] = []

    def main() -> None:
        raise RuntimeError("[pair.cc:538] Connection closed by peer [10.0.0.2]:4711\nmore")

    monkeypatch.setattr(arguments, "LOST_RANK_SECONDS", 0.0)
    monkeypatch.setattr(arguments.os, "_exit", codes.append)
    monkeypatch.setattr(distributed, "meet", lambda: None)
    monkeypatch.setattr(arguments.socket, "gethostname", lambda: "node7")
    config = str(PROJECT / "configs" / "quickstart.yaml")
    parts = ("backbone.from_scratch", "sft", "reward", "ppo")  # on four ranks
    words = ["/somewhere/train_sft.py", config, f"run_dir={tmp_path / 'run'}"]
    words += [f"{part}.microbatch_size=1" for part in parts]
    monkeypatch.setattr(sys, "argv", words)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("CROSS_SIZE", "2")):
        monkeypatch.setenv(name, value)
    arguments.run_stage(main)
    found = capsys.readouterr().err
    assert codes == [1]
    assert found.startswith(
        "train_sft.py (rank 3 on node7): error: another rank has gone ([pair.cc:538] Connection "
        "closed by peer [10.0.0.2]:4711). Its own output says why, on its own node"
    )
    assert "Traceback" not in found
