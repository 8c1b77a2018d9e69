"""Adapters of strangers get 400 with a reason, and nothing of them stays in memory."""

import gc
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from serving_setup import make_served_run, post, serving

from chatllama.inference.load import LoadedRun, load_run
from chatllama.runs.folder import RunFolder, write_record
from chatllama.runtime.files import file_hash

pytestmark = pytest.mark.slow
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_served_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)


@pytest.fixture(scope="module")
def loaded(run: RunFolder) -> LoadedRun:
    return load_run(run)


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def key(**values: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


CHANGES: list[Change] = [
    *(text("chatllama.json", content) for content in ("[]", "5", "{}", "[" * 100_000)),
    *(text("chatllama.json", f'{{"contract": {what}}}') for what in ("[]", "{}", '{"hash": 1}')),
    *(text("adapter_config.json", content) for content in ("[]", "null", "{}", "[" * 100_000, "{")),
    *(text("adapter_model.safetensors", content) for content in ("", "x" * 100, "\x08\0\0{}")),
    key(r=10**9), key(r=-1), key(r="8"), key(r=2), key(lora_alpha="x"), key(lora_alpha=None),
    key(target_modules=5), key(target_modules=[1]), key(target_modules=["nothing"]),
    key(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "lm_head"]),
]  # fmt: skip


def names(loaded: LoadedRun) -> set[str]:
    """Every parameter in memory, and every adapter that a layer holds."""
    layers = [module for module in loaded.model.modules() if isinstance(module, LoraLayer)]
    adapters = {name for layer in layers for name in (*layer.lora_A, *layer.scaling)}
    return {name for name, _ in loaded.model.named_parameters()} | adapters


def test_strange_adapters_are_refused_and_leave_nothing(run: RunFolder, loaded: LoadedRun) -> None:
    before = names(loaded)
    with serving(run, loaded) as url:
        for number, change in enumerate(CHANGES):
            folder = run.root / f"strange{number}"
            shutil.copytree(run.root / "extra", folder)
            change(folder)
            asked = {"lora_name": "strange", "lora_path": str(folder)}
            status, told = post(url, "/v1/load_lora_adapter", asked)
            assert status == 400, (number, told)
            assert told["error"]["message"].startswith("lora_path: "), told
            assert str(run.root) not in str(told)
            assert names(loaded) == before, number
        assert post(url, "/v1/completions", {"model": "policy", "prompt": "a"})[0] == 200


def test_an_adapter_that_is_not_as_its_run_wrote_it_is_refused(
    run: RunFolder, loaded: LoadedRun
) -> None:
    other = RunFolder(run.root / "other")
    names_of_files = ("adapter_model.safetensors", "adapter_config.json", "chatllama.json")
    shutil.copytree(run.root / "extra", other.policy_adapter)
    files = {f"ppo/policy/{n}": file_hash(other.policy_adapter / n) for n in names_of_files}
    empty = {key: {} for key in ("code", "packages", "config", "data", "parents")}
    base = {"path": "b", "fingerprint": None}
    written = {"begun": "2026-11-30", "finished": "2026-11-30", "base": base, "files": files}
    write_record(other, "ppo", written | empty)
    body = {"lora_name": "other", "lora_path": str(other.policy_adapter), "load_inplace": True}
    with serving(run, loaded) as url:
        assert post(url, "/v1/load_lora_adapter", body)[0] == 200
        for name in names_of_files:
            content = (other.policy_adapter / name).read_bytes()
            flipped = bytearray(content)
            flipped[len(content) // 2] ^= 1
            (other.policy_adapter / name).write_bytes(flipped)
            status, told = post(url, "/v1/load_lora_adapter", body)
            assert status == 400 and f"{name} is not what the stage wrote" in str(told)
            assert str(run.root) not in str(told)
            (other.policy_adapter / name).write_bytes(content)
        assert post(url, "/v1/load_lora_adapter", body)[0] == 200
        assert post(url, "/v1/unload_lora_adapter", {"lora_name": "other"})[0] == 200


@pytest.mark.parametrize(
    "change",
    [text("chatllama.json", '{"base": "b"}'), key(r=5), key(target_modules=["q_proj", "lm_head"])],
)
def test_fifty_refusals_take_no_memory(run: RunFolder, loaded: LoadedRun, change: Change) -> None:
    folder = run.root / "again"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.root / "extra", folder)
    change(folder)
    before = names(loaded)
    with serving(run, loaded) as url:

        def refused(times: int) -> None:
            for _ in range(times):
                asked = {"lora_name": "strange", "lora_path": str(folder)}
                assert post(url, "/v1/load_lora_adapter", asked)[0] == 400

        refused(5)
        first = tensors()
        refused(45)
        deadline = time.monotonic() + 10  # the reply comes before the engine drops the last error
        while tensors() > first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert tensors() <= first and names(loaded) == before


def tensors() -> int:
    gc.collect()
    return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError(), KeyError("x")])
def test_a_load_that_fails_half_way_leaves_nothing(
    run: RunFolder, loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    before = names(loaded)
    update, calls = LoraLayer.update_layer, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return update(self, *args, **kwargs)

    with serving(run, loaded) as url:
        asked = {"lora_name": "half", "lora_path": str(run.root / "extra")}
        with monkeypatch.context() as broken:
            for layer in {type(m) for m in loaded.model.modules() if isinstance(m, LoraLayer)}:
                update = layer.update_layer
                broken.setattr(layer, "update_layer", failing)
            assert post(url, "/v1/load_lora_adapter", asked)[0] == 400
        assert len(calls) == 3 and names(loaded) == before
        assert post(url, "/v1/load_lora_adapter", asked)[0] == 200
        assert post(url, "/v1/unload_lora_adapter", {"lora_name": "half"})[0] == 200
