"""The sections `sft` and `reward`, and what all three stages share.

`ppo` is in `ppo.py`, the rest of the YAML in `schema.py`; numbers derived from these are in
`batch_sizes.py`.
"""

from typing import Annotated

from pydantic import Field, model_validator

from chatllama.config.base import (
    Betas,
    FilePath,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Schedule,
    Section,
)
from chatllama.config.sources import DataSource

FLOAT32_MAX = 3.4e38


class StageSection(Section):
    """Data, checkpoints and AdamW of any stage."""

    data: list[DataSource] = []
    """Training data of the stage."""
    eval_data: list[DataSource] = []
    """Held-out sources. Empty: eval_fraction of `data` is held out."""
    eval_fraction: Fraction = 0.05
    """Share of `data` held out, chosen by the seed (not used with eval_data)."""
    decontaminate: list[DataSource] = []
    """Evaluation sets: training records that share 13 words in a row with one of their prompts
    (or all of a shorter one) are left out, and counted."""
    save_every: NonNegative = 0
    """Steps between checkpoints. 0: only the finished stage is saved."""
    save_total_limit: Positive = 2
    """Newest checkpoints kept."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    lr_schedule: Schedule = "cosine"
    """After warm-up: cosine to 10 % of the peak, linear to 0, or constant."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of AdamW."""
    adam_betas: Betas = [0.9, 0.95]
    """Decay rates of AdamW's moments."""
    adam_eps: PositiveFloat = 1e-8
    """Epsilon of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Global norm that gradients are clipped to; in PPO policy and critic each by its own."""

    @model_validator(mode="after")
    def _check_rates(self) -> "StageSection":
        self.check_float32("learning_rate", self.learning_rate)
        return self

    def check_float32(self, key: str, rate: float) -> None:
        """Raises ValueError if AdamW would compute with a number beyond float32.

        At step t it divides the learning rate by 1 - beta1^t, which is worst where warm-up ends,
        and multiplies it by the weight decay.
        """
        correction = 1 - self.adam_betas[0] ** max(self.warmup_steps, 1)
        if rate * max(1 / correction, self.weight_decay) > FLOAT32_MAX:
            raise ValueError(f"{key} {rate:g} is too large: AdamW's step would be beyond float32")


class OptimizerSection(StageSection):
    """Epochs and batches of SFT and the reward model."""

    epochs: PositiveFloat = 1.0
    """Passes over the mixture (not used when `steps` is given)."""
    steps: Positive | None = None
    """Optimizer steps. null: from `epochs`."""
    batch_size: Positive = 64
    """Examples per optimizer step, over all ranks and accumulation steps."""
    microbatch_size: Positive = 8
    """Examples per forward pass, on one rank; reward model: on average, of about equal tokens."""
    eval_every: NonNegative = 0
    """Optimizer steps between evaluations on held-out data. 0: only at the end."""

    @model_validator(mode="after")
    def _check_batch(self) -> "OptimizerSection":
        self.check_multiple("batch_size", "microbatch_size")
        return self


class GivenSection(OptimizerSection):
    """A stage in whose place a finished adapter may stand."""

    adapter: FilePath | None = None
    """Folder of a finished adapter, of another run or of plain PEFT, that takes the place of
    training: give this or `data`. It must fit backbone and chat template."""

    @model_validator(mode="after")
    def _check_either(self) -> "GivenSection":
        if self.adapter is not None and self.data:
            raise ValueError("give data, to train an adapter, or adapter, to use a finished one")
        return self


class SftSection(GivenSection):
    """Supervised instruction tuning (LLaMA-I)."""

    max_length: Positive = 2048
    """Tokens of a training sequence; longer conversations are cut, and counted."""
    packing: bool = True
    """Several conversations per sequence, which do not attend to each other. false: one each; a
    step's rows then go from short to long, so that microbatches need little padding."""


class RewardSection(GivenSection):
    """The reward model: pairwise Bradley-Terry loss on the scalar head.

    An example is a prompt with its ranked answers: two for a pair, or K for a list, which trains
    all of its pairs at once.
    """

    max_length: Positive = 2048
    """Tokens of prompt + answer; longer answers are left out, and counted."""
    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate of adapter and head."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW."""
    margin_coef: NonNegativeFloat = 0.0
    """Factor on a pair's `margin`, subtracted from the score difference (LLaMA-2 3.2.2)."""
    center_coef: NonNegativeFloat = 0.01
    """Weight of mean((r_chosen + r_rejected)^2), which keeps scores near 0 (arXiv 2312.09244)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of wrong labels: this share of the loss has the opposite label."""
    ensemble: Positive = 1
    """Reward models trained one after another, each with its own seed and data order."""
    allow_weak: bool = False
    """Let PPO start on a reward model that is not significantly better than chance."""

    @model_validator(mode="after")
    def _check_one(self) -> "RewardSection":
        if self.adapter is not None and self.ensemble > 1:
            raise ValueError("adapter is one reward model: leave ensemble at 1")
        return self
