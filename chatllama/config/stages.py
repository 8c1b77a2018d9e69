"""The sections of the first two stages, `sft` and `reward`, and what all three share.

`ppo` is in `config_ppo.py`, the rest of the YAML in `config.py`. Numbers derived from these are in
`batching.py`.
"""

from typing import Annotated

from pydantic import Field, model_validator

from chatllama.config.base import (
    Betas,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Schedule,
    Section,
)
from chatllama.config.sources import DataSource


class StageSection(Section):
    """What the three stages have in common: data, saving, and AdamW."""

    data: list[DataSource] = []
    """Sources of the stage's training data."""
    eval_data: list[DataSource] = []
    """Held-out sources. Empty: eval_fraction of `data` is held out."""
    eval_fraction: Fraction = 0.05
    """Share of `data` held out, chosen by the seed (not used with eval_data)."""
    decontaminate: list[DataSource] = []
    """Evaluation sets: a training record that shares 13 words in a row with one of their prompts
    (or all of a shorter one) is left out, and counted."""
    save_every: NonNegative = 0
    """Steps between checkpoints. 0: only the finished stage is saved."""
    save_total_limit: Positive = 2
    """Checkpoints kept."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    lr_schedule: Schedule = "cosine"
    """After warm-up: cosine to 10 % of the peak, linear to 0, or constant."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of AdamW."""
    adam_betas: Betas = [0.9, 0.95]
    """Moment decay rates of AdamW."""
    adam_eps: PositiveFloat = 1e-8
    """Epsilon of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""


class OptimizerSection(StageSection):
    """Passes and batches of SFT and the reward model."""

    epochs: PositiveFloat = 1.0
    """Passes over the mixture (not used when `steps` is given)."""
    steps: Positive | None = None
    """Optimizer steps. null: from `epochs`."""
    batch_size: Positive = 64
    """Examples per optimizer step, over all ranks and accumulation steps."""
    microbatch_size: Positive = 8
    """Examples per forward pass, on one rank; of the reward model on average, since its
    microbatches hold about equally many tokens."""
    eval_every: NonNegative = 0
    """Optimizer steps between evaluations on held-out data. 0: only at the end."""

    @model_validator(mode="after")
    def _check_batch(self) -> "OptimizerSection":
        if self.batch_size % self.microbatch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of "
                f"microbatch_size {self.microbatch_size}"
            )
        return self


class SftSection(OptimizerSection):
    """Supervised instruction tuning (LLaMA-I)."""

    max_length: Positive = 2048
    """Tokens of a training sequence; longer conversations are cut, and counted."""
    packing: bool = True
    """Fill each sequence with several conversations that do not see each other. false: one each;
    a step's rows then go from short to long, so that microbatches need little padding."""


class RewardSection(OptimizerSection):
    """The reward model: pairwise Bradley-Terry loss on the scalar head.

    An example is a prompt with its ranked answers: two for a pair, K for a list, all of whose pairs
    train at once.
    """

    max_length: Positive = 2048
    """Tokens of prompt + answer; longer answers are left out, and counted."""
    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate of adapter and head."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW."""
    margin_coef: NonNegativeFloat = 0.0
    """Times a pair's `margin`, subtracted from the score difference (LLaMA-2 3.2.2)."""
    center_coef: NonNegativeFloat = 0.01
    """Of mean((r_chosen + r_rejected)^2), which keeps scores around 0 (arXiv 2312.09244)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the labels taken to be wrong: that much of the loss pulls the other way."""
    ensemble: Positive = 1
    """Reward models trained one after another, each with its own seed and data order."""
    allow_weak: bool = False
    """Let PPO start on a reward model that cannot be told from guessing."""
