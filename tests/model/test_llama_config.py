"""config.json of strangers: refused in words before a module is built or memory allocated."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FORMS, tiny_llama

from chatllama.config.model import BackboneSection
from chatllama.model import backbone
from chatllama.model.backbone import load_backbone
from chatllama.model.llama_config import tensor_shapes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(base: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(base, tmp_path / "copy")


def refused(folder: Path, words: str) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match=rf"(?s)backbone\.path: .*{words}"):
        load_backbone(BackboneSection(path=str(folder), dtype="float32"), str(folder))
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    "changes",
    [
        {key: value}
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        for value in (-4, 0, 2**62, 2.5, float("nan"), [3])
    ]
    + [
        {"num_hidden_layers": 3_000_000}, {"num_hidden_layers": 60_000}, {"num_hidden_layers": "2"},
        {"vocab_size": None}, {"rms_norm_eps": float("nan")}, {"rms_norm_eps": "x"},
        {"num_key_value_heads": 3}, {"head_dim": 7}, {"head_dim": -8}, {"pad_token_id": 10**6},
        {"hidden_act": "nothing"}, {"hidden_act": 5}, {"tie_word_embeddings": "no"},
        {"rope_parameters": {"rope_type": "nothing", "rope_theta": 1e4}}, {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}},
        {"rope_parameters": {"rope_type": 5}}, {"quantization_config": [1]},
        {"quantization_config": {"quant_method": {}}}, {"quantization_config": {"a": 1}},
        {"transformers_weights": "../x.safetensors"}, {"transformers_weights": "model.safetensors"},
        {"sliding_window": "x"}, {"sliding_window": 0},
        {"model_type": 5}, {"model_type": None}, {"architectures": 5}, {"hidden_size": "32"},
        {"num_hidden_layers": 5000, "hidden_size": 2**19}, {"attention_bias": True},
    ],
)  # fmt: skip
def test_keys_that_make_no_llama(
    damaged: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise SystemExit("weights were read")

    if "quantization_config" not in changes:
        monkeypatch.setattr(backbone.AutoModelForCausalLM, "from_pretrained", loaded)
    file = damaged / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    key = next(iter(changes))
    told = {"attention_bias": r"such as \S+bias", "model_type": "", "quantization_config": "quanti"}
    refused(damaged, told.get(key, key))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", "null", "", "{", "[" * 100_000, '"text"', "5", "\xff"])
def test_files_that_hold_no_object(damaged: Path, name: str, content: str) -> None:
    (damaged / name).write_text(content, "latin-1")
    refused(damaged, rf"{name} is damaged")


def test_files_that_are_none(damaged: Path) -> None:
    (damaged / "config.json").unlink()
    os.mkfifo(damaged / "config.json")
    refused(damaged, "config")
    (damaged / "config.json").unlink()
    (damaged / "config.json").mkdir()
    refused(damaged, "config")


def test_an_adapter_does_not_lead_to_another_model(base: Path, damaged: Path) -> None:
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (damaged / "adapter_config.json").write_text(json.dumps(content))
    refused(damaged, "is an adapter")


@pytest.mark.parametrize("form", FORMS)
def test_shapes_are_those_of_transformers_model(form: str) -> None:
    llama = tiny_llama(form=form)
    expected = {name: tuple(p.shape) for name, p in llama.named_parameters()}
    assert dict(tensor_shapes(llama.config)) == expected


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 70}, {"vocab_size": 2**20}, {"intermediate_size": 48}, {"hidden_size": 64},
     {"intermediate_size": 2**18}, {"num_key_value_heads": 4}],
    ids=str,
)  # fmt: skip
def test_shapes_are_compared_before_a_model_is_built(
    changes: dict[str, int], damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: Any, **options: Any) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr(backbone.AutoModelForCausalLM, "from_pretrained", built)
    file = damaged / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(damaged, r"has shape \(\d+, \d+\), but by config\.json it should have")
