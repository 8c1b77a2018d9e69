"""Exact resume on two ranks: SFT, reward model and PPO under ZeRO 0, 2 and 3, bit for bit."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parent.parent


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path):
    from kills.run import prepare
    from workers.resume_worker import STOP_AFTER

    prepare(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(PROJECT),
        "PATH": f"{launcher.parent}:{os.environ['PATH']}",
    }
    worker = PROJECT / "tests" / "workers" / "resume_worker.py"
    done = subprocess.run(
        [str(launcher), "--num_gpus", "2", "--master_port", str(port), str(worker), str(tmp_path)],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    adapters = {"sft": {"adapter"}, "reward": {"adapter"}, "ppo": {"policy", "policy-ema", "value"}}
    assert set(found) == {"0", "2", "3"}
    for zero, stages in found.items():
        for stage, each in stages.items():
            where = f"{stage} under ZeRO-{zero}"
            step = STOP_AFTER[stage]
            assert each["told"] == {"step": step, "signal": "SIGUSR1"}, where
            assert each["saved"] == [f"step-{step}"], where
            assert set(each["whole"]) == adapters[stage], where
            assert each["cut"] == each["whole"], where
