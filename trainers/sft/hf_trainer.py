"""How transformers' Trainer is made to do things our way: what `instruction_trainer.py` rests on.

Settings, the order of the data, optimizer and schedule, and the callbacks that put checkpoints and
metrics where a run folder wants them. The reward model and PPO have loops of their own.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from chatllama.config.batch_sizes import lr_factor
from chatllama.config.stages import OptimizerSection
from chatllama.reporting.tracker import Tracker
from chatllama.runs import interruption
from chatllama.runs.checkpoints import publish
from chatllama.runs.folder import RunFolder, Stage
from chatllama.runtime import distributed
from trainers.engine.engine import seed_step


def trainer_settings(
    section: OptimizerSection,
    run: RunFolder,
    stage: Stage,
    *,
    steps: int,
    accumulation_steps: int,
    log_every: int,
    seed: int,
    zero: dict[str, Any] | None,
) -> dict[str, Any]:
    """Keyword arguments for a TrainingArguments class, with everything of its own switched off.

    Precision is ours (`bf16` stays off): float32 weights train under autocast.

    Args:
        section: batch sizes, optimiser, saving.
        run: where checkpoints go.
        stage: whose checkpoints.
        steps: optimizer steps.
        accumulation_steps: microbatches per optimizer step, on one rank.
        log_every: optimizer steps between logs.
        seed: of dropout.
        zero: DeepSpeed configuration; None without a launcher.
    """
    return {
        "output_dir": str(run.stage(stage) / ".unfinished"),
        "max_steps": steps,
        "per_device_train_batch_size": section.microbatch_size,
        "per_device_eval_batch_size": section.microbatch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "max_grad_norm": section.max_grad_norm,
        "learning_rate": section.learning_rate,
        "logging_steps": log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if section.save_every else "no",
        "save_steps": section.save_every or 500,
        "eval_strategy": "steps" if section.eval_every else "no",
        "eval_steps": section.eval_every or None,
        "train_sampling_strategy": "sequential",  # `fixed_order` has shuffled
        "remove_unused_columns": False,
        "activation_checkpointing": False,  # switched on at the model, non-reentrant
        "bf16": False,
        "fp16": False,
        "use_cpu": distributed.device().type == "cpu",
        "dataloader_pin_memory": distributed.device().type == "cuda",
        "accelerator_config": {"non_blocking": distributed.device().type == "cuda"},
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "deepspeed": zero,
    }


def build_optimizer(
    trainer: Trainer, model: nn.Module, section: OptimizerSection
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms and biases do not decay."""
    decaying = set(trainer.get_decay_parameter_names(model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if n in decaying], "weight_decay": section.weight_decay},
        {"params": [p for n, p in trained if n not in decaying], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=(section.adam_betas[0], section.adam_betas[1]),
        eps=section.adam_eps,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, section: OptimizerSection, steps: int
) -> LambdaLR:
    """The section's learning rate over `steps` optimizer steps."""
    return LambdaLR(
        optimizer, lambda step: lr_factor(step, steps, section.lr_schedule, section.warmup_steps)
    )


def set_schedule(schedule: LambdaLR, step: int) -> None:
    """Sets the learning rates as `step` finished optimizer steps leave them."""
    rates = [
        base * factor(step)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    now = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | now)


class StepFolders(TrainerCallback):
    """Moves each checkpoint that the Trainer has completed to `checkpoints/step-N`.

    A folder of that name is therefore always whole. Keeps the newest `limit`. A signal to stop
    makes one after the step that runs, and ends the stage.
    """

    def __init__(self, run: RunFolder, stage: Stage, limit: int, layout: dict[str, Any]) -> None:
        self.run = run
        self.stage: Stage = stage
        self.stopping = False
        self.unfinished = run.stage(stage) / ".unfinished"
        self.folder = run.checkpoints(stage)
        self.limit = limit
        self.layout = layout
        self._remove_unfinished()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """From here on signals wait for the end of a step."""
        interruption.begin_steps()

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Dropout of a step follows from its number: a checkpoint holds no random state."""
        seed_step(args.seed, state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Asks the Trainer for a checkpoint if any rank was told to stop."""
        self.stopping = interruption.stop_requested()
        control.should_save |= self.stopping

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Publishes the checkpoint that all ranks have written."""
        written = self.unfinished / f"checkpoint-{state.global_step}"
        publish(written, self.folder, state.global_step, self.limit, self.layout)
        if self.stopping:
            interruption.stop(self.run, self.stage, state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Nothing is left beside the checkpoints."""
        distributed.barrier()
        self._remove_unfinished()
        interruption.end_steps()

    def _remove_unfinished(self) -> None:
        if distributed.rank() == 0:
            shutil.rmtree(self.unfinished, ignore_errors=True)


class MetricsToTracker(TrainerCallback):
    """Hands the Trainer's logs to our tracker under our names (`sft/loss`, `sft/lr` ...)."""

    NAMES = (
        ("loss", "loss"),
        ("accuracy", "accuracy"),
        ("learning_rate", "lr"),
        ("grad_norm", "grad_norm"),
        ("tokens", "tokens"),
        ("eval_loss", "eval_loss"),
        ("eval_accuracy", "eval_accuracy"),
    )

    def __init__(self, tracker: Tracker, prefix: str) -> None:
        self.tracker = tracker
        self.prefix = prefix

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """One line of metrics for a step or an evaluation."""
        metrics = dict(self._renamed(logs or {}))
        if metrics:
            self.tracker.log(state.global_step, metrics)

    def _renamed(self, logs: dict[str, float]) -> Iterator[tuple[str, float]]:
        for theirs, ours in self.NAMES:
            if theirs in logs:
                yield f"{self.prefix}/{ours}", logs[theirs]


def forget_accelerator() -> None:
    """Lets a second trainer of this process have DeepSpeed settings of its own.

    accelerate keeps its state in class attributes and refuses to change it; its reset is private
    (version pinned; tests/sft/test_sft.py trains backbone and SFT in one launch).
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
