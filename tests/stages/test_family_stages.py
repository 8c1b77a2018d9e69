"""Every family through SFT, reward model and PPO: one process, two ranks, and resuming."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from workers.family_worker import FAMILIES, LARGE, metrics, prepare, prepare_large, run_stages
from workers.resume_worker import train

from chatllama.model.adapters import WEIGHTS, load_adapter
from chatllama.runs import interruption
from chatllama.runs.folder import STAGES, RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All runs, of one process and of two ranks; read only."""
    folder = tmp_path_factory.mktemp("families")
    prepare(folder)
    prepare_large(folder)
    try:
        for name in FAMILIES:
            run_stages(folder, name, "alone")
        launch("tests/workers/family_worker.py", folder)
        yield folder
    finally:
        interruption.restore_default_handlers()


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_give_what_one_process_gives(name: str, zero: int, folder: Path) -> None:
    alone, split = RunFolder(folder / "alone" / name), RunFolder(folder / f"zero-{zero}" / name)
    expected, found = metrics(alone), metrics(split)
    assert expected.keys() == found.keys() == set(STAGES)
    for stage in STAGES:
        assert len(found[stage]) == len(expected[stage]) >= 2
        for mine, theirs in zip(found[stage], expected[stage], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5), stage
    for adapter in ("sft/adapter", "reward/adapter", "ppo/policy", "ppo/value"):
        mine, theirs = (load_adapter(run.root / adapter).state for run in (split, alone))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", FAMILIES)
def test_resumed_is_bit_equal(name: str, stage: Any, folder: Path, tmp_path: Path) -> None:
    whole, cut = RunFolder(folder / "alone" / name), RunFolder(tmp_path / "cut")
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(whole.stage(earlier), cut.stage(earlier))
    for kept in ("config.yaml", "lineage.json"):
        shutil.copy(whole.root / kept, cut.root / kept) if stage != "sft" else None
    step = whole.checkpoints(stage) / "step-1"
    shutil.copytree(step, cut.checkpoints(stage) / "step-1")
    shutil.copy(whole.metrics(stage), cut.stage(stage))
    train(stage, [str(folder / f"{name}.yaml"), f"run_dir={cut.root}", "--resume"])
    assert metrics(cut)[stage] == metrics(whole)[stage]
    files = [f.relative_to(whole.root) for f in whole.stage(stage).glob(f"*/{WEIGHTS}")]
    assert files
    for file in files:
        assert (cut.root / file).read_bytes() == (whole.root / file).read_bytes(), file


def test_a_tied_1b_through_zero_3(folder: Path) -> None:
    run = RunFolder(folder / "zero-3" / LARGE)
    found = metrics(run)
    assert found["sft"] and found["ppo"][-1]["step"] == 1
    base: Any = AutoModelForCausalLM.from_pretrained(folder / LARGE, dtype=torch.float32)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.config.hidden_size == 2048 and base.config.vocab_size == 128256
    for adapter in (run.sft_adapter, run.policy_adapter):
        state = load_adapter(adapter).state
        assert all(tensor.numel() and tensor.any() for tensor in state.values())
        assert not any("lm_head" in key or "embed" in key for key in state)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = base(tokens).logits
        policy = PeftModel.from_pretrained(base, str(run.policy_adapter))
        assert not torch.allclose(policy(tokens).logits, before, atol=1e-4)
