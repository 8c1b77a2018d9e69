"""train_ppo.py's main, from YAML and prompt files to exports, in one process."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import PROJECT
from ppo_runs import make_base, make_run, ppo_config, tokenizer_of

import train_ppo
from chatllama.config.loader import dump_config, load_config
from chatllama.config.schema import Config
from chatllama.generation.sampling import Sampling
from chatllama.inference.chat_model import ChatModel
from chatllama.inference.load import load_run
from chatllama.model.adapters import load_adapter
from chatllama.model.roles import acting_as
from chatllama.runs.folder import RunFolder
from chatllama.text.chat_format import render
from chatllama.text.detokenizing import stream_text
from chatllama.text.tokenizer import load_tokenizer
from trainers.ppo.data import load_prompts

WEIGHTS = "adapter_model.safetensors"
QUESTIONS = [
    f"{who} {does} {where}?"
    for who in ("Anna", "Victor", "the baker", "the queen")
    for does in ("paints", "asks about")
    for where in ("the river", "a garden")
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> str:
    return make_base(tmp_path_factory.mktemp("stage") / "base", tiny_tokenizer_dir)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Prompts, held-out prompts and instructions."""
    rows = [{"prompt": question} for question in QUESTIONS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[12:]))
    pairs = [{"instruction": q, "input": "", "output": "by the river."} for q in QUESTIONS[:5]]
    (tmp_path / "sft.json").write_text(json.dumps(pairs))
    return tmp_path


def prepare(base: str, files: Path, name: str = "run", members: int = 1, **changes: Any) -> str:
    """A run folder after two stages, and the config file beside it; returns the file."""
    data = {
        "data": [{"path": str(files / "prompts.jsonl")}],
        "eval_data": [{"path": str(files / "held_out.jsonl")}],
    }
    ppo = {**data, **changes.pop("ppo", {})}
    cfg = ppo_config(base, files / name, ppo=ppo, **changes)
    make_run(cfg, members)
    file = files / f"{name}.yaml"
    dump_config(cfg, file)
    return str(file)


def metrics_of(run: RunFolder) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in run.metrics("ppo").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def adapters_of(run: RunFolder) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run.stage("ppo").glob(f"*/{WEIGHTS}")}


@pytest.mark.slow
def test_a_stage_from_files_to_exports(base: str, files: Path, capsys: pytest.CaptureFixture[str]):
    file, run = prepare(base, files), RunFolder(files / "run")
    frozen = {path: path.read_bytes() for path in run.root.glob(f"*/adapter*/{WEIGHTS}")}
    train_ppo.main([file, "tracking.sample_every=1"])
    out = capsys.readouterr().out
    assert "training prompts: " in out and "held-out prompts: " in out
    assert len(frozen) == 2 and all(path.read_bytes() == data for path, data in frozen.items())
    lines, result = metrics_of(run), run.read_result("ppo")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["ppo/kl_sequence"] == 0 and lines[1]["ppo/kl_sequence"] != 0
    assert [line["ppo/lr"] for line in lines] == pytest.approx([3e-3 * 5 / 8, 3e-3 * 1 / 8])
    assert result["steps"] == 2 and result["kl_sequence"] == lines[1]["ppo/kl_sequence"]
    assert result["score_scale"] > 0 and result["wall_seconds"] > result["train_seconds"] > 0
    assert set(adapters_of(run)) == {"policy", "value"}
    assert not run.checkpoints("ppo").exists()
    value = load_adapter(run.value_adapter)
    assert set(value.head) == {"weight", "bias"} and value.info["stage"] == "ppo"
    evaluation = json.loads(run.evaluation.read_text())
    assert evaluation["num_prompts"] == 4 and list(evaluation["roles"]) == ["base", "sft", "ppo"]
    assert {s["prompt"] for s in evaluation["samples"]} == set(QUESTIONS[12:])
    assert load_config(run.config) == load_config(file, ["tracking.sample_every=1"])
    before = adapters_of(run)
    train_ppo.main([file])
    assert "stage ppo of" in (said := capsys.readouterr().out) and "has finished before" in said
    assert adapters_of(run) == before and len(metrics_of(run)) == 2


EVERYTHING: dict[str, Any] = {
    "steps": 4,
    "save_every": 1,
    "save_total_limit": 9,
    "ema_decay": 0.9,
    "score_normalization": "running",
    "kl_controller": "adaptive",
    "kl_target": 0.01,
    "kl_horizon": 50,
    "reference_refresh_every": 2,
    "critic_warmup_steps": 1,
    "lr_schedule": "cosine",
    "warmup_steps": 3,
    "samples_per_prompt": 2,
    "kl_loss_coef": 0.1,
    "reward_ensemble": "min",
    "eval_every": 3,
    "ptx_coef": 0.2,
}


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(base: str, files: Path, step: int):
    everything = {**EVERYTHING, "ptx_data": [{"path": str(files / "sft.json")}]}
    file = prepare(base, files, members=2, ppo=everything)
    whole, cut = RunFolder(files / "run"), RunFolder(files / "cut")
    shutil.copytree(whole.root, cut.root)
    train_ppo.main([file])
    assert len(list(whole.checkpoints("ppo").iterdir())) == 4
    name = f"step-{step}"
    shutil.copytree(whole.checkpoints("ppo") / name, cut.checkpoints("ppo") / name)
    for path in ("metrics.jsonl", "health.jsonl"):
        shutil.copy(whole.stage("ppo") / path, cut.stage("ppo"))
    command = [file, f"run_dir={cut.root}"]
    with pytest.raises(ValueError, match=rf"{name} exists from an earlier start.* --resume"):
        train_ppo.main(command)
    train_ppo.main([*command, "--resume"])
    assert metrics_of(cut) == metrics_of(whole)
    assert len({line["ppo/kl_coef"] for line in metrics_of(cut)}) == 4
    adapters = adapters_of(cut)
    assert set(adapters) == {"policy", "value", "policy-ema"}
    assert adapters == adapters_of(whole)
    assert json.loads(cut.evaluation.read_text()) == json.loads(whole.evaluation.read_text())
    assert cut.read_result("ppo")["score_offset"] == whole.read_result("ppo")["score_offset"]


@pytest.mark.slow
def test_checkpoints_come_at_their_rhythm(base: str, files: Path):
    file, run = prepare(base, files), RunFolder(files / "run")
    train_ppo.main([file, "ppo.steps=5", "ppo.save_every=2", "ppo.save_total_limit=1"])
    assert [path.name for path in run.checkpoints("ppo").iterdir()] == ["step-4"]


@pytest.mark.slow
def test_stages_and_contracts_are_checked_before_anything_is_trained(base: str, files: Path):
    file, run = prepare(base, files), RunFolder(files / "run")
    with pytest.raises(ValueError, match=str(run.sft_adapter)):
        train_ppo.main([file, "chat.template=llama2"])
    elsewhere = str(files / "nothing")
    with pytest.raises(ValueError, match=elsewhere):
        train_ppo.main([file, f"ppo.rewards=[{{adapter: {elsewhere}}}]"])
    info_file = run.reward_adapter / "chatllama.json"
    info = json.loads(info_file.read_text())
    info["contract"]["hash"] = "0" * 64
    info_file.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=str(run.reward_adapter)):
        train_ppo.main([file])
    run.result("reward").unlink()
    with pytest.raises(ValueError, match=r"stage reward of .* has not finished: .*result\.json"):
        train_ppo.main([file])
    assert not run.metrics("ppo").exists()


@pytest.mark.slow
def test_functions_alone_need_no_reward_stage(base: str, files: Path):
    file, run = prepare(base, files), RunFolder(files / "run")
    shutil.rmtree(run.stage("reward"))
    train_ppo.main([file, "ppo.rewards=[{function: ppo_runs:count_words}]"])
    score = metrics_of(run)[0]["ppo/rm_score_mean"]
    assert 10 * 3 <= score <= 10 * 5 + 40  # three to five words
    assert load_adapter(run.value_adapter).head["bias"].any()


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_without_a_critic_no_value_model_is_written(base: str, files: Path, advantage: str):
    file, run = prepare(base, files), RunFolder(files / "run")
    train_ppo.main([file, f"ppo.advantage={advantage}", "ppo.samples_per_prompt=2"])
    assert set(adapters_of(run)) == {"policy"} and not run.value_adapter.exists()


@pytest.mark.slow
def test_a_critic_on_the_policys_trunk_is_the_policy_with_a_head(base: str, files: Path):
    file, run = prepare(base, files), RunFolder(files / "run")
    train_ppo.main([file, "ppo.value_model=policy_trunk"])
    policy, value = load_adapter(run.policy_adapter), load_adapter(run.value_adapter)
    assert policy.state.keys() == value.state.keys() and policy.lora == value.lora
    assert all(torch.equal(value.state[name], tensor) for name, tensor in policy.state.items())
    assert not policy.head and value.head["weight"].any()


@pytest.mark.slow
def test_after_full_fine_tuning_the_base_is_the_reference(base: str, files: Path):
    later = {"r": 2, "alpha": 4.0, "target_modules": ["q_proj"]}
    file = prepare(base, files, lora=None, later_lora=later, ppo={"ema_decay": 0.5})
    run = RunFolder(files / "run")
    train_ppo.main([file])
    lines = metrics_of(run)
    assert lines[0]["ppo/kl_sequence"] == 0 and lines[1]["ppo/kl_sequence"] != 0
    for folder in (run.policy_adapter, run.ema_adapter):
        saved = load_adapter(folder)
        assert (saved.lora.r, saved.lora.alpha, saved.lora.target_modules) == (2, 4.0, ["q_proj"])
        assert saved.info["base"] == str(run.full_model)
    assert load_adapter(run.value_adapter).lora.r == 3  # the reward adapter's
    assert list(json.loads(run.evaluation.read_text())["roles"]) == ["sft", "ppo", "ema"]


@pytest.mark.slow
def test_without_held_out_prompts_there_is_no_evaluation(base: str, files: Path):
    file, run = prepare(base, files), RunFolder(files / "run")
    train_ppo.main([file, "evaluation.num_prompts=0"])
    assert not run.evaluation.exists() and run.result("ppo").is_file()


@pytest.mark.slow
def test_recomputing_activations_changes_nothing(base: str, files: Path):
    lines = []
    for name in ("false", "true"):
        file = prepare(base, files, name)
        train_ppo.main([file, f"backbone.gradient_checkpointing={name}"])
        lines.append(metrics_of(RunFolder(files / name)))
    for plain, recomputed in zip(*lines, strict=True):
        assert recomputed == pytest.approx(plain, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_a_bfloat16_base_trains_float32_adapters(base: str, files: Path):
    low = prepare(base, files, "low", backbone={"dtype": "bfloat16"})
    train_ppo.main([low])
    lines = metrics_of(RunFolder(files / "low"))
    assert lines[0]["ppo/kl_sequence"] == 0 and lines[0]["ppo/first_log_ratio"] == 0
    state = load_adapter(RunFolder(files / "low").policy_adapter).state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.slow
def test_the_exported_policy_is_the_trained_one_in_plain_peft(
    base: str, files: Path, capsys: pytest.CaptureFixture[str]
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    file, run = prepare(base, files, ppo={"ema_decay": 0.5}), RunFolder(files / "run")
    kept: list[Any] = []
    export = train_ppo_export()

    def spy(cfg: Any, run: RunFolder, model: Any, *others: Any) -> None:
        kept.append(model)
        export(cfg, run, model, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainers.ppo.model.export_ppo", spy)
        train_ppo.main([file])
    tokens = torch.tensor([[1, 80, 90, 100, 110]])
    for role, folder in (("policy", run.policy_adapter), ("ema", run.ema_adapter)):
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
        with torch.no_grad(), acting_as(kept[0].eval(), role):
            expected = kept[0].llama(tokens).logits
            torch.testing.assert_close(plain(tokens).logits, expected, atol=1e-5, rtol=0)
    names, cfg = dict[str, Any](), load_config(run.config)
    capsys.readouterr()
    exec(readmes_snippet(base, run.policy_adapter), names)
    said = capsys.readouterr().out.removesuffix("\n")
    messages = names["messages"]
    rendered = render(load_tokenizer(base), cfg.chat, messages, add_generation_prompt=True).ids
    assert names["prompt"]["input_ids"].tolist() == [rendered]
    chat = ChatModel(load_run(run), Sampling(12, temperature=0.0), torch.Generator())
    new = iter(names["ids"][0, len(rendered) :].tolist())
    spoken = "".join(stream_text(load_tokenizer(base), new))  # what lies in `said`, byte by byte
    assert said and "".join(chat.answer(messages, "policy")) == spoken


def readmes_snippet(base: str, policy: Path) -> str:
    """README's way from messages to an answer by PEFT alone, with other paths."""
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    (block,) = (each for each in blocks if "apply_chat_template" in each)
    assert block.count("runs/mine/ppo/policy") == 2
    hub = "meta-llama/Llama-2-7b-hf"
    block = block.replace("max_new_tokens=200", "max_new_tokens=12")
    return block.replace("runs/mine/ppo/policy", str(policy)).replace(hub, base)


def train_ppo_export() -> Any:
    from trainers.ppo.model import export_ppo

    return export_ppo


# --- prompts: fast


def loaded(base: str, files: Path, **ppo: Any) -> tuple[set[str], set[str]]:
    """Training and held-out texts."""
    data = {"data": [{"path": str(files / "prompts.jsonl")}]}
    cfg = Config.model_validate(ppo_config(base, "r", ppo={**data, **ppo}).model_dump())
    prompts = load_prompts(cfg, tokenizer_of(base))
    held_out = prompts.held_out["text"][:] if len(prompts.held_out) else []
    return set(prompts.train["text"][:]), set(held_out)


def test_prompts_are_held_out_by_fraction_or_by_file(base: str, files: Path):
    train, held_out = loaded(base, files, eval_fraction=0.4)
    assert train | held_out == set(QUESTIONS[:12]) and not train & held_out and held_out
    assert loaded(base, files, eval_fraction=0.0) == (set(QUESTIONS[:12]), set())
    own = [{"path": str(files / "held_out.jsonl")}]
    assert loaded(base, files, eval_data=own) == (set(QUESTIONS[:12]), set(QUESTIONS[12:]))


def test_prompts_over_the_limit_are_left_out(base: str, files: Path):
    tokenizer = tokenizer_of(base)
    data = [{"path": str(files / "prompts.jsonl")}]
    cfg = ppo_config(base, "r", ppo={"data": data, "eval_fraction": 0.0})
    prompts = load_prompts(cfg, tokenizer).train
    pairs = zip(prompts["text"][:], prompts["input_ids"][:], strict=True)
    lengths = {text: len(ids) for text, ids in pairs}
    limit = sorted(lengths.values())[len(lengths) // 2]
    train, held_out = loaded(base, files, max_prompt_length=limit, eval_fraction=0.0)
    assert train == {text for text, length in lengths.items() if length <= limit}
    assert 0 < len(train) < 12 and not held_out


def test_prompts_leave_room_for_the_answers(
    base: str, files: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = tokenizer_of(base)  # of a model with 256 positions
    data = [{"path": str(files / "prompts.jsonl")}]
    cfg = ppo_config(base, "r", ppo={"data": data, "eval_fraction": 0.0})
    lengths = [len(ids) for ids in load_prompts(cfg, tokenizer).train["input_ids"][:]]
    shortest = min(lengths)
    assert shortest < max(lengths)
    room = cfg.generation.model_copy(update={"max_new_tokens": 256 - shortest})
    capsys.readouterr()
    kept = load_prompts(cfg.model_copy(update={"generation": room}), tokenizer).train
    assert {len(ids) for ids in kept["input_ids"][:]} == {shortest}
    assert f"prompts of {shortest} tokens at most" in capsys.readouterr().out
