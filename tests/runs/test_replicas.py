"""Two machines, each with a run folder of its own, do what one process does."""

import json
import sys
from pathlib import Path

import pytest
from launching import free_port, start_on, two_machines

import train_ppo
import train_rm
import train_sft
from chatllama.config.loader import load_config
from chatllama.runs import replicas
from chatllama.runs.folder import STAGES, RunFolder
from chatllama.runs.replicas import check_run_folder, replicate_folder, views_of
from chatllama.runtime import distributed

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"
CONFIG = """
run_dir: run
backbone: {{path: {base}, dtype: float32}}
chat: {{template: llama2}}
lora: {{r: 4}}
tracking: {{report_to: []}}
sft:
  data: [{{path: {samples}/alpaca.jsonl}}]
  batch_size: 4
  microbatch_size: 2
  max_length: 256
  steps: 2
reward:
  data: [{{path: {samples}/preferences.jsonl}}]
  eval_fraction: 0.25
  batch_size: 4
  microbatch_size: 2
  max_length: 256
  steps: 2
  allow_weak: true
ppo:
  data: [{{path: {samples}/prompts.jsonl}}]
  eval_fraction: 0.25
  rollout_batch_size: 4
  minibatch_size: 4
  microbatch_size: 2
  score_normalization_samples: 4
  steps: 2
generation: {{max_new_tokens: 6}}
evaluation: {{num_prompts: 2}}
"""


@pytest.fixture
def config_file(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    file = tmp_path / "nodes.yaml"
    file.write_text(CONFIG.format(base=tiny_llama_dir, samples=SAMPLES))
    return file


def metrics(run: RunFolder) -> list[dict[str, float]]:
    lines = [
        json.loads(line) for stage in STAGES for line in run.metrics(stage).read_text().splitlines()
    ]
    timed = ("time", "sft/tokens_per_second", "reward/tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


@pytest.mark.slow
def test_two_machines_without_a_shared_folder_give_what_one_process_gives(
    tmp_path: Path, config_file: Path
):
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    port = free_port()
    with two_machines() as machines:
        started = []
        for number, machine in enumerate(machines):
            folder = tmp_path / f"node-{number}"
            folder.mkdir()
            words = [sys.executable, "-m", "chatllama.cli", "run", str(config_file)]
            words += ["--hostfile", str(tmp_path / "hosts"), "--node-rank", str(number)]
            words += ["--master-addr", machine.master_addr, "--master-port", str(port)]
            started.append(start_on(machine, words, folder))
        outputs = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    first, second = (RunFolder(tmp_path / f"node-{number}" / "run") for number in (0, 1))
    alone = RunFolder(tmp_path / "alone")
    for main in (train_sft.main, train_rm.main, train_ppo.main):
        main([str(config_file), f"run_dir={alone.root}"])
    for found, expected in zip(metrics(first), metrics(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert "is not shared by" in outputs[0] and "is not shared by" not in outputs[1]
    copied = ["sft/adapter", "reward/adapter", "ppo/policy", "ppo/value"]
    for folder in copied:
        for file in (first.root / folder).iterdir():
            assert (second.root / folder / file.name).read_bytes() == file.read_bytes()
    for stage in STAGES:
        assert second.read_result(stage) == first.read_result(stage)
    assert first.summary.is_file() and not second.summary.exists()


def test_one_machine_copies_nothing(tmp_path: Path):
    assert views_of(tmp_path) == []
    replicate_folder(RunFolder(tmp_path), tmp_path / "sft")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_copied_without_checkpoints_and_its_result_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Rank 0 sends, rank 1 of another machine receives; both are played here, one after the other.
    ours, theirs = tmp_path / "ours" / "sft", tmp_path / "theirs" / "sft"
    (ours / "checkpoints").mkdir(parents=True)
    (ours / "adapter").mkdir()
    contents = {"result.json": b"{}", "adapter/weights": bytes(range(100)), "z": b""}
    for name, content in {**contents, "checkpoints/step": b"no"}.items():
        (ours / name).write_bytes(content)
    sent: list[object] = []

    def send(value: object) -> object:
        sent.append(value)
        return value

    monkeypatch.setattr(replicas, "CHUNK", 30)
    monkeypatch.setattr(replicas, "views_of", lambda folder: [("a", True), ("b", False)])
    monkeypatch.setattr(distributed, "from_rank_zero", send)
    replicate_folder(RunFolder(ours.parent), ours)
    assert sent[0] == ["adapter/weights", "z", "result.json"]
    received = iter(list(sent))
    monkeypatch.setattr(distributed, "from_rank_zero", lambda value: next(received))
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    replicate_folder(RunFolder(theirs.parent), theirs)
    files = {str(p.relative_to(theirs)): p.read_bytes() for p in theirs.rglob("*") if p.is_file()}
    assert files == contents


def test_checkpoints_need_a_shared_folder(
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    views = [("a", True), ("b", False), ("b", False)]
    monkeypatch.setattr(replicas, "views_of", lambda folder: views)
    run = RunFolder(tmp_path / "run")
    saving = load_config(str(config_file), ["sft.save_every=1", "ppo.save_every=1"])
    with pytest.raises(ValueError, match=r"shared by b, .*\(sft.save_every=0, ppo.save_every=0\)"):
        check_run_folder(saving, run)
    check_run_folder(load_config(str(config_file)), run)
    assert "not shared by b: they get copies" in capsys.readouterr().out
    views[1:] = [("b", True)]
    check_run_folder(saving, run)
    assert not capsys.readouterr().out
