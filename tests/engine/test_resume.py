"""Interrupted and resumed: SFT, reward model and PPO, on the same ranks and on other ones."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import launch

from chatllama.runs import interruption
from chatllama.runs.folder import STAGES, RunFolder, Stage
from chatllama.runtime.jsonl import read_lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of one process and of two ranks, whole, interrupted, and resumed in all ways."""
    from kills.run import prepare
    from workers.resume_worker import go_on, leave_alone

    folder = tmp_path_factory.mktemp("resume")
    prepare(folder)
    config = str(folder / "config.yaml")
    try:
        leave_alone(folder, config)
        launch("tests/workers/resume_worker.py", folder)
        go_on(folder / "left by two", config)
        yield folder
    finally:
        interruption.restore_default_handlers()


def metrics(run: Path, stage: Stage) -> list[dict[str, float]]:
    """What a stage logged, without its times."""
    lines = read_lines(RunFolder(run).metrics(stage))
    return [{name: line[name] for name in line if name != "time"} for line in lines]


@pytest.mark.parametrize(
    ("left", "trained", "stage"),
    [
        ("left by one", "all weights", "sft"),
        *((left, "adapters", each) for left in ("left by one", "left by two") for each in STAGES),
    ],
)
def test_resumed_on_other_ranks_and_another_zero_stage(
    folder: Path, left: str, trained: str, stage: Stage
):
    # one process, then two ranks under ZeRO-3; two ranks under ZeRO-2, then one process
    alone = metrics(folder / "alone" / trained, stage)
    other = metrics(folder / left / trained / stage, stage)
    assert len(other) == len(alone) >= 3
    for expected, found in zip(alone, other, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_interrupted_and_resumed_equals_uninterrupted(folder: Path):
    from workers.resume_worker import STOP_AFTER

    found = json.loads((folder / "found.json").read_text())
    adapters = {"sft": {"adapter"}, "reward": {"adapter"}, "ppo": {"policy", "policy-ema", "value"}}
    assert set(found) == {"0", "2", "3"}
    for zero, stages in found.items():
        for stage, each in stages.items():
            where = f"{stage} under ZeRO-{zero}"
            step = STOP_AFTER[stage]
            assert each["told"] == {"step": step, "signal": "SIGUSR1"}, where
            assert each["saved"] == [f"step-{step}"], where
            assert set(each["whole"]) == adapters[stage], where
            assert each["cut"] == each["whole"], where
