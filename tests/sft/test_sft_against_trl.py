"""SFT against TRL's SFTTrainer: loss and gradient norm of five steps on the same batches."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chatllama.config.schema import Config
from chatllama.model.roles import RoleModel, adapter_state
from chatllama.runs.folder import RunFolder
from chatllama.runtime.jsonl import read_lines
from chatllama.runtime.libraries import quiet_libraries
from chatllama.text.tokenizer import load_tokenizer
from trainers.sft.data import Rows, arrange_rows
from trainers.sft.model import build_engine, build_policy
from trainers.sft.train import train_sft

pytestmark = pytest.mark.slow
SECTION = {
    "steps": 5,
    "batch_size": 8,
    "microbatch_size": 2,
    "max_length": 48,
    "learning_rate": 5e-3,
    "lr_schedule": "constant",
    "weight_decay": 0.1,
    "adam_betas": [0.9, 0.95],
    "adam_eps": 1e-6,
    "max_grad_norm": 0.15,
}


def documents() -> Dataset:
    """Thirty documents whose first tokens do not train; no two are alike."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(30):
        ids = [1, *torch.randint(3, 300, (8 + number % 20,), generator=generator).tolist(), 2]
        rows.append({"input_ids": ids, "mask": [0] * (3 + number % 4) + [1] * len(ids)})
        rows[-1]["mask"] = rows[-1]["mask"][: len(ids)]
    return Dataset.from_list(rows)


def ours(cfg: Config, rows: Rows, model: RoleModel) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    run = RunFolder(Path(cfg.run_dir))
    tokenizer = load_tokenizer(str(cfg.backbone.path))
    train_sft(cfg, run, rows, build_engine(cfg, model), tokenizer, False)
    lines = read_lines(run.metrics("sft"))
    return [(line["sft/loss"], line["sft/grad_norm"]) for line in lines]


def trl_rows(rows: Rows) -> Dataset:
    """Our rows in training order, with labels from the documents' own masks."""
    masks = {tuple(d["input_ids"]): d["mask"] for d in documents().to_list()}
    out = []
    for row in rows.train.to_list():
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        ends = list(itertools.accumulate(lengths))
        parts = [row["input_ids"][end - n : end] for end, n in zip(ends, lengths, strict=True)]
        mask = itertools.chain(*(masks[tuple(part)] for part in parts))
        labels = [i if m else -100 for i, m in zip(row["input_ids"], mask, strict=True)]
        out.append({"input_ids": row["input_ids"], "labels": labels, "seq_lengths": lengths})
    return Dataset.from_list(out)


def trls(
    cfg: Config, rows: Rows, adapter: dict[str, torch.Tensor] | None, folder: Path
) -> list[tuple[float, float]]:
    """The same of TRL's trainer; its adapter starts from the same tensors."""
    section, packing = cfg.sft, "seq_lengths" in rows.train.column_names
    model: Any = AutoModelForCausalLM.from_pretrained(str(cfg.backbone.path), dtype=torch.float32)
    if adapter is not None and cfg.lora is not None:
        modules = cfg.lora.target_modules
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        assert isinstance(model, PeftModel)
        found = set_peft_model_state_dict(model, adapter)
        assert not found.unexpected_keys
    data = trl_rows(rows)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=section.steps or 0,
            per_device_train_batch_size=section.microbatch_size,
            gradient_accumulation_steps=section.batch_size // section.microbatch_size,
            learning_rate=section.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=section.weight_decay,
            adam_beta1=section.adam_betas[0],
            adam_beta2=section.adam_betas[1],
            adam_epsilon=section.adam_eps,
            max_grad_norm=section.max_grad_norm,
            train_sampling_strategy="sequential",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=data if packing else data.remove_columns("seq_lengths"),
        data_collator=DataCollatorForLanguageModeling(
            0, padding_free=packing, return_position_ids=packing
        ),
        processing_class=load_tokenizer(str(cfg.backbone.path)),
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return [(line["loss"], float(line["grad_norm"])) for line in logs]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8.0, "dropout": 0.0}, None])
def test_losses_and_gradient_norms_are_those_of_trl(
    tiny_llama_dir: Path, tmp_path: Path, lora: dict | None, packing: bool
):
    quiet_libraries()
    cfg = Config.model_validate(
        {
            "run_dir": str(tmp_path),
            "backbone": {"path": str(tiny_llama_dir), "dtype": "float32"},
            "lora": lora,
            "tracking": {"report_to": []},
            "sft": {"data": [], **SECTION, "packing": packing},
        }
    )
    rows = arrange_rows(documents(), None, cfg.sft, seed=0)
    model = build_policy(cfg, RunFolder(tmp_path))
    start = adapter_state(model, "policy") if lora else None
    copied = {name: tensor.clone() for name, tensor in start.items()} if start else None
    found, expected = ours(cfg, rows, model), trls(cfg, rows, copied, tmp_path / "trl")
    assert len(expected) == 5 and expected[0][0] - expected[4][0] > 1e-3
    assert max(norm for _, norm in expected) > cfg.sft.max_grad_norm  # clipping is at work
    for step, (own, other) in enumerate(zip(found, expected, strict=True)):
        assert own == pytest.approx(other, rel=1e-5), step
