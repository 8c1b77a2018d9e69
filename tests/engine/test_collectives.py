"""What an optimizer step sends between two ranks, and the buffers that DeepSpeed makes for it."""

import json
from typing import Any

import pytest
from launching import launch
from tiny_models import tiny_llama
from workers import engine_worker

pytestmark = pytest.mark.slow

STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def found(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("collectives")
    launch("tests/workers/collectives_worker.py", base, folder)
    ranks = [json.loads((folder / f"out-{rank}.json").read_text()) for rank in (0, 1)]
    for name, out in ranks[0].items():
        assert out["sent"] == ranks[1][name]["sent"]
    return ranks[0]


@pytest.mark.parametrize("stage", STAGES)
def test_several_microbatches_are_reduced_as_often_as_one(
    found: dict[str, dict[str, Any]], stage: int
):
    two, one = (found[f"{stage} none {size}"]["sent"] for size in (2, 4))
    assert 0 < two["reductions"] == one["reductions"]


def test_steps_are_those_of_one_process(base: str, found: dict[str, dict[str, Any]]):
    alone = engine_worker.build(base, microbatch_size=8)
    expected = [engine_worker.step(alone, number) for number in (0, 1)]
    for name, out in found.items():
        for step, own in zip(out["steps"], expected, strict=True):
            assert step == pytest.approx(own, rel=1e-5), name


def test_no_buffer_is_larger_than_the_model(found: dict[str, dict[str, Any]]):
    for name, out in found.items():
        assert out["allocated"] <= out["all"], name


def test_every_group_has_our_limit(found: dict[str, dict[str, Any]]):
    for name, out in found.items():
        assert out["limits"] == [7.0, 7.0], name
