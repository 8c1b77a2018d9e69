"""A run folder cannot grant itself that its own Python code runs."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from generation_runs import make_run

from chatllama import cli
from chatllama.inference.load import load_run
from chatllama.runs.folder import RunFolder

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({marker!r}, "w").close()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)


@pytest.fixture
def stranger(plain: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run whose config trusts the code in its folder, which leaves the file `ran` behind."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    run = RunFolder(shutil.copytree(plain.root, tmp_path / "run"))
    text = run.config.read_text().replace(str(plain.root), str(run.root))
    run.config.write_text(text.replace("dtype:", "trust_remote_code: true, dtype:"))
    file = run.backbone / "config.json"
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "model_type": "own", "auto_map": own})
    )
    (run.backbone / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    (tmp_path / "news.de").write_text("Ja.\n")
    (tmp_path / "news.en").write_text("Yes.\n")
    return run


@pytest.fixture(autouse=True)
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    yield


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "export", "eval"])
def test_commands_that_open_a_run_do_not_run_its_code(
    stranger: RunFolder, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    news = ["--translation", str(tmp_path / "news"), "--languages", "de", "en"]
    more = {"generate": ["hi"], "serve": ["--port", "0"], "eval": news}.get(command, [])
    assert cli.main([command, str(stranger.root), *more]) == 2
    error = capsys.readouterr().err
    assert "brings Python code of its own" in error and "give --trust-remote-code" in error
    assert not (tmp_path / "ran").exists()


def test_the_flag_allows_it(stranger: RunFolder, tmp_path: Path) -> None:
    options = ["--trust-remote-code", "--max-new-tokens", "2"]
    assert cli.main(["generate", str(stranger.root), "hi", *options]) == 0
    assert (tmp_path / "ran").exists()


def test_a_plain_model_needs_no_trust_whatever_its_config_says(plain: RunFolder) -> None:
    before = plain.config.read_text()
    plain.config.write_text(before.replace("dtype:", "trust_remote_code: true, dtype:"))
    assert load_run(plain, roles=["policy"]).config.backbone.trust_remote_code is False
    plain.config.write_text(before)
