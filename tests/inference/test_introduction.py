import json
from pathlib import Path

import pytest

from chatllama.config.schema import Config
from chatllama.inference.introduction import example_prompts, what_it_knows
from chatllama.runs.folder import RunFolder


def evaluated(root: Path, *prompts: object) -> RunFolder:
    run = RunFolder(root)
    run.evaluation.write_text(json.dumps({"samples": [{"prompt": each} for each in prompts]}))
    return run


def test_prompts_are_short_and_each_comes_once(tmp_path: Path) -> None:
    assert example_prompts(RunFolder(tmp_path)) == []
    run = evaluated(tmp_path, "a", " a ", "", "x" * 301, "b", "y" * 300, "c")
    assert example_prompts(run) == ["a", "b", "y" * 300, "c"]
    assert example_prompts(evaluated(tmp_path, *"abcdefghi")) == ["a", "d", "g"]
    assert example_prompts(evaluated(tmp_path)) == []


@pytest.mark.parametrize("content", ["[]", "{", '{"samples": [{"prompt": 5}]}', "{}"])
def test_a_damaged_evaluation_is_named(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path)
    run.evaluation.write_text(content)
    assert example_prompts(run) == []
    assert f"no example prompts: {run.evaluation} is damaged" in capsys.readouterr().err


def test_only_a_backbone_made_here_is_called_tiny() -> None:
    made = {"from_scratch": {"data": [{"path": "texts/notes.txt.gz", "format": "text"}]}}
    cfg = Config.model_validate({"run_dir": "r", "backbone": made})
    assert "nothing but notes.txt.gz" in (what_it_knows(cfg) or "")
    cfg = Config.model_validate({"run_dir": "r", "backbone": {"path": "b"}})
    assert what_it_knows(cfg) is None
