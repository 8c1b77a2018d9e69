"""PPO in one file computes what the trainer computes, and refuses options that it does not have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import TinyRun, make_prompts, weights

from chatllama.config.loader import dump_config
from chatllama.config.ppo import PpoSection
from chatllama.model.adapters import load_adapter
from chatllama.runs.folder import RunFolder
from examples import ppo_flat

SETTINGS: dict[str, Any] = {
    "steps": 3,
    "critic_warmup_steps": 1,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "lr_schedule": "cosine",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("flat"), tiny_tokenizer_dir)


def test_three_steps_are_those_of_the_trainer(tiny: TinyRun):
    trainer, own = tiny.trainer(ppo=SETTINGS), tiny.trainer(ppo=SETTINGS)
    own_model, prompts = own.engine.model, make_prompts().train.to_list()
    state = trainer.start()
    names = ("score_mean", "kl_sequence", "policy_loss", "value_loss")
    steps = 0
    for batch, metrics in ppo_flat.train(own.cfg, own_model, prompts, own.stop_tokens):
        state, rollout, _, expected = trainer.advance(state)
        for name in ("tokens", "mask", "response_mask", "finished"):
            assert torch.equal(vars(batch)[name], vars(rollout)[name]), name
        for name in ("logprobs", "ref_logprobs", "values", "scores"):
            torch.testing.assert_close(vars(batch)[name], vars(rollout)[name], atol=2e-6, rtol=1e-5)
        assert metrics == pytest.approx(
            {n: expected[f"ppo/{n}"] for n in names}, rel=1e-5, abs=1e-6
        )
        expected_weights = weights(trainer.engine.model)
        for name, weight in weights(own_model).items():
            torch.testing.assert_close(weight, expected_weights[name], atol=1e-6, rtol=0, msg=name)
        steps += 1
    assert steps == 3


def test_from_a_run_folder_to_a_policy(tiny: TinyRun, tmp_path: Path):
    records = [{"prompt": f"Who paints {place}?"} for place in ("the river", "a garden")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = [{"path": str(tmp_path / "prompts.jsonl")}]
    cfg = tiny.config(ppo={"data": data, "eval_fraction": 0.0, "steps": 1})
    run = RunFolder(Path(cfg.run_dir))
    dump_config(cfg, run.config)
    ppo_flat.main([str(run.root), "--out", str(tmp_path / "policy")])
    policy, sft = load_adapter(tmp_path / "policy"), load_adapter(run.sft_adapter)
    assert policy.info["stage"] == "ppo" and policy.lora == sft.lora
    assert policy.state.keys() == sft.state.keys()
    assert any(not torch.equal(policy.state[name], sft.state[name]) for name in sft.state)


@pytest.mark.parametrize("factor", [0.0, 1e-6, 1e-5])
def test_a_reward_model_that_says_nothing_is_refused(tiny: TinyRun, factor: float):
    own = tiny.trainer(ppo=SETTINGS)
    for weight in own.engine.model.heads["reward"].parameters():
        weight.data *= factor
    prompts = make_prompts().train.to_list()
    with pytest.raises(ValueError, match="all answers score about"):
        next(ppo_flat.train(own.cfg, own.engine.model, prompts, own.stop_tokens))


@pytest.mark.parametrize("option", ["kl_loss_coef", "ema_decay", "length_penalty"])
def test_an_option_that_is_not_in_the_file_is_refused(tiny: TinyRun, option: str):
    with pytest.raises(ValueError, match=rf"ppo\.{option}.*train_ppo\.py"):
        ppo_flat.check_options(tiny.config(ppo={option: 0.5}))
    with pytest.raises(ValueError, match=r"reward\.ensemble.*train_ppo\.py"):
        ppo_flat.check_options(tiny.config(reward={"ensemble": 2}))
    ppo_flat.check_options(tiny.config(ppo={"kl_coef": 0.1, "eval_every": 2}))


def test_every_option_that_it_honours_is_a_key_of_the_config():
    assert set(ppo_flat.OPTIONS.split()) <= PpoSection.model_fields.keys()
