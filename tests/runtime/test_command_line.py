"""Output that is only shown never ends the work: ASCII streams, closed pipes, lost terminals."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

STAGE = """
    from trainers.stages.arguments import run_stage
    run_stage(work)
"""
COMMAND = """
    from chatllama import cli
    from trainers.stages import pipeline
    pipeline.run_pipeline = lambda *args, **kwargs: work()
    raise SystemExit(cli.main(["run", "x.yaml"]))
"""
WORK = """
    import os, sys
    from pathlib import Path
    from chatllama.reporting.display import PlainDisplay

    def work():
        display = PlainDisplay("sft", 2, "t")
        for step in (1, 2):
            display.show_sample(step, "Say it\\u2019s fine", {text!r}, 0.5)
            display.update(step, {{"sft/loss": 1.0}})
            print("a note", file=sys.stderr, flush=True)
            print("n" * 100_000)
        Path("done").write_text("all")
"""
COMMAND_DOOR = pytest.param(COMMAND, id="command", marks=pytest.mark.slow)
DOORS = pytest.mark.parametrize("door", [pytest.param(STAGE, id="stage"), COMMAND_DOOR])


def start(door: str, text: str, folder: Path, **options) -> subprocess.Popen:
    code = textwrap.dedent(WORK).format(text=text) + textwrap.dedent(door)
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **options.pop("env", {})}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=folder, env=environment, **options)


@DOORS
@pytest.mark.parametrize("text", ["it\u2019s", "\u00e4\u4e2d", "half \ud83d"])
def test_an_ascii_stream_shows_escapes(door: str, text: str, tmp_path: Path) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    process = start(door, text, tmp_path, env=ascii_only, stdout=-1, stderr=-1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert text.encode("ascii", "backslashreplace") in out and (tmp_path / "done").is_file()


@DOORS
@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_closed_pipe_is_ignored(door: str, closed: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    rest = subprocess.DEVNULL
    streams = {"stdout": rest, "stderr": rest, closed: writer}
    if closed == "both":
        streams = {"stdout": writer, "stderr": writer}
    process = start(door, "x", tmp_path, **streams)
    os.close(writer)
    assert process.wait(timeout=60) == 0 and (tmp_path / "done").is_file()


@pytest.mark.parametrize("text", ["x", "\u4e2d " * 900])
def test_a_closed_pipe_is_ignored_also_by_what_is_still_buffered(text: str) -> None:
    code = "from chatllama.runtime.command_line import shown_only\n"
    code += f"with shown_only('stdout'):\n    print({text!r})"
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": "", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, stdout=writer, stderr=-1, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@DOORS
def test_streams_that_are_not_open_are_ignored(door: str, tmp_path: Path) -> None:
    process = start(door, "x", tmp_path, preexec_fn=lambda: os.closerange(1, 3))
    assert process.wait(timeout=60) == 0 and (tmp_path / "done").is_file()


def test_a_terminal_that_goes_away_lets_the_stage_save(tmp_path: Path) -> None:
    work = """
    import time
    from chatllama.runs import interruption
    from pathlib import Path
    from trainers.stages.arguments import run_stage

    def work():
        with interruption.steps():
            Path("begun").touch()
            while interruption._signals.received is None:
                time.sleep(0.01)
            print("the step is done", flush=True)
            Path("saved").touch()

    run_stage(work)
    """
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-c", textwrap.dedent(work)])
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert (tmp_path / "saved").is_file()


def test_answers_to_a_closed_pipe_end_the_command() -> None:
    """Where stdout is the result, nobody reads the rest, and the command stops quietly."""
    code = """
    from chatllama import cli
    from chatllama.inference import batch
    def answers(*_):
        for _ in range(100_000):
            print("x" * 100)
        raise AssertionError("went on")
    batch.generate_command = answers
    raise SystemExit(cli.main(["generate", "RUN", "Hello"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, stdin=subprocess.DEVNULL)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 0
