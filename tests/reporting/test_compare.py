"""`chatllama compare`: keys that differ, figures beside each other, paired tests by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatllama import cli
from chatllama.reporting.compare import Paired, compare_runs, differences, paired_tests
from chatllama.runs.folder import RunFolder
from chatllama.runtime.jsonl import append_lines


def make_run(folder: Path, kl_coef: float, golds: list[float], **judged: Any) -> RunFolder:
    run = RunFolder(folder)
    run.stage("ppo").mkdir(parents=True)
    run.config.write_text(
        f"run_dir: {folder}\nbackbone: {{path: m}}\n"
        f"ppo: {{kl_coef: {kl_coef}, data: [{{path: p}}]}}\n"
    )
    judged = {"by": "gold m:f", "prompts": "abc", "values": {"ppo": golds}} | judged
    roles = {"ppo": {"gold_mean": sum(golds) / len(golds), "gold_se": 0.25, "kl": 2.0}}
    run.evaluation.write_text(json.dumps({"roles": roles, "judged": judged}))
    run.result("ppo").write_text('{"wall_seconds": 1800.0}')
    append_lines(run.metrics("ppo"), [{"step": s, "ppo/score_mean": s * kl_coef} for s in (1, 2)])
    return run


def test_runs_stand_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a" / "x", 0.05, [1.0, 2.0, 3.0, 4.0])
    make_run(tmp_path / "b" / "x", 0.1, [2.0, 2.0, 5.0, 5.0])
    page = tmp_path / "page.html"
    words = ["compare", str(tmp_path / "a" / "x"), str(tmp_path / "b" / "x"), "--out", str(page)]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    html = page.read_text()
    for text in ("a/x", "b/x", "ppo.kl_coef", "2.500 ± 0.250", "3.500 ± 0.250", "0.500"):
        assert text in shown and text in html, text
    assert "Reward score (normalised)" in html and "<script" not in html
    assert "run_dir" not in shown.split("written")[0]


def test_a_paired_test_by_hand(tmp_path: Path) -> None:
    runs = {
        "one": make_run(tmp_path / "one", 0.1, [1.0, 2.0, 3.0, 4.0]),
        "two": make_run(tmp_path / "two", 0.1, [2.0, 2.0, 5.0, 5.0]),
    }
    (test,) = paired_tests(runs)
    assert isinstance(test, Paired)
    # Differences 1, 0, 2, 1: mean 1, deviation sqrt(2 / 3), over sqrt(4).
    assert (test.difference, test.error) == pytest.approx((1.0, (2 / 3) ** 0.5 / 2))
    assert test.wins[0] == pytest.approx(3.5 / 4)
    assert "two is better" in test.text
    equal = {"one": runs["one"], "same": make_run(tmp_path / "same", 0.1, [1.0, 2.0, 3.0, 4.0])}
    (test,) = paired_tests(equal)
    assert isinstance(test, Paired)
    assert test.wins[0] == 0.5 and "no measurable difference" in test.text


def test_equal_answers_tie(tmp_path: Path) -> None:
    """In another batch the score of a text rounds otherwise."""
    runs = {
        "one": make_run(tmp_path / "one", 0.1, [1.0, 2.0]),
        "two": make_run(tmp_path / "two", 0.1, [1.000001, 3.0]),
    }
    for run, first in zip(runs.values(), ("older", "same"), strict=True):
        append_lines(run.evaluations, [{"step": 1, "answers": [first, "x"]}])
        append_lines(run.evaluations, [{"step": 2, "answers": ["same", first]}])
    (test,) = paired_tests(runs)
    assert isinstance(test, Paired)
    assert test.wins[0] == 0.75


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"by": "gold m:g"}, "they were judged by different ones"),
        ({"prompts": "def"}, "their prompts differ"),
        ({}, "an evaluation.json is of an older version, without each answer's value"),
    ],
)
def test_only_equal_prompts_and_judges_are_compared(
    tmp_path: Path, other: dict[str, str], reason: str
) -> None:
    runs = {
        "one": make_run(tmp_path / "one", 0.1, [1.0, 2.0]),
        "two": make_run(tmp_path / "two", 0.1, [1.0, 2.0], **other),
    }
    if not other:
        roles = json.loads(runs["two"].evaluation.read_text())["roles"]
        runs["two"].evaluation.write_text(json.dumps({"roles": roles}))
    assert [test.text for test in paired_tests(runs)] == [
        f"no paired test of two and one: {reason}"
    ]


def test_shares_have_their_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, 0.1, [1.0]).root for name in "ab"]
    accuracy = {"accuracy": 0.8, "accuracy_low": 0.75, "accuracy_high": 0.845}
    (runs[0] / "reward").mkdir()
    (runs[0] / "reward" / "result.json").write_text(json.dumps(accuracy))
    compare_runs(runs)
    assert "0.800 (0.750 to 0.845)" in capsys.readouterr().out
    assert "0.800 (0.750 to 0.845)" in (tmp_path / "compare.html").read_text()


def test_differences_name_each_key_once() -> None:
    one: dict[str, Any] = {
        "run_dir": "a",
        "seed": 0,
        "ppo": {"kl_coef": 0.1, "steps": 3},
        "lora": None,
    }
    two: dict[str, Any] = {
        "run_dir": "b",
        "seed": 1,
        "ppo": {"kl_coef": 0.1, "steps": 4},
        "lora": {"r": 8},
    }
    one["sft"] = {"data": [{"path": "x", "weight": 1.0}], "columns": ["a"]}
    two["sft"] = {"data": [{"path": "y", "weight": 1.0}, {"path": "z"}], "columns": ["b"]}
    found = dict(differences({"one": one, "two": two}))
    assert found == {
        "seed": [0, 1], "ppo.steps": [3, 4], "lora.r": [None, 8], "sft.data.0.path": ["x", "y"],
        "sft.data.1.path": [None, "z"], "sft.columns": [["a"], ["b"]],
    }  # fmt: skip


def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "one", 0.1, [1.0])
    with pytest.raises(ValueError, match="needs at least two runs, not 1"):
        compare_runs([run.root, run.root / ".." / "one"])
    assert cli.main(["compare", str(run.root), str(tmp_path / "gone")]) == 2
    assert "gone is not a run folder" in capsys.readouterr().err
