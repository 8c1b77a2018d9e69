"""Paths of a run folder, and the records of lineage.json."""

from pathlib import Path

import pytest

from chatllama.runs.folder import RunFolder, check_run_dir, read_lineage, write_record
from chatllama.runtime.files import write_json


def test_members_of_an_ensemble_are_in_order(tmp_path: Path):
    run = RunFolder(tmp_path)
    for number in (10, 2, 1):
        run.reward_member(number).mkdir(parents=True)
    names = ["adapter", "adapter-1", "adapter-2", "adapter-10"]
    assert [folder.name for folder in run.reward_members()] == names


def test_a_missing_config_or_result_names_its_file(tmp_path: Path):
    run = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=r"is not a run folder: .*config\.yaml is missing"):
        run.existing_config()
    with pytest.raises(ValueError, match=r"stage sft .* not finished: .*sft/result\.json is miss"):
        run.read_result("sft")
    run.config.write_text("seed: 0\n")
    write_json(run.result("sft"), {"loss": 0.5})
    assert run.existing_config() == tmp_path / "config.yaml"
    assert run.read_result("sft") == {"loss": 0.5}


def test_checkpoints_or_finished_members_show_that_a_stage_was_begun(tmp_path: Path):
    run = RunFolder(tmp_path)
    (run.checkpoints("sft") / "damaged-step-4").mkdir(parents=True)
    assert not run.was_begun("sft")
    (run.checkpoints("sft") / "step-4").mkdir()
    (run.checkpoints("reward") / "member-1" / "reward" / "checkpoints" / "step-2").mkdir(
        parents=True
    )
    write_json(run.checkpoints("ppo") / "members.json", [])
    assert run.was_begun("sft") and run.was_begun("reward") and run.was_begun("ppo")


def test_records_of_lineage_are_replaced_and_removed(tmp_path: Path):
    run = RunFolder(tmp_path)
    assert read_lineage(run) == {}
    write_record(run, "ppo", {"seed": 1})
    write_record(run, "sft", {"seed": 2})
    write_record(run, "ppo", {"seed": 3})
    assert list(read_lineage(run).items()) == [("sft", {"seed": 2}), ("ppo", {"seed": 3})]
    write_record(run, "sft", None)
    assert read_lineage(run) == {"ppo": {"seed": 3}}
    run.lineage.write_text("{")
    with pytest.raises(ValueError, match=r"lineage\.json is damaged"):
        read_lineage(run)


def test_what_cannot_be_a_run_folder_is_refused(tmp_path: Path):
    for good in ("new/run", "with blank", "Läufe", "[1] (b)", "~x"):
        check_run_dir(tmp_path / good)
        assert (tmp_path / good).is_dir()
    (tmp_path / "link").symlink_to(tmp_path / "new")
    check_run_dir(tmp_path / "link" / "run")
    check_run_dir(tmp_path / "link")
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    wrong = {
        "file": "it is a file",
        "file/run": "Not a directory",
        "dangling": f"it is a link to {tmp_path}/nowhere, which is not there",
        "x" * 300: "File name too long",
        "a/" * 3000: "File name too long",
    }
    for name, reason in wrong.items():
        with pytest.raises(ValueError, match=f"^run_dir: .*: {reason}. Give another run_dir$"):
            check_run_dir(tmp_path / name)
    with pytest.raises(ValueError, match=r"run_dir: /proc/run cannot be the run folder: "):
        check_run_dir(Path("/proc/run"))
