"""Adapters that ask for other arithmetic than plain LoRA are refused by one check."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

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
