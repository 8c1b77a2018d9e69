"""Judgements over the metrics of past PPO steps: each says what is wrong, or nothing.

Pure functions of (history, thresholds, this step's metrics). Their names, causes and remedies are
in `health_rules.py`, the thresholds in `chatllama/config/ppo.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from chatllama.config.ppo import HealthSection

GRAD_NORM_STEPS, GRAD_NORM_LEAST = 20, 5
DEAD_STEPS = 3
CRITIC_STEPS, CRITIC_RISE = 10, 0.1
SURPRISE_FLOOR = 0.01
"""Nats per token that may come from sampling and scoring in different kernels."""
KL_FLOOR = 0.02
"""Nats per response by which an estimate below 0 is rounding."""


Metrics = Mapping[str, float]


@dataclass
class History:
    """The metrics that the rules look back at: of the first steps and of the last ones."""

    first: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> values of the first `baseline_steps` steps."""
    last: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> newest values, the newest at the end."""
    best: dict[str, float] = field(default_factory=dict)
    """The evaluation before the last one with the highest gold score: its metrics."""
    steps: int = 0
    """Steps done, the one that is judged included."""

    def add(self, name: str, value: float, section: HealthSection) -> None:
        """Appends a finite value, forgetting what no rule can ask for any more."""
        first = self.first.setdefault(name, [])
        if len(first) < section.baseline_steps:
            first.append(value)
        kept = max(section.window, GRAD_NORM_STEPS + 2)
        self.last[name] = [*self.last.get(name, []), value][-kept:]

    def recent(self, name: str, count: int) -> list[float] | None:
        """The last `count` values, or None while there are fewer."""
        values = self.last.get(name, [])
        return values[-count:] if len(values) >= count else None

    def change(self, name: str, section: HealthSection) -> tuple[float, float] | None:
        """Mean over the first steps and over the last window; None while they could overlap."""
        first, last = self.first.get(name, []), self.recent(name, section.window)
        if self.steps < section.baseline_steps + section.window or last is None:
            return None
        return _mean(first), _mean(last)


@dataclass(frozen=True)
class Finding:
    """A rule's judgement that something is wrong."""

    figure: float
    threshold: float
    meaning: str


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def check_initial_kl(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Before the first update policy and reference are the same model."""
    figure = metrics["ppo/kl_abs_max"]
    if history.steps > 1 or figure <= section.max_initial_kl:
        return None
    return Finding(
        figure,
        section.max_initial_kl,
        f"Before step 1 policy and reference differ by up to {figure:.3g} nats a token: the KL "
        "penalty pulls towards another model than the one PPO starts from.",
    )


def check_first_ratio(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """More than noise between rollout and first minibatch, which score the same weights."""
    figure = metrics["ppo/first_log_ratio"]
    if figure <= section.max_first_log_ratio:
        return None
    return Finding(
        figure,
        section.max_first_log_ratio,
        "Before any update of this step the log-probability of a token differs by up to "
        f"{figure:.3g} nats from the rollout's: the probability ratios measure noise.",
    )


def check_ratio(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """A token whose probability an update multiplied, two steps in a row."""
    last = history.recent("ppo/ratio_max", 2)
    if last is None or min(last) <= section.max_ratio:
        return None
    return Finding(
        min(last),
        section.max_ratio,
        f"In two steps running an update made a token {min(last):.3g} times as likely or more: "
        "the samples no longer describe the policy that learns from them.",
    )


def check_approx_kl(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Ratios that are far from 1 on the whole."""
    figure = metrics["ppo/approx_kl"]
    if figure <= section.max_approx_kl:
        return None
    return Finding(
        figure,
        section.max_approx_kl,
        f"An update made the sampled tokens {math.exp(math.sqrt(2 * figure)):.3g} times as likely "
        "or unlikely (root mean square): they no longer describe the policy that learns from them.",
    )


def check_grad_norm(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """A gradient norm far above what was usual, two steps in a row."""
    values = history.last["ppo/grad_norm"]
    before, last = values[:-2][-GRAD_NORM_STEPS:], values[-2:]
    if len(before) < GRAD_NORM_LEAST:
        return None
    usual = median(before)
    if min(last) <= section.max_grad_norm_factor * usual:
        return None
    return Finding(
        min(last),
        section.max_grad_norm_factor * usual,
        f"The gradient norm was {last[0]:.3g} and {last[1]:.3g} in two steps running; its median "
        f"before was {usual:.3g}.",
    )


def check_kl(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """A policy far from the reference, two steps in a row."""
    last = history.recent("ppo/kl_token", 2)
    if last is None or min(last) <= section.max_kl_token:
        return None
    return Finding(
        min(last),
        section.max_kl_token,
        f"The policy is {min(last):.3g} nats a token away from the reference: far outside the "
        "text on which the reward model can be trusted.",
    )


def check_sampling(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Tokens that do not come from the distributions that score them.

    For y drawn from p the mean of -log p(y) is p's entropy, and the deviations of successive tokens
    are uncorrelated, whatever was drawn before.
    """
    gaps = history.last["ppo/surprise_gap"][-section.window :]
    errors = history.last["ppo/surprise_gap_se"][-section.window :]
    figure = _mean(gaps)
    error = math.sqrt(math.fsum(e * e for e in errors)) / len(errors)
    threshold = math.copysign(max(section.max_surprise_errors * error, SURPRISE_FLOOR), figure)
    if abs(figure) <= abs(threshold):
        return None
    kind = "likelier" if figure < 0 else "unlikelier"
    return Finding(
        figure,
        threshold,
        f"The sampled tokens are {abs(figure):.3g} nats {kind} than tokens drawn from the scored "
        f"distributions would be (standard error {error:.2g}): ratios and KL are those of another "
        "policy.",
    )


def check_negative_kl(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """A KL is never negative; its k1 estimate may be, within its standard error."""
    kl = history.recent("ppo/kl_sequence", section.window)
    errors = history.recent("ppo/kl_sequence_se", section.window)
    if kl is None or errors is None:
        return None
    figure = _mean(kl)
    error = math.sqrt(math.fsum(e * e for e in errors)) / len(errors)
    threshold = -max(section.min_kl_errors * error, KL_FLOOR)
    if figure >= threshold:
        return None
    return Finding(
        figure,
        threshold,
        f"The estimated KL per response is {figure:.3g} nats (standard error {error:.2g}), and no "
        "KL is below 0: responses do not come from the distribution that is scored.",
    )


def check_clip_fraction(
    history: History, section: HealthSection, metrics: Metrics
) -> Finding | None:
    """Many tokens outside the clip range."""
    last = history.recent("ppo/clip_fraction", section.window)
    if last is None or _mean(last) <= section.max_clip_fraction:
        return None
    return Finding(
        _mean(last),
        section.max_clip_fraction,
        f"{_mean(last):.0%} of the tokens leave the clip range within a step and then teach "
        "nothing: the updates are too large for the batch.",
    )


def check_dead_rewards(
    history: History, section: HealthSection, metrics: Metrics
) -> Finding | None:
    """Scores that do not tell responses apart."""
    last = history.recent("ppo/score_std", DEAD_STEPS)
    if last is None or max(last) > section.min_score_std:
        return None
    return Finding(
        max(last),
        section.min_score_std,
        f"All responses of {DEAD_STEPS} steps running got the same score: there is nothing to "
        "learn but the KL penalty.",
    )


def check_gold_falls(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Gold below its best in two evaluations while the reward model sees no harm."""
    gold = history.recent("ppo/eval_gold_mean", 2)
    errors = history.recent("ppo/eval_gold_se", 2)
    if gold is None or errors is None or not history.best:
        return None
    best, best_error = history.best["ppo/eval_gold_mean"], history.best["ppo/eval_gold_se"]
    thresholds = [
        best - section.gold_drop_errors * math.sqrt(error**2 + best_error**2) for error in errors
    ]
    fell = all(value < threshold for value, threshold in zip(gold, thresholds, strict=True))
    score, best_score = metrics["ppo/eval_score_mean"], history.best["ppo/eval_score_mean"]
    if not fell or score < best_score:
        return None
    return Finding(
        gold[-1],
        thresholds[-1],
        f"Held-out gold fell from {best:.3g} to {gold[-1]:.3g} while the reward model's score "
        f"went from {best_score:.3g} to {score:.3g}: the policy exploits the reward model.",
    )


def check_disagreement(
    history: History, section: HealthSection, metrics: Metrics
) -> Finding | None:
    """An ensemble that no longer agrees on what it pays for."""
    spread = history.change("ppo/ensemble_disagreement", section)
    score = history.change("ppo/score_mean", section)
    if spread is None or score is None or spread[0] <= 0 or score[1] <= score[0]:
        return None
    figure = spread[1] / spread[0]
    if figure <= section.max_disagreement_factor:
        return None
    return Finding(
        figure,
        section.max_disagreement_factor,
        f"The reward models disagree {figure:.3g} times as much as at first while the score rose "
        f"from {score[0]:.3g} to {score[1]:.3g}: the policy has left the text that they know.",
    )


def check_eos(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Fewer responses that end by themselves than at first."""
    change = history.change("ppo/eos_rate", section)
    if change is None or change[1] >= change[0] - section.max_eos_drop:
        return None
    return Finding(
        change[1],
        change[0] - section.max_eos_drop,
        f"{change[1]:.0%} of the responses end by themselves, {change[0]:.0%} did at first.",
    )


def check_length(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Responses much longer or shorter than at first."""
    change = history.change("ppo/response_length", section)
    if change is None:
        return None
    factor, limit = change[1] / change[0], section.max_length_factor
    if 1 / limit <= factor <= limit:
        return None
    return Finding(
        factor,
        limit if factor > 1 else 1 / limit,
        f"Responses have {change[1]:.1f} tokens, {factor:.2g} times the {change[0]:.1f} of the "
        "first steps.",
    )


def check_entropy(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Responses that hardly vary."""
    change = history.change("ppo/entropy", section)
    if change is None or change[0] <= 0:
        return None
    figure = change[1] / change[0]
    if figure >= section.min_entropy_fraction:
        return None
    return Finding(
        figure,
        section.min_entropy_fraction,
        f"The entropy is {change[1]:.3g} nats a token, {change[0]:.3g} at first: responses hardly "
        "vary any more, and PPO has nothing left to choose from.",
    )


def check_critic(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """A critic worse than a constant that is not getting better."""
    last = history.recent("ppo/explained_variance", CRITIC_STEPS)
    if last is None or history.steps < section.critic_patience + CRITIC_STEPS:
        return None
    figure, half = _mean(last), CRITIC_STEPS // 2
    rises = _mean(last[half:]) > _mean(last[:half]) + CRITIC_RISE
    if figure >= section.min_explained_variance or rises:
        return None
    return Finding(
        figure,
        section.min_explained_variance,
        f"The critic's explained variance is {figure:.3g} over {CRITIC_STEPS} steps: a constant "
        "would predict the returns better, so it adds noise to the advantages.",
    )


def check_not_finite(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """NaN or infinity in any metric."""
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if not bad:
        return None
    listed = ", ".join(f"{name} is {value}" for name, value in bad.items())
    return Finding(
        next(iter(bad.values())), 0.0, f"{listed}. RUN/ppo/bad_batch-step-N.pt holds the batch."
    )
