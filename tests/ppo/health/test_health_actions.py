"""What a PPO run does about a diagnosis, and where it is written."""

import json
import math
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from chatllama.config.ppo import HealthSection
from trainers.ppo.health.monitor import Diagnosis, decide, start_diagnoses, write_diagnoses
from trainers.ppo.health.rules import RULES

PROJECT = Path(__file__).resolve().parents[3]


def diagnosis(name: str, step: int = 3, figure: float = 1.25) -> Diagnosis:
    rule = next(rule for rule in RULES if rule.name == name)
    severity = "fatal" if rule.fatal else "warning"
    return Diagnosis(name, step, figure, 1.0, "It is so.", (rule.causes,), rule.knob, severity)


@pytest.mark.parametrize(
    ("action", "names", "rollbacks", "expected"),
    [
        ("warn", [], 0, "go on"),
        ("warn", ["kl_explosion"], 0, "go on"),
        ("warn", ["kl_explosion", "not_finite"], 0, "stop"),
        ("stop", [], 0, "go on"),
        ("stop", ["length_drift"], 0, "stop"),
        ("rollback", [], 9, "go on"),
        ("rollback", ["kl_explosion"], 0, "rollback"),
        ("rollback", ["not_finite"], 1, "rollback"),
        ("rollback", ["not_finite"], 2, "stop"),
        ("rollback", ["initial_kl_not_zero"], 0, "stop"),
        ("rollback", ["kl_explosion", "negative_kl"], 0, "stop"),
    ],
)
def test_decisions(action: str, names: list[str], rollbacks: int, expected: str) -> None:
    section = HealthSection.model_validate({"action": action})
    assert decide(section, [diagnosis(name) for name in names], rollbacks) == expected


def test_knobs_are_keys_of_the_config() -> None:
    from chatllama.config.schema import Config

    for rule in RULES:
        for word in rule.knob.replace(",", " ").replace(";", " ").split():
            section, dot, key = word.partition(".")
            if dot:
                annotation = Config.model_fields[section].annotation
                assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
                assert key in annotation.model_fields, word


def test_diagnoses_are_written_and_cut_at_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "ppo" / "health.jsonl"
    start_diagnoses(path, None)
    assert path.read_text() == ""
    write_diagnoses(path, [], "go on")
    write_diagnoses(path, [diagnosis("length_drift", 3)], "go on")
    write_diagnoses(path, [diagnosis("not_finite", 9, math.nan)], "rollback")
    write_diagnoses(path, [diagnosis("length_drift", 8)], "go on")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(each["name"], each["step"], each["figure"]) for each in lines] == [
        ("length_drift", 3, 1.25),
        ("not_finite", 9, None),
        ("length_drift", 8, 1.25),
    ]
    assert lines[0]["decision"] == "go on" and lines[0]["causes"] and lines[0]["knob"]
    start_diagnoses(path, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 9]
    start_diagnoses(path, 0)  # back at the start: what led there stays
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [9]
    start_diagnoses(path, None)
    assert path.read_text() == ""


def test_wrong_settings_are_refused() -> None:
    for wrong in (
        {"ignore": ["kl_explosions"]},
        {"action": "ignore"},
        {"rollback_lr_factor": 1.0},
        {"max_ratio": 1.0},
        {"window": 0},
    ):
        with pytest.raises(ValidationError):
            HealthSection.model_validate(wrong)


def test_the_table_in_the_docs_holds_every_diagnosis_and_threshold() -> None:
    page = (PROJECT / "docs" / "health.md").read_text(encoding="utf-8")
    for rule in RULES:
        assert f"`{rule.name}`" in page
        for metric in rule.needs:
            assert f"`{metric}`" in page
    for key, field in HealthSection.model_fields.items():
        assert f"`{key}`" in page, key
        if isinstance(field.default, float):
            assert f"{field.default:g}" in page, key
