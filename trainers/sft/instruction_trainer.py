"""The trainer of SFT and of backbones made from text: TRL's SFTTrainer with a loss of our own.

What it trains on and with which settings is in `sft.py` and `pretrain.py`; optimizer, schedule and
callbacks, the same for the reward model, are in `hf_trainer.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from chatllama.config.stages import OptimizerSection
from chatllama.model.lm_head import TokenLoss, token_loss
from chatllama.runs.checkpoints import explained
from chatllama.runtime import distributed
from trainers.engine.engine import restore
from trainers.engine.sharded_state import write_shares
from trainers.sft.data import IGNORED, RowCollator, Rows, row_lengths
from trainers.sft.hf_trainer import build_optimizer, build_schedule, set_schedule


class InstructionTrainer(SFTTrainer):
    """SFTTrainer with a token loss that is the same for any split of a batch.

    The loss is the sum over the trained tokens of the whole optimizer step, all ranks and
    accumulation steps, divided by their number. The LM head sees trained positions only.

    Args:
        model: a causal LLaMA, or one with adapters.
        args: from `sft_arguments`.
        section: optimiser and schedule.
        rows: in training order.
        tokenizer: for the padding id and the checkpoints.
        use_bfloat16: run the forward pass under autocast to bfloat16.
        callbacks: checkpoints and metrics.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: LlamaForCausalLM | PeftModel,
        args: SFTConfig,
        section: OptimizerSection,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        use_bfloat16: bool,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.section = section
        llama = cast(
            LlamaForCausalLM, model.get_base_model() if isinstance(model, PeftModel) else model
        )
        pad_id = cast(int, tokenizer.pad_token_id)
        # otherwise the Trainer aligns them, with a warning
        llama.config.pad_token_id = llama.generation_config.pad_token_id = pad_id
        # flash attention reads document boundaries from one long row only
        flat = llama.config._attn_implementation == "flash_attention_2"
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows.train,
            eval_dataset=rows.held_out,
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(pad_id, padding_free=True)
            if flat
            else RowCollator(pad_id),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        assert self.accelerator.num_processes == distributed.world_size(), (
            f"the trainer sees {self.accelerator.num_processes} ranks of {distributed.world_size()}"
        )
        end_in_loss(llama, use_bfloat16)
        self._correct_and_trained = torch.zeros(2, dtype=torch.long, device=self.args.device)
        ends = slice(section.batch_size - 1, None, section.batch_size)
        self._tokens_after = np.cumsum(row_lengths(rows.train))[ends]

    def run(self, checkpoint: Path | None) -> dict[str, float]:
        """Trains, evaluates, and returns the closing numbers.

        Args:
            checkpoint: to go on from; None: from the beginning.
        """
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        numbers = {
            "loss": [line["loss"] for line in self.state.log_history if "loss" in line][-1],
            "steps": self.state.global_step,
            "tokens": int(self._tokens_after[-1]),
        }
        return numbers | self.evaluate()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """This microbatch's share of the loss, times the ranks, as gradients are averaged."""
        assert num_items_in_batch is not None and not return_outputs
        losses: TokenLoss = model(**inputs, as_loss=True)
        self._correct_and_trained += _correct_and_trained(losses, inputs["labels"])
        num_tokens = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return losses.loss_sum * self.accelerator.num_processes / num_tokens

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Token mean of loss and accuracy on the held-out rows, over all ranks."""
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        if rows is None:
            return {}
        model = cast(nn.Module, self.model_wrapped)
        model.eval()  # DeepSpeed's returns nothing
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for inputs in self._evaluation_batches(cast(Dataset, rows)):
            with torch.no_grad():
                losses: TokenLoss = model(**inputs, as_loss=True)
            totals[0] += losses.loss_sum
            totals[1:] += _correct_and_trained(losses, inputs["labels"])
        loss, correct, trained = distributed.all_sum(totals).tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss / max(trained, 1),
            f"{metric_key_prefix}_accuracy": correct / max(trained, 1),
        }
        self.log(dict(metrics))
        return metrics

    def _evaluation_batches(self, rows: Dataset) -> Iterator[dict[str, Any]]:
        """This rank's share; ranks run equally often (ZeRO-3), in spare turns without labels."""
        size, world = self.args.per_device_eval_batch_size, distributed.world_size()
        for first in range(0, len(rows), size * world):
            start = first + distributed.rank() * size
            turn = range(min(start, len(rows)), min(start + size, len(rows)))
            batch = list(rows.select(turn or [0]))
            inputs = self._prepare_inputs(self.data_collator(cast(list[dict[str, Any]], batch)))
            if not turn:
                inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
            yield inputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds accuracy and the tokens seen so far to a step's log."""
        if "loss" in logs:
            correct, trained = distributed.all_sum(self._correct_and_trained).tolist()
            self._correct_and_trained.zero_()
            logs["accuracy"] = correct / max(trained, 1)
            logs["tokens"] = int(self._tokens_after[self.state.global_step - 1])
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as the section says."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                self, cast(nn.Module, model or self.model), self.section
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule as the section says."""
        if self.lr_scheduler is None:
            chosen = optimizer if optimizer is not None else self.optimizer
            self.lr_scheduler = build_schedule(chosen, self.section, num_training_steps)
        return self.lr_scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Our own files; one that cannot be written ends the stage with a message."""
        unfinished, step = Path(cast(str, self.args.output_dir)), self.state.global_step
        folder = unfinished / f"checkpoint-{step}"
        with explained(unfinished, unfinished.parent / "checkpoints", step):
            folder.mkdir(parents=True, exist_ok=True)
            write_shares(folder, cast(nn.Module, self.model), self._inner_optimizer())
            if distributed.rank() == 0:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Nothing: weights come with the optimizer's state, once there is one."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every step is seeded by its number."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """The Trainer's own, but for what a checkpoint holds."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            restore(folder, cast(nn.Module, self.model), self._inner_optimizer())
            set_schedule(self.lr_scheduler, self.state.global_step)
        return prepared

    def _inner_optimizer(self) -> Any:
        """Torch's AdamW or DeepSpeed's optimizer, without accelerate's wrapper."""
        return cast(Any, self.optimizer).optimizer

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Nothing: checkpoints are for resuming."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing: counting the parameters takes longer than a step of a tiny model."""
        return 0


def _correct_and_trained(losses: TokenLoss, labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([losses.num_correct, (labels[:, 1:] != IGNORED).sum()])


def end_in_loss(llama: LlamaForCausalLM, use_bfloat16: bool) -> None:
    """From now on `llama(..., labels=..., as_loss=True)` gives a `TokenLoss` instead of logits.

    Args:
        llama: otherwise as before.
        use_bfloat16: run that forward pass under autocast to bfloat16.
    """
    llama.forward = MethodType(_LossForward(use_bfloat16), llama)


class _LossForward:
    """A causal LLaMA's forward pass that can end in the loss instead of logits."""

    def __init__(self, use_bfloat16: bool) -> None:
        self.use_bfloat16 = use_bfloat16

    def __call__(
        self,
        llama: LlamaForCausalLM,
        *args: Any,
        as_loss: bool = False,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`TokenLoss` of the labels when `as_loss` is set, else what the LLaMA returns.

        Autocast is entered here, inside the engine's forward pass: DeepSpeed switches off one that
        was entered outside.
        """
        if not as_loss:
            kwargs["labels"] = labels
            return type(llama).forward(llama, *args, **kwargs)
        assert labels is not None
        device_type = labels.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.use_bfloat16):
            kwargs.pop("return_dict", None)
            hidden = llama.model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
            targets = labels[:, 1:]
            trained = targets != IGNORED
            weight = llama.lm_head.weight  # whole within the head's call

            def loss(states: torch.Tensor) -> TokenLoss:
                return token_loss(states, weight, targets[trained])

            return distributed.call_inside([llama.lm_head], loss, hidden[trained])
