"""The plan against what DeepSpeed allocates: two ranks, all ZeRO stages, LoRA and whole models."""

import json
from pathlib import Path

import pytest
from launching import launch
from tiny_models import tiny_config
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(tiny_config(vocabulary=512, hidden=192)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_plan_is_what_two_ranks_allocate(base: Path, tmp_path: Path, zero: int) -> None:
    launch("tests/workers/memory_worker.py", base, tmp_path, zero)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{zero}-{rank}.json").read_text())
        for kind, sizes in found.items():
            between = sizes["planned held"] / sizes["held"]
            most = sizes["planned"] / sizes["most"]
            assert between == pytest.approx(1, abs=0.02), (kind, sizes)
            assert most == pytest.approx(1, abs=0.1), (kind, sizes)
