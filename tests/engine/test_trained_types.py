"""What is trained is float32 in every stage, also on a base that says it is of 4 or 8 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import ppo_config
from safetensors.torch import load_file
from tiny_models import LORA, tiny_llama

from chatllama.model.roles import Adapter, RoleModel
from chatllama.runs.checkpoints import step_folders
from chatllama.runs.folder import STAGES, RunFolder
from trainers.engine.engine import Engine
from trainers.ppo import model as ppo
from trainers.reward import model as reward
from trainers.sft import model as sft

BUILDERS = {"sft": sft.build_engine, "reward": reward.build_engine, "ppo": ppo.build_engine}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("stage", "name"),
    [("sft", "lora_A.policy"), ("reward", "heads.reward"), ("ppo", "lora_B.value")],
)
def test_a_stage_that_would_train_16_bits_does_not_begin(stage: str, name: str, kind: torch.dtype):
    roles = {"sft": ("policy",), "reward": ("reward",), "ppo": ("policy", "value")}[stage]
    heads = tuple(role for role in ("reward", "value") if role in roles)
    cfg = ppo_config("unused", "unused")
    adapters = {role: Adapter(LORA, trainable=True) for role in roles}
    model = RoleModel(tiny_llama(), adapters, heads=heads)
    BUILDERS[stage](cfg, model)
    found = next(p for n, p in model.named_parameters() if name in n)
    found.data = found.data.to(kind)  # as TRL does on a base in 4 or 8 bits
    with pytest.raises(AssertionError, match="trained parameters must be float32"):
        BUILDERS[stage](cfg, model)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kills.run import prepare

    folder = tmp_path_factory.mktemp("types")
    prepare(folder)
    return folder


@pytest.mark.slow
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
