"""What can be wrong with a PPO run: each diagnosis with its judge, likely causes and the knob.

The judges' arithmetic is in `health_judges.py`, the thresholds in `chatllama/config/ppo.py`,
what follows from a diagnosis in `health.py`; docs/health.md is the table.
"""

from collections.abc import Callable
from dataclasses import dataclass

from chatllama.config.ppo import DiagnosisName, HealthSection
from trainers.ppo.health import checks as health_judges
from trainers.ppo.health.checks import Finding, History, Metrics

Judge = Callable[[History, HealthSection, Metrics], Finding | None]


@dataclass(frozen=True)
class Rule:
    """One way to fall ill."""

    name: DiagnosisName
    needs: tuple[str, ...]
    """Metrics without which a step is not judged."""
    judge: Judge
    causes: tuple[str, ...]
    """Likeliest first."""
    knob: str
    """Which keys to turn, and which way."""
    fatal: bool = False
    """Going on is pointless, whatever `action` says."""
    rollback_helps: bool = True
    """A lower learning rate from an earlier checkpoint may avoid it."""


RATE_DOWN = "ppo.learning_rate (lower)"
KL_UP = "ppo.kl_coef (higher)"

RULES: tuple[Rule, ...] = (
    Rule(
        "not_finite",
        (),
        health_judges.check_not_finite,
        (
            "an update that was too large",
            "overflow in a 16-bit backbone",
            "NaN in a reward, a weight or an adapter of an earlier stage",
        ),
        f"{RATE_DOWN}, ppo.max_grad_norm (lower), backbone.dtype (float32)",
        fatal=True,
    ),
    Rule(
        "initial_kl_not_zero",
        ("ppo/kl_abs_max",),
        health_judges.check_initial_kl,
        (
            "RUN/sft/adapter or the base is not what the policy started from",
            "the reference is the bare base",
            "dropout is on",
        ),
        "run_dir, backbone.path (those of the SFT stage)",
        fatal=True,
        rollback_helps=False,
    ),
    Rule(
        "first_ratio_not_one",
        ("ppo/first_log_ratio",),
        health_judges.check_first_ratio,
        (
            "dropout is on",
            "rollout and update score at different temperatures or in different batches",
            "kernels that are not deterministic",
        ),
        "backbone.attn_implementation (sdpa), backbone.dtype (float32)",
        fatal=True,
        rollback_helps=False,
    ),
    Rule(
        "ratio_explosion",
        ("ppo/ratio_max",),
        health_judges.check_ratio,
        ("learning rate too high", "too many updates on one batch", "minibatches too small"),
        f"{RATE_DOWN}, ppo.epochs (lower), ppo.minibatch_size (higher)",
    ),
    Rule(
        "ratio_explosion",
        ("ppo/approx_kl",),
        health_judges.check_approx_kl,
        ("learning rate too high", "too many updates on one batch", "minibatches too small"),
        f"{RATE_DOWN}, ppo.target_kl (set it), ppo.epochs (lower), ppo.minibatch_size (higher)",
    ),
    Rule(
        "grad_norm_explosion",
        ("ppo/grad_norm",),
        health_judges.check_grad_norm,
        ("learning rate too high", "an outlier among the scores", "returns that jumped"),
        f"{RATE_DOWN}, ppo.score_clip (set it), ppo.max_grad_norm (lower)",
    ),
    Rule(
        "kl_explosion",
        ("ppo/kl_token",),
        health_judges.check_kl,
        ("KL penalty too weak for the scores", "learning rate too high", "reward hacking"),
        f"{KL_UP}, {RATE_DOWN}, ppo.kl_controller (adaptive)",
    ),
    Rule(
        "sampling_mismatch",
        ("ppo/surprise_gap", "ppo/surprise_gap_se"),
        health_judges.check_sampling,
        (
            "sampling filters: tokens are drawn with top_p or top_k, log-probabilities without",
            "a temperature that sampling and scoring do not share",
            "banned tokens or a minimum length",
            "the sampler runs other weights than are scored",
        ),
        "generation.top_p (1), generation.top_k (0)",
        rollback_helps=False,
    ),
    Rule(
        "negative_kl",
        ("ppo/kl_sequence", "ppo/kl_sequence_se"),
        health_judges.check_negative_kl,
        (
            "the sampler runs older weights than are scored",
            "sampling filters: tokens are drawn with top_p or top_k, log-probabilities without",
            "a temperature that sampling and scoring do not share",
        ),
        "generation.top_p (1), generation.top_k (0)",
        rollback_helps=False,
    ),
    Rule(
        "clip_fraction_high",
        ("ppo/clip_fraction",),
        health_judges.check_clip_fraction,
        ("learning rate too high", "too many updates on one batch", "clip range too narrow"),
        f"{RATE_DOWN}, ppo.epochs (lower), ppo.clip_range (wider)",
    ),
    Rule(
        "dead_rewards",
        ("ppo/score_std",),
        health_judges.check_dead_rewards,
        (
            "the reward model has learnt nothing, or its head was not loaded",
            "scores clipped to one value",
            "the policy gives one answer only",
        ),
        "ppo.score_clip (wider or null); train the reward model again",
    ),
    Rule(
        "reward_hacking",
        ("ppo/eval_gold_mean", "ppo/eval_gold_se", "ppo/eval_score_mean"),
        health_judges.check_gold_falls,
        (
            "KL penalty too weak for this reward model",
            "a reward model too weak or trained on other text",
            "too many steps",
        ),
        f"{KL_UP}, ppo.steps (fewer), reward.data (fresh pairs of the policy's answers)",
    ),
    Rule(
        "reward_hacking",
        ("ppo/ensemble_disagreement", "ppo/score_mean"),
        health_judges.check_disagreement,
        (
            "KL penalty too weak for these reward models",
            "reward models trained on other text than the policy now writes",
        ),
        f"{KL_UP}, ppo.steps (fewer), reward.data (fresh pairs of the policy's answers)",
    ),
    Rule(
        "eos_rate_falling",
        ("ppo/eos_rate",),
        health_judges.check_eos,
        (
            "the reward pays for length",
            "cut responses are not punished",
            "generation.max_new_tokens is too small for what the policy learns to write",
        ),
        "ppo.missing_eos_penalty (higher), generation.max_new_tokens (higher), "
        "ppo.length_penalty (set it)",
    ),
    Rule(
        "length_drift",
        ("ppo/response_length",),
        health_judges.check_length,
        ("the reward model prefers long (or short) answers", "KL penalty too weak"),
        f"ppo.length_penalty (set it), {KL_UP}; look at the reward model's length correlation",
    ),
    Rule(
        "entropy_collapse",
        ("ppo/entropy",),
        health_judges.check_entropy,
        ("KL penalty too weak", "learning rate too high", "one pattern that always scores high"),
        f"{KL_UP}, {RATE_DOWN}",
    ),
    Rule(
        "critic_explained_variance_negative",
        ("ppo/explained_variance",),
        health_judges.check_critic,
        (
            "the critic learns too slowly or diverges",
            "value updates clipped too hard",
            "returns of a scale that the value head did not start from",
        ),
        "ppo.value_learning_rate, ppo.critic_warmup_steps (more), ppo.value_clip_range (wider), "
        "ppo.vf_coef (higher)",
    ),
)
