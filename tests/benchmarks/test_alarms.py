"""The counts of benchmarks/alarms.py by hand; one short run of a world."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chatllama.config.ppo import HealthSection

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def alarms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import alarms  # pyright: ignore[reportMissingImports]

    return alarms


@pytest.mark.parametrize(
    ("gold", "fell"),
    [
        ([0.0] * 10, None),
        ([1, 1, 1, 0, 0, 0, 0], 4),  # means 1, .67, .33, 0: below 1 - 3 * .082 from step 4 on
        ([1, 1, 1, 0, 1, 1, 1, 1], 4),  # three means of .67
        ([1, 1, 1, 0.8, 0.8, 0.8, 0.8], None),
        ([0, 0, 0, 1, 1, 1, 0, 0], 7),
        ([1, 1, 1, 0], None),  # one mean alone
    ],
)
def test_when_gold_fell(alarms: ModuleType, gold: list[float], fell: int | None):
    # error of a mean of three: .1 / sqrt(3) = .058; of a difference .082, three of them .245
    assert alarms.gold_fell(gold, [0.1] * len(gold)) == fell


def test_every_run_is_planned_once(alarms: ModuleType):
    planned = list(alarms.planned())
    assert len(set(planned)) == len(planned) == 21 * 20 + 20 + 200
    assert planned[:10] == [("clean", "calibration", seed) for seed in range(10)]


def clean_run(alarms: ModuleType, worst: float) -> Any:
    """Ten clean steps, two of which have a clip fraction that fills the mean of five."""
    steps = [{"ppo/clip_fraction": worst if step in (4, 5) else 0.1} for step in range(10)]
    return alarms.Run("clean", "calibration", steps, None)


def test_thresholds_are_the_strictest_with_few_false_alarms(alarms: ModuleType):
    quiet, loud = clean_run(alarms, 0.1), clean_run(alarms, 0.5)  # means of five up to .1 and .26
    assert alarms.false_rate([quiet, loud], HealthSection(max_clip_fraction=0.4)) == 0
    strict = HealthSection(max_clip_fraction=0.2)
    assert alarms.alarms(loud, strict) == [("clip_fraction_high", 6)]
    assert alarms.false_rate([quiet, loud], strict, "clip_fraction_high") == 1000 / 20
    assert alarms.calibrated([quiet])["max_clip_fraction"] == 0.2
    assert alarms.calibrated([quiet, loud])["max_clip_fraction"] == 0.3
    assert alarms.calibrated([loud] + [quiet] * 99)["max_clip_fraction"] == 0.2  # 1 in 1,000 steps


@pytest.mark.slow
def test_a_world_is_run_and_tabulated(
    alarms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(alarms, "STEPS", 4)
    todo = [("constant reward", "held-out", 0), ("clean", "held-out", 0)]
    monkeypatch.setattr(alarms, "planned", lambda: todo)
    alarms.make(tmp_path / "runs.jsonl")
    alarms.make(tmp_path / "runs.jsonl")
    assert [(r["fault"], len(r["steps"])) for r in alarms.read(tmp_path / "runs.jsonl")] == [
        ("constant reward", 4), ("clean", 4),
    ]  # fmt: skip
    text = alarms.table(tmp_path / "runs.jsonl")
    assert "| constant reward | 1 of 1 | 1 of 1 | 3 | 0 of 1 |  |" in text
    assert "0.0 false alarms in 1,000 clean held-out steps" in text
