"""A finished run opened for inference."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ppo_runs import TinyRun, make_run, make_stop_tokens, tokenizer_of
from tiny_models import LORA

from chatllama.config.loader import dump_config
from chatllama.inference.load import load_run
from chatllama.model.adapters import load_adapter, save_adapter
from chatllama.model.roles import acting_as, adapter_state
from chatllama.runs.folder import RunFolder
from trainers.ppo.model import export_ppo
from trainers.stages.stage import adapter_info


@pytest.fixture
def tiny(tmp_path: Path, tiny_tokenizer_dir: Path) -> TinyRun:
    tiny = TinyRun.make(tmp_path, tiny_tokenizer_dir)
    dump_config(tiny.config(), RunFolder(tiny.folder).config)
    return tiny


def logits(model: object, role: str) -> torch.Tensor:
    with torch.no_grad(), acting_as(model, role):  # type: ignore[arg-type]
        return model.llama(torch.tensor([[1, 80, 90, 100]])).logits  # type: ignore[attr-defined]


def test_what_there_is_so_far_is_loaded(tiny: TinyRun):
    run = RunFolder(tiny.folder)
    loaded = load_run(run)
    names = loaded.model.adapter_names
    assert names["reference"] and names["reward"] and "policy" not in names
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.config == tiny.config() and loaded.chat.template == "alpaca"
    saved = load_adapter(run.sft_adapter)
    for name, tensor in adapter_state(loaded.model, "reference").items():
        assert torch.equal(tensor, saved.state[name])


def test_the_policy_speaks_and_the_reward_model_scores_as_in_training(tiny: TinyRun):
    run, cfg = RunFolder(tiny.folder), tiny.config()
    trainer = tiny.trainer()
    state = trainer.start()
    rollout = trainer.advance(state)[1]
    tokenizer = tokenizer_of(tiny.base)
    info = adapter_info(cfg, run, tokenizer, "ppo")
    export_ppo(cfg, run, trainer.engine.model, tokenizer, info)
    loaded = load_run(run)
    trainer.engine.model.eval()
    for role in ("base", "reference", "policy"):
        assert torch.equal(logits(loaded.model, role), logits(trainer.engine.model, role)), role
    assert not torch.equal(logits(loaded.model, "policy"), logits(loaded.model, "reference"))
    from chatllama.model.scoring import score_sequences

    with torch.no_grad():
        scores = score_sequences(loaded.model, rollout.tokens, rollout.mask)
    torch.testing.assert_close(scores, rollout.scores, atol=1e-5, rtol=0)


def test_the_run_moves_with_its_folder(tiny: TinyRun, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    tiny.folder.rename(moved)
    assert load_run(RunFolder(moved)).model.adapter_names["reference"]


def test_no_run_folder(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere is not a run folder: it does not exist"):
        load_run(RunFolder(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"is not a run folder: .*config\.yaml is missing"):
        load_run(RunFolder(tmp_path))


def test_a_run_without_adapters(tiny: TinyRun, tmp_path: Path):
    run = RunFolder(tmp_path / "bare")
    dump_config(tiny.config(), run.config)
    with pytest.raises(ValueError, match="holds no adapter yet"):
        load_run(run)


def test_an_adapter_of_another_contract_is_refused_by_its_folder(tiny: TinyRun):
    run = RunFolder(tiny.folder)
    saved = load_adapter(run.sft_adapter)
    contract = {**saved.info["contract"], "hash": "0" * 64, "template": "llama2"}
    save_adapter(run.sft_adapter, saved.state, LORA, {**saved.info, "contract": contract})
    with pytest.raises(ValueError, match=str(run.sft_adapter)):
        load_run(run)


@pytest.mark.parametrize("key", ["use_rslora", "use_dora", "lora_bias"])
def test_a_run_with_an_adapter_of_other_arithmetic_is_refused(tiny: TinyRun, key: str):
    path = RunFolder(tiny.folder).sft_adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: True}))
    with pytest.raises(ValueError, match=rf"{path}: {key} is True"):
        load_run(RunFolder(tiny.folder))
    with pytest.raises(ValueError, match=rf"{path}: {key} is True"):
        tiny.trainer()


def test_after_full_fine_tuning_the_base_is_sfts_model(tiny: TinyRun, tmp_path: Path):
    full = TinyRun(tiny.base, tmp_path / "full")
    cfg = full.config(lora=None)
    run = make_run(cfg)
    dump_config(cfg, run.config)
    trainer = full.trainer(lora=None)
    trainer.advance(trainer.start())
    tokenizer = make_stop_tokens(cfg).tokenizer
    info = adapter_info(cfg, run, tokenizer, "ppo")
    export_ppo(cfg, run, trainer.engine.model, tokenizer, info)
    assert load_adapter(run.policy_adapter).info["base"] == str(run.full_model)
    loaded = load_run(run)
    trainer.engine.model.eval()
    for role in ("reference", "policy"):
        assert torch.equal(logits(loaded.model, role), logits(trainer.engine.model, role)), role


def test_members_of_the_ensemble_and_the_average_are_loaded(
    tmp_path: Path, tiny_tokenizer_dir: Path
):
    tiny = TinyRun.make(tmp_path, tiny_tokenizer_dir, members=2)
    run = RunFolder(tiny.folder)
    dump_config(tiny.config(), run.config)
    saved = load_adapter(run.sft_adapter)
    state = {name: tensor + 0.25 for name, tensor in saved.state.items()}
    save_adapter(run.ema_adapter, state, LORA, saved.info)
    loaded = load_run(run)
    assert loaded.reward_roles == ["reward", "reward_1"]
    for name, tensor in adapter_state(loaded.model, "ema").items():
        assert torch.equal(tensor, state[name])
    for member, role in zip(run.reward_members(), loaded.reward_roles, strict=True):
        weight = load_adapter(member).head["weight"]
        assert torch.equal(loaded.model.heads[role].weight, weight)  # type: ignore[arg-type]
    some = load_run(run, roles=["base", "ema"]).model
    assert set(some.lora) == {"ema"} and not some.heads
    with pytest.raises(ValueError, match="has no adapter for policy; there: "):
        load_run(run, roles=["policy"])


def test_after_full_fine_tuning_sft_alone_is_enough(tiny: TinyRun, tmp_path: Path):
    full = TinyRun(tiny.base, tmp_path / "full")
    cfg = full.config(lora=None)
    run = RunFolder(full.folder)
    dump_config(cfg, run.config)
    with pytest.raises(ValueError, match="holds no adapter yet"):
        load_run(run)
    make_run(cfg)
    shutil.rmtree(run.stage("reward"))
    loaded = load_run(run)
    assert loaded.reward_roles == [] and not loaded.model.lora
    assert torch.equal(logits(loaded.model, "reference"), logits(loaded.model, "base"))
