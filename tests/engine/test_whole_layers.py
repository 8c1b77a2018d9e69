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
    for kind, found in first.items():
        for what in found.keys() & {"steps", "losses", "changed"}:
            assert found[what] == second[kind][what]
    return first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_sampling_fetches_each_layer_once(passes: dict[str, Any], dtype: str):
    assert passes[dtype]["steps"] == [LAYERS + OUTSIDE] * 5
    assert min(passes["plain float32"]["steps"]) > 20 * LAYERS  # without it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_fetches_each_layer_once(passes: dict[str, Any], dtype: str):
    assert passes[dtype]["scoring"] == LAYERS + OUTSIDE
    assert passes["plain float32"]["scoring"] > 20 * LAYERS
    assert passes["plain bfloat16"]["scoring"] == 2 * LAYERS + OUTSIDE  # one for each type


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["losses", "answers", "logprobs", "weights"])
def test_nothing_else_changes(passes: dict[str, Any], what: str, dtype: str):
    assert passes[dtype][what] == passes[f"plain {dtype}"][what]


def test_what_deepspeed_keeps_whole_is_not_rounded(passes: dict[str, Any]):
    assert passes["kept whole"]["changed"] == []
