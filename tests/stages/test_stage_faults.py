"""Faults of disks, schedulers and people, tried on real stages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatllama.runs.checkpoints import step_folders, verify
from chatllama.runs.folder import RunFolder

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kills.run import prepare

    folder = tmp_path_factory.mktemp("faults")
    prepare(folder)
    return folder


def failing(function: Callable[..., Any], good_calls: int) -> Callable[..., Any]:
    """The disk is full after so many calls."""
    calls = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > good_calls:
            raise OSError(28, os.strerror(28))
        return function(*args, **kwargs)

    return call


def test_a_full_disk_in_sft_keeps_the_checkpoint_before(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import train_sft
    from trainers.engine import engine

    run = RunFolder(tmp_path / "run")
    command = [str(prepared / "config.yaml"), f"run_dir={run.root}", "sft.steps=4"]
    with monkeypatch.context() as patch:
        good = failing(engine.write_shards, good_calls=1)
        patch.setattr(engine, "write_shards", good)
        with pytest.raises(
            ValueError, match=r"could not be written .*No space left on device"
        ) as caught:
            train_sft.main(command)
    (kept,) = step_folders(run.checkpoints("sft"))
    assert f"{kept} is as it was" in str(caught.value) and verify(kept)
    assert not any(p.is_file() for p in (run.stage("sft") / ".unfinished").rglob("*"))
    train_sft.main([*command, "--resume"])
    assert run.result("sft").is_file()


def test_a_stage_of_another_base_or_template_is_refused(prepared: Path, tmp_path: Path):
    import torch
    from safetensors.torch import load_file, save_file

    import train_rm
    import train_sft

    run, base = RunFolder(tmp_path / "run"), tmp_path / "base"
    shutil.copytree(prepared / "base", base)
    command = [str(prepared / "config.yaml"), f"run_dir={run.root}", f"backbone.path={base}"]
    train_sft.main([*command, "sft.steps=1"])
    with pytest.raises(ValueError, match=r"sft/adapter was made under another chat .* chat\.templ"):
        train_rm.main([*command, "chat.template=vicuna", "reward.max_length=250"])
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + torch.tensor(0.5)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"sft/adapter was trained on another base: .*fingerprint"):
        train_rm.main(command)
    os.truncate(run.sft_adapter / "adapter_model.safetensors", 1000)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not what the stage wrote"):
        train_rm.main(command)


def test_one_flipped_bit_is_named_by_every_later_stage(prepared: Path, tmp_path: Path):
    import train_ppo
    import train_rm
    import train_sft

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    run, base = RunFolder(tmp_path / "run"), tmp_path / "base"
    shutil.copytree(prepared / "base", base)
    command = [str(prepared / "config.yaml"), f"run_dir={run.root}", f"backbone.path={base}"]
    train_sft.main([*command, "sft.steps=1"])
    adapters = [run.sft_adapter]
    for script in (train_rm, train_ppo):
        files = [folder / "adapter_model.safetensors" for folder in adapters]
        for file in (*files, base / "model.safetensors"):
            flip(file)
            with pytest.raises(ValueError, match=rf"{file.name} is not .* changed or damaged"):
                script.main(command)
            flip(file)
        if script is train_rm:
            script.main([*command, "reward.epochs=0.1"])
            adapters.append(run.reward_adapter)


def test_a_run_that_is_told_to_stop_saves_and_keeps_others_out(prepared: Path, tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    chatllama = [
        sys.executable,
        "-c",
        "import sys; from chatllama.cli import main; sys.exit(main())",
    ]
    command = [*chatllama, "run", str(prepared / "config.yaml"), f"run_dir={run.root}"]
    command += ["sft.steps=5000", "sft.save_every=0"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]
    deadline = time.monotonic() + 600
    while not run.metrics("sft").is_file() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 2 and f"{run.root} is in use by" in second.stderr
    assert f"(process {process.pid} on " in second.stderr
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 75, said
    told = json.loads(run.interrupted("sft").read_text())
    (checkpoint,) = step_folders(run.checkpoints("sft"))
    assert checkpoint.name == f"step-{told['step']}" and told["step"] < 5000
    assert f"is saved at step {told['step']}" in said and "--resume" in said
    assert verify(checkpoint)["layout"] == {"ranks": 2, "zero_stage": 2, "microbatch_size": 2}
    assert not list(run.root.glob(".lock-*"))


@pytest.mark.parametrize("name", ["~/runs/x", "a blank", "Läufe ß", "[1]{2}*", "link/run", "."])
def test_any_name_of_a_run_folder(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    import train_sft

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    work = tmp_path / "cwd"
    work.mkdir()
    monkeypatch.chdir(work)
    run_dir, place = str(tmp_path / name), tmp_path / name
    if name[0] == "~":
        run_dir, place = name, tmp_path / "home/runs/x"
    elif name == ".":
        run_dir, place = "run", work / "run"
    command = [str(prepared / "config.yaml"), f"run_dir={json.dumps(run_dir)}"]
    command += ["sft.lr_schedule=constant", "sft.warmup_steps=0"]
    train_sft.main([*command, "sft.steps=1"])
    run = RunFolder(place)
    (kept,) = step_folders(run.checkpoints("sft"))
    assert verify(kept)["files"].keys() == {"state.pt", "trained-0.safetensors"}
    run.result("sft").unlink()
    train_sft.main([*command, "sft.steps=2", "--resume"])
    assert run.read_result("sft")["steps"] == 2
    assert "~" not in {path.name for path in (*tmp_path.iterdir(), *work.iterdir())}


def test_a_run_of_relative_paths_opens_from_any_folder(
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    import train_sft
    from chatllama.cli import main

    monkeypatch.chdir(prepared)
    run_dir = os.path.relpath(tmp_path / "run")
    data = ["backbone.path=base", "sft.data=[{path: sft.jsonl}]", "sft.steps=1"]
    train_sft.main(["config.yaml", f"run_dir={run_dir}", *data])
    train_sft.main([str(prepared / "config.yaml"), f"run_dir={run_dir}", "sft.steps=1"])
    monkeypatch.chdir(tmp_path)
    train_sft.main(["run/config.yaml"])
    assert capsys.readouterr().out.count("has finished before") == 2
    assert main(["generate", "run", "Where is Anna?"]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    train_sft.main(["moved/config.yaml"])
    assert "of moved has finished before" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"cos\nsystem\n(S'exit 3'\ntR."])
def test_a_state_that_is_none_is_refused_with_a_message(
    prepared: Path, tmp_path: Path, content: bytes
):
    import train_sft
    from chatllama.runs.checkpoints import write_manifest

    run = RunFolder(tmp_path / "run")
    command = [str(prepared / "config.yaml"), f"run_dir={run.root}", "sft.lr_schedule=constant"]
    train_sft.main([*command, "sft.steps=1"])
    run.result("sft").unlink()
    (kept,) = step_folders(run.checkpoints("sft"))
    about = json.loads((kept / "manifest.json").read_text())
    (kept / "state.pt").write_bytes(content)
    write_manifest(kept, {"step": about["step"], "layout": about["layout"]})
    with pytest.raises(ValueError, match=r"step-1/state\.pt is refused, .*: remove .*step-1 to go"):
        train_sft.main([*command, "sft.steps=2", "--resume"])


def test_the_last_evaluation_of_sft_is_one_row_also_after_a_kill(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import train_sft
    from trainers.sft import model

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    run = RunFolder(tmp_path / "run")
    command = [str(prepared / "config.yaml"), f"run_dir={run.root}", "sft.steps=3", "--resume"]
    for _ in range(3):  # while it exports
        with monkeypatch.context() as patch:
            patch.setattr(model, "export_sft", killed)
            with pytest.raises(KeyboardInterrupt):
                train_sft.main(command)
    train_sft.main(command)
    lines = [json.loads(line) for line in run.metrics("sft").open()]
    assert [line["step"] for line in lines if "sft/eval_loss" in line] == [3]
    assert [line["step"] for line in lines if "sft/loss" in line] == [1, 2, 3]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_finished_stage_is_prolonged_to_the_weights_of_one_go(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    import train_ppo
    import train_rm
    import train_sft
    from trainers.ppo import model as ppo_model
    from trainers.reward import train as reward_train
    from trainers.sft import model as sft_model

    exports = {"sft": (sft_model, "export_sft"), "ppo": (ppo_model, "export_ppo")}
    exports["reward"] = (reward_train, "export_reward")
    mains = {"sft": train_sft.main, "reward": train_rm.main, "ppo": train_ppo.main}
    earlier = list(mains)[: list(mains).index(stage)]

    def start(folder: str, *more: str) -> RunFolder:
        run = RunFolder(tmp_path / folder)
        constant = [f"{name}.lr_schedule=constant" for name in mains]
        few = [f"{name}.steps=1" for name in earlier]
        command = [str(prepared / "config.yaml"), f"run_dir={run.root}", *constant, *few]
        for name in (*earlier, stage):
            mains[name]([*command, *more])
        return run

    def adapters(run: RunFolder) -> list[bytes]:
        return [p.read_bytes() for p in sorted(run.stage(stage).glob("*/adapter_model.*"))]  # type: ignore[arg-type]

    whole = start("whole", f"{stage}.steps=3")
    run = start("run", f"{stage}.steps=2")
    before = adapters(run)
    evaluation = run.evaluation.read_bytes() if stage == "ppo" else b""
    assert before and before != adapters(whole)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*exports[stage], killed)
        with pytest.raises(KeyboardInterrupt):
            start("run", f"{stage}.steps=3", "--resume")
    assert adapters(run) == before and not run.result(stage).is_file()  # type: ignore[arg-type]
    assert stage != "ppo" or run.evaluation.read_bytes() == evaluation
    start("run", f"{stage}.steps=3", "--resume")
    assert adapters(run) == adapters(whole) and run.read_result(stage)["steps"] == 3  # type: ignore[arg-type]
    assert stage != "ppo" or run.evaluation.read_bytes() != evaluation


def test_an_ensemble_is_finished_with_the_members_that_are_begun(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import train_rm
    import train_sft
    from trainers.reward import train as reward_train

    run = RunFolder(tmp_path / "run")
    command = [str(prepared / "config.yaml"), f"run_dir={run.root}", "sft.steps=1"]
    train_sft.main(command)
    exported = reward_train.export_reward

    def killed_in_the_second(cfg: Any, folder: Path, *rest: Any) -> None:
        if folder != run.reward_adapter:
            raise KeyboardInterrupt
        exported(cfg, folder, *rest)

    ensemble = ["reward.ensemble=3", "reward.steps=3"]
    with monkeypatch.context() as patch:
        patch.setattr(reward_train, "export_reward", killed_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            train_rm.main([*command, *ensemble])
    assert run.finished_members() == 1
    train_rm.main([*command, "reward.ensemble=2", "reward.steps=2", "--resume"])
    assert run.read_result("reward")["ensemble"] == 2 and len(run.reward_members()) == 2


def test_a_stage_can_be_ended_at_any_of_its_checkpoints(prepared: Path, tmp_path: Path):
    import train_sft

    run = RunFolder(tmp_path / "run")
    command = [str(prepared / "config.yaml"), f"run_dir={run.root}", "sft.lr_schedule=cosine"]
    train_sft.main([*command, "sft.steps=5"])
    run.result("sft").unlink()
    for steps in (4, 5):  # the two that are kept; no learning rate is left to depend on them
        train_sft.main([*command, f"sft.steps={steps}", "--resume"])
        assert run.read_result("sft")["steps"] == steps and run.sft_adapter.is_dir()
        run.result("sft").unlink()
    with pytest.raises(ValueError, match=r"sft\.steps: 5 there, 3 now"):
        train_sft.main([*command, "sft.steps=3", "--resume"])
