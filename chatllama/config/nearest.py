"""What an unknown name may mean: the nearest known ones, and ours for those of other libraries."""

import difflib
from collections.abc import Iterable
from pathlib import Path

OTHER_NAMES: dict[str, str] = {
    "adam_beta1": "adam_betas",
    "adam_beta2": "adam_betas",
    "adam_epsilon": "adam_eps",
    "base_model": "backbone.path",
    "algorithm": "ppo.advantage",
    "beta": "ppo.kl_coef",
    "bf16": "backbone.dtype: bfloat16",
    "bits": "backbone.quantization",
    "chat_template": "chat.template",
    "cliprange": "ppo.clip_range",
    "cutoff_len": "max_length",
    "dataset": "data",
    "dataset_name": "data",
    "eval_steps": "eval_every",
    "fp16": "backbone.dtype: bfloat16 (float16 needs a loss scaling that there is not)",
    "fp32": "backbone.dtype: float32",
    "gradient_accumulation_steps": "batch_size, of all ranks and accumulated microbatches together",
    "init_kl_coef": "ppo.kl_coef",
    "kl": "ppo.kl_coef",
    "kl_penalty": "ppo.kl_coef",
    "lambda": "ppo.lam",
    "load_in_4bit": "backbone.quantization: nf4",
    "load_in_8bit": "backbone.quantization: int8",
    "logging_steps": "tracking.log_every",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_schedule",
    "max_completion_length": "generation.max_new_tokens",
    "max_response_length": "generation.max_new_tokens",
    "max_seq_length": "max_length",
    "max_steps": "steps",
    "mini_batch_size": "ppo.minibatch_size",
    "model": "backbone.path",
    "model_name_or_path": "backbone.path",
    "num_generations": "ppo.samples_per_prompt",
    "num_ppo_epochs": "ppo.epochs",
    "num_train_epochs": "epochs",
    "output_dir": "run_dir",
    "per_device_train_batch_size": "microbatch_size",
    "pretrain": "backbone.path",
    "rank": "lora.r",
    "response_length": "generation.max_new_tokens",
    "save_steps": "save_every",
    "torch_dtype": "backbone.dtype",
    "train_file": "data",
    "use_flash_attention_2": "backbone.attn_implementation: flash_attention_2",
    "use_wandb": "tracking.report_to: [wandb]",
    "wandb_project": "tracking.wandb.project",
    "warmup_ratio": "warmup_steps",
    "zero_stage": "deepspeed.stage",
}
"""Name elsewhere -> key here, whole or the last part of a stage's key, and what else to know."""


def did_you_mean(wanted: str, known: Iterable[str], most: int = 3) -> str:
    """`; did you mean a or b?` with the nearest names, or nothing."""
    near = difflib.get_close_matches(wanted, list(known), n=most)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def files_like(path: str | Path) -> str:
    """The same with the files and folders beside a path that does not exist."""
    given = Path(path)
    if not given.parent.is_dir():
        return files_like(given.parent) if given.parent != given else ""
    names = (str(given.with_name(file.name)) for file in sorted(given.parent.iterdir()))
    return did_you_mean(str(given), names)
