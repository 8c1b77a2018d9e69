"""A run that is trained on a function of a script or notebook: resumed there, refused elsewhere."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ppo_runs import make_base, ppo_config

import chatllama
from chatllama import cli
from chatllama.config.base import load_function
from chatllama.config.loader import dump_config
from chatllama.model.adapters import WEIGHTS
from chatllama.runs.folder import RunFolder
from chatllama.runtime.digests import function_file
from chatllama.start.runs import run_state
from trainers.stages.lineage import other_versions

CALLS: list[str] = []
BROKEN: list[int] = []


def spaces(prompt: str, response: str) -> float:
    CALLS.append(response)
    if BROKEN and len(CALLS) > BROKEN[0]:
        raise KeyError("the notebook's kernel died")
    return float(len(response) % 7)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module's function is one of a notebook."""
    monkeypatch.setattr(spaces, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "spaces", spaces, raising=False)
    CALLS.clear()
    BROKEN.clear()


def test_the_file_of_a_function_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pack").mkdir()
    for name in ("mine.py", "pack/__init__.py", "pack/inner.py"):
        (tmp_path / name).write_text("raise SystemExit\n")
    assert function_file("mine:f") == tmp_path / "mine.py"
    assert function_file(f"{tmp_path}/mine:f") == tmp_path / "mine.py"
    assert function_file("pack.inner:f") == tmp_path / "pack" / "inner.py"
    assert function_file("json:loads") == Path(json.__file__)
    assert function_file("sys:exit") is None and function_file("no_such_module:f") is None
    with pytest.raises(
        ValueError, match=r"k: gone is a function of the script .*train\(\.\.\., rew"
    ):
        load_function("__main__:gone", "k")


def test_a_changed_file_is_said_where_both_are_known() -> None:
    def record(sha: str | None) -> dict[str, Any]:
        return {"packages": {}, "code": {"version": "0"}, "functions": {"m:f": sha}}

    said = other_versions(record("a"), record("b"))
    assert said == ["the file of function m:f has been changed"]
    for old, new in (("a", "a"), (None, "b"), ("a", None)):
        assert other_versions(record(old), record(new)) == []


@pytest.mark.slow
def test_a_run_of_a_notebook_goes_on_in_it_and_nowhere_else(
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
    script: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data_cache: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"What paints {number}?"}) for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    base = make_base(tmp_path / "base", tiny_tokenizer_dir)
    files = []
    for name in ("whole", "cut"):
        ppo = {"data": [{"path": "prompts.jsonl"}], "advantage": "rloo", "samples_per_prompt": 4,
               "save_every": 1}  # fmt: skip
        none = {"data": []}
        cfg = ppo_config(base, tmp_path / name, sft=none, reward=none, ppo=ppo)
        files.append(tmp_path / f"{name}.yaml")
        dump_config(cfg, files[-1])
    whole, cut = (RunFolder(tmp_path / name) for name in ("whole", "cut"))
    chatllama.train(files[0], reward=spaces)
    first = len(CALLS)
    BROKEN.append(2 * first - first // 3)  # while the second step is scored
    with pytest.raises(ValueError, match=r"__main__:spaces failed for .*kernel died"):
        chatllama.train(files[1], reward=spaces)
    assert cut.report.is_file() and run_state(cut).state.startswith("ppo stopped after step 1")
    capsys.readouterr()
    monkeypatch.delattr(sys.modules["__main__"], "spaces")  # the command is another process
    assert cli.main(["run", str(cut.config), "--resume"]) == 2
    assert "chatllama.train(..., reward=spaces, resume=True)" in capsys.readouterr().err
    assert cli.main(["report", str(cut.root)]) == 0 and cli.main(["run", str(whole.config)]) == 0
    assert chatllama.load(whole.root).chat("What paints 3?", max_new_tokens=2, seed=0) is not None
    monkeypatch.setattr(sys.modules["__main__"], "spaces", spaces, raising=False)
    BROKEN.clear()
    chatllama.train(files[1], reward=spaces, resume=True)
    weights = [(each.policy_adapter / WEIGHTS).read_bytes() for each in (whole, cut)]
    assert weights[0] == weights[1]
