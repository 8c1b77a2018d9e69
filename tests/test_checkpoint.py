from pathlib import Path

import pytest

from chatllama.checkpoint import checkpoint_to_resume, publish, save_step, step_folders, step_of
from chatllama.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def save(run: RunFolder, step: int, limit: int = 2, text: str = "x") -> None:
    save_step(run, "ppo", step, limit, lambda folder: _write(folder, text))


def _write(folder: Path, text: str) -> None:
    (folder / "part").write_text(text)


def names(run: RunFolder) -> list[str]:
    return [path.name for path in step_folders(run.checkpoints("ppo"))]


def test_the_newest_are_kept(run: RunFolder):
    for step in (5, 10, 100, 20):
        save(run, step)
    # by number, not by name: 20 < 100; step-20 came last but is not the newest
    assert names(run) == ["step-20", "step-100"]
    assert [step_of(p) for p in step_folders(run.checkpoints("ppo"))] == [20, 100]
    save(run, 7, limit=3)
    assert names(run) == ["step-7", "step-20", "step-100"]


def test_no_folder_no_checkpoints(run: RunFolder):
    assert step_folders(run.checkpoints("ppo")) == []
    assert checkpoint_to_resume(run, "ppo", resume=False) is None
    assert checkpoint_to_resume(run, "ppo", resume=True) is None


def test_resuming_takes_the_newest_and_starting_afresh_is_refused(run: RunFolder):
    save(run, 9)
    save(run, 11)
    found = checkpoint_to_resume(run, "ppo", resume=True)
    assert found == run.checkpoints("ppo") / "step-11"
    with pytest.raises(ValueError, match=r"step-11 exists .* with --resume, or remove .*checkpoi"):
        checkpoint_to_resume(run, "ppo", resume=False)
    assert checkpoint_to_resume(run, "sft", resume=False) is None


def test_a_checkpoint_is_replaced_whole(run: RunFolder):
    save(run, 3, text="old")
    (run.checkpoints("ppo") / "step-3" / "leftover").write_text("")
    save(run, 3, text="new")
    folder = run.checkpoints("ppo") / "step-3"
    assert [path.name for path in folder.iterdir()] == ["part"]
    assert (folder / "part").read_text() == "new"


def test_what_was_interrupted_is_no_checkpoint(run: RunFolder):
    save(run, 3)

    def dies(folder: Path) -> None:
        _write(folder, "half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_step(run, "ppo", 4, 2, dies)
    assert names(run) == ["step-3"]
    save(run, 4, text="whole")
    assert (run.checkpoints("ppo") / "step-4" / "part").read_text() == "whole"
    assert not (run.stage("ppo") / ".unfinished").exists()


def test_other_names_are_not_taken_for_checkpoints(run: RunFolder):
    folder = run.checkpoints("ppo")
    for name in ("step-", "step-x", ".step-4.tmp", "members.json", "7", "step-6.old"):
        (folder / name).mkdir(parents=True)
    assert step_folders(folder) == []


def test_publishing_moves_the_folder(run: RunFolder, tmp_path: Path):
    written = tmp_path / "written"
    written.mkdir()
    _write(written, "x")
    publish(written, run.checkpoints("sft"), 8, limit=1)
    assert (run.checkpoints("sft") / "step-8" / "part").is_file() and not written.exists()
