"""The beginning that all stages share."""

from pathlib import Path

import pytest

from chatllama.config.schema import Config
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runs.lock import release_all
from chatllama.runtime import distributed
from trainers.stages import stage as stage_module


def join(folder: Path, stage: Stage, **keys: object) -> None:
    cfg = Config.model_validate({"run_dir": str(folder), "backbone": {"path": "-"}, **keys})
    stage_module.join(cfg, RunFolder(folder), stage, None)
    release_all()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_are_chosen_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage, deterministic: bool
):
    chosen: list[bool] = []
    monkeypatch.setattr(stage_module, "choose_kernels", chosen.append)
    monkeypatch.setattr(stage_module, "initialise", lambda section: chosen.append(True))
    join(tmp_path, stage, deterministic=deterministic)
    assert chosen == [deterministic, True]


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
    join(tmp_path, stage)
    line = "using one of 4 GPUs: `deepspeed` in place of `python` uses all of them"
    assert (line in capsys.readouterr().out) is said
