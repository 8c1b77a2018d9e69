"""Weights go from the files to the device that they are for, and are held nowhere in between."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import TinyRun, tokenizer_of
from tiny_models import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from chatllama.config.model import BackboneSection
from chatllama.inference.load import load_run
from chatllama.model import backbone
from chatllama.model.backbone import load_backbone
from chatllama.runs.folder import RunFolder
from trainers.ppo.model import build_roles
from trainers.reward.model import build_reward_model
from trainers.sft.model import build_policy


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("placement"), tiny_tokenizer_dir)


def section(path: Path | str, dtype: str = "float32") -> BackboneSection:
    return BackboneSection.model_validate({"path": str(path), "dtype": dtype})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_read_onto_the_device(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, dtype: str
):
    # The meta device stands for a GPU: what is on it takes no memory here.
    monkeypatch.setattr(backbone, "device", lambda: torch.device("meta"))
    llama = load_backbone(section(tiny.base, dtype), tiny.base)
    assert {str(p.device) for p in llama.parameters()} == {"meta"}
    assert {p.dtype for p in llama.parameters()} == {getattr(torch, dtype)}
    assert not any(hasattr(module, "_hf_hook") for module in llama.modules())


DOORS: dict[str, Callable[[TinyRun, RunFolder], object]] = {
    "sft": lambda tiny, run: build_policy(tiny.config(), run),
    "sft of all weights": lambda tiny, run: build_policy(tiny.config(lora=None), run),
    "reward": lambda tiny, run: build_reward_model(tiny.config(), run, tokenizer_of(tiny.base), 0),
    "ppo": lambda tiny, run: build_roles(tiny.config(), run, tokenizer_of(tiny.base)),
    "inference": lambda tiny, run: load_run(run, tiny.config()),
}


@pytest.mark.parametrize("zero3", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_every_stage_reads_onto_its_gpu_unless_zero3_splits_the_weights(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, door: str, zero3: bool
):
    gpu = torch.device("cuda", 1)
    placed: list[Any] = []
    original = backbone.AutoModelForCausalLM.from_pretrained

    def loads(*args: Any, **kwargs: Any) -> Any:
        placed.append(kwargs.pop("device_map", None))
        return original(*args, **kwargs)

    monkeypatch.setattr(backbone, "device", lambda: gpu)
    monkeypatch.setattr(backbone, "is_deepspeed_zero3_enabled", lambda: zero3)
    monkeypatch.setattr(backbone.AutoModelForCausalLM, "from_pretrained", loads)
    DOORS[door](tiny, RunFolder(tiny.folder))
    assert placed == [None if zero3 else {"": gpu}]


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


@pytest.mark.slow
def test_the_host_holds_less_than_a_shard_while_weights_go_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **shape))
    size, shard = sum(p.numel() * 4 for p in model.parameters()), 30 * 10**6
    model.save_pretrained(tmp_path, max_shard_size=shard)
    del model
    monkeypatch.setattr(backbone, "device", lambda: torch.device("meta"))
    load_backbone(section(tmp_path, "bfloat16"), str(tmp_path))  # what the first load imports
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.001)

    before, watcher = anonymous_bytes(), threading.Thread(target=watch)
    watcher.start()
    load_backbone(section(tmp_path, "bfloat16"), str(tmp_path))
    ended.set()
    watcher.join()
    assert size > 4 * shard and 0 < peak[0] < before + shard


def test_on_the_cpu_the_weights_are_the_file_s(tmp_path: Path):
    llama = tiny_llama()
    llama.save_pretrained(tmp_path)
    loaded = load_backbone(section(tmp_path), str(tmp_path))
    for name, tensor in llama.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].device == torch.device("cpu")
