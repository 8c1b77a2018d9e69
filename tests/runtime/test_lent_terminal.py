"""A process of a stage: what it says itself is on the terminal, what libraries say is in a log."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatllama.runtime.lent_terminal import VARIABLE
from trainers.stages.processes import run_to_end

CHILD = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from chatllama.runtime import lent_terminal
lent_terminal.take_terminal()
logging.getLogger("lib").addHandler(logging.StreamHandler())
lent_terminal.log_apart(Path(sys.argv[1]) if sys.argv[1:] else None)
print("result")
print("our warning", file=sys.stderr)
os.write(2, b"noise of C\\n")
logging.getLogger("lib").warning("noise of a logger")
logging.getLogger("other").warning("noise without handler")
warnings.warn("noise by warnings")
subprocess.run(["echo", "noise of a child"])
assert lent_terminal.VARIABLE not in os.environ
print(lent_terminal.is_lent())
lent_terminal.give_back()
"""
NOISE = ("of C", "of a logger", "without handler", "by warnings", "of a child")


def never() -> bool:
    return False


def test_the_run_lends_its_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    assert run_to_end([sys.executable, "-c", CHILD], os.environ, never, log) == 0
    shown = capfd.readouterr()
    assert shown.out == "result\nTrue\n" and shown.err == "our warning\n"
    text = log.read_text()
    assert text.startswith("before\n") and all(f"noise {each}" in text for each in NOISE)


@pytest.mark.parametrize("lender", [None, "/nonexistent/terminal"])
def test_a_stage_that_is_started_by_hand_divides_its_own_streams(
    tmp_path: Path, lender: str | None
) -> None:
    log = tmp_path / "sft" / "log.txt"
    environment = os.environ | ({VARIABLE: lender} if lender else {})
    command = [sys.executable, "-c", CHILD, str(log)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "result\nFalse\n" and done.stderr == "our warning\n"
    assert all(f"noise {each}" in log.read_text() for each in NOISE)
