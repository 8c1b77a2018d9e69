"""The `ppo` section, and `ppo.health`: when a run counts as ill, and what is done about it.

Details, formulas and sources of every key are in docs/ppo.md and docs/health.md.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from chatllama.config.base import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Schedule,
    Section,
)
from chatllama.config.sources import DataSource
from chatllama.config.stages import StageSection

DiagnosisName = Literal[
    "not_finite",
    "initial_kl_not_zero",
    "first_ratio_not_one",
    "ratio_explosion",
    "grad_norm_explosion",
    "kl_explosion",
    "sampling_mismatch",
    "negative_kl",
    "clip_fraction_high",
    "dead_rewards",
    "reward_hacking",
    "eos_rate_falling",
    "length_drift",
    "entropy_collapse",
    "critic_explained_variance_negative",
]
Window = Annotated[int, Field(ge=1, le=100)]
Factor = Annotated[float, Field(gt=1)]
StrictFraction = Annotated[float, Field(gt=0, lt=1)]


class HealthSection(Section):
    """Diagnoses of a PPO run, judged after every step. See docs/health.md."""

    action: Literal["warn", "stop", "rollback"] = "warn"
    """On a diagnosis: only say it, end the stage, or go back to the last good checkpoint with a
    lower learning rate. not_finite, initial_kl_not_zero and first_ratio_not_one never go on."""
    rollback_lr_factor: StrictFraction = 0.5
    """Multiplies all learning rates at every rollback."""
    max_rollbacks: NonNegative = 2
    """Rollbacks before the stage is ended instead."""
    ignore: list[DiagnosisName] = []
    """Diagnoses that are not made."""
    repeat_after: Window = 20
    """Steps before a diagnosis that holds on is reported again."""
    baseline_steps: Window = 5
    """The first steps of the run, with whose mean length, EOS rate and entropy are compared."""
    window: Window = 5
    """Last steps whose mean is judged where no other number of steps is given."""
    max_initial_kl: NonNegativeFloat = 1e-3
    """initial_kl_not_zero: nats of any token between policy and reference before step 1."""
    max_first_log_ratio: NonNegativeFloat = 1e-3
    """first_ratio_not_one: nats of any token between rollout and first minibatch."""
    max_ratio: Factor = 100.0
    """ratio_explosion: largest probability ratio of a step, two steps in a row."""
    max_approx_kl: PositiveFloat = 0.2
    """ratio_explosion: mean of half the squared log ratio of a step, nats squared a token."""
    max_grad_norm_factor: Factor = 10.0
    """grad_norm_explosion: gradient norm over its median of the 20 steps before, two in a row."""
    max_kl_token: PositiveFloat = 1.0
    """kl_explosion: nats a token between policy and reference."""
    max_surprise_errors: PositiveFloat = 6.0
    """sampling_mismatch: standard errors between the mean of -log p of the sampled tokens and the
    entropy of the scored distributions."""
    min_kl_errors: PositiveFloat = 4.0
    """negative_kl: standard errors by which the KL estimate lies below 0."""
    max_clip_fraction: StrictFraction = 0.4
    """clip_fraction_high: share of tokens whose ratio was clipped."""
    min_score_std: NonNegativeFloat = 1e-4
    """dead_rewards: standard deviation of the scores of a step, three steps in a row."""
    gold_drop_errors: PositiveFloat = 3.0
    """reward_hacking: standard errors by which held-out gold lies below its best, two evaluations
    in a row, while the reward model's score has not fallen."""
    max_disagreement_factor: Factor = 2.0
    """reward_hacking: disagreement of the reward ensemble over that of the first steps, while the
    score has risen."""
    max_eos_drop: StrictFraction = 0.2
    """eos_rate_falling: share of responses fewer than at first that end by themselves."""
    max_length_factor: Factor = 2.0
    """length_drift: mean response length over that of the first steps, or the other way round."""
    min_entropy_fraction: Fraction = 0.2
    """entropy_collapse: entropy over that of the first steps."""
    min_explained_variance: Annotated[float, Field(lt=1)] = -0.05
    """critic_explained_variance_negative: mean of 10 steps of the share of the returns' variance
    that the critic predicts, while it does not rise."""
    critic_patience: NonNegative = 10
    """critic_explained_variance_negative: first steps of the run, which it does not look at."""


class RewardSource(Section):
    """One term of the score: a reward adapter, or a Python function of the user's."""

    adapter: str | None = None
    """Folder of a reward adapter; `run`: the one this run has trained (with its ensemble)."""
    function: str | None = None
    """`module:function` from (prompt, response) strings to a float."""
    weight: float = 1.0
    """Factor of this term."""

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardSource":
        if (self.adapter is None) == (self.function is None):
            raise ValueError("give exactly one of adapter and function")
        return self


class PpoSection(StageSection):
    """PPO against the reward model. See docs/ppo.md for every detail and its source."""

    steps: Positive = 100
    """Rollout batches."""
    rollout_batch_size: Positive = 128
    """Responses sampled per step, over all ranks."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt of a rollout batch."""
    max_prompt_length: Positive = 1024
    """Tokens of a prompt; longer prompts are left out, and counted."""
    epochs: Positive = 4
    """Passes over each rollout batch."""
    minibatch_size: Positive = 64
    """Responses per optimizer step on average, over all ranks: whole microbatches."""
    microbatch_size: Positive = 8
    """Responses per forward pass on average, on one rank. The rollout_batch_size / microbatch_size
    microbatches hold about equally many tokens: none decides memory, and ranks do not wait."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of the policy adapter."""
    value_learning_rate: PositiveFloat | None = None
    """Peak learning rate of value adapter and head. null: learning_rate."""
    lr_schedule: Schedule = "linear"
    """Over all optimizer steps, after warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW."""
    adam_eps: PositiveFloat = 1e-5
    """Epsilon of AdamW (Huang 2024, arXiv 2403.17031)."""

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
    kl_loss_coef: NonNegativeFloat = 0.0
    """Weight of a KL term in the loss, beside the one in the reward."""
    kl_loss_estimator: Literal["k2", "k3"] = "k2"
    """Of that term: k2 = 0.5 (log pi - log pi_ref)^2, k3 = exp(-k1) - 1 + k1."""
    reference_refresh_every: NonNegative = 0
    """Steps after which the reference becomes the present policy (LLaMA-2's rounds). 0: never."""
    target_kl: PositiveFloat | None = None
    """An update ends early once a minibatch's approx_kl (nats per token) is above this."""

    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae needs a critic; rloo (arXiv 2402.14740) and grpo (arXiv 2402.03300) compare the samples
    of a prompt and hold no value model."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token (gae)."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of generalised advantage estimation (arXiv 1506.02438)."""
    whiten_advantages: bool | None = None
    """Shift and scale advantages to mean 0, variance 1 over the rollout batch of all ranks.
    null: with gae."""
    clip_range: PositiveFloat = 0.2
    """Ratios beyond 1 +- this get no gradient."""
    value_model: Literal["adapter", "policy_trunk"] = "adapter"
    """Where the value head sits: on an adapter copied from the reward model's, or on the policy."""
    value_clip_range: PositiveFloat = 0.2
    """Values are clipped to within this of the rollout's."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    critic_warmup_steps: NonNegative = 0
    """First steps, in which only the critic learns."""

    rewards: list[RewardSource] = [RewardSource(adapter="run")]
    """Terms of the score, added with their weights."""
    reward_ensemble: Literal["mean", "min"] = "mean"
    """How the members of an ensemble make one score (min: arXiv 2310.02743)."""
    score_normalization: Literal["reference", "running", "none"] = "reference"
    """Scores less a mean, over a deviation: those of the reference's answers before step 1, or of
    all answers so far."""
    score_normalization_samples: Positive = 256
    """Reference answers scored before step 1 (reference)."""
    score_clip: PositiveFloat | None = None
    """Normalised scores are clipped to +- this."""
    whiten_rewards: bool = False
    """Scale rewards to variance 1 in every batch, mean kept. Changes what kl_coef means."""
    missing_eos: Literal["penalty", "filter"] = "penalty"
    """Responses that do not end by themselves: lose missing_eos_penalty, or are not learnt from."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Subtracted from the normalised score of a response that does not end by itself."""
    length_penalty: NonNegativeFloat = 0.0
    """Subtracted from the normalised score per response token."""

    ptx_coef: NonNegativeFloat = 0.0
    """Weight of the log-likelihood of other text (InstructGPT's PPO-ptx, arXiv 2203.02155)."""
    ptx_data: list[DataSource] = []
    """That text: instruction data (its answers count) or format `text`."""
    ptx_max_length: Positive = 512
    """Tokens of a text; longer ones are cut, and counted."""
    ptx_microbatch_size: Positive = 4
    """Texts beside each microbatch of responses, on average: of about equally many tokens."""
    ema_decay: Fraction | None = None
    """Decay per optimizer step of an average of the policy's weights, exported to ppo/policy-ema.
    null: none (InstructGPT: 0.992)."""
    eval_every: NonNegative = 0
    """Steps between measurements of the policy on held-out prompts. 0: only at the end."""
    health: HealthSection = HealthSection()
    """When the run counts as ill."""

    @field_validator("kl_estimator", mode="before")
    @classmethod
    def _refuse_biased_kl(cls, value: object) -> object:
        if value in ("k2", "k3", "abs"):
            raise ValueError(
                f"{value} inside the reward has the wrong gradient: k3's expectation is "
                "grad KL(pi||ref) - grad KL(ref||pi), about 0 near the reference, so it does not "
                "regularise. Only k1 is allowed (k2 and k3 may stand in the loss: kl_loss_coef)"
            )
        return value

    @model_validator(mode="after")
    def _check_batch(self) -> "PpoSection":
        for whole, part in (
            ("rollout_batch_size", "minibatch_size"),
            ("rollout_batch_size", "samples_per_prompt"),
            ("minibatch_size", "microbatch_size"),
        ):
            if self.__dict__[whole] % self.__dict__[part]:
                raise ValueError(
                    f"{whole} {self.__dict__[whole]} is not a multiple of "
                    f"{part} {self.__dict__[part]}"
                )
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> "PpoSection":
        if self.advantage != "gae" and self.samples_per_prompt < 2:
            raise ValueError(
                f"advantage {self.advantage} compares samples of one prompt: samples_per_prompt "
                f"must be 2 or more, not {self.samples_per_prompt}"
            )
        if self.advantage != "gae" and self.critic_warmup_steps:
            raise ValueError(f"critic_warmup_steps needs a critic; {self.advantage} has none")
        if (self.ptx_coef > 0) != bool(self.ptx_data):
            raise ValueError("ptx_coef and ptx_data go together: give both or neither")
        if self.health.action == "rollback" and not self.save_every:
            raise ValueError("health.action rollback goes back to checkpoints: set save_every")
        if not self.rewards:
            raise ValueError("rewards: give at least one source")
        return self

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        return self.advantage == "gae" if self.whiten_advantages is None else self.whiten_advantages
