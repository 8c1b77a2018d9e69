"""The section `ppo.health`: when a PPO run counts as ill, and what is done about it.

The figures are computed by `trainers/health_rules.py`; docs/health.md lists them side by side.
"""

from typing import Annotated, Literal

from pydantic import Field

from chatllama.config_base import Fraction, NonNegative, NonNegativeFloat, PositiveFloat, Section

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
