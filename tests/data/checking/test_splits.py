"""The data check says what a stage would refuse: every record, or none, is held out."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatllama.config.loader import load_config
from data.checking.check import examine
from data.mixture import load_mixture
from data.reading.records import Kind

pytestmark = pytest.mark.usefixtures("data_cache")

STAGES: dict[str, Kind] = {"sft": "sft", "reward": "preferences", "ppo": "prompts"}


def record(kind: Kind, question: str, number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "Ready."}]
    prompt = [*turns, {"role": "user", "content": f"What is {number}?"}]
    answer = {"role": "assistant", "content": f"It is {number}."}
    rows: dict[str, Any] = {
        "sft": {"messages": [*prompt, answer]},
        "preferences": {"prompt": prompt, "chosen": [answer], "rejected": "I do not know."},
        "prompts": {"messages": prompt},
    }
    return rows[kind]


def mixture_findings(tmp_path: Path, stage: str, questions: list[str], **keys: Any) -> list[str]:
    rows = [record(STAGES[stage], each, number) for number, each in enumerate(questions)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "backbone": {"path": "none"},
        stage: {"data": [{"path": str(tmp_path / "a.jsonl")}], **keys},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(content))
    report = examine(load_config(tmp_path / "config.yaml"), None).report
    found = [each for each in report.findings if each.check == "mixture"]
    assert all(each.severity == "error" and each.source == f"{stage}.data" for each in found)
    return [example for each in found for example in each.examples]


@pytest.mark.parametrize("stage", STAGES)
def test_every_record_is_held_out_since_all_begin_alike(stage: str, tmp_path: Path) -> None:
    (said,) = mixture_findings(tmp_path, stage, ["Rules: ..."] * 5, eval_fraction=0.999)
    assert said.startswith("every record is held out; all begin with the same user turn")
    cfg = load_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"nothing to train on.*all begin with the same"):
        load_mixture(getattr(cfg, stage).data, [], 0.999, cfg.seed, STAGES[stage])
    for questions in (["A", "B", "C"], ["A"]):
        said = mixture_findings(tmp_path, stage, questions, eval_fraction=0.9999)
        assert said == ["every record is held out"]


def test_none_is_held_out_where_the_reward_model_needs_some(tmp_path: Path) -> None:
    alike, few = ["Rules: ..."] * 5, [f"question {i}" for i in range(4)]
    (said,) = mixture_findings(tmp_path, "reward", alike, eval_fraction=1e-9)
    assert said.startswith("no pair is held out; all begin with the same user turn")
    (said,) = mixture_findings(tmp_path, "reward", few, eval_fraction=1e-9)
    assert said == "no pair is held out; set reward.eval_data or a larger reward.eval_fraction"
    assert mixture_findings(tmp_path, "reward", few, eval_fraction=0.0) == [said]
    assert mixture_findings(tmp_path, "sft", alike, eval_fraction=1e-9) == []


@pytest.mark.parametrize("stage", STAGES)
def test_records_on_both_sides_or_held_out_elsewhere_are_no_fault(
    stage: str, tmp_path: Path
) -> None:
    questions = [f"question {i}" for i in range(30)]
    assert mixture_findings(tmp_path, stage, questions, eval_fraction=0.5) == []
    elsewhere = [{"path": str(tmp_path / "a.jsonl")}]
    alike = mixture_findings(tmp_path, stage, ["Rules: ..."] * 3, eval_data=elsewhere)
    assert alike == []
