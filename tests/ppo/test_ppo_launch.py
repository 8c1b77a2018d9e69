"""PPO on two ranks through the deepspeed launcher against one process, and its resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import PROJECT, launch
from ppo_runs import TinyRun
from workers.ppo_worker import OPTIONS, VARIANTS, run_variant

from chatllama.model.adapters import load_adapter
from chatllama.runs.folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("launch"), tiny_tokenizer_dir, members=2)


@pytest.fixture(scope="module")
def alone(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every kind of run in this one process (how ZeRO splits means nothing here)."""
    folder = tmp_path_factory.mktemp("alone")
    names = ("plain", "options", "trunk", "rloo")
    return {name: run_variant(tiny, folder, 2, name) for name in names}


def assert_equal_runs(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, tensor in expected["weights"].items():
        off = float((found["weights"][name] - tensor).abs().max())
        assert off < 1e-4, (name, off)
    samples = [[s[role] for role in ("base", "sft")] for s in expected["evaluation"]["samples"]]
    assert [[s[r] for r in ("base", "sft")] for s in found["evaluation"]["samples"]] == samples
    assert found["lonely"] == expected["lonely"] and found["lonely"][0]
    assert found["resumed"] and found["resumed_metrics"]


def test_one_process_resumes_exactly(alone: dict[str, dict[str, Any]]):
    for name, found in alone.items():
        assert found["resumed"] and found["resumed_metrics"], name
        assert len(found["metrics"]) == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_give_what_one_process_gives(
    tiny: TinyRun, alone: dict[str, dict[str, Any]], tmp_path: Path, stage: int
):
    names = ["plain", "options", "trunk", "rloo"]
    if stage == 3:
        names = ["plain", "trunk", "split options", "persistent"]
    worker = PROJECT / "tests" / "workers" / "ppo_worker.py"
    launch(worker, tiny.base, tiny.folder, tmp_path, stage, *names)
    ranks = [torch.load(tmp_path / f"out-{rank}.pt") for rank in (0, 1)]
    for name in names:
        expected = alone["options" if VARIANTS[name][0] is OPTIONS else name]
        for found in ranks:
            assert_equal_runs(found[name], expected)
        assert ranks[0][name]["metrics"] == ranks[1][name]["metrics"]
        run = RunFolder(tmp_path / name.replace(" ", "-"))
        for role, folder in (("policy", run.policy_adapter), ("ema", run.ema_adapter)):
            if folder.is_dir():
                state = load_adapter(folder).state
                own = {n: w for n, w in expected["weights"].items() if f".{role}.weight" in n}
                assert len(state) == len(own) > 0
                for n, tensor in own.items():
                    exported = state[n.removeprefix("backbone.").replace(f".{role}.", ".")]
                    assert float((exported - tensor).abs().max()) < 1e-4
