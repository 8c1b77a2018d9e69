import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from chatllama.config.model import LoraSection
from chatllama.config.schema import Config
from chatllama.model.families import smallest_window
from chatllama.planning.published import PUBLISHED, published_shape
from chatllama.planning.shape import read_shape
from chatllama.planning.source import find_shape

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
        ("HuggingFaceTB/smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M"),
        ("someone/Llama-2-7b", None),
    ],
)
def test_tuned_siblings_have_the_shape_of_their_base(name: str, listed: str | None) -> None:
    assert published_shape(name) == (PUBLISHED[listed] if listed else None)


@pytest.mark.parametrize(
    ("family", "tied", "more"),
    [
        ("llama", True, {}),
        ("llama", False, {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
        ("mistral", False, {"head_dim": 16}),
        ("qwen2", True, {}),
        ("qwen3", False, {"head_dim": 10}),
        ("qwen3", True, {"head_dim": 8, "attention_bias": True}),
    ],
)
def test_counts_are_those_of_transformers_and_peft(family: str, tied: bool, more: dict) -> None:
    config = AutoConfig.for_model(family, **SMALL, **more, tie_word_embeddings=tied)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    shape = read_shape(config.to_dict(), "here")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    for targets in ("all-linear", ["q_proj", "v_proj", "down_proj"]):
        lora = LoraSection(r=3, target_modules=targets)  # pyright: ignore[reportArgumentType]
        settings = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
        with torch.device("meta"):
            adapted: Any = get_peft_model(model, settings)
        names = dict(adapted.named_parameters())
        expected = sum(p.numel() for name, p in names.items() if "lora_" in name)
        assert shape.adapter_parameters(lora) == expected
        adapted.unload()


def test_a_qwen3_without_head_dim_has_transformers_own() -> None:
    found = read_shape({"model_type": "qwen3", **SMALL}, "here").head_dim
    assert found == AutoConfig.for_model("qwen3", **SMALL).head_dim == 128


@pytest.mark.parametrize(
    ("kind", "keys", "window"),
    [
        ("mistral", {"sliding_window": 4096}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": True}, 4096),
        ("qwen3", {"sliding_window": 64, "layer_types": ["full_attention"] * 3}, None),
        ("qwen3", {"sliding_window": 64, "layer_types": ["sliding_attention"] * 3}, 64),
        ("llama", {"sliding_window": 64}, None),
    ],
)
def test_windows_are_those_that_layers_have(kind: str, keys: dict, window: int | None) -> None:
    assert read_shape({"model_type": kind, **SMALL, **keys}, "here").window == window
    config = AutoConfig.for_model(kind, **SMALL, **keys)
    assert read_shape(config.to_dict(), "here").window == smallest_window(config)


def config_of(path: str, **backbone: Any) -> Config:
    return Config.model_validate({"run_dir": "unused", "backbone": {"path": path, **backbone}})


def test_the_local_folder_comes_before_the_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SMALL}))
    shape, where = find_shape(config_of(str(tmp_path)))
    assert shape.vocab_size == 99 and where == str(tmp_path / "config.json")
    named = config_of("huggyllama/llama-7b")
    assert find_shape(named)[0].parameters == 6_738_415_616
    assert find_shape(named, tmp_path / "config.json")[0].vocab_size == 99


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a model's config.json"),
        ("[]", "holds no mapping"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2' has no plan"),
        (json.dumps({"model_type": "llama", **SMALL, "vocab_size": "9"}), "vocab_size must be"),
        (json.dumps({"model_type": "llama", **SMALL, "num_hidden_layers": 0}), "positive integer"),
        ('{"model_type": "llama"}', "hidden_size must be a positive integer, not None"),
    ],
)
def test_a_config_json_that_is_none_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        find_shape(config_of(str(tmp_path)))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_folder_or_hub_id_without_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        find_shape(config_of(str(tmp_path)))
    for name in ("nobody/nothing-here", "not a hub id", "a/b/c"):
        with pytest.raises(ValueError, match=r"--model-config FILE"):
            find_shape(config_of(name))
