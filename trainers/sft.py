"""Stage 1: supervised instruction tuning (LLaMA-I): its rows, settings, model and result.

Conversations become tokens in `data/sft.py`; the loss and the loop are in `instruction_trainer.py`.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, pack_dataset  # pyright: ignore[reportPrivateImportUsage]

from chatllama import distributed
from chatllama.adapter_files import check_tensors, save_adapter
from chatllama.backbone import load_backbone
from chatllama.backbone_path import backbone_path
from chatllama.batching import microbatches_per_step, optimizer_steps
from chatllama.checkpoint import checkpoint_to_resume, layout_of, step_of
from chatllama.config import Config, DeepSpeedSection, OptimizerSection
from chatllama.durable import replace_folder
from chatllama.lora_layer import merge_products
from chatllama.roles import (
    Adapter,
    RoleModel,
    acting_as,
    adapter_parameters,
    adapter_state,
)
from chatllama.run_folder import INFO, RunFolder, write_json
from chatllama.tokenizer import save_tokenizer
from chatllama.tracking import Tracker
from data.collate import bucket_by_length, fill_rate
from data.mixture import load_mixture
from data.sft import tokenize_conversations
from trainers.engine import gathered, partitioned_loading
from trainers.hf_trainer import (
    MetricsToTracker,
    StepFolders,
    fixed_order,
    trainer_settings,
)
from trainers.instruction_trainer import IGNORED, InstructionTrainer, Rows, row_lengths
from trainers.zero import zero_settings


def load_rows(cfg: Config, tokenizer: PreTrainedTokenizerFast) -> Rows:
    """The stage's conversations as packed rows in training order; says what was read and left out.

    Raises:
        ValueError: a source cannot be read, or there is nothing to train on.
    """
    section = cfg.sft
    mixture = load_mixture(
        section.data,
        section.eval_data,
        section.eval_fraction,
        cfg.seed,
        "sft",
        section.decontaminate,
    )
    train, report = tokenize_conversations(mixture.train, tokenizer, cfg.chat, section.max_length)
    held_out = None
    if len(mixture.held_out):
        held_out, _ = tokenize_conversations(
            mixture.held_out, tokenizer, cfg.chat, section.max_length
        )
    rows = arrange_rows(
        train,
        held_out,
        section,
        max_length=section.max_length,
        packing=section.packing,
        seed=cfg.seed,
    )
    if distributed.rank() == 0:
        print(mixture.summary())
        print(
            f"{report.summary()}; {rows.num_rows} rows of at most {section.max_length} tokens, "
            f"{rows.facts['fill_rate']:.1%} filled"
        )
    return replace(rows, facts=rows.facts | report.facts)


def arrange_rows(
    train: Dataset,
    held_out: Dataset | None,
    section: OptimizerSection,
    *,
    max_length: int,
    packing: bool,
    seed: int,
) -> Rows:
    """Rows in training order: packed, or with each step's rows sorted by length.

    Args:
        train: `input_ids` and `mask` (1 = trains; no such column: all), one document a row.
        held_out: the same, for evaluation.
        section: gives the number of optimizer steps and the batch size.
        max_length: tokens of a row; documents are no longer than that.
        packing: fill rows with several documents.
        seed: of the order.

    Raises:
        ValueError: there is nothing to train on.
    """
    documents = _with_labels(train).shuffle(seed=seed)
    rows = pack_dataset(documents, max_length) if packing else documents
    steps = optimizer_steps(section, len(rows))
    evaluation = _with_labels(held_out) if held_out is not None and len(held_out) else None
    if evaluation is not None and packing:
        evaluation = cast(Dataset, pack_dataset(evaluation, max_length))
    elif evaluation is not None:
        places = bucket_by_length(row_lengths(evaluation).tolist(), len(evaluation))
        evaluation = evaluation.select(places)
    order = fixed_order(cast(Dataset, rows), steps * section.batch_size, seed)
    lengths = row_lengths(order).tolist()
    if not packing:
        places = bucket_by_length(lengths, section.batch_size)
        order, lengths = order.select(places), [lengths[place] for place in places]
    facts = {"fill_rate": fill_rate(lengths, section.microbatch_size)}
    return Rows(order, evaluation, steps, len(rows), facts)


def _with_labels(documents: Dataset) -> Dataset:
    """Labels from masks. A document's first token follows nothing, so nothing predicts it."""

    def label(batch: dict[str, list]) -> dict[str, list]:
        masks = batch["mask"] if "mask" in batch else [[1] * len(i) for i in batch["input_ids"]]
        return {
            "labels": [
                [IGNORED] + [t if m else IGNORED for t, m in zip(ids[1:], mask[1:], strict=True)]
                for ids, mask in zip(batch["input_ids"], masks, strict=True)
            ]
        }

    kept = [name for name in documents.column_names if name in ("input_ids", "mask")]
    columns = documents.select_columns(kept)
    return columns.map(label, batched=True, remove_columns=kept[1:])


def sft_arguments(
    cfg: Config,
    section: OptimizerSection,
    run: RunFolder,
    rows: Rows,
    *,
    stage_limit: int = 3,
) -> SFTConfig:
    """TRL's settings of a run.

    Args:
        cfg: for tracking, seed and deepspeed.
        section: `cfg.sft`, or the one that pretraining derives from `from_scratch`.
        run: where checkpoints go.
        rows: gives the number of steps.
        stage_limit: the highest ZeRO stage to use.
    """
    accumulation = microbatches_per_step(section, distributed.world_size(), "sft")
    zero = None
    if distributed.is_launched():
        deepspeed = cfg.deepspeed
        if deepspeed.stage > stage_limit:
            deepspeed = _without_splitting(deepspeed, stage_limit)
        zero = zero_settings(
            deepspeed,
            microbatch_size=section.microbatch_size,
            accumulation_steps=accumulation,
            max_grad_norm=section.max_grad_norm,
        )
    settings = trainer_settings(
        section,
        run,
        "sft",
        steps=rows.steps,
        accumulation_steps=accumulation,
        log_every=cfg.tracking.log_every,
        seed=cfg.seed,
        zero=zero,
    )
    skip = {"skip_prepare_dataset": True}
    return SFTConfig(**settings, max_length=None, packing=False, dataset_kwargs=skip)


def _without_splitting(section: DeepSpeedSection, stage: int) -> DeepSpeedSection:
    """The section at a lower stage, where only the optimizer is offloaded, to the CPU."""
    kept = section.model_dump(include={"offload_optimizer"} if stage else set())
    if kept.get("offload_optimizer") == "nvme":
        kept["offload_optimizer"] = "cpu"
    return DeepSpeedSection(stage=stage, **kept)


def build_policy(cfg: Config, run: RunFolder) -> LlamaForCausalLM | RoleModel:
    """What SFT trains: the backbone with a new policy adapter, or with `lora: null` all weights."""
    path = backbone_path(cfg.backbone, run)
    dtype = cfg.backbone.dtype if cfg.lora is not None else "float32"
    with partitioned_loading(cfg.deepspeed, dtype):
        llama = load_backbone(cfg.backbone, path, getattr(torch, dtype))
    if cfg.lora is None:
        llama.requires_grad_(True)
        if cfg.backbone.gradient_checkpointing:
            llama.activation_checkpointing_enable({"use_reentrant": False})
        return llama
    torch.manual_seed(cfg.seed)
    model = RoleModel(llama, {"policy": Adapter(cfg.lora, trainable=True)}, dropout=True)
    merge_products(model)
    if cfg.backbone.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def train_sft(
    cfg: Config,
    run: RunFolder,
    rows: Rows,
    model: LlamaForCausalLM | RoleModel,
    tokenizer: PreTrainedTokenizerFast,
    resume: bool,
) -> dict[str, float]:
    """Trains the model in place and returns the closing numbers.

    Args:
        cfg: the whole config: four of its sections count.
        run: for checkpoints and metrics.
        rows: from `load_rows`.
        model: from `build_policy`.
        tokenizer: the backbone's.
        resume: go on from the newest checkpoint, if there is one.

    Raises:
        ValueError: there are checkpoints and `resume` is off.
    """
    layout = layout_of(cfg.deepspeed, cfg.sft.microbatch_size)
    checkpoint = checkpoint_to_resume(run, "sft", resume, layout)
    adapted = isinstance(model, RoleModel)
    tracker = Tracker(run, "sft", cfg.tracking, rows.steps, distributed.rank())
    with tracker, acting_as(model, "policy") if adapted else nullcontext():
        if checkpoint is not None:
            tracker.resume_from(step_of(checkpoint))
        trainer = InstructionTrainer(
            model.peft_model if adapted else model,
            sft_arguments(cfg, cfg.sft, run, rows),
            cfg.sft,
            rows,
            tokenizer,
            use_bfloat16=cfg.backbone.dtype == "bfloat16",
            callbacks=[
                StepFolders(run, "sft", cfg.sft.save_total_limit, layout),
                MetricsToTracker(tracker, "sft"),
            ],
        )
        return trainer.run(checkpoint) | rows.facts


def export_sft(
    cfg: Config,
    run: RunFolder,
    model: LlamaForCausalLM | RoleModel,
    tokenizer: PreTrainedTokenizerFast,
    info: Mapping[str, object],
) -> None:
    """Writes RUN/sft/adapter, or with `lora: null` the plain Hugging Face folder RUN/sft/model.

    Args:
        cfg: gives the adapter's shape.
        run: receives the folder.
        model: trained.
        tokenizer: saved beside a whole model.
        info: from `stage.adapter_info`.
    """
    if isinstance(model, RoleModel):
        parameters: Sequence[torch.nn.Parameter] = adapter_parameters(model, "policy")
    else:
        parameters = list(model.parameters())
    with gathered(parameters):
        if distributed.rank() == 0:
            if isinstance(model, RoleModel):
                assert cfg.lora is not None
                save_adapter(run.sft_adapter, adapter_state(model, "policy"), cfg.lora, info)
            else:
                save_model(run.full_model, model, tokenizer, info)
    distributed.barrier()


def save_model(
    folder: Path,
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    info: Mapping[str, object],
) -> None:
    """Replaces `folder` by a plain Hugging Face folder (float32), complete, or leaves it as it was.

    Args:
        folder: where `from_pretrained` will read.
        llama: its parameters whole (gathered under ZeRO-3).
        tokenizer: saved beside the weights.
        info: what chatllama.json will say.

    Raises:
        ValueError: a tensor is empty, all zero or not finite.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    llama.save_pretrained(beside)
    save_tokenizer(tokenizer, beside)
    write_json(beside / INFO, dict(info))
    for file in sorted(beside.glob("*.safetensors")):
        check_tensors(load_file(file), str(file))
    replace_folder(beside, folder)
