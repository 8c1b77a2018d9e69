"""What ZeRO-3 gathers on every GPU when results are written: adapters and heads, or one tensor."""

import json
from pathlib import Path

import pytest
import torch
from launching import launch
from ppo_runs import TinyRun
from safetensors.torch import load_file

from chatllama.model.adapters import load_adapter
from chatllama.runs.folder import RunFolder

pytestmark = pytest.mark.slow

ADAPTERS = ("ppo, save", "ppo, export", "servers, publish", "reward, export", "sft, export")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("gathers")
    tiny = TinyRun.make(folder, tiny_tokenizer_dir)
    launch("tests/workers/gather_worker.py", tiny.base, tiny.folder, folder)
    return folder


def gathers_of(folder: Path) -> dict[str, list[list[str]]]:
    first, second = (json.loads((folder / f"gathers-{r}.json").read_text()) for r in (0, 1))
    assert first == second  # or the ranks would wait for each other
    return first


@pytest.mark.parametrize("phase", ADAPTERS)
def test_adapters_and_heads_are_gathered_and_nothing_of_the_base(folder: Path, phase: str):
    calls = gathers_of(folder)[phase]
    names = [name for call in calls for name in call]
    assert names
    assert [n for n in names if ".lora_" not in n and not n.startswith("heads.")] == []
    roles = {name.split(".")[-2] for name in names if ".lora_" in name}
    expected = {
        "ppo, save": {"reference", "ema"},
        "ppo, export": {"policy", "ema", "value"},
        "servers, publish": {"policy"},
        "reward, export": {"reward"},
        "sft, export": {"policy"},
    }
    assert roles == expected[phase]


def test_all_weights_are_gathered_one_tensor_at_a_time(folder: Path):
    calls = gathers_of(folder)["sft, export of all weights"]
    base = load_file(folder / "base" / "model.safetensors")
    assert [len(call) for call in calls] == [1] * len(base)
    exported = load_file(RunFolder(folder / "sft-full").full_model / "model.safetensors")
    assert exported.keys() == base.keys()
    for name, tensor in base.items():
        assert torch.equal(exported[name], tensor.float()), name


def test_what_was_written_is_whole(folder: Path):
    run = RunFolder(folder / "ppo")
    value = load_adapter(run.value_adapter)
    assert value.head["weight"].shape[0] == 1 and value.head["bias"].shape == (1,)
    parent = load_adapter(RunFolder(folder / "run").sft_adapter).state
    for path in (run.policy_adapter, run.ema_adapter):
        state = load_adapter(path).state
        assert state.keys() == parent.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in parent.items())
    reward = load_adapter(folder / "reward")
    assert (
        reward.head["weight"].any()
        and load_adapter(RunFolder(folder / "sft-lora").sft_adapter).state.keys() == parent.keys()
    )
