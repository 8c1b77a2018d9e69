"""Checkpoints: the newest good one is found, and no fault of disk or process tears one."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from chatllama.runs import checkpoints
from chatllama.runs.checkpoints import (
    MANIFEST,
    DamagedError,
    checkpoint_to_resume,
    newest_good,
    save_step,
    step_folders,
    step_of,
    verify,
)
from chatllama.runs.folder import RunFolder
from chatllama.runtime import files

LAYOUT = {"ranks": 1, "zero_stage": None, "microbatch_size": 8}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def save(run: RunFolder, step: int, limit: int = 2, text: str = "x") -> None:
    save_step(run, "ppo", step, limit, LAYOUT, lambda folder: _write(folder, text))


def resume(run: RunFolder, layout: dict[str, Any] = LAYOUT) -> Path | None:
    return checkpoint_to_resume(run, "ppo", True, layout)


def _write(folder: Path, text: str) -> None:
    (folder / "part").write_text(text)
    (folder / "ranks").mkdir(exist_ok=True)
    (folder / "ranks" / "0").write_text(text * 100)


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
    assert sorted(p.name for p in run.checkpoints("ppo").iterdir()) == sorted(names(run))


def test_no_folder_no_checkpoints(run: RunFolder):
    assert step_folders(run.checkpoints("ppo")) == []
    assert checkpoint_to_resume(run, "ppo", False, LAYOUT) is None
    assert resume(run) is None


def test_resuming_takes_the_newest_and_starting_afresh_is_refused(run: RunFolder):
    save(run, 9)
    save(run, 11)
    assert resume(run) == run.checkpoints("ppo") / "step-11"
    with pytest.raises(ValueError, match=r"step-11 exists .* with --resume, or remove .*checkpoi"):
        checkpoint_to_resume(run, "ppo", False, LAYOUT)
    assert checkpoint_to_resume(run, "sft", False, LAYOUT) is None


def test_a_checkpoint_is_replaced_whole(run: RunFolder):
    save(run, 3, text="old")
    (run.checkpoints("ppo") / "step-3" / "leftover").write_text("")
    save(run, 3, text="new")
    folder = run.checkpoints("ppo") / "step-3"
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "part", "ranks"]
    assert (folder / "part").read_text() == "new"


def test_what_was_interrupted_is_no_checkpoint(run: RunFolder):
    save(run, 3)

    def dies(folder: Path) -> None:
        (folder / "of the first try").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_step(run, "ppo", 4, 2, LAYOUT, dies)
    assert names(run) == ["step-3"]
    save(run, 4, text="whole")
    folder = run.checkpoints("ppo") / "step-4"
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "part", "ranks"]
    assert not (run.stage("ppo") / ".unfinished").exists()


def test_other_names_are_not_taken_for_checkpoints(run: RunFolder):
    folder = run.checkpoints("ppo")
    for name in ("step-", "step-x", "step-²", ".step-4.tmp", "members.json", "7", "step-6.old"):
        (folder / name).mkdir(parents=True)
    assert step_folders(folder) == []


@pytest.mark.parametrize("written", [[], ["state.pt"], ["trained-0.safetensors", "other"]])
def test_a_checkpoint_without_an_expected_file_is_not_published(run: RunFolder, written: list[str]):
    save(run, 3)
    expected = ["trained-0.safetensors", "state.pt"]

    def write(folder: Path) -> list[str]:
        for name in written:
            (folder / name).write_text("x")
        return expected

    lacking = ", ".join(sorted(set(expected) - set(written)))
    with pytest.raises(DamagedError, match=rf"lacks .*{lacking} and is not published"):
        save_step(run, "ppo", 4, 2, LAYOUT, write)
    assert names(run) == ["step-3"] and resume(run)
    with pytest.raises(DamagedError, match="lacks all files"):
        save_step(run, "ppo", 4, 2, LAYOUT, lambda folder: [])


@pytest.mark.parametrize(("size", "good"), [(5, True), (4, False), (6, False)])
def test_each_rank_hashes_the_files_that_it_wrote(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, size: int, good: bool
):
    read: list[str] = []

    def hashes(path: Path) -> str:
        read.append(path.name)
        return "a hash of this rank"

    def write(folder: Path) -> list[str]:
        for name in ("trained-0", "trained-1", "of nobody"):
            (folder / name).write_text("12345")
        return ["trained-0"]

    other = {"trained-1": (size, "a hash of the other rank")}
    monkeypatch.setattr(checkpoints, "file_hash", hashes)
    monkeypatch.setattr(checkpoints, "all_gather_objects", lambda own: [own, other])
    if not good:
        with pytest.raises(DamagedError, match=rf"trained-1 has 5 bytes; {size} were written"):
            save_step(run, "ppo", 4, 2, LAYOUT, write)
        return
    save_step(run, "ppo", 4, 2, LAYOUT, write)
    manifest = json.loads((run.checkpoints("ppo") / "step-4" / MANIFEST).read_text())
    assert manifest["files"]["trained-1"] == {"bytes": 5, "sha256": "a hash of the other rank"}
    assert manifest["files"]["trained-0"]["sha256"] == "a hash of this rank"
    assert sorted(read) == ["of nobody", "trained-0"]


def test_checkpoints_beyond_the_stage_are_left_alone(run: RunFolder):
    for step in (3, 5, 8):
        save(run, step, limit=3)
    for steps, expected in ((9, 8), (8, 8), (7, 5), (3, 3)):
        found = checkpoint_to_resume(run, "ppo", True, LAYOUT, steps)
        assert found == run.checkpoints("ppo") / f"step-{expected}"
    with pytest.raises(ValueError, match=r"holds step-3, step-5, step-8, all beyond .* 2 steps"):
        checkpoint_to_resume(run, "ppo", True, LAYOUT, 2)
    assert names(run) == ["step-3", "step-5", "step-8"]


# --- damage --------------------------------------------------------------------------------------


def cut_off(folder: Path) -> None:
    os.truncate(folder / "ranks" / "0", 99)


def flip(folder: Path) -> None:
    (folder / "part").write_text("y")


DAMAGES = {
    r"ranks/0 has 99 bytes; 100 were written": cut_off,
    r"part is corrupted: its content is not what was written": flip,
    r"part is missing": lambda folder: (folder / "part").unlink(),
    r"manifest\.json is missing": lambda folder: (folder / MANIFEST).unlink(),
    r"manifest\.json is damaged": lambda folder: os.truncate(folder / MANIFEST, 20),
    r"manifest\.json is damaged: it lists no": lambda folder: (folder / MANIFEST).write_text(
        '{"step": 4, "files": {}}'
    ),
    r"manifest\.json is damaged: the whole must be": lambda f: (f / MANIFEST).write_text("[]"),
    r"manifest\.json is damaged: files must be": lambda folder: (folder / MANIFEST).write_text(
        '{"files": [5]}'
    ),
    r"manifest\.json is damaged: files\.part\.bytes must": lambda folder: (
        folder / MANIFEST
    ).write_text('{"files": {"part": {"bytes": "1", "sha256": "x"}}}'),
    r"manifest\.json is damaged: layout\.ranks must": lambda f: (f / MANIFEST).write_text(
        '{"files": {}, "layout": {"ranks": null, "zero_stage": 2, "microbatch_size": 1}}'
    ),
    r"manifest\.json is damaged: recursion": lambda f: (f / MANIFEST).write_text("[" * 99_999),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    run: RunFolder, message: str, capsys: pytest.CaptureFixture[str]
):
    save(run, 3)
    save(run, 4)
    folder = run.checkpoints("ppo")
    DAMAGES[message](folder / "step-4")
    with pytest.raises(DamagedError, match=message):
        verify(folder / "step-4")
    assert resume(run) == folder / "step-3"
    said = capsys.readouterr().err
    assert f"{folder / 'step-4'}" in said and "going on from " + str(folder / "step-3") in said
    assert names(run) == ["step-3"] and (folder / "damaged-step-4").is_dir()
    DAMAGES[message](folder / "step-3")
    with pytest.raises(ValueError, match=rf"no checkpoint .* can be used: .*{message}.* afresh"):
        resume(run)
    assert names(run) == ["step-3"]


def test_a_rollback_passes_over_a_damaged_checkpoint(run: RunFolder):
    save(run, 3)
    save(run, 4)
    flip(run.checkpoints("ppo") / "step-4")
    checkpoint, manifest = newest_good(run.checkpoints("ppo"))
    assert checkpoint.name == "step-3" and manifest["step"] == 3


def test_another_layout_is_told_of(run: RunFolder, capsys: pytest.CaptureFixture[str]):
    two = {"ranks": 2, "zero_stage": 2, "microbatch_size": 4}
    save_step(run, "ppo", 4, 2, two, lambda folder: _write(folder, "x"))
    assert resume(run, two) and capsys.readouterr().out == ""
    for other, words in (
        (LAYOUT, "with one process without the deepspeed launcher, microbatches of 8"),
        ({**two, "ranks": 1, "zero_stage": 3}, "with 1 rank under ZeRO-3, microbatches of 4"),
        ({**two, "microbatch_size": 1}, "with 2 ranks under ZeRO-2, microbatches of 1"),
    ):
        assert resume(run, other)
        said = capsys.readouterr().out
        assert (
            f"step-4 was written by 2 ranks under ZeRO-2, microbatches of 4; going on {words}"
            in said
        )
        assert "the same batches, but not bit for bit the same weights" in said


# --- disks that cannot be written -----------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """256 KiB of disk, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_checkpoint(small_disk: Path):
    run = RunFolder(small_disk / "run")
    save(run, 3)

    def too_much(folder: Path) -> None:
        (folder / "a").write_bytes(b"x" * 400_000)

    with pytest.raises(ValueError) as caught:
        save_step(run, "ppo", 4, 2, LAYOUT, too_much)
    message = str(caught.value)
    assert "checkpoint of step 4 could not be written below" in message
    assert "No space left on device (0.00 GB free there)" in message
    assert f"{run.checkpoints('ppo') / 'step-3'} is as it was" in message
    assert not (run.stage("ppo") / ".unfinished").exists()  # its room is free again
    assert resume(run) == run.checkpoints("ppo") / "step-3"
    save(run, 4)


def test_a_full_disk_while_torch_writes(small_disk: Path):
    import torch

    run = RunFolder(small_disk / "run")
    with pytest.raises(ValueError, match=r"step 4 could not be written .*there is no earlier one"):
        save_step(run, "ppo", 4, 2, LAYOUT, lambda f: torch.save(torch.zeros(99999), f / "a"))


def test_a_read_only_disk_keeps_the_old_checkpoint(small_disk: Path):
    run = RunFolder(small_disk / "run")
    save(run, 3)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ValueError, match=r"step 4 .*: Read-only file system .*step-3 is as it was"):
        save(run, 4)
    assert names(run) == ["step-3"]


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    unfinished, flushed = run.stage("ppo") / ".unfinished", set()
    monkeypatch.setattr(files, "flush", flushed.add)
    save(run, 3)
    paths = run.checkpoints("ppo").glob("step-3/**/*")
    names = [path.relative_to(run.checkpoints("ppo") / "step-3") for path in paths]
    assert {str(name) for name in names} == {"part", "ranks", "ranks/0", MANIFEST}
    assert flushed >= {unfinished, *(unfinished / name for name in names)}
    assert run.checkpoints("ppo") in flushed  # and the name itself


@pytest.mark.parametrize("place", ["flush", "rename", "second rename", "manifest", "write"])
@pytest.mark.parametrize("again", [False, True])
def test_a_failing_write_anywhere_keeps_the_old_checkpoint(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, place: str, again: bool
):
    save(run, 3)
    save(run, 4)

    def full(*args: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    rename = Path.rename

    def last_rename_fails(path: Path, target: Path) -> Path:
        return full() if path.name == ".unfinished" else rename(path, target)

    with monkeypatch.context() as patch:
        if place == "flush":
            patch.setattr(files, "flush", full)
        elif place == "rename":
            patch.setattr(Path, "rename", full)
        elif place == "second rename":
            patch.setattr(Path, "rename", last_rename_fails)
        elif place == "manifest":
            patch.setattr(checkpoints, "write_manifest", full)
        write = full if place == "write" else lambda folder: _write(folder, "new")
        with pytest.raises(ValueError, match=r"No space left on device .*step-4 is as it was"):
            save_step(run, "ppo", 4 if again else 5, 2, LAYOUT, write)
    assert names(run) == ["step-3", "step-4"]
    assert verify(run.checkpoints("ppo") / "step-4")["step"] == 4
    save(run, 5)
    assert names(run) == ["step-4", "step-5"]


# --- kill -9 -------------------------------------------------------------------------------------


@pytest.fixture
def quick_run() -> Iterator[RunFolder]:
    """A run folder in memory where there is such a place: 50 kills must not wait for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield RunFolder(Path(name) / "run")


def saves_until_killed(run: RunFolder, first: int, tell: int) -> None:
    """Saves of 30 files each, every third step twice; a byte for each that begins."""

    def write(folder: Path) -> None:
        os.write(tell, b"x")
        for number in range(30):
            (folder / f"part-{number}").write_bytes(os.urandom(20_000))

    for step in range(first, first + 10_000):
        for _ in range(2 if step % 3 == 0 else 1):
            save_step(run, "ppo", step, 2, LAYOUT, write)


@pytest.mark.slow
def test_kill_at_fifty_moments_of_saving(quick_run: RunFolder):
    run, rng, reached, hits = quick_run, random.Random(0), 0, 0
    started = time.monotonic()
    for step in range(-5, 0):
        save_step(run, "sft", step, 9, LAYOUT, lambda folder: _write(folder, "x" * 20_000))
    usual = 3 * (time.monotonic() - started) / 5
    for _ in range(50):
        hear, tell = os.pipe()
        child = os.fork()
        if child == 0:
            saves_until_killed(run, reached + 1, tell)
        for _ in range(rng.randint(1, 3)):
            os.read(hear, 1)
        time.sleep(rng.uniform(0.0, usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(hear)
        os.close(tell)
        places = [run.stage("ppo"), run.checkpoints("ppo")]
        hits += any(p.name.startswith(".") for f in places if f.is_dir() for p in f.iterdir())
        found = resume(run)
        # the newest that was ever published is still there, and good
        assert (0 if found is None else step_of(found)) >= reached
        if found is not None:
            reached = step_of(found)
            assert len(verify(found)["files"]) == 30
        assert not list(run.checkpoints("ppo").glob("damaged-*"))
    assert reached >= 20 and hits >= 10, (reached, hits)  # it did hit saves in progress


def test_a_kill_between_the_two_renames_is_undone(run: RunFolder):
    save(run, 3, limit=1)
    folder = run.checkpoints("ppo")
    (folder / "step-3").rename(folder / ".step-3.old")
    assert resume(run) == folder / "step-3"
    shutil.copytree(folder / "step-3", folder / ".step-3.old")
    shutil.copytree(folder / "step-3", folder / ".step-2.removed")
    assert resume(run) == folder / "step-3"
    assert [path.name for path in folder.iterdir()] == ["step-3"]
