"""The SFT stage as people start it: learning, resuming, full fine-tuning, the launcher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import launch

import train_sft
from chatllama.runs.folder import RunFolder, read_lineage


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("sft_config")
    people = ["Anna", "the baker", "my brother", "Victor", "the queen", "a quiet child"]
    places = ["the river", "a garden", "an old house", "the market"]
    records = [
        {"instruction": f"Is {who} at {place}?", "input": "", "output": f"{who} is at {place}."}
        for who in people
        for place in places
    ]
    (folder / "sft.json").write_text(json.dumps(records))
    (folder / "text.txt").write_text(
        "\n\n".join(f"{who} walks to {place} and is quiet." for who in people for place in places)
    )
    file = folder / "sft.yaml"
    file.write_text(
        f"""
run_dir: {folder / "run"}
backbone: {{path: {tiny_llama_dir}, dtype: float32}}
lora: {{r: 4, dropout: 0.1}}
tracking: {{report_to: []}}
sft:
  data: [{{path: {folder / "sft.json"}}}]
  eval_fraction: 0.2
  steps: 6
  batch_size: 8
  microbatch_size: 2
  max_length: 256
  learning_rate: 1e-2
"""
    )
    return file


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "sft" / "metrics.jsonl").open()]
    return [line["sft/loss"] for line in lines if "sft/loss" in line]


@pytest.mark.slow
def test_stage_learns_and_its_adapter_loads_with_plain_peft(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = RunFolder(tmp_path / "run")
    command = [str(config_file), f"run_dir={run.root}", "sft.steps=20"]
    train_sft.main(command)
    result = run.read_result("sft")
    curve = losses(run.root)
    assert len(curve) == 20 and max(curve[-4:]) < curve[0] - 0.3  # dropout: steps differ
    assert result["loss"] == curve[-1] and result["steps"] == 20
    assert result["eval_loss"] < curve[0] and result["tokens"] > 0
    base = AutoModelForCausalLM.from_pretrained(
        json.loads((run.sft_adapter / "chatllama.json").read_text())["base"]
    )
    tokens = torch.tensor([[1, 30, 40, 50]])
    with torch.no_grad():
        before = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, str(run.sft_adapter)).eval()
        assert not torch.allclose(adapted(tokens).logits, before, atol=1e-2)
    assert not run.checkpoints("sft").exists() and not (run.root / "sft" / ".unfinished").exists()
    capsys.readouterr()
    train_sft.main(command)
    assert "has finished before" in capsys.readouterr().out


@pytest.mark.slow
def test_resumed_stage_is_bit_equal(config_file: Path, tmp_path: Path):
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    train_sft.main([str(config_file), f"run_dir={whole.root}", "sft.save_every=2"])
    kept = sorted(path.name for path in whole.checkpoints("sft").iterdir())
    assert kept == ["step-4", "step-6"]  # save_total_limit
    shutil.copytree(whole.checkpoints("sft") / "step-4", cut.checkpoints("sft") / "step-4")
    shutil.copy(whole.metrics("sft"), cut.root / "sft")
    command = [str(config_file), f"run_dir={cut.root}", "sft.save_every=2"]
    with pytest.raises(ValueError, match=r"step-4 exists .* --resume"):
        train_sft.main(command)
    train_sft.main([*command, "--resume"])
    assert losses(cut.root) == losses(whole.root)
    for run in (whole, cut):
        assert (run.sft_adapter / "adapter_model.safetensors").is_file()
    weights = [(r.sft_adapter / "adapter_model.safetensors").read_bytes() for r in (whole, cut)]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_gives_a_plain_model_folder(config_file: Path, tmp_path: Path, dtype: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = RunFolder(tmp_path / "run")
    train_sft.main(
        [
            str(config_file),
            f"run_dir={run.root}",
            "lora=null",
            "sft.learning_rate=3e-3",
            f"backbone.dtype={dtype}",
        ]
    )
    assert losses(run.root)[-1] < losses(run.root)[0] - 0.3
    model = AutoModelForCausalLM.from_pretrained(run.full_model)
    assert model.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(run.full_model)) == 300


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(config_file: Path, tmp_path: Path):
    for name in ("false", "true"):
        train_sft.main(
            [
                str(config_file),
                f"run_dir={tmp_path / name}",
                "lora.dropout=0.0",
                f"backbone.gradient_checkpointing={name}",
            ]
        )
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_equal_one_process(config_file: Path, tmp_path: Path, stage: int):
    common = [str(config_file), "lora.dropout=0.0", "sft.save_every=3"]
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    train_sft.main([*common, f"run_dir={one.root}"])
    zero = [f"deepspeed.stage={stage}", "deepspeed.stage3_param_persistence_threshold=0"]
    launch("train_sft.py", *common, f"run_dir={two.root}", *zero)
    assert losses(two.root) == pytest.approx(losses(one.root), rel=1e-4)
    ours, theirs = one.read_result("sft"), two.read_result("sft")
    assert theirs["eval_loss"] == pytest.approx(ours["eval_loss"], rel=1e-4)
    # and the launched run resumes from its own step-3 to the same end
    shutil.rmtree(two.checkpoints("sft") / "step-6")
    two.result("sft").unlink()
    curve = losses(two.root)
    launch("train_sft.py", *common, f"run_dir={two.root}", *zero, "--resume")
    assert losses(two.root) == curve
    # Both starts on the same machine: told once.
    starts = [read_lineage(run)["sft"]["hardware"] for run in (one, two)]
    assert [[machine["ranks"] for machine in each[0]] for each in starts] == [[1], [2]]
    assert [len(each) for each in starts] == [1, 1] and starts[0][0][0]["cores"] > 0


@pytest.mark.slow
def test_backbone_from_scratch_then_sft_in_one_launch(config_file: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    text = config_file.parent / "text.txt"
    scratch = (
        f"backbone={{dtype: float32, from_scratch: {{data: [{{path: {text}, format: text}}], "
        "vocab_size: 290, hidden_size: 32, intermediate_size: 64, num_layers: 2, steps: 8, "
        "batch_size: 8, microbatch_size: 2, max_length: 64, warmup_steps: 2}}"
    )
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    for run in (one, two):
        command = [str(config_file), scratch, "lora.dropout=0.0", f"run_dir={run.root}"]
        command += ["deepspeed.stage=2"]
        train_sft.main(command) if run is one else launch("train_sft.py", *command)
        assert AutoModelForCausalLM.from_pretrained(run.backbone).config.vocab_size == 290
        assert (run.backbone / "tokenizer.model").is_file()
        assert run.read_result("sft")["backbone_seconds"] > 0
        curve = losses(run.root / "pretraining")
        assert len(curve) == 8 and curve[-1] < curve[0] - 0.1
    for folder in ("pretraining", "."):
        assert losses(two.root / folder) == pytest.approx(losses(one.root / folder), rel=1e-4)
