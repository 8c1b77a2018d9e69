"""The commands of the first minutes: what `chatllama` alone, runs, configs and env say."""

import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from chatllama import cli
from chatllama.config.loader import dump_config, load_config
from chatllama.runs.folder import RunFolder
from chatllama.start import configs, env
from chatllama.start.configs import copy_config
from chatllama.start.runs import find_runs, run_state

RUN = "chatllama run {}/config.yaml"
BASE = "backbone: {path: m}\nsft: {data: [{path: a.jsonl}]}\nppo: {data: [{path: p.jsonl}]}\n"


def make_run(folder: Path, *, finished: str = "", steps: int = 0) -> RunFolder:
    """A run of SFT and PPO; `steps` of the first stage that is not finished."""
    folder.mkdir(parents=True)
    (folder / "c.yaml").write_text(f"run_dir: {folder}\n{BASE}")
    run = RunFolder(folder)
    dump_config(load_config(folder / "c.yaml"), run.config)
    for stage in finished.split():
        (folder / stage).mkdir()
        (folder / stage / "result.json").write_text("{}")
    if steps:
        stage = "ppo" if finished else "sft"
        (folder / stage / "checkpoints" / f"step-{steps}").mkdir(parents=True)
    return run


@pytest.mark.parametrize(
    ("finished", "steps", "state", "after"),
    [
        ("", 0, "sft to do, ppo to do", RUN),
        ("", 20, "sft killed or crashed after step 20, ppo to do", RUN + " --resume"),
        ("sft", 0, "sft finished, ppo to do", RUN),
        ("sft", 4, "sft finished, ppo killed or crashed after step 4", RUN + " --resume"),
        ("sft ppo", 0, "sft finished, ppo finished", "chatllama chat {}"),
    ],
)
def test_a_run_says_how_far_it_is_and_what_comes_next(
    tmp_path: Path, finished: str, steps: int, state: str, after: str
) -> None:
    run = make_run(tmp_path / "x", finished=finished, steps=steps)
    found = run_state(run)
    assert (found.state, found.next) == (state, after.format(run.root))


def test_a_run_in_progress_is_not_started_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x", steps=3)
    owner = {
        "host": os.uname().nodename, "pid": os.getpid(), "token": "t", "command": "c",
        "since": 0.0, "started": psutil.Process().create_time(),
    }  # fmt: skip
    (run.root / ".lock-run").write_text(json.dumps(owner))
    assert run_state(run).state == "sft running, ppo to do"
    assert "--resume" not in run_state(run).next
    owner["started"] = 1.0  # an earlier process with the same number
    (run.root / ".lock-run").write_text(json.dumps(owner))
    assert "--resume" in run_state(run).next


def test_runs_are_found_below_a_folder_newest_first_and_others_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = make_run(tmp_path / "runs" / "old"), make_run(tmp_path / "runs" / "a" / "new")
    os.utime(old.config, (1, 1))
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "config.yaml").write_text(f"run_dir: x\n{BASE}")
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("# Written by chatllama\nsead: 1\n")
    os.utime(broken / "config.yaml", (2, 2))
    found = [run.root for run in find_runs(tmp_path / "runs")]
    assert found == [new.root, broken, old.root]
    assert cli.main(["runs", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "cannot be read" in shown and "sead" in shown
    assert cli.main(["runs", str(tmp_path / "rnus")]) == 2
    assert f"did you mean {tmp_path / 'runs'}?" in capsys.readouterr().err


def test_alone_it_shows_commands_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    heads = [line for line in shown.splitlines() if line.endswith(":")]
    assert heads == ["start:", "train:", "use:"]
    assert "New here? `chatllama init`" in shown and "runs in" not in shown
    for number in range(7):
        make_run(tmp_path / "runs" / f"r{number}")
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert shown.count("next: chatllama run runs/r") == 5 and "and 2 more" in shown


@pytest.mark.parametrize("name", ["quickstart", "llama-13b-8gpu-zero2", "reference.yaml"])
def test_a_copied_config_reads_as_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs", "copy", name, "mine"]) == 0
    file = f"{name.removesuffix('.yaml')}.yaml"
    if name != "reference.yaml":
        assert load_config(f"mine/{file}") == load_config(configs.SHIPPED / file)
    with pytest.raises(ValueError, match="is there already"):
        copy_config(name, tmp_path / "mine")
    with pytest.raises(ValueError, match=r"did you mean quickstart\?"):
        copy_config("quikstart", tmp_path)


def test_configs_lists_what_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs"]) == 0
    shown = capsys.readouterr().out
    assert {line.split()[0] for line in shown.splitlines()[1:]} == {
        file.stem for file in configs.SHIPPED.glob("*.yaml")
    }
    assert "  quickstart" in shown and "The demo: from nothing" in shown


def test_env_names_versions_disk_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(env, "EXTRAS", {"pytest": "x", "no_such_module": "a use"})
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    for part in (
        f"({sys.executable})",
        " free at ",
        "torch 2.",
        "no: a use",
        f"pytest       {pytest.__version__}",
    ):
        assert part in shown
    assert "hf_secret" not in shown
    if "gpu          none" in shown:
        assert "attention    sdpa\n" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rusn"], "did you mean run"),
        (["train", "c.yaml"], "did you mean run?"),
        (["generate", "r", "p", "--max-tokens", "3"], "did you mean --max-new-tokens"),
        (["data", "chek"], "did you mean check"),
        (["run", "c.yaml", "--from", "rewrd"], "did you mean reward"),
    ],
)
def test_misspelt_commands_and_choices(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan", "mine.yml"], "no such file: mine.yml; did you mean mine.yaml?"),
        (["plan", "runs/x"], "runs/x is a folder; its config is runs/x/config.yaml"),
        (["plan", "."], ". is a folder; give a YAML file"),
        (["plan", "configs/quickstart.yaml"], "`chatllama configs copy quickstart` makes one here"),
        (
            ["report", "runs/y"],
            "runs/y is not a run folder: it does not exist; did you mean runs/x?",
        ),
        (["report", "rnus/x"], "it does not exist; did you mean runs?"),
    ],
)
def test_misspelt_files_and_folders(
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "x")
    (tmp_path / "mine.yaml").write_text("")
    assert cli.main(words) == 2
    assert expected in capsys.readouterr().err
