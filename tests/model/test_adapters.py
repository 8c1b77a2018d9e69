"""Adapters that ask for other arithmetic than plain LoRA are refused by one check."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatllama.config.model import LoraSection
from chatllama.model.adapters import load_adapter, save_adapter

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "policy"
    state = {NAME.format("A"): torch.ones(2, 8), NAME.format("B"): torch.ones(8, 2)}
    save_adapter(folder, state, LoraSection(r=2, alpha=4), {"base": "b", "stage": "ppo"})
    return folder


def changed(saved: Path, folder: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(saved, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_rslora": True}, "use_rslora is True"),
        ({"use_dora": True}, "use_dora is True"),
        ({"alpha_pattern": {"q_proj": 64}}, "alpha_pattern is {'q_proj': 64}"),
        ({"rank_pattern": {"^model": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layers_to_transform": [1]}, "layers_to_transform"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save is ['embed_tokens']"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_of_next_year": {"scale": 2}}, "use_of_next_year"),
        ({"target_modules": ".*q_proj"}, "'.*q_proj' is a regular expression"),
    ],
)
def test_other_arithmetic_is_refused_by_its_key(
    saved: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{re.escape(named)}"):
        load_adapter(changed(saved, tmp_path / "other", changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "gaussian", "peft_version": "0.9.0", "use_of_next_year": None},
        {"revision": "main", "inference_mode": False, "layers_to_transform": []},
        {"use_rslora": False, "rank_pattern": {}, "modules_to_save": []},
    ],
)
def test_keys_that_change_nothing_are_no_hindrance(
    saved: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    lora = load_adapter(changed(saved, tmp_path / "same", changes)).lora
    assert (lora.r, lora.alpha, lora.target_modules) == (2, 4.0, ["q_proj"])


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def key(file: str, **values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tensors(**state: torch.Tensor) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        weights = folder / "adapter_model.safetensors"
        names = {NAME.format(k) if len(k) == 1 else k: v for k, v in state.items()}
        save_file(load_file(weights) | names, weights, metadata={"format": "pt"})

    return change


STRANGE = [
    *(text(name, content) for name in ("adapter_config.json", "chatllama.json")
      for content in ("[]", "null", "", "{", "5", "[" * 100_000, '{"a":' * 50_000, "\0", "{}")),
    *(text("adapter_model.safetensors", content) for content in ("", "x" * 100, "\x08\0\0{}")),
    *(key("adapter_config.json", r=r) for r in (10**9, 60_000, -1, 0, "2", None, [2], 2.5, 3)),
    *(key("adapter_config.json", lora_alpha=a) for a in (float("nan"), "x", None, -1, 1e400, [])),
    *(key("adapter_config.json", target_modules=t) for t in
      (5, [1], [], ["nothing"], ["q_proj", "lm_head"], {"q_proj": 1}, None, ["q_proj", "v_proj"])),
    key("adapter_config.json", lora_dropout="x"), key("adapter_config.json", peft_type=[]),
    key("adapter_config.json", modules_to_save=5), key("adapter_config.json", modules_to_save={}),
    key("chatllama.json", base=5), key("chatllama.json", base=None),
    key("chatllama.json", base_fingerprint=5), key("chatllama.json", contract=[]),
    key("chatllama.json", stage={}),
    tensors(A=torch.ones(3, 8)), tensors(A=torch.ones(2, 8, 1)), tensors(B=torch.ones(8)),
    tensors(other=torch.ones(2, 2)), tensors(**{NAME.format("A")[:-20]: torch.ones(2, 8)}),
    tensors(**{NAME.format("A").replace("q_p", "v_p"): torch.ones(2, 8)}),
    tensors(**{"base_model.model.score.weight": torch.ones(2, 8)}),
    tensors(**{"base_model.model.score.other": torch.ones(1, 8)}),
    tensors(**{"base_model.model.score.bias": torch.ones(1)}),
]  # fmt: skip


@pytest.mark.parametrize("change", STRANGE)
def test_files_of_strangers_are_refused_by_name(
    saved: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    folder = shutil.copytree(saved, tmp_path / "strange")
    change(folder)
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"strange(/\w+\.json)?( is damaged)?: "):
        load_adapter(folder)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_module_with_one_of_its_two_matrices_is_refused(
    saved: Path, tmp_path: Path, part: str
) -> None:
    folder = shutil.copytree(saved, tmp_path / "lone")
    state = load_file(folder / "adapter_model.safetensors")
    other = NAME.format(part).replace("layers.0", "layers.1")
    save_file(
        {**state, other: state[NAME.format(part)].clone()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"layers\.1\..* has one of its two matrices only"):
        load_adapter(folder)
