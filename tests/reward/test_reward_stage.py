"""The whole reward stage: train_rm.py in one process and on two ranks, resume, ensembles."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from transformers import LlamaForCausalLM

import train_rm
from chatllama.config.loader import load_config
from chatllama.config.schema import RewardSection
from chatllama.model.adapters import load_adapter, save_adapter
from chatllama.model.roles import Adapter, RoleModel, adapter_parameters, adapter_state
from chatllama.runs.folder import RunFolder
from chatllama.runtime.files import write_json
from chatllama.text.tokenizer import load_tokenizer
from trainers.reward.data import load_preferences
from trainers.reward.evaluate import check_gate
from trainers.stages import stage

PROJECT = Path(__file__).resolve().parents[2]


def metrics(run: RunFolder) -> list[dict[str, float]]:
    return [json.loads(line) for line in run.metrics("reward").open()]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A config beside a finished SFT stage and learnable pairs and lists."""
    folder = tmp_path_factory.mktemp("reward_config")
    rng = random.Random(0)
    people = ["Anna", "the baker", "my brother", "Victor", "the queen", "a quiet child"]
    places = ["the river", "a garden", "an old house", "the market", "some forest"]
    records: list[dict[str, Any]] = []
    for hour in range(1, 5):
        for who in people:
            for place in places:
                where = [f"{who} walks to {place} at {hour}.", f"{rng.choice(people)} paints."]
                if len(records) % 4:
                    answers = {"chosen": where[0], "rejected": where[1], "margin": 1}
                else:
                    answers = {"answers": [where[0], f"{who} at {hour}.", where[1]]}
                records.append({"prompt": f"Where is {who}, and {hour}?", **answers})
    for kind in ("chosen", "answers"):
        chosen = [json.dumps(record) for record in records if kind in record]
        (folder / f"{kind}.jsonl").write_text("\n".join(chosen) + "\n")
    file = folder / "reward.yaml"
    file.write_text(
        f"""
run_dir: {folder / "run"}
backbone: {{path: {tiny_llama_dir}, dtype: float32}}
lora: {{r: 4, dropout: 0.1}}
tracking: {{report_to: []}}
sft: {{data: [{{path: read_before.jsonl}}]}}
reward:
  data: [{{path: {folder / "chosen.jsonl"}}}, {{path: {folder / "answers.jsonl"}}}]
  eval_fraction: 0.2
  steps: 6
  batch_size: 8
  microbatch_size: 2
  max_length: 256
  learning_rate: 5e-3
"""
    )
    cfg, run = load_config(str(file)), RunFolder(folder / "run")
    write_json(run.result("sft"), {"loss": 1.0})
    tokenizer = load_tokenizer(tiny_llama_dir)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        llama = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
        sft = RoleModel(llama, {"reference": Adapter(cfg.adapter_lora)})
        for parameter in adapter_parameters(sft, "reference"):
            parameter.data.normal_(std=0.05)
    info = stage.adapter_info(cfg, run, tokenizer, "sft")
    save_adapter(run.sft_adapter, adapter_state(sft, "reference"), cfg.adapter_lora, info)
    return file


def new_run(config_file: Path, folder: Path) -> tuple[list[str], RunFolder]:
    """The command line and the folder of another run with the same finished SFT stage."""
    shutil.copytree(config_file.parent / "run" / "sft", folder / "sft")
    return [str(config_file), f"run_dir={folder}"], RunFolder(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = load_adapter(folder)
    return {**saved.state, "score": saved.head["weight"]}


@pytest.mark.slow
def test_the_stage_learns_and_writes_what_it_found(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command, run = new_run(config_file, tmp_path / "run")
    train_rm.main([*command, "reward.steps=16", "reward.eval_every=4"])
    result = run.read_result("reward")
    lines = metrics(run)
    losses = [line["reward/loss"] for line in lines if "reward/loss" in line]
    assert len(losses) == 16 and losses[-1] < losses[0] - 0.2
    assert [line["step"] for line in lines if "reward/eval_loss" in line] == [4, 8, 12, 16]
    assert result["accuracy"] > 0.8 and result["accuracy_low"] > 0.5
    assert result["num_eval_pairs"] > result["num_eval_prompts"]  # lists of three
    assert (result["steps"], result["ensemble"], result["loss"]) == (16, 1, losses[-1])
    diagnosis = json.loads(run.reward_diagnosis.read_text())
    assert diagnosis["model"]["accuracy"]["value"] == pytest.approx(result["accuracy"])
    assert diagnosis["model"]["padding"]["error"] < 1e-4
    assert set(diagnosis["data"]["training"]["answers_per_prompt"]) == {"2", "3"}
    before, after = load_adapter(run.sft_adapter).state, load_adapter(run.reward_adapter).state
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not run.checkpoints("reward").exists()
    assert check_gate(run, RewardSection()) == []
    out = capsys.readouterr().out
    assert "reward model diagnosis: accuracy" in out and "training pairs" in out
    train_rm.main([*command, "reward.steps=16", "reward.eval_every=4"])
    assert "has finished before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_stage_is_bit_equal(config_file: Path, tmp_path: Path):
    command, whole = new_run(config_file, tmp_path / "whole")
    train_rm.main([*command, "reward.save_every=2"])
    command, cut = new_run(config_file, tmp_path / "cut")
    shutil.copytree(whole.checkpoints("reward") / "step-4", cut.checkpoints("reward") / "step-4")
    shutil.copy(whole.metrics("reward"), cut.stage("reward"))
    with pytest.raises(ValueError, match=r"step-4 exists .* --resume"):
        train_rm.main([*command, "reward.save_every=2"])
    train_rm.main([*command, "reward.save_every=2", "--resume"])
    expected = weights(whole.reward_adapter)
    for name, tensor in weights(cut.reward_adapter).items():
        assert torch.equal(tensor, expected[name]), name
    same = [{k: v for k, v in line.items() if k != "time"} for line in metrics(whole)]
    assert [{k: v for k, v in line.items() if k != "time"} for line in metrics(cut)] == same
    keys = ("accuracy", "eval_loss", "loss")
    results = [[run.read_result("reward")[key] for key in keys] for run in (whole, cut)]
    assert results[0] == results[1]


FRESH_PROCESS = """
import json
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base, adapter, inputs = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    rows = json.load(open(inputs))
    print(json.dumps([float(model(input_ids=torch.tensor([ids])).logits) for ids in rows]))
assert not [name for name in sys.modules if name.split(".")[0] in ("chatllama", "trainers")]
"""


@pytest.mark.slow
def test_an_ensemble_of_two(config_file: Path, tmp_path: Path, tiny_llama_dir: Path):
    command, single = new_run(config_file, tmp_path / "single")
    train_rm.main(command)
    command, run = new_run(config_file, tmp_path / "run")
    command.append("reward.ensemble=2")
    train_rm.main(command)
    folders = run.reward_members()
    alone, first, second = (weights(f) for f in (single.reward_adapter, *folders))
    assert all(torch.equal(alone[name], first[name]) for name in alone)
    assert not any(torch.equal(second[name], first[name]) for name in first)
    members = json.loads((run.checkpoints("reward") / "members.json").read_text())
    diagnosis = json.loads(run.reward_diagnosis.read_text())
    assert len(diagnosis["model"]["members"]) == 2 and run.read_result("reward")["ensemble"] == 2

    # A process without this package gives member 1's scores of held-out answers.
    cfg, tokenizer = load_config(str(config_file)), load_tokenizer(tiny_llama_dir)
    held_out = load_preferences(cfg, tokenizer).held_out
    rows = [ids for ids_list in held_out["answer_ids"][:5] for ids in ids_list]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            FRESH_PROCESS,
            str(tiny_llama_dir),
            str(folders[1]),
            "rows.json",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(members[1]["scores"][: len(rows)], abs=1e-5)

    # Interrupted between the members, it goes on with the second.
    run.result("reward").unlink()
    write_json(run.checkpoints("reward") / "members.json", members[:1])
    (folders[0] / "adapter_model.safetensors").unlink()  # would be written again if redone
    with pytest.raises(ValueError, match=r"members\.json exists .* --resume"):
        train_rm.main(command)
    train_rm.main([*command, "--resume"])
    assert not (folders[0] / "adapter_model.safetensors").exists()
    again = weights(folders[1])
    assert all(torch.equal(second[name], again[name]) for name in second)


@pytest.fixture(scope="module")
def one_process(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    command, run = new_run(config_file, tmp_path_factory.mktemp("one") / "run")
    train_rm.main([*command, "reward.ensemble=2", "lora.dropout=0.0"])
    return run


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_equal_one_process(
    config_file: Path, tmp_path: Path, one_process: RunFolder, zero: int
):
    command, run = new_run(config_file, tmp_path / "run")
    launch(
        "train_rm.py",
        *command,
        "reward.ensemble=2",
        "lora.dropout=0.0",
        f"deepspeed.stage={zero}",
        "deepspeed.stage3_param_persistence_threshold=0",
    )
    for ours, theirs in zip(metrics(one_process), metrics(run), strict=True):
        for name, value in ours.items():
            if name != "time":
                assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for ours, theirs in zip(one_process.reward_members(), run.reward_members(), strict=True):
        expected = weights(ours)
        for name, tensor in weights(theirs).items():
            # By norm: AdamW makes 1e-5 to 1e-3 of the rounding where a gradient is nearly zero,
            # also in one process with microbatches of another size.
            assert (tensor - expected[name]).norm() <= 2e-4 * expected[name].norm(), name
    scores = [
        [m["scores"] for m in json.loads((r.checkpoints("reward") / "members.json").read_text())]
        for r in (one_process, run)
    ]
    torch.testing.assert_close(
        torch.tensor(scores[1]), torch.tensor(scores[0]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(("file", "rated"), [("chosen", True), ("answers", False)])
def test_margin_coef_needs_margins(config_file: Path, file: str, rated: bool):
    path = config_file.parent / f"{file}.jsonl"
    cfg = load_config(config_file, ["reward.margin_coef=0.5", f"reward.data=[{{path: {path}}}]"])
    tokenizer = load_tokenizer(str(cfg.backbone.path))
    if rated:
        assert len(load_preferences(cfg, tokenizer).train)
        return
    with pytest.raises(ValueError, match=r"reward\.margin_coef 0\.5: no pair .*margin_coef=0$"):
        load_preferences(cfg, tokenizer)
