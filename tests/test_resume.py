"""Exact resume on two ranks: SFT, reward model and PPO under ZeRO 0, 2 and 3, bit for bit."""

import json
from pathlib import Path

import pytest
from test_ppo_launch import PROJECT, launch

pytestmark = pytest.mark.slow


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path):
    from kills.run import prepare
    from workers.resume_worker import STOP_AFTER

    prepare(tmp_path)
    launch(str(PROJECT / "tests" / "workers" / "resume_worker.py"), str(tmp_path))
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
