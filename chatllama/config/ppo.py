"""The `ppo` section, and `ppo.health`: when a run counts as failing, and what is done about it.

Details, formulas and sources of every key are in docs/ppo.md and docs/health.md.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from chatllama.config.base import (
    FilePath,
    Fraction,
    FunctionName,
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
    "not_finite", "initial_kl_not_zero", "first_ratio_not_one", "ratio_explosion",
    "grad_norm_explosion", "kl_explosion", "sampling_mismatch", "negative_kl",
    "clip_fraction_high", "dead_rewards", "reward_hacking", "eos_rate_falling", "length_drift",
    "entropy_collapse", "critic_explained_variance_negative", "scores_not_repeatable",
    "score_falling",
]  # fmt: skip
Window = Annotated[int, Field(ge=1, le=100)]
Factor = Annotated[float, Field(gt=1)]
GRPO_KL_LOSS_COEF = 0.02
StrictFraction = Annotated[float, Field(gt=0, lt=1)]


class HealthSection(Section):
    """Health checks of a PPO run after every step. See docs/health.md."""

    action: Literal["warn", "stop", "rollback"] = "warn"
    """On a diagnosis: warn, end the stage, or go back to the last good checkpoint with a lower
    learning rate. not_finite, initial_kl_not_zero and first_ratio_not_one never only warn."""
    rollback_lr_factor: StrictFraction = 0.5
    """Factor on all learning rates at every rollback."""
    max_rollbacks: NonNegative = 2
    """Rollbacks before the stage is ended instead."""
    ignore: list[DiagnosisName] = []
    """Checks that are left out."""
    repeat_after: Window = 20
    """Steps until a diagnosis that persists is reported again."""
    baseline_steps: Window = 5
    """First steps of the run; their mean length, EOS rate and entropy are the baselines."""
    window: Window = 5
    """Steps averaged by a check, unless it says otherwise."""
    max_initial_kl: NonNegativeFloat = 1e-3
    """initial_kl_not_zero: nats of any token between policy and reference before step 1. Fatal in
    float32; in bfloat16, where kernels may round differently, only reported."""
    max_initial_kl_mean: NonNegativeFloat = 0.02
    """initial_kl_not_zero in bfloat16: the same, mean over tokens. Fatal."""
    max_first_log_ratio: NonNegativeFloat = 1e-3
    """first_ratio_not_one: nats of any token between rollout and first minibatch. Fatal in float32;
    in bfloat16 only reported."""
    max_first_log_ratio_mean: NonNegativeFloat = 0.02
    """first_ratio_not_one in bfloat16: the same, mean over tokens. Fatal."""
    max_ratio: Factor = 100.0
    """ratio_explosion: largest probability ratio of a step, two steps in a row."""
    max_approx_kl: PositiveFloat = 0.2
    """ratio_explosion: mean of half the squared log ratio of a step, nats squared per token."""
    max_grad_norm_factor: Factor = 10.0
    """grad_norm_explosion: gradient norm over its median of the 20 steps before, two in a row."""
    max_kl_token: PositiveFloat = 1.0
    """kl_explosion: nats per token between policy and reference."""
    max_surprise_errors: PositiveFloat = 4.0
    """sampling_mismatch: standard errors between mean -log p of the sampled tokens and entropy."""
    min_kl_errors: PositiveFloat = 4.0
    """negative_kl: standard errors of the KL estimate below 0."""
    max_clip_fraction: StrictFraction = 0.2
    """clip_fraction_high: share of tokens that clipping left without a gradient."""
    min_score_std: NonNegativeFloat = 1e-4
    """dead_rewards: standard deviation of the raw scores of a step over max(1, |mean|), or of the
    shaped ones, three steps in a row. PPO does not start on raw scores that vary less."""
    max_rescore_gap: PositiveFloat = 0.5
    """scores_not_repeatable: share of the scores' variance that scoring again does not find."""
    score_drop_errors: PositiveFloat = 3.0
    """score_falling: standard errors of the mean score below that of the first steps."""
    gold_drop_errors: PositiveFloat = 3.0
    """reward_hacking: standard errors of held-out gold below its best, two evaluations in a row,
    while the reward model's score has not fallen."""
    max_disagreement_factor: Factor = 2.0
    """reward_hacking: ensemble disagreement over its lowest, while the score has risen."""
    max_eos_drop: StrictFraction = 0.2
    """eos_rate_falling: drop of the share of responses that end with EOS, below its baseline."""
    max_length_factor: Factor = 2.0
    """length_drift: mean response length over its baseline, or the other way round, while longer
    (shorter) answers score higher as much as at first."""
    min_entropy_fraction: Fraction = 0.2
    """entropy_collapse: entropy over its baseline."""
    min_explained_variance: Annotated[float, Field(lt=1)] = -0.05
    """critic_explained_variance_negative: share of the variance of rewards-to-go that the critic
    explains, its mean over 10 steps, while it does not rise."""
    critic_patience: NonNegative = 10
    """critic_explained_variance_negative: first steps of the run, which are not checked."""


class RewardSource(Section):
    """One term of the score: a reward adapter, a function, another model, or servers."""

    adapter: FilePath | None = None
    """Folder of a reward adapter; `run`: the one that this run trained (with its ensemble)."""
    function: FunctionName | None = None
    """`module:function`: (prompt, response) to a float, or (prompts, completions, **columns) to a
    list of floats (all forms: docs/rewards.md); `FOLDER/module:function` where the module is
    neither installed nor in the current folder (RUN/config.yaml holds it so)."""
    model: FilePath | None = None
    """Folder or hub id of a reward model of any family, which AutoModelForSequenceClassification
    loads with one label; it reads answers by its own tokenizer and chat template."""
    urls: list[str] = []
    """Servers with the same reward model: `chatllama serve`, whose /v1/score is requested."""
    weight: float = 1.0
    """Factor of this term."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Of the term in metrics. null: the function's name, reward_model, or the folder's."""
    processes: NonNegative = 0
    """function: processes on each rank that call it, one answer at a time. 0: the training process
    calls it."""
    timeout: PositiveFloat | None = None
    """Seconds of a call of the function (which needs processes, or is async), or of a request."""
    timeout_score: float | None = None
    """function: the score of an answer whose call takes too long. null: an error."""

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardSource":
        kinds = (self.adapter, self.function, self.model, self.urls or None)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError("give exactly one of adapter, function, model and urls")
        if self.function is None and (self.processes or self.timeout_score is not None):
            raise ValueError("processes and timeout_score are for a function")
        if self.timeout is not None and self.function is None and not self.urls:
            raise ValueError("timeout is for a function or urls")
        if self.timeout_score is not None and self.timeout is None:
            raise ValueError("timeout_score is for calls that take too long: give timeout")
        return self

    @property
    def label(self) -> str:
        """Its name in metrics."""
        if self.name is not None:
            return self.name
        if self.adapter == "run":
            return "reward_model"
        if self.function is not None:
            return self.function.rpartition(":")[2]
        return "servers" if self.urls else Path(self.adapter or self.model or "").name


class PpoSection(StageSection):
    """PPO against the reward model. See docs/ppo.md for every detail and its source."""

    steps: Positive = 100
    """Rollout batches."""
    rollout_batch_size: Positive = 128
    """Responses sampled per step, over all ranks."""
    samples_per_prompt: Positive = 1
    """Responses per prompt of a rollout batch."""
    max_prompt_length: Positive = 1024
    """Tokens of a prompt; longer prompts are left out, and counted."""
    epochs: Positive = 4
    """Passes over each rollout batch."""
    minibatch_size: Positive = 64
    """Responses per optimizer step on average, over all ranks (whole microbatches)."""
    microbatch_size: Positive = 8
    """Responses per forward pass on average, on one rank; all have about equally many tokens."""
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate of the policy adapter."""
    value_learning_rate: PositiveFloat | None = None
    """Peak learning rate of value adapter and head. null: learning_rate."""
    lr_schedule: Schedule = "linear"
    """Decay over all optimizer steps, after warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW."""
    adam_eps: PositiveFloat = 1e-5
    """Epsilon of AdamW (Huang 2024, arXiv 2403.17031)."""

    kl_coef: NonNegativeFloat = 0.05
    """Reward subtracted per nat of log pi - log pi_ref (the first value, if adaptive). Default with
    grpo: 0; there it is in deviations of a group's scores."""
    kl_estimator: Literal["k1"] = "k1"
    """KL estimate in the reward: k1 = log pi - log pi_ref; the others have a wrong gradient."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: kl_coef follows kl_target (Ziegler 2019, arXiv 1909.08593)."""
    kl_target: PositiveFloat = 6.0
    """Adaptive controller: nats per response."""
    kl_horizon: Positive = 10_000
    """Adaptive controller: responses over which kl_coef adapts."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """Weight of a KL term in the loss, in addition to the one in the reward. Default with grpo and
    without a kl_coef: 0.02."""
    kl_loss_estimator: Literal["k2", "k3"] = "k2"
    """KL estimate in the loss: k2 = 0.5 (log pi - log pi_ref)^2, k3 = exp(-k1) - 1 + k1. Default
    with grpo: k3."""
    reference_refresh_every: NonNegative = 0
    """Steps between updates of the reference to the current policy (LLaMA-2). 0: never."""
    target_kl: PositiveFloat | None = None
    """An update ends early once a minibatch's approx_kl (nats per token) is above this."""

    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae needs a critic; rloo (arXiv 2402.14740), grpo (2402.03300) compare a prompt's samples."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token (gae)."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of generalised advantage estimation (arXiv 1506.02438)."""
    critic_lam: Annotated[float, Field(ge=0, le=1)] | None = None
    """Lambda of the returns that the critic learns (gae); 1: rewards-to-go. null: lam."""
    whiten_advantages: bool | None = None
    """Normalise advantages to mean 0, variance 1 over all ranks' rollout batch. null: with gae."""
    clip_range: PositiveFloat = 0.2
    """Probability ratios outside 1 +- this have no gradient."""
    value_model: Literal["adapter", "policy_trunk"] = "adapter"
    """What the value head is on: an adapter copied from the reward model's, or the policy."""
    value_clip_range: PositiveFloat = 0.2
    """Values are clipped to this distance from the rollout's."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    critic_warmup_steps: NonNegative = 0
    """First steps, in which only the critic is trained: the policy's learning-rate schedule and
    AdamW begin after them."""

    rewards: list[RewardSource] = [RewardSource(adapter="run")]
    """Terms of the score, summed with their weights."""
    reward_ensemble: Literal["mean", "min"] = "mean"
    """How the scores of an ensemble are combined (min: arXiv 2310.02743)."""
    score_normalization: Literal["reference", "running", "none"] = "reference"
    """Normalise scores by those of the reference's responses before step 1, or of all so far."""
    score_normalization_samples: Positive = 256
    """reference: responses scored before step 1."""
    score_clip: PositiveFloat | None = None
    """Normalised scores are clipped to +- this."""
    whiten_rewards: bool = False
    """Scale rewards to variance 1 in every batch, mean kept. Changes the effect of kl_coef."""
    missing_eos: Literal["penalty", "filter"] = "penalty"
    """Responses without EOS: missing_eos_penalty is subtracted, or they are not trained on."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Subtracted from the normalised score of a response without EOS."""
    length_penalty: NonNegativeFloat = 0.0
    """Subtracted from the normalised score per response token."""

    ptx_coef: NonNegativeFloat = 0.0
    """Weight of the log-likelihood of other text (InstructGPT's PPO-ptx, arXiv 2203.02155)."""
    ptx_data: list[DataSource] = []
    """Data of ptx_coef: instruction data (its answers are trained on) or format `text`."""
    ptx_max_length: Positive = 512
    """Tokens of a ptx text; longer ones are cut, and counted."""
    ptx_microbatch_size: Positive = 4
    """Texts per microbatch of responses, on average: about equally many tokens."""
    ema_decay: Fraction | None = None
    """Decay per optimizer step of the average weights in ppo/policy-ema (InstructGPT: 0.992)."""
    eval_every: NonNegative = 0
    """Steps between evaluations of the policy on held-out prompts. 0: only at the end."""
    health: HealthSection = HealthSection()
    """Health checks."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_grpo(cls, values: dict[str, Any] | object) -> object:
        """Puts the KL of grpo into the loss, unless kl_coef is given."""
        if not isinstance(values, dict):
            return values
        given = cast(dict[str, Any], values)
        if given.get("advantage") != "grpo":
            return given
        in_loss = 0.0 if given.get("kl_coef") else GRPO_KL_LOSS_COEF
        return {"kl_coef": 0.0, "kl_loss_coef": in_loss, "kl_loss_estimator": "k3", **given}

    @field_validator("kl_estimator", mode="before")
    @classmethod
    def _refuse_biased_kl(cls, value: object) -> object:
        if value in ("k2", "k3", "abs"):
            raise ValueError(
                f"{value} in the reward has the wrong gradient: k3's expectation is "
                "grad KL(pi||ref) - grad KL(ref||pi), about 0 near the reference, so it does not "
                "regularise. Only k1 is allowed (k2 and k3 are for the loss: kl_loss_coef)"
            )
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> "PpoSection":
        self.check_multiple("rollout_batch_size", "minibatch_size")
        self.check_multiple("rollout_batch_size", "samples_per_prompt")
        self.check_multiple("minibatch_size", "microbatch_size")
        if self.value_learning_rate is not None:
            self.check_float32("value_learning_rate", self.value_learning_rate)
        if self.advantage != "gae" and self.samples_per_prompt < 2:
            raise ValueError(
                f"advantage {self.advantage} compares samples of one prompt: samples_per_prompt "
                f"must be 2 or more, not {self.samples_per_prompt}"
            )
        critics = {
            "critic_warmup_steps": self.critic_warmup_steps > 0,
            "critic_lam": self.critic_lam is not None,
        }
        for key, is_set in critics.items():
            if self.advantage != "gae" and is_set:
                raise ValueError(f"{key} needs a critic; {self.advantage} has none")
        if self.critic_warmup_steps >= self.steps:
            raise ValueError(
                f"critic_warmup_steps {self.critic_warmup_steps}: in the first so many of the "
                f"{self.steps} steps the policy rests, so it would never be trained; give fewer, "
                "or more steps"
            )
        if self.advantage == "grpo" and self.whiten_rewards:
            raise ValueError("whiten_rewards: grpo divides the scores of each group itself")
        if self.kl_controller == "adaptive" and not self.kl_coef:
            raise ValueError("kl_controller adaptive multiplies kl_coef: give one above 0")
        if (self.ptx_coef > 0) != bool(self.ptx_data):
            raise ValueError("ptx_coef and ptx_data go together: give both or neither")
        if self.health.action == "rollback" and not self.save_every:
            raise ValueError("health.action rollback goes back to checkpoints: set save_every")
        if self.score_normalization == "reference" and self.score_normalization_samples < 2:
            raise ValueError(
                "score_normalization_samples: one response has no deviation; give 2 or more"
            )
        if not self.rewards:
            raise ValueError("rewards: give at least one source")
        labels = [source.label for source in self.rewards]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"rewards: two terms are called {twice[0]}: give each a `name`")
        return self

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        return self.advantage == "gae" if self.whiten_advantages is None else self.whiten_advantages
