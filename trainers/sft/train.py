"""Stage 1: supervised instruction tuning (LLaMA-I): its rows, settings, model and result.

The loss and the loop are in `instruction_trainer.py`.
"""

from contextlib import nullcontext

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig  # pyright: ignore[reportPrivateImportUsage]

from chatllama.config.batch_sizes import microbatches_per_step
from chatllama.config.schema import Config, DeepSpeedSection
from chatllama.config.stages import OptimizerSection
from chatllama.model.roles import (
    RoleModel,
    acting_as,
)
from chatllama.reporting.tracker import Tracker
from chatllama.runs.checkpoints import checkpoint_to_resume, layout_of, step_of
from chatllama.runs.folder import RunFolder
from chatllama.runtime import distributed
from trainers.engine.zero import zero_settings
from trainers.sft.data import Rows
from trainers.sft.hf_trainer import MetricsToTracker, StepFolders, trainer_settings
from trainers.sft.instruction_trainer import InstructionTrainer


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
