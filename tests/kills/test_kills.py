"""A small sample of `make kills`: training killed at random moments ends with equal weights."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_training_ends_with_the_weights_of_the_uninterrupted():
    script = Path(__file__).parent / "run.py"
    command = [sys.executable, str(script), "--kills", "4", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "4 kills, nothing lost" in done.stdout
