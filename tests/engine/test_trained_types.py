"""What is trained is float32 in every stage, also on a base that says it is of 4 or 8 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatllama.runs.checkpoints import step_folders
from chatllama.runs.folder import STAGES, RunFolder
from trainers.engine.engine import Engine
from trainers.ppo import model as ppo
from trainers.reward import model as reward
from trainers.sft import model as sft

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kills.run import prepare

    folder = tmp_path_factory.mktemp("types")
    prepare(folder)
    return folder


@pytest.mark.parametrize("flag", ["is_loaded_in_4bit", "is_loaded_in_8bit"])
def test_two_steps_of_every_stage(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
):
    from kills.run import MAINS

    def flagged(load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any, **kwargs: Any) -> Any:
            llama = load(*args, **kwargs)
            setattr(llama, flag, True)
            return llama

        return loaded

    seen: list[set[torch.dtype]] = []
    step = Engine.step

    def observed(engine: Engine, *args: Any) -> float:
        norm = step(engine, *args)
        trained = [p for group in engine.trained.values() for p in group]
        seen.append({kind for p in trained if p.grad is None for kind in (p.dtype,)})
        assert getattr(engine.model.llama, flag)
        return norm

    monkeypatch.setattr(Engine, "step", observed)
    for module in (sft, reward, ppo):
        monkeypatch.setattr(module, "load_backbone", flagged(module.load_backbone))
    run = RunFolder(tmp_path / "run")
    settings = ["sft.steps=2", "reward.steps=2", "ppo.steps=2", "backbone.dtype=bfloat16"]
    for stage in STAGES:
        MAINS[stage]([str(prepared / "config.yaml"), f"run_dir={run.root}", *settings])
        saved = step_folders(run.checkpoints(stage))
        assert [folder.name for folder in saved] == ["step-1", "step-2"]
        for folder in saved:
            tensors = load_file(folder / "trained-0.safetensors")
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(seen) >= 6 and set().union(*seen) == {torch.float32}
