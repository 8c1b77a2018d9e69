"""The beginning that all stages share."""

from pathlib import Path

import pytest

from chatllama.config.schema import Config
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runs.lock import release_all
from chatllama.runtime import distributed
from trainers.stages import stage as stage_module


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize(
    ("gpus", "launched", "said"), [(4, False, True), (4, True, False), (1, False, False)]
)
def test_a_process_alone_says_that_it_uses_one_of_several_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: Stage,
    gpus: int,
    launched: bool,
    said: bool,
):
    monkeypatch.setattr(distributed, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(stage_module, "initialise", lambda section: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if launched:
        monkeypatch.setenv("WORLD_SIZE", "1")
    cfg = Config.model_validate({"run_dir": str(tmp_path), "backbone": {"path": "-"}})
    stage_module.join(cfg, RunFolder(tmp_path), stage, None)
    release_all()
    line = "using one of 4 GPUs: `deepspeed` in place of `python` uses all of them"
    assert (line in capsys.readouterr().out) is said
