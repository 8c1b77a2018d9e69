"""Reward training against TRL's RewardTrainer: loss and gradient norm of five steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM
from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportPrivateImportUsage]

from chatllama.config.schema import Config
from chatllama.model.roles import Adapter, RoleModel, adapter_state
from chatllama.runtime.libraries import quiet_libraries
from chatllama.text.tokenizer import load_tokenizer
from data.batches import SharedPromptCollator
from trainers.engine.engine import Engine, ParameterGroup
from trainers.reward.train import optimizer_step

pytestmark = pytest.mark.slow
STEPS, BATCH, MICROBATCH = 5, 8, 2


def config(base: Path) -> Config:
    """One loss with centring, clipped."""
    section = {
        "data": [],
        "batch_size": BATCH,
        "microbatch_size": MICROBATCH,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "adam_betas": [0.9, 0.95],
        "adam_eps": 1e-6,
        "max_grad_norm": 0.5,
        "center_coef": 0.1,
        "margin_coef": 0.0,
    }
    return Config.model_validate(
        {
            "run_dir": "none",
            "backbone": {"path": str(base), "dtype": "float32"},
            "lora": {"r": 4, "alpha": 16.0, "dropout": 0.0},
            "reward": section,
        }
    )


def pairs() -> list[dict[str, Any]]:
    """A prompt of three tokens with a better and a worse answer each, of several lengths."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for number in range(STEPS * BATCH):
        sizes = (4 + number % 5, 3 + number % 7)
        prompt, *answers = (
            torch.randint(3, 290, (n,), generator=generator).tolist() for n in (3, *sizes)
        )
        ids = [[1, *prompt, *answer, 2] for answer in answers]
        rows.append({"answer_ids": ids, "ranks": [0, 1], "ratings": [1.0, 0.0], "prompt_length": 4})
    return rows


def reward_model(cfg: Config, base: Path, full: bool) -> RoleModel:
    """An adapter and a head; or all weights and a head, which our stage does not train."""
    llama = LlamaForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    if full:
        model = RoleModel(llama, {}, ("reward",), {"reward": "base"})
        return model.requires_grad_(True)
    return RoleModel(llama, {"reward": Adapter(cfg.adapter_lora, trainable=True)}, ("reward",))


def ours(cfg: Config, model: RoleModel) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    section = cfg.reward
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = Engine(
        model,
        [ParameterGroup("reward", trained, section.learning_rate)],
        section,
        cfg.deepspeed,
        accumulation_steps=BATCH // MICROBATCH,
    )
    data, collator, found = Dataset.from_list(pairs()), SharedPromptCollator(0, 256), []
    for step in range(STEPS):
        batch = list(range(step * BATCH, (step + 1) * BATCH))
        metrics = optimizer_step(cfg, engine, data, batch, collator, 1.0)
        found.append((metrics["reward/loss"], metrics["reward/grad_norm"]))
    return found


def trls(
    cfg: Config, base: Path, head: torch.Tensor, adapter: dict[str, torch.Tensor] | None, out: Path
) -> list[tuple[float, float]]:
    """The same of TRL's trainer, on answers with the prompt before each."""
    section = cfg.reward
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32, pad_token_id=0
    )
    with torch.no_grad():
        model.score.weight.copy_(head)
    if adapter is not None:
        modules = cfg.adapter_lora.target_modules
        lora = LoraConfig(r=4, lora_alpha=16, target_modules=modules, task_type="SEQ_CLS")
        model = get_peft_model(model, lora)
        start = adapter | {"base_model.model.score.weight": head}
        assert not set_peft_model_state_dict(model, start).unexpected_keys
    rows = [{"chosen_ids": p["answer_ids"][0], "rejected_ids": p["answer_ids"][1]} for p in pairs()]
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(out),
            max_steps=STEPS,
            per_device_train_batch_size=MICROBATCH,
            gradient_accumulation_steps=BATCH // MICROBATCH,
            learning_rate=section.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            adam_beta1=section.adam_betas[0],
            adam_beta2=section.adam_betas[1],
            adam_epsilon=section.adam_eps,
            max_grad_norm=section.max_grad_norm,
            center_rewards_coefficient=section.center_coef,
            disable_dropout=True,
            train_sampling_strategy="sequential",
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(base),
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return [(line["loss"], float(line["grad_norm"])) for line in logs]


@pytest.mark.parametrize("full", [False, True])
def test_losses_and_gradient_norms_are_those_of_trl(
    tiny_llama_dir: Path, tmp_path: Path, full: bool
):
    quiet_libraries()
    cfg = config(tiny_llama_dir)
    model = reward_model(cfg, tiny_llama_dir, full)
    head = next(model.heads["reward"].parameters()).detach().clone()
    adapter = None if full else {n: t.clone() for n, t in adapter_state(model, "reward").items()}
    found, expected = ours(cfg, model), trls(cfg, tiny_llama_dir, head, adapter, tmp_path)
    assert len(expected) == STEPS
    assert max(norm for _, norm in expected) > cfg.reward.max_grad_norm  # clipping is at work
    for step, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert own == pytest.approx(other, rel=1e-5), step
