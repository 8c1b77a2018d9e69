"""The plan beside what a stage takes, and the message when memory runs out."""

import json
import sys
from pathlib import Path

import pytest
import torch

from chatllama.config.schema import Config
from chatllama.runs.folder import Stage
from trainers.stages import arguments, memory

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


def config(base: Path) -> Config:
    return Config.model_validate({"run_dir": str(base.parent), "backbone": {"path": str(base)}})


def test_a_stage_says_its_plan_and_then_what_it_took(base: Path) -> None:
    (line,) = memory.announcement(config(base), "ppo")
    assert line.startswith("memory: planned ") and "rollout" in line and "FITS" not in line
    text = memory.actual(config(base), "ppo")
    assert text.startswith("memory: at most ") and "resident, libraries included; planned" in text
    assert memory.peak_here() > 50e6


def test_a_model_without_a_plan_trains_all_the_same(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "other"}')
    (line,) = memory.announcement(config(base), "sft")
    assert "no plan" in line and "model_type 'other'" in line
    assert "planned" not in memory.actual(config(base), "sft")
    assert "no plan for this model" in memory.out_of_memory(config(base), "sft", "x")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nGPU 0 has ..."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(("script", "stage"), [("train_sft.py", "sft"), ("train_ppo.py", "ppo")])
def test_memory_that_runs_out_names_plan_and_keys(
    base: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, script: str, stage: Stage
) -> None:
    file = base / "a.yaml"
    data = f"{stage}: {{data: [{{path: x.jsonl}}]}}\n"
    file.write_text(f"run_dir: {base.parent}\nbackbone: {{path: {base}}}\n{data}")
    if stage == "ppo":
        file.write_text(f"{file.read_text()}reward: {{adapter: x}}\n")
    monkeypatch.setattr(sys, "argv", [script, str(file), f"{stage}.microbatch_size=4"])
    code, message = arguments._failure(error)
    assert code == 2 and "\n" not in message
    assert f"memory ran out in stage {stage} (" in message and "Planned were " in message
    assert f"{stage}.microbatch_size=2 (" in message, message
    assert "backbone.gradient_checkpointing=true (" in message


def test_other_errors_are_not_called_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for error in (RuntimeError("shapes do not match"), KeyError("memory")):
        with pytest.raises(type(error)):
            arguments._failure(error)
