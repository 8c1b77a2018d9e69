"""Runs, adapters and plain models are opened alike, by every door."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from generation_runs import answers, make_run

from chatllama.inference.chat import chat
from chatllama.inference.folders import find_model
from chatllama.inference.options import ChatOptions, default_role
from chatllama.runs.folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("folders") / "run", tiny_tokenizer_dir)


def texts(run: RunFolder, tmp_path: Path, name: str, **options: Any) -> list[str]:
    lines = answers(run, tmp_path / f"{name}.jsonl", max_new_tokens=6, **options)
    return [line["response"] for line in lines]


def test_a_plain_model_answers_as_the_base_of_its_run(run: RunFolder, tmp_path: Path):
    model, cfg = find_model(run.backbone)
    assert default_role(model) == "base" and default_role(run) == "policy"
    assert cfg.backbone.path == str(run.backbone)
    plain = texts(model, tmp_path, "plain")
    assert plain == texts(run, tmp_path, "base", role="base") and any(plain)


def test_an_adapter_answers_as_its_role_wherever_it_lies(run: RunFolder, tmp_path: Path):
    moved = tmp_path / "downloads" / "tuned"
    shutil.copytree(run.policy_adapter, moved)
    expected = texts(run, tmp_path, "policy", role="policy")
    assert texts(RunFolder(run.policy_adapter), tmp_path, "there") == expected
    assert texts(RunFolder(moved), tmp_path, "moved") == expected
    alone, _ = find_model(run.policy_adapter)
    assert not alone.sft_adapter.is_dir() and not alone.reward_adapter.is_dir()


def test_a_terminal_talks_with_a_plain_model(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("chatllama.inference.chat.read_messages", lambda: iter(["Anna paints"]))
    chat(run.backbone, ChatOptions(max_new_tokens=4, seed=0))
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "nowhere is not a run folder: it does not exist"),
        ("empty", r"empty is not a run folder: .*config\.yaml is missing; nor is it a model"),
        ("a file", "a file is not a run folder: it is a file"),
        ("strange", "no base_model_name_or_path"),
        ("value", "value model, which has no answers"),
    ],
)
def test_what_is_none_of_them_is_refused(run: RunFolder, tmp_path: Path, place: str, message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").touch()
    for name in ("strange", "value"):
        shutil.copytree(run.policy_adapter, tmp_path / name)
    (tmp_path / "strange" / "chatllama.json").unlink()
    (tmp_path / "strange" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        find_model(tmp_path / place)


def test_a_hub_id_is_none_of_the_folders_that_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run, cfg = find_model("someone/a-llama")
    assert cfg.backbone.path == "someone/a-llama" and default_role(run) == "base"
    (tmp_path / "someone").mkdir()
    with pytest.raises(ValueError, match="it does not exist"):
        find_model("someone/a-llama")
