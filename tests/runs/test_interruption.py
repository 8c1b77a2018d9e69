"""Signals to stop: they wait for the end of a step, and end everything else at once."""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatllama.runs import interruption
from chatllama.runs.folder import RunFolder
from chatllama.runs.interruption import EXIT_CODE, Interrupted, steps, stop, stop_requested
from chatllama.runs.lock import acquire, lock_path, release_all
from chatllama.runtime.files import write_json
from trainers.stages import pipeline, refusals
from trainers.stages import processes as process_group
from trainers.stages.arguments import run_stage
from trainers.stages.pipeline import StageFailed
from trainers.stages.processes import run_to_end

SIGNALS = interruption.SIGNALS


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    # Shells start what runs in the background with SIGINT ignored, which would stay so.
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in SIGNALS}
    interruption.listen()
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)
    interruption._signals.__init__()


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", SIGNALS)
def test_between_steps_the_end_comes_at_once(signum: signal.Signals):
    with pytest.raises(Interrupted, match=f"ended by {signum.name} between steps"):
        send(signum)
    assert not issubclass(Interrupted, Exception)


def test_a_step_is_finished_and_saved_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run, done = RunFolder(tmp_path), []
    with pytest.raises(Interrupted, match="SIGUSR1: stage sft is saved at step 3"), steps():
        for step in range(1, 9):
            if step == 3:
                send(signal.SIGUSR1)
                send(signal.SIGUSR1)
            done.append(step)
            if stop_requested():
                stop(run, "sft", step)
    assert done == [1, 2, 3]
    assert json.loads(run.interrupted("sft").read_text()) == {"step": 3, "signal": "SIGUSR1"}
    assert capfd.readouterr().err.count("SIGUSR1: saving after this step") == 1


def test_a_signal_after_the_last_question_is_not_lost():
    with pytest.raises(Interrupted, match="between steps"), steps():
        send(signal.SIGTERM)


def test_errors_inside_steps_stay_errors():
    with pytest.raises(ZeroDivisionError), steps():
        send(signal.SIGTERM)
        raise ZeroDivisionError


def test_workers_that_inherit_the_handler_just_end():
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")  # signals before this one are Python's to forget
        time.sleep(60)
        os._exit(0)
    os.read(hear, 1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def exit_code_of(main) -> int:
    """Of a process that runs `main` as the scripts do."""
    child = os.fork()
    if child == 0:
        try:
            run_stage(main)
            os._exit(0)
        except BaseException:  # what escapes must not go on as a second pytest
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_exit_code_is_its_own_and_the_lock_goes(tmp_path: Path):
    run = RunFolder(tmp_path)

    def main() -> None:
        acquire(run, "stage")
        send(signal.SIGTERM)

    assert exit_code_of(main) == EXIT_CODE == 75
    assert not lock_path(run, "stage").exists()


@pytest.mark.parametrize("others", [[], [signal.SIGTERM], [signal.SIGTERM, signal.SIGUSR1]])
def test_ctrl_c_saves_and_exits_with_130(
    tmp_path: Path, others: list[signal.Signals], capfd: pytest.CaptureFixture[str]
):
    def main() -> None:
        with steps():
            for signum in (signal.SIGINT, *others):  # launchers add theirs
                send(signum)
            assert stop_requested()
            stop(RunFolder(tmp_path), "sft", 4)

    assert exit_code_of(main) == 130
    message = capfd.readouterr().err
    assert message.splitlines() == [
        "SIGINT: saving after this step, then ending",
        "SIGINT: stage sft is saved at step 4; go on with --resume",
    ]


def test_ctrl_c_between_steps_is_one_line(capfd: pytest.CaptureFixture[str]):
    assert exit_code_of(lambda: send(signal.SIGINT)) == 130
    message = capfd.readouterr().err
    assert message == "ended by SIGINT between steps: go on with --resume\n"


def test_a_second_ctrl_c_ends_the_stage_at_once(capfd: pytest.CaptureFixture[str]):
    def main() -> None:
        with steps():
            send(signal.SIGINT)
            send(signal.SIGINT)
            raise AssertionError("went on")

    assert exit_code_of(main) == 130
    assert capfd.readouterr().err.endswith("\nended by a second SIGINT: go on with --resume\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_signals_of_the_terminal_that_were_ignored_stay_so(signum: signal.Signals):
    """As under nohup, or in the background of a script."""
    signal.signal(signum, signal.SIG_IGN)
    interruption.listen()
    send(signum)
    interruption.restore_default_handlers()
    assert signal.getsignal(signum) is signal.SIG_IGN


@pytest.mark.parametrize(("code", "text"), [(28, "No space left"), (30, "Read-only file system")])
def test_faults_of_the_disk_are_the_users_to_mend(
    code: int, text: str, capfd: pytest.CaptureFixture[str]
):
    def main() -> None:
        raise OSError(code, os.strerror(code), "runs/x/metrics.jsonl")

    assert exit_code_of(main) == 2
    message = capfd.readouterr().err
    assert text in message and "runs/x/metrics.jsonl" in message and "Traceback" not in message


# --- chatllama run --------------------------------------------------------------------------------

ASKED = """
import os, signal, sys, time
if sys.argv[1] == "group":  # the launcher dies of the signal, its rank goes on
    if os.fork():
        time.sleep(60)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.5), open("saved", "w"), os._exit(75)))
open("pid.tmp", "w").write(str(os.getpid()))
os.rename("pid.tmp", "pid")
time.sleep(60)
"""


def started_pid(folder: Path) -> int:
    deadline = time.monotonic() + 60
    while not (folder / "pid").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    return int((folder / "pid").read_text())


def test_a_command_that_is_asked_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def ask() -> bool:
        os.kill(started_pid(tmp_path), signal.SIGUSR1)
        return True

    thread = threading.Thread(target=lambda: (started_pid(tmp_path), send(signal.SIGTERM)))
    thread.start()
    assert run_to_end([sys.executable, "-c", ASKED, "one"], os.environ, ask) == 75
    thread.join()
    assert (tmp_path / "saved").is_file()


def test_ranks_save_even_if_the_launcher_dies_of_the_same_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process_group, "GRACE_SECONDS", 0.1)  # less than saving takes

    def ask() -> bool:
        rank = started_pid(tmp_path)
        os.kill(os.getpgid(rank), signal.SIGTERM)
        os.kill(rank, signal.SIGUSR1)
        return True

    thread = threading.Thread(target=lambda: (started_pid(tmp_path), send(signal.SIGTERM)))
    thread.start()
    with pytest.raises(SystemExit) as caught:
        run_to_end([sys.executable, "-c", ASKED, "group"], os.environ, ask)
    thread.join()
    assert caught.value.code == 128 + 15 and (tmp_path / "saved").is_file()


def test_the_launcher_ignores_the_signal_that_is_for_the_ranks(tmp_path: Path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"
    assert run_to_end([sys.executable, "-c", code], os.environ, bool) == 0


@pytest.mark.parametrize("ending", ["code", "marker", "exit"])
def test_the_run_says_what_was_saved_and_ends_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
):
    run = RunFolder(tmp_path / "run")
    file = tmp_path / "my.yaml"
    text = f"run_dir: {run.root}\nbackbone: {{path: llama}}\nchat: {{template: llama2}}\n"
    file.write_text(text + "sft: {data: [{path: a.jsonl}]}\n")
    monkeypatch.setattr(pipeline, "count_gpus", lambda: 0)
    for name in ("input_problems", "model_problems"):  # there is no model
        monkeypatch.setattr(refusals, name, lambda *_: [])

    def told(*_: object) -> int:
        write_json(run.interrupted("sft"), {"step": 7, "signal": "SIGTERM"})
        if ending == "exit":
            raise SystemExit(143)
        return 75 if ending == "code" else 1

    monkeypatch.setattr(pipeline, "run_to_end", told)
    with pytest.raises(StageFailed, match=r"\(SIGTERM\) and is saved at step 7") as caught:
        pipeline.run_pipeline(str(file))
    assert caught.value.exit_code == 75
    assert f"chatllama run {run.config} --resume" in str(caught.value)
    assert not lock_path(run, "run").exists()


def test_rank_0_is_found_by_its_lock(tmp_path: Path):
    run = RunFolder(tmp_path)
    assert not pipeline._request_stop(run, "sft")
    acquire(run, "stage")
    with steps():
        assert pipeline._request_stop(run, "sft")
        assert stop_requested()
        interruption._signals.received = None
    release_all()
