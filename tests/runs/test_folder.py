"""Paths of a run folder, and the records of lineage.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from chatllama.runs.folder import RunFolder, check_run_dir, read_lineage, write_record
from chatllama.runtime.files import write_json


def test_members_of_an_ensemble_are_in_order(tmp_path: Path):
    run = RunFolder(tmp_path)
    for number in (10, 2, 1):
        run.reward_member(number).mkdir(parents=True)
    names = ["adapter", "adapter-1", "adapter-2", "adapter-10"]
    assert [folder.name for folder in run.reward_members()] == names


@pytest.mark.parametrize("name", ["adapter-x", "adapter-", "adapter-1.old", "adapter-²"])
def test_a_folder_that_is_no_member_of_the_ensemble_is_named(name: str, tmp_path: Path):
    run = RunFolder(tmp_path)
    (run.stage("reward") / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"reward/adapter-.* is no member .*: move it out of"):
        run.reward_members()


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
    for name in ("damaged-step-4", "step-", "step-x", "step-²"):
        (run.checkpoints("sft") / name).mkdir(parents=True)
    assert not run.was_begun("sft")
    (run.checkpoints("sft") / "step-4").mkdir()
    (run.checkpoints("reward") / "member-1" / "reward" / "checkpoints" / "step-2").mkdir(
        parents=True
    )
    write_json(run.checkpoints("ppo") / "members.json", [])
    assert run.was_begun("sft") and run.was_begun("reward") and run.was_begun("ppo")


def record(**changes: Any) -> dict[str, Any]:
    """What lineage.json holds of a stage that runs."""
    base = {"path": "b", "fingerprint": None, "of_next_year": 1}
    empty = {key: {} for key in ("code", "packages", "config", "data", "parents")}
    return {"begun": "2026", "finished": None, "base": base, **empty, "seed": 1} | changes


def test_records_of_lineage_are_replaced_and_removed(tmp_path: Path):
    run = RunFolder(tmp_path)
    assert read_lineage(run) == {}
    write_record(run, "ppo", record())
    write_record(run, "sft", record(seed=2))
    write_record(run, "ppo", record(seed=3))
    expected = [("sft", record(seed=2)), ("ppo", record(seed=3))]
    assert list(read_lineage(run).items()) == expected
    write_record(run, "sft", None)
    assert read_lineage(run) == {"ppo": record(seed=3)}
    run.lineage.write_text("{")
    with pytest.raises(ValueError, match=r"lineage\.json is damaged"):
        read_lineage(run)


STRANGE: list[Any] = [
    None, [], 5, "x", {"sft": None}, {"sft": []}, {"sft": {}}, {"sft": "x"}, {"sft": 2**70},
    *({"sft": record(**{key: value})} for key in ("base", "config", "data", "parents", "packages",
      "code", "outputs", "files", "changed", "begun") for value in (None, 5, "x" * 5, [[[5]]])
      if not (key == "begun" and isinstance(value, str))),
    {"sft": record(base={"path": 5, "fingerprint": None})}, {"sft": record(base={"path": "b"})},
    {"sft": record(base={"path": "b", "fingerprint": 5})}, {"sft": record(data={"a": {}})},
    {"sft": record(base={"path": "b", "fingerprint": "f", "files": {"a": None}})},
    {"sft": record(data={"a": {"sha256": 5}})}, {"sft": record(files={"a": {}})},
]  # fmt: skip


@pytest.mark.parametrize("content", STRANGE)
def test_lineage_of_another_shape_is_damaged(tmp_path: Path, content: Any):
    run = RunFolder(tmp_path)
    run.lineage.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lineage\.json is damaged: .*(must be|is missing)"):
        read_lineage(run)


@pytest.mark.parametrize(
    "content", ["null", "[]", "5", '{"loss": "x"}', '{"loss": null}', "[" * 9999]
)
def test_results_of_another_shape_are_damaged(tmp_path: Path, content: str):
    run = RunFolder(tmp_path)
    run.stage("sft").mkdir()
    run.result("sft").write_text(content)
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        run.read_result("sft")


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
