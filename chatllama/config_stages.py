"""The sections of the three stages: `sft`, `reward` and `ppo`.

The rest of the YAML is in `config.py`. Numbers derived from these are in `batching.py`.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from chatllama.config_base import (
    Betas,
    DataSource,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Schedule,
    Section,
)


class StageSection(Section):
    """What the three stages have in common: saving and holding data out."""

    data: list[DataSource] = []
    """Sources of the stage's training data."""
    eval_data: list[DataSource] = []
    """Held-out sources. Empty: eval_fraction of `data` is held out."""
    eval_fraction: Fraction = 0.05
    """Share of `data` held out, chosen by the seed (not used with eval_data)."""
    save_every: NonNegative = 0
    """Steps between checkpoints. 0: only the finished stage is saved."""
    save_total_limit: Positive = 2
    """Checkpoints kept."""


class OptimizerSection(StageSection):
    """The optimiser of SFT and the reward model."""

    epochs: PositiveFloat = 1.0
    """Passes over the mixture (not used when `steps` is given)."""
    steps: Positive | None = None
    """Optimizer steps. null: from `epochs`."""
    batch_size: Positive = 64
    """Examples per optimizer step, over all ranks and accumulation steps."""
    microbatch_size: Positive = 8
    """Examples per forward pass, on one rank."""
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
    """Fill each sequence with several conversations that do not see each other."""


class RewardSection(OptimizerSection):
    """The reward model: pairwise Bradley-Terry loss on the scalar head."""

    max_length: Positive = 2048
    """Tokens of prompt + answer; longer pairs are left out, and counted."""
    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate of adapter and head."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW."""
    margin_coef: NonNegativeFloat = 0.0
    """Times a pair's `margin`, subtracted from the score difference (LLaMA-2 3.2.2)."""
    center_coef: NonNegativeFloat = 0.01
    """Of mean((r_chosen + r_rejected)^2), which keeps scores around 0 (arXiv 2312.09244)."""


class PpoSection(StageSection):
    """PPO against the reward model. See docs/ppo.md for every detail and its source."""

    steps: Positive = 100
    """Rollout batches."""
    rollout_batch_size: Positive = 128
    """Responses sampled per step, over all ranks."""
    max_prompt_length: Positive = 1024
    """Tokens of a prompt; longer prompts are left out, and counted."""
    epochs: Positive = 4
    """Passes over each rollout batch."""
    minibatch_size: Positive = 64
    """Responses per optimizer step, over all ranks."""
    microbatch_size: Positive = 8
    """Responses per forward pass, on one rank."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of the policy adapter."""
    value_learning_rate: PositiveFloat | None = None
    """Peak learning rate of value adapter and head. null: learning_rate."""
    lr_schedule: Schedule = "linear"
    """Over all optimizer steps, after warm-up."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW."""
    adam_betas: Betas = [0.9, 0.95]
    """Moment decay rates of AdamW."""
    adam_eps: PositiveFloat = 1e-5
    """Epsilon of AdamW (Huang 2024, arXiv 2403.17031)."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""
    kl_coef: NonNegativeFloat = 0.05
    """Reward subtracted per nat of log pi - log pi_ref (the first value, if adaptive)."""
    kl_estimator: Literal["k1"] = "k1"
    """KL estimate inside the reward: k1 = log pi - log pi_ref; the others have a wrong gradient."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Adaptive: kl_coef follows kl_target (Ziegler 2019, arXiv 1909.08593)."""
    kl_target: PositiveFloat = 6.0
    """Adaptive controller: nats per response."""
    kl_horizon: Positive = 10_000
    """Adaptive controller: responses over which kl_coef adapts."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of generalised advantage estimation (arXiv 1506.02438)."""
    clip_range: PositiveFloat = 0.2
    """Ratios beyond 1 +- this get no gradient."""
    value_clip_range: PositiveFloat = 0.2
    """Values are clipped to within this of the rollout's."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0, variance 1 over the rollout batch of all ranks."""
    score_normalization: Literal["reference", "none"] = "reference"
    """Reference: subtract mean and divide by deviation of scores of the reference's answers."""
    score_normalization_samples: Positive = 256
    """Reference answers scored for that, before step 1."""
    score_clip: PositiveFloat | None = None
    """Normalised scores are clipped to +- this."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Subtracted from the score of a response that does not end by itself."""
    eval_every: NonNegative = 0
    """Steps between evaluations on held-out prompts. 0: only at the end."""

    @field_validator("kl_estimator", mode="before")
    @classmethod
    def _refuse_biased_kl(cls, value: object) -> object:
        if value in ("k2", "k3", "abs"):
            raise ValueError(
                f"{value} inside the reward has the wrong gradient: k3's expectation is "
                "grad KL(pi||ref) - grad KL(ref||pi), about 0 near the reference, so it does not "
                "regularise. Only k1 is allowed"
            )
        return value

    @model_validator(mode="after")
    def _check_batch(self) -> "PpoSection":
        for whole, part in (
            ("rollout_batch_size", "minibatch_size"),
            ("minibatch_size", "microbatch_size"),
        ):
            if self.__dict__[whole] % self.__dict__[part]:
                raise ValueError(
                    f"{whole} {self.__dict__[whole]} is not a multiple of "
                    f"{part} {self.__dict__[part]}"
                )
        return self
