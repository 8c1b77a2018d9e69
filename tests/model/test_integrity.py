"""One bit flipped in what a run made or rests on, at each command and stage that reads it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ppo_runs import TinyRun

from chatllama.cli import main
from chatllama.config.loader import dump_config, load_config
from chatllama.config.model import LoraSection
from chatllama.inference.load import load_run
from chatllama.model import weight_files
from chatllama.model.adapters import load_adapter
from chatllama.model.integrity import base_record, check_outputs
from chatllama.runs.folder import STAGES, RunFolder, Stage, read_lineage, write_record
from chatllama.runtime import digests, distributed
from chatllama.runtime.files import write_json
from chatllama.text.tokenizer import load_tokenizer
from trainers.stages import lineage
from trainers.stages.decisions import check_resumed, decide

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A folder with `base` and a finished `run`, whose lineage is as the stages write it."""
    folder = tmp_path_factory.mktemp("finished")
    tiny = TinyRun.make(folder, tiny_tokenizer_dir)
    run, cfg = RunFolder(tiny.folder), tiny.config()
    shutil.copytree(run.sft_adapter, run.policy_adapter)
    shutil.copytree(run.reward_adapter, run.value_adapter)
    dump_config(cfg, run.config)
    for stage in STAGES:
        write_record(run, stage, lineage.gather(cfg, run, stage, {}))
        lineage.finish(cfg, run, stage)
        write_json(run.result(stage), {"steps": 1.0})
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    """A copy with a base of its own, which lies elsewhere than when it was trained."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = RunFolder(tmp_path / "run")
    text = run.config.read_text().replace(str(finished / "base"), str(tmp_path / "base"))
    run.config.write_text(text.replace(str(finished / "run"), str(run.root)))
    return run


def flip(path: Path) -> None:
    """One bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


ADAPTERS = ("sft/adapter", "reward/adapter", "ppo/policy")
BASE = ("base/model.safetensors", "base/config.json", "base/tokenizer.json")
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "generate": (["Anna"], ADAPTERS[1:]),
    "chat": ([], ADAPTERS),
    "eval": (["--translation", "news", "--languages", "de", "en"], ADAPTERS[1:]),
    "export": (["--reward"], ADAPTERS[1:]),
    "serve": (["--port", "0"], ADAPTERS),
    "report": ([], (*ADAPTERS, "ppo/value")),
}


@pytest.mark.parametrize(
    ("command", "damaged"),
    [
        (command, file)
        for command, (_, adapters) in COMMANDS.items()
        for file in (
            *(f"run/{adapter}/{WEIGHTS}" for adapter in adapters),
            f"run/{adapters[-1]}/adapter_config.json",
            *(BASE if command != "report" else ()),
        )
    ],
)
def test_a_command_names_the_file(
    run: RunFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    damaged: str,
):
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it is served"))
    for language in ("de", "en"):
        (run.root / f"news.{language}").write_text("a\n")
    options = [str(run.root / each) if each == "news" else each for each in COMMANDS[command][0]]
    file = run.root.parent / damaged
    flip(file)
    assert main([command, str(run.root), *options]) == 2
    error = capsys.readouterr().err
    assert str(file if damaged.startswith("run") else file.parent) in error
    assert file.name in error and "opy it again" in error and "Traceback" not in error


STAGE_FILES: dict[Stage, tuple[str, ...]] = {
    "sft": (),
    "reward": (f"run/sft/adapter/{WEIGHTS}", "run/sft/adapter/chatllama.json"),
    "ppo": (
        f"run/sft/adapter/{WEIGHTS}",
        f"run/reward/adapter/{WEIGHTS}",
        "run/reward/adapter/adapter_config.json",
    ),
}


@pytest.mark.parametrize(
    ("stage", "damaged"),
    [(stage, file) for stage, files in STAGE_FILES.items() for file in (*files, *BASE)],
)
def test_a_stage_names_the_file(run: RunFolder, stage: Stage, damaged: str):
    cfg, file = load_config(run.config), run.root.parent / damaged
    run.result(stage).unlink()
    (run.checkpoints(stage) / "step-1").mkdir(parents=True)
    check_resumed(cfg, run, stage)
    flip(file)
    with pytest.raises(ValueError, match=rf"{file.name} is not .*was changed or damaged since"):
        check_resumed(cfg, run, stage)


@pytest.mark.parametrize("damaged", ["sft/adapter", "reward/adapter", "ppo/policy", "ppo/value"])
def test_a_finished_stage_is_not_kept(run: RunFolder, damaged: str):
    cfg, file = load_config(run.config), run.root / damaged / WEIGHTS
    assert [each.action for each in decide(cfg, run, None, False).values()] == ["keep"] * 3
    flip(file)
    stage = damaged.partition("/")[0]
    with pytest.raises(ValueError, match=rf"{file} is not .*chatllama run --from {stage}` make"):
        decide(cfg, run, None, False)
    flip(file)
    flip(run.root.parent / "base/model.safetensors")
    with pytest.raises(ValueError, match=r"base: model\.safetensors is not the file that stage"):
        decide(cfg, run, None, False)


@pytest.mark.parametrize("adapter", [*ADAPTERS, "ppo/value"])
@pytest.mark.parametrize("place", ["", "ppo", "link"])
def test_an_adapter_is_compared_wherever_it_is_read(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, adapter: str, place: str
):
    folder = run.root / adapter
    if place == "link":
        (run.root.parent / "link").symlink_to(run.root)
        folder = run.root.parent / "link" / adapter
    elif place:
        monkeypatch.chdir(run.root)
        folder = Path(adapter)
    load_adapter(folder)
    flip(run.root / adapter / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{adapter}/{WEIGHTS} is not what the stage wrote"):
        load_adapter(folder)


def test_an_adapter_replaced_on_purpose_loses_its_entry(run: RunFolder):
    flip(run.policy_adapter / WEIGHTS)
    with pytest.raises(ValueError, match="replaced it on purpose, remove its entry from lineage"):
        load_run(run, roles=["policy"])
    record = read_lineage(run)["ppo"]
    del record["files"][f"ppo/policy/{WEIGHTS}"]
    write_record(run, "ppo", record)
    load_run(run, roles=["policy"])


def test_members_of_an_ensemble_are_told_apart(run: RunFolder):
    record = read_lineage(run)["reward"]
    shutil.copytree(run.reward_adapter, run.reward_member(1))
    names = [path for path in record["files"] if path.endswith(WEIGHTS)]
    record["files"] |= {name.replace("adapter/", "adapter-1/"): "0" for name in names}
    write_record(run, "reward", record)
    load_adapter(run.reward_adapter)
    with pytest.raises(ValueError, match=rf"adapter-1/{WEIGHTS} is not what"):
        load_adapter(run.reward_member(1))


@pytest.mark.parametrize("keeps", ["outputs", "nothing", "no lineage"])
def test_runs_of_older_versions_are_opened_and_said(
    run: RunFolder, capsys: pytest.CaptureFixture[str], keeps: str
):
    for stage, record in read_lineage(run).items():
        del record["files"], record["base"]["files"]
        if keeps == "nothing":
            del record["outputs"]
        write_record(run, stage, record)  # type: ignore[arg-type]
    if keeps == "no lineage":
        run.lineage.unlink()
    load_run(run)
    assert capsys.readouterr().err.count("as an older version made some") == 1
    flip(run.policy_adapter / WEIGHTS)
    if keeps == "outputs":  # of the folder alone
        with pytest.raises(ValueError, match=r"ppo/policy is not what the stage wrote"):
            load_adapter(run.policy_adapter)
    else:
        load_adapter(run.policy_adapter)


def test_nothing_is_said_of_a_whole_run(run: RunFolder, capsys: pytest.CaptureFixture[str]):
    load_run(run)
    assert capsys.readouterr().err == ""


def test_a_report_needs_no_adapters(run: RunFolder):
    shutil.rmtree(run.policy_adapter)
    with pytest.raises(ValueError, match=r"policy/.* is missing"):
        check_outputs(run)
    assert main(["report", str(run.root)]) == 0


def test_a_second_command_hashes_no_base(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    hashed: Callable[[Path], str] = digests.file_hash
    monkeypatch.setattr(digests, "file_hash", lambda path: read.append(path) or hashed(path))
    monkeypatch.setattr(digests, "LARGE", 50_000)
    monkeypatch.setattr(digests, "cache_file", lambda: run.root.parent / "digests.json")
    base = run.root.parent / "base/model.safetensors"
    load_run(run, roles=["policy"])
    assert base in read
    read.clear()
    load_run(run, roles=["policy"])
    assert base not in read and run.policy_adapter / WEIGHTS in read
    flip(base)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that stage sft"):
        load_run(run, roles=["policy"])


def test_after_full_fine_tuning_the_model_is_compared(run: RunFolder):
    shutil.copytree(run.root.parent / "base", run.full_model)
    cfg = load_config(run.config, ["lora=null"])
    dump_config(cfg, run.config)
    lineage.finish(cfg, run, "sft")
    load_run(run, roles=["reference"])
    flip(run.full_model / "model.safetensors")
    with pytest.raises(ValueError, match=r"sft/model/model\.safetensors is not what the stage"):
        load_run(run, roles=["reference"])
    with pytest.raises(ValueError, match=r"sft/model/model\.safetensors is not what the stage"):
        check_resumed(cfg, run, "reward")


def download(base: Path, cache: Path) -> tuple[Path, str]:
    """Puts a model into a cache of the hub, as a/b; its folder there, and its commit."""
    commit, blobs = "c" * 40, cache / "models--a--b/blobs"
    snapshot = cache / "models--a--b/snapshots" / commit
    for folder in (blobs, snapshot, cache / "models--a--b/refs"):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        large = file.name == "model.safetensors"
        blob = blobs / (digests.file_hashes([file])[file] if large else f"{number:040d}")
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(blob)
    (cache / "models--a--b/refs/main").write_text(commit)
    return snapshot, commit


def test_a_model_of_the_hub(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = run.root.parent / "base"
    snapshot, commit = download(base, tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cfg = load_config(run.config, ["backbone.path=a/b"])
    record = base_record(cfg, run)
    assert record["commit"] == commit
    assert record["files"] == read_lineage(run)["sft"]["base"]["files"]
    write_record(run, "sft", read_lineage(run)["sft"] | {"base": record})
    (snapshot / "config.json").unlink()
    shutil.copyfile(base / "config.json", snapshot / "config.json")
    flip(snapshot / "config.json")
    with pytest.raises(
        ValueError, match=rf"config\.json is not .* set backbone\.revision to {commit}"
    ):
        load_run(run, cfg, ["policy"])
    flip((snapshot / "model.safetensors").resolve())
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*to download it again"):
        base_record(cfg, run)


@pytest.mark.parametrize("stage", ["reward", "ppo"])
@pytest.mark.parametrize("damaged", [None, *BASE])
def test_a_model_that_a_stage_downloads_is_compared_in_that_stage(
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damaged: str | None,
    stage: Stage,
):
    from trainers.stages import stage as stages

    base, cache = run.root.parent / "base", tmp_path / "hub"
    cfg = load_config(run.config, ["backbone.path=a/b"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(stages, "record_config", lambda cfg, run: None)
    if damaged and damaged.endswith(".json"):
        with (run.root.parent / damaged).open("a") as file:
            file.write("\n")  # still JSON
    elif damaged:
        flip(run.root.parent / damaged)
    monkeypatch.setattr(weight_files, "model_folder", lambda *_: download(base, cache)[0])
    if damaged is None:
        stages.open_stage(cfg, run, stage)
        assert read_lineage(run)[stage]["base"]["commit"] == "c" * 40
        return
    with pytest.raises(ValueError, match=rf"{Path(damaged).name} is not the file that stage sft"):
        stages.open_stage(cfg, run, stage)


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_after_full_fine_tuning_the_base_is_not_downloaded_again(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, stage: Stage
):
    from trainers.stages import stage as stages

    shutil.copytree(run.root.parent / "base", run.full_model)
    cfg = load_config(run.config, ["backbone.path=a/b", "lora=null"])
    loaded: list[str] = []
    monkeypatch.setattr(stages, "record_config", lambda cfg, run: None)
    monkeypatch.setattr(stages, "backbone_folder", lambda _, path: loaded.append(path))
    tokenizer = load_tokenizer(run.root.parent / "base")
    monkeypatch.setattr(stages, "load_tokenizer", lambda *_, **options: tokenizer)
    lineage.finish(cfg, run, "sft")
    stages.open_stage(cfg, run, stage)
    assert loaded == []
    stages.open_stage(cfg.model_copy(update={"lora": LoraSection()}), run, "sft")
    assert loaded == ["a/b"]


@pytest.mark.parametrize("damaged", [None, *BASE, "other weights"])
def test_machines_have_the_same_base(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, damaged: str | None
):
    from trainers.stages import stage

    cfg = load_config(run.config)
    first = base_record(cfg, run)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("CROSS_SIZE", "2")
    monkeypatch.setattr(distributed, "from_rank_zero", lambda _: first)
    if damaged is None:
        stage.compare_machines(cfg, run, None)
        return
    if damaged == "other weights":
        file = run.root.parent / "base/model.safetensors"
        flip(file)
        file.rename(file.with_name("model-1.safetensors"))  # other files, compared by both ends
        first["fingerprint"] = "0"
    else:
        flip(run.root.parent / damaged)
    name = "has other weights" if damaged == "other weights" else f"base: {Path(damaged).name} on "
    with pytest.raises(ValueError, match=name):
        stage.compare_machines(cfg, run, None)
    monkeypatch.setenv("CROSS_SIZE", "1")
    stage.compare_machines(cfg, run, None)
