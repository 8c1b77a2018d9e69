"""Under ZeRO-3 a decoder layer is fetched at once where nothing trains, and nowhere else."""

import json
from typing import Any

import pytest
import torch
from launching import launch
from tiny_models import tiny_config
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.slow

LAYERS = 4
OUTSIDE = 3
"""Embedding, last norm and LM head, of which each is a module of its own."""


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("passes")
    config = tiny_config()
    config.num_hidden_layers = LAYERS
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    launch("tests/workers/leaf_worker.py", folder / "base", folder)
    first, second = (json.loads((folder / f"passes-{r}.json").read_text()) for r in (0, 1))
    for kind in ("float32", "bfloat16", "plain"):
        assert first[kind]["steps"] == second[kind]["steps"]
        assert first[kind]["losses"] == second[kind]["losses"]
    return first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_sampling_fetches_each_layer_once(passes: dict[str, Any], dtype: str):
    assert passes[dtype]["steps"] == [LAYERS + OUTSIDE] * 5
    assert min(passes["plain"]["steps"]) > 20 * LAYERS  # without it


@pytest.mark.parametrize(("dtype", "types"), [("float32", 1), ("bfloat16", 2)])
def test_scoring_fetches_each_layer_once_for_each_type(
    passes: dict[str, Any], dtype: str, types: int
):
    assert passes[dtype]["scoring"] == types * LAYERS + OUTSIDE  # adapters are float32
    assert passes["plain"]["scoring"] > 20 * LAYERS


@pytest.mark.parametrize("what", ["losses", "answers", "logprobs", "weights"])
def test_nothing_else_changes(passes: dict[str, Any], what: str):
    assert passes["float32"][what] == passes["plain"][what]
