"""`chatllama sweep`: combinations, what is trained once, what is kept, what failed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatllama import cli
from chatllama.runs.folder import RunFolder, Stage
from trainers.stages import sweep as sweeping
from trainers.stages.sweep import combinations, copy_before_ppo


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    data = "{data: [{path: p}]}"
    path.write_text(
        f"run_dir: {tmp_path}/runs/s\nbackbone: {{path: m}}\n"
        f"sft: {data}\nreward: {data}\nppo: {data}\n"
    )
    return str(path)


def test_every_combination_is_a_run(config: str, tmp_path: Path) -> None:
    found = combinations(config, ["ppo.kl_coef=0.02,1e-1", "seed=0,1", "ppo.steps=5"])
    root = tmp_path / "runs" / "s"
    names = [
        "kl_coef=0.02,seed=0",
        "kl_coef=0.02,seed=1",
        "kl_coef=0.1,seed=0",
        "kl_coef=0.1,seed=1",
    ]
    assert [each.folder for each in found] == [root / name for name in names]
    assert found[2].overrides == ("ppo.kl_coef=0.1", "seed=0", "ppo.steps=5")
    assert found[2].before_ppo == ("seed=0",)
    alike = combinations(config, ["sft.steps=1,2", "ppo.steps=3,4"])
    assert alike[1].folder.name == "sft.steps=1,ppo.steps=4"
    with pytest.raises(ValueError, match="would have one folder"):
        combinations(config, ["backbone.path='a/b',a_b"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ppo.kl_coef=0.1"], "no key has several values"),
        (["seed"], "give section.key=value"),
        (["ppo.kl_coef=0.1,high"], "ppo.kl_coef"),
        (["ppo.gone=1,2"], "ppo.gone"),
    ],
)
def test_no_run_begins_where_one_is_wrong(config: str, words: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        combinations(config, words)


def test_a_list_is_one_value(config: str) -> None:
    words = ["lora.target_modules=[q_proj, v_proj]", "seed=0,1"]
    found = combinations(config, words)
    assert len(found) == 2 and found[0].overrides[0] == words[0]


def finish(folder: Path, *stages: Stage) -> RunFolder:
    run = RunFolder(folder)
    for stage in stages:
        (folder / stage / "checkpoints").mkdir(parents=True)
        (folder / stage / "result.json").write_text("{}")
        (folder / stage / "adapter").mkdir()
    run.lineage.write_text(json.dumps({stage: RECORD for stage in stages}))
    return run


RECORD: dict[str, Any] = {
    "begun": "a", "finished": "b", "code": {}, "packages": {}, "config": {},
    "base": {"path": "m", "fingerprint": None}, "data": {}, "parents": {},
}  # fmt: skip


def test_finished_stages_before_ppo_are_copied_with_their_records(tmp_path: Path) -> None:
    source = finish(tmp_path / "a", "sft", "reward", "ppo")
    target = RunFolder(tmp_path / "b")
    copy_before_ppo(source, target)
    assert sorted(path.name for path in target.root.iterdir()) == ["lineage.json", "reward", "sft"]
    assert list(json.loads(target.lineage.read_text())) == ["sft", "reward"]
    assert not (target.root / "sft" / "checkpoints").exists()
    target.lineage.write_text("{}")
    copy_before_ppo(source, target)  # a run that has begun stays as it is
    assert target.lineage.read_text() == "{}"


def test_runs_follow_each_other_and_failures_come_last(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []

    def call(command: list[str], **settings: Any) -> int:
        assert command[:5] == [sys.executable, "-m", "chatllama.cli", "run", config]
        assert command[-1] == "--resume"
        folder = Path(json.loads(command[-2].removeprefix("run_dir=")))
        begun.append(folder.name)
        if folder.name == "kl_coef=0.2" and begun.count(folder.name) == 1:
            return 1
        copied = (folder / "sft" / "result.json").is_file()
        assert copied == (folder.name != "kl_coef=0.1")
        stages: tuple[Stage, ...] = ("ppo",) if copied else ("sft", "reward", "ppo")
        finish(folder, *stages)
        (folder / "summary.json").write_text("{}")
        (folder / "config.yaml").write_text(f"run_dir: {folder}\nbackbone: {{path: m}}\n")
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr(sweeping, "compare_runs", lambda folders, out: out)
    words = ["sweep", config, "ppo.kl_coef=0.1,0.2,0.3"]
    assert cli.main(words) == 2
    assert begun == ["kl_coef=0.1", "kl_coef=0.2", "kl_coef=0.3"]
    assert "1 of 3 runs failed: kl_coef=0.2" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert begun[3:] == ["kl_coef=0.2"]
    assert "kl_coef=0.1: finished before" in capsys.readouterr().err
