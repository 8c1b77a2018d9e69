"""The rules of the health monitor: each check with its name, likely causes and remedy.

The checks are in `checks.py`, the thresholds in `chatllama/config/ppo.py`, what follows from a
diagnosis in `monitor.py`; docs/health.md is the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from chatllama.config.ppo import DiagnosisName, HealthSection
from trainers.ppo.health import checks
from trainers.ppo.health.history import Finding, History, Metrics


@dataclass(frozen=True)
class Rule:
    """One way in which a run fails."""

    name: DiagnosisName
    needs: tuple[str, ...]
    """Metrics without which a step is not checked."""
    check: Callable[[History, HealthSection, Metrics], Finding | None]
    causes: str
    """Likeliest first, separated by `; `."""
    knob: str
    """Config keys to change, and how."""
    fatal: bool = False
    """Training cannot go on, whatever `action` says."""
    rollback_helps: bool = True
    """A lower learning rate from an earlier checkpoint may avoid it."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the backbone for which the rule is; None: any."""
    only_reported: bool = False
    """No `action` follows."""


RATE_DOWN = "ppo.learning_rate (lower)"
KL_UP = "ppo.kl_coef (higher)"
FRESH_PAIRS = f"{KL_UP}, ppo.steps (fewer), reward.data (fresh pairs of the policy's answers)"
NO_FILTERS = "generation.top_p (1), generation.top_k (0)"
FILTERS = "sampling filters: tokens are drawn with top_p or top_k, log-probabilities without"
TEMPERATURES = "a temperature that sampling and scoring do not share"
LARGE_UPDATES = "learning rate too high; too many updates on one batch; minibatches too small"


def _sameness(
    dtype: Literal["float32", "bfloat16"], *, mean: bool = False, **follows: bool
) -> tuple[Rule, Rule]:
    """The rules that what is computed twice is the same, of any token or on average."""
    return (
        Rule(
            "initial_kl_not_zero",
            ("ppo/kl_abs_mean" if mean else "ppo/kl_abs_max",),
            partial(checks.check_initial_kl, mean=mean),
            "RUN/sft/adapter or the base is not what the policy started from; the reference is the "
            "bare base; dropout is on",
            "run_dir, backbone.path (those of the SFT stage)",
            rollback_helps=False,
            dtype=dtype,
            **follows,
        ),
        Rule(
            "first_ratio_not_one",
            ("ppo/first_log_ratio_mean" if mean else "ppo/first_log_ratio",),
            partial(checks.check_first_ratio, mean=mean),
            "dropout is on; rollout and update score at different temperatures or in different "
            "batches; kernels that are not deterministic",
            "backbone.attn_implementation (sdpa), backbone.dtype (float32)",
            rollback_helps=False,
            dtype=dtype,
            **follows,
        ),
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "not_finite",
        (),
        checks.check_not_finite,
        "an update that was too large; overflow in a 16-bit backbone; NaN in a reward, a weight "
        "or an adapter of an earlier stage",
        f"{RATE_DOWN}, ppo.max_grad_norm (lower), backbone.dtype (float32)",
        fatal=True,
    ),
    *_sameness("float32", fatal=True),
    *_sameness("bfloat16", mean=True, fatal=True),
    *_sameness("bfloat16", only_reported=True),
    Rule(
        "ratio_explosion",
        ("ppo/ratio_max",),
        checks.check_ratio,
        LARGE_UPDATES,
        f"{RATE_DOWN}, ppo.epochs (lower), ppo.minibatch_size (higher)",
    ),
    Rule(
        "ratio_explosion",
        ("ppo/approx_kl",),
        checks.check_approx_kl,
        LARGE_UPDATES,
        f"{RATE_DOWN}, ppo.target_kl (set it), ppo.epochs (lower), ppo.minibatch_size (higher)",
    ),
    Rule(
        "grad_norm_explosion",
        ("ppo/grad_norm",),
        checks.check_grad_norm,
        "learning rate too high; an outlier among the scores; returns that jumped",
        f"{RATE_DOWN}, ppo.score_clip (set it), ppo.max_grad_norm (lower)",
    ),
    Rule(
        "kl_explosion",
        ("ppo/kl_token",),
        checks.check_kl,
        "KL penalty too weak for the scores; learning rate too high; reward hacking",
        f"{KL_UP}, {RATE_DOWN}, ppo.kl_controller (adaptive)",
    ),
    Rule(
        "sampling_mismatch",
        ("ppo/surprise_gap", "ppo/surprise_gap_se"),
        checks.check_sampling,
        f"{FILTERS}; {TEMPERATURES}; banned tokens or a minimum length; the sampler uses other "
        "weights than the scorer",
        NO_FILTERS,
        rollback_helps=False,
    ),
    Rule(
        "negative_kl",
        ("ppo/kl_sequence", "ppo/kl_sequence_se"),
        checks.check_negative_kl,
        f"the sampler uses older weights than the scorer; {FILTERS}; {TEMPERATURES}",
        NO_FILTERS,
        rollback_helps=False,
    ),
    Rule(
        "clip_fraction_high",
        ("ppo/clip_fraction",),
        checks.check_clipping,
        "learning rate too high; too many updates on one batch; clip range too narrow",
        f"{RATE_DOWN}, ppo.epochs (lower), ppo.clip_range (wider)",
    ),
    Rule(
        "dead_rewards",
        ("ppo/rm_score_std", "ppo/rm_score_mean"),
        checks.check_raw_scores,
        "the reward model has learnt nothing, or its head was not loaded; the policy gives one "
        "answer only",
        "ppo.rewards; train the reward model again",
    ),
    Rule(
        "dead_rewards",
        ("ppo/rm_score_group_std", "ppo/rm_score_mean"),
        checks.check_groups,
        "the reward reads the prompt and not the answer; the policy gives one answer to a prompt",
        "ppo.rewards",
    ),
    Rule(
        "dead_rewards",
        ("ppo/score_std",),
        checks.check_scores,
        "scores clipped to one value; the policy gives one answer only",
        "ppo.score_clip (wider or null)",
    ),
    Rule(
        "scores_not_repeatable",
        ("ppo/rescore_gap",),
        checks.check_rescored,
        "scores that belong to other answers of the batch; a judge or function whose score is "
        "mostly chance; a score that depends on the batch (padding, dropout)",
        "ppo.rewards",
        rollback_helps=False,
    ),
    Rule(
        "score_falling",
        ("ppo/score_mean", "ppo/score_se", "ppo/score_std"),
        checks.check_score_falls,
        "learning rate too high; advantages or scores of the wrong sign or of other answers; a "
        "reward that changed during the run",
        f"{RATE_DOWN}, ppo.rewards (sign of each weight)",
    ),
    Rule(
        "reward_hacking",
        ("ppo/eval_gold_mean", "ppo/eval_gold_se", "ppo/eval_score_mean"),
        checks.check_gold_falls,
        "KL penalty too weak for this reward model; a reward model too weak or trained on other "
        "text; too many steps",
        FRESH_PAIRS,
    ),
    Rule(
        "reward_hacking",
        ("ppo/ensemble_disagreement", "ppo/score_mean", "ppo/rm_score_mean"),
        checks.check_ensemble,
        "KL penalty too weak for these reward models; reward models trained on other text than "
        "the policy now writes",
        FRESH_PAIRS,
    ),
    Rule(
        "eos_rate_falling",
        ("ppo/eos_rate",),
        checks.check_eos,
        "the reward pays for length; cut responses are not penalised; generation.max_new_tokens "
        "is too small for what the policy learns to write",
        "ppo.missing_eos_penalty (higher), generation.max_new_tokens (higher), "
        "ppo.length_penalty (set it)",
    ),
    Rule(
        "length_drift",
        ("ppo/response_length", "ppo/length_correlation"),
        checks.check_length,
        "the reward model prefers long (or short) answers; KL penalty too weak",
        f"ppo.length_penalty (set it), {KL_UP}; look at the reward model's length correlation",
    ),
    Rule(
        "entropy_collapse",
        ("ppo/entropy",),
        checks.check_entropy,
        "KL penalty too weak; learning rate too high; one pattern that always scores high",
        f"{KL_UP}, {RATE_DOWN}",
    ),
    Rule(
        "critic_explained_variance_negative",
        ("ppo/explained_variance",),
        checks.check_critic,
        "the critic learns too slowly or diverges; value updates clipped too hard; returns of a "
        "scale that the value head did not start from",
        "ppo.value_learning_rate, ppo.critic_warmup_steps (more), ppo.value_clip_range (wider), "
        "ppo.vf_coef (higher)",
    ),
    Rule(
        "critic_explained_variance_negative",
        ("ppo/explained_variance", "ppo/score_std"),
        checks.check_critic_lost,
        "the critic's learning rate is too high; scores that jumped",
        "ppo.value_learning_rate (lower), ppo.vf_coef (lower), ppo.score_clip (set it)",
    ),
)
