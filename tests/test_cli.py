import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatllama import cli
from chatllama.inference import chat
from chatllama.inference.options import ChatOptions
from chatllama.reporting import page
from chatllama.runs.folder import STAGES
from trainers.stages import pipeline
from trainers.stages.launcher import Launch
from trainers.stages.pipeline import StageFailed


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict[str, Any]]]:
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def note(*args: object, **kwargs: object) -> None:
        seen.append((args, kwargs))

    monkeypatch.setattr(pipeline, "run_pipeline", note)
    monkeypatch.setattr(chat, "chat", note)
    return seen


def test_run_takes_overrides_before_and_after_options(calls: list) -> None:
    words = "run a.yaml seed=1 --num-gpus 2 ppo.steps=3 --resume sft.steps=4 --from reward"
    assert cli.main(words.split()) == 0
    (((config, overrides), options),) = calls
    assert (config, overrides) == ("a.yaml", ["seed=1", "ppo.steps=3", "sft.steps=4"])
    expected = {"launch": Launch(num_gpus=2), "resume": True, "redo_from": "reward"}
    assert options == {**expected, "only": STAGES}


def test_chat_passes_its_settings(calls: list) -> None:
    words = "chat RUN --role sft --temperature 0 --top-p 0.5 --seed 3"
    assert cli.main(words.split()) == 0
    expected = ChatOptions(role="sft", temperature=0.0, top_p=0.5, seed=3)
    assert calls == [((Path("RUN"), expected), {})]
    assert (expected.system, ChatOptions().temperature, ChatOptions().top_p) == (None, 0.7, 0.9)


@pytest.mark.parametrize(
    "words",
    ["rusn x", "run", "run a.yaml --resum", "run a.yaml --num-gpus x", "report a b", "chat a=1 b"],
)
def test_wrong_words_give_usage_and_code_2(
    words: str, calls: list, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words.split())
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err and calls == []


def test_mistakes_are_one_message_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("run_dir: x\nbackbone: {path: y}\nsead: 1\n")
    assert cli.main(["run", str(config)]) == 2
    error = capsys.readouterr().err
    assert "sead" in error and "seed" in error and "Traceback" not in error
    assert cli.main(["run", str(config), "--num-gpus", "0"]) == 2
    assert "--num-gpus 0: must be at least 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sead"):
        cli.main(["run", str(config), "--debug"])


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(run: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "write_report", interrupt)
    assert cli.main(["report", "."]) == 130


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("absent", "it does not exist"),
        ("a file", "it is a file"),
        ("below a file", "Not a directory"),
        ("a dangling link", "it is a link to .*gone, which is not there"),
        ("a link to itself", "Too many levels of symbolic links"),
        ("too long", "File name too long"),
        ("not to be read", "there is no right to read it"),
        ("empty", "it holds no config|config.yaml is missing"),
    ],
)
def test_a_run_that_cannot_be_read_is_refused_with_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    reason: str,
) -> None:
    run = tmp_path / "run"
    match kind:
        case "a file" | "below a file":
            run.write_text("")
            run = run / "x" if kind == "below a file" else run
        case "a dangling link" | "a link to itself":
            run.symlink_to("gone" if kind == "a dangling link" else "run")
        case "too long":
            run = tmp_path / ("x" * 300)
        case "not to be read" | "empty":
            run.mkdir()
    if kind == "not to be read":  # whoever runs the tests may read everything
        monkeypatch.setattr("os.access", lambda *_: False)
    translate = ["--translation", str(tmp_path / "news"), "--languages", "de", "en"]
    for language in ("de", "en"):
        (tmp_path / f"news.{language}").write_text("a\n")
    for command, *words in (
        ["report"], ["generate", "hi"], ["chat"], ["serve", "--port", "0"], ["export"],
        ["eval", *translate], ["finish"],
    ):  # fmt: skip
        assert cli.main([command, str(run), *words]) == 2, command
        error = capsys.readouterr().err
        assert re.search(reason, error) and str(run) in error and "Traceback" not in error, command


def test_a_file_that_cannot_be_read_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreadable(run: object) -> None:
        raise PermissionError(13, "Permission denied", "runs/x/summary.json")

    monkeypatch.setattr(page, "write_report", unreadable)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "Permission denied: 'runs/x/summary.json'" in capsys.readouterr().err


def test_a_failed_stage_gives_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise StageFailed("stage sft failed", 7)

    monkeypatch.setattr(pipeline, "run_pipeline", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "x"])
    assert caught.value.code == 7
    assert capsys.readouterr().err == "chatllama: stage sft failed\n"


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['chatllama', '--help']\n"
        "from chatllama import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'rich', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\x07b", "a\x9bb"])
def test_an_error_cannot_steer_the_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", name]) == 2
    shown = capsys.readouterr().err
    assert "\N{REPLACEMENT CHARACTER}" in shown
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)
