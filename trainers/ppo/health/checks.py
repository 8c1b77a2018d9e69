"""Checks over the metrics of past PPO steps; each returns a finding or None, or raises TooFewSteps.

Pure functions of (history, thresholds, this step's metrics). Their names, causes and remedies are
in `rules.py`, the thresholds in `chatllama/config/ppo.py`.
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
"""Nats per token that different kernels in sampling and scoring may cause."""
KL_FLOOR = 0.02
"""Nats per response by which an estimate below 0 is rounding."""

ROUNDING = 1e-6
"""Share of the scores' size by which the members of an ensemble differ when they are the same."""

Metrics = Mapping[str, float]


class TooFewSteps(Exception):
    """A check needs more steps than there have been."""


@dataclass
class History:
    """The metrics that the checks look back at: of the first steps and of the last ones."""

    first: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> values of the first `baseline_steps` steps."""
    last: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> last values, the newest at the end."""
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the evaluation with the highest gold score before the last one."""
    steps: int = 0
    """Steps done, the checked one included."""

    def add(self, name: str, value: float, section: HealthSection) -> None:
        """Appends a finite value and drops those that no check needs any more."""
        first = self.first.setdefault(name, [])
        if len(first) < section.baseline_steps:
            first.append(value)
        kept = max(section.window, GRAD_NORM_STEPS + 2)
        self.last[name] = [*self.last.get(name, []), value][-kept:]

    def recent(self, name: str, count: int) -> list[float]:
        """The last `count` values; raises TooFewSteps while there are fewer."""
        values = self.last.get(name, [])
        if len(values) < count:
            raise TooFewSteps
        return values[-count:]

    def change(self, name: str, section: HealthSection) -> tuple[float, float]:
        """Mean over the first steps and over the last window, which must not overlap."""
        if self.steps < section.baseline_steps + section.window:
            raise TooFewSteps
        last = self.recent(name, section.window)
        return _mean(self.first[name]), _mean(last)


@dataclass(frozen=True)
class Finding:
    """What a check found wrong."""

    figure: float
    threshold: float
    meaning: str


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _error_of_mean(errors: list[float]) -> float:
    """Standard error of the mean of independent numbers with the given standard errors."""
    return math.sqrt(math.fsum(e * e for e in errors)) / len(errors)


def _above(figure: float, threshold: float, meaning: str) -> Finding | None:
    return Finding(figure, threshold, meaning) if figure > threshold else None


def _below(figure: float, threshold: float, meaning: str) -> Finding | None:
    return Finding(figure, threshold, meaning) if figure < threshold else None


def check_initial_kl(
    history: History, section: HealthSection, metrics: Metrics, mean: bool = False
) -> Finding | None:
    """Policy and reference are the same model before the first update: each token, or the mean."""
    figure = metrics["ppo/kl_abs_mean" if mean else "ppo/kl_abs_max"] if history.steps <= 1 else 0.0
    size = f"{figure:.3g} nats a token on average" if mean else f"up to {figure:.3g} nats a token"
    return _above(
        figure,
        section.max_initial_kl_mean if mean else section.max_initial_kl,
        f"Before step 1 policy and reference differ by {size}: the KL penalty pulls towards "
        "another model than the one PPO starts from.",
    )


def check_first_ratio(
    history: History, section: HealthSection, metrics: Metrics, mean: bool = False
) -> Finding | None:
    """Rollout and first minibatch score the same weights alike; on average, or everywhere."""
    figure = metrics["ppo/first_log_ratio_mean" if mean else "ppo/first_log_ratio"]
    size = f"{figure:.3g} nats on average" if mean else f"up to {figure:.3g} nats"
    return _above(
        figure,
        section.max_first_log_ratio_mean if mean else section.max_first_log_ratio,
        f"Before any update of this step the log-probability of a token differs by {size} from the "
        "rollout's: the probability ratios measure noise.",
    )


def check_ratio(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """No update multiplies a token's probability too much, two steps in a row."""
    last = history.recent("ppo/ratio_max", 2)
    return _above(
        min(last),
        section.max_ratio,
        f"In two steps running an update made a token {min(last):.3g} times as likely or more: "
        "the samples no longer describe the policy that learns from them.",
    )


def check_approx_kl(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Ratios stay near 1 on the whole."""
    figure = metrics["ppo/approx_kl"]
    factor = math.exp(min(math.sqrt(2 * figure), 700.0))  # beyond it exp overflows
    return _above(
        figure,
        section.max_approx_kl,
        f"An update made the sampled tokens {factor:.3g} times as likely or unlikely (root mean "
        "square): they no longer describe the policy that learns from them.",
    )


def check_grad_norm(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """The gradient norm stays near its median, two steps in a row."""
    values = history.last["ppo/grad_norm"]
    before, last = values[:-2][-GRAD_NORM_STEPS:], values[-2:]
    if len(before) < GRAD_NORM_LEAST:
        return None
    usual = median(before)
    return _above(
        min(last),
        section.max_grad_norm_factor * usual,
        f"The gradient norm was {last[0]:.3g} and {last[1]:.3g} in two steps running; its median "
        f"before was {usual:.3g}.",
    )


def check_kl(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """The policy stays near the reference, two steps in a row."""
    last = history.recent("ppo/kl_token", 2)
    return _above(
        min(last),
        section.max_kl_token,
        f"The policy is {min(last):.3g} nats a token away from the reference: far outside the "
        "text on which the reward model can be trusted.",
    )


def check_sampling(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Tokens come from the distributions that score them.

    For y drawn from p the mean of -log p(y) is p's entropy, and the deviations of successive tokens
    are uncorrelated, whatever was drawn before.
    """
    figure = _mean(history.last["ppo/surprise_gap"][-section.window :])
    error = _error_of_mean(history.last["ppo/surprise_gap_se"][-section.window :])
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
    """The KL is not negative; its k1 estimate may be, within its standard error."""
    kl = history.recent("ppo/kl_sequence", section.window)
    errors = history.recent("ppo/kl_sequence_se", section.window)
    figure, error = _mean(kl), _error_of_mean(errors)
    return _below(
        figure,
        -max(section.min_kl_errors * error, KL_FLOOR),
        f"The estimated KL per response is {figure:.3g} nats (standard error {error:.2g}), and no "
        "KL is below 0: responses do not come from the distribution that is scored.",
    )


def check_clipping(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Few tokens are outside the clip range."""
    last = history.recent("ppo/clip_fraction", section.window)
    return _above(
        _mean(last),
        section.max_clip_fraction,
        f"{_mean(last):.0%} of the tokens leave the clip range on the side that they are pushed to "
        "within a step, and then have no gradient: the updates are too large for the batch.",
    )


def check_raw_scores(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Raw scores differ between responses by more than a share of their size."""
    deviations = history.recent("ppo/rm_score_std", DEAD_STEPS)
    sizes = [max(1.0, abs(mean)) for mean in history.recent("ppo/rm_score_mean", DEAD_STEPS)]
    return _below(
        max(d / size for d, size in zip(deviations, sizes, strict=True)),
        section.min_score_std,
        f"The raw scores of {DEAD_STEPS} steps running differ by {max(deviations):.2g} (standard "
        f"deviation) around {metrics['ppo/rm_score_mean']:.3g}: what PPO follows is noise.",
    )


def check_groups(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Raw scores differ between the responses to one prompt, not between prompts alone."""
    deviations = history.recent("ppo/rm_score_group_std", DEAD_STEPS)
    sizes = [max(1.0, abs(mean)) for mean in history.recent("ppo/rm_score_mean", DEAD_STEPS)]
    return _below(
        max(d / size for d, size in zip(deviations, sizes, strict=True)),
        section.min_score_std,
        f"In {DEAD_STEPS} steps running the raw scores of the responses to a prompt differ by "
        f"{max(deviations):.2g} (mean standard deviation): the reward depends on the prompt alone, "
        "and no response is better than another.",
    )


def check_scores(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Shaped scores, with their clipping and penalties, differ between responses."""
    return _below(
        max(history.recent("ppo/score_std", DEAD_STEPS)),
        section.min_score_std,
        f"All responses of {DEAD_STEPS} steps running got the same score: there is nothing to "
        "learn but the KL penalty.",
    )


def check_gold_falls(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Gold does not fall, in two evaluations, while the reward model's score rises."""
    gold = history.recent("ppo/eval_gold_mean", 2)
    errors = history.recent("ppo/eval_gold_se", 2)
    if not history.best:
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


def check_ensemble(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """The reward models of an ensemble agree as much as at first, or the score does not rise."""
    spread = history.change("ppo/ensemble_disagreement", section)
    score = history.change("ppo/score_mean", section)
    size = max(1.0, abs(history.recent("ppo/rm_score_mean", 1)[0]))
    if spread[0] <= ROUNDING * size or score[1] <= score[0]:
        return None
    figure = spread[1] / spread[0]
    return _above(
        figure,
        section.max_disagreement_factor,
        f"The reward models disagree {figure:.3g} times as much as at first while the score rose "
        f"from {score[0]:.3g} to {score[1]:.3g}: the policy has left their training data.",
    )


def check_eos(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """About as many responses end with a stop token as at first."""
    change = history.change("ppo/eos_rate", section)
    return _below(
        change[1],
        change[0] - section.max_eos_drop,
        f"{change[1]:.0%} of the responses end by themselves, {change[0]:.0%} did at first.",
    )


def check_length(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Responses are about as long as at first."""
    change = history.change("ppo/response_length", section)
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
    """Responses vary."""
    change = history.change("ppo/entropy", section)
    if change[0] <= 0:
        return None
    return _below(
        change[1] / change[0],
        section.min_entropy_fraction,
        f"The entropy is {change[1]:.3g} nats a token, {change[0]:.3g} at first: responses hardly "
        "vary any more, and PPO has nothing left to choose from.",
    )


def check_critic(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """The critic beats a constant, or improves."""
    last = history.recent("ppo/explained_variance", CRITIC_STEPS)
    if history.steps < section.critic_patience + CRITIC_STEPS:
        return None
    figure, half = _mean(last), CRITIC_STEPS // 2
    if _mean(last[half:]) > _mean(last[:half]) + CRITIC_RISE:
        return None
    return _below(
        figure,
        section.min_explained_variance,
        f"The critic's explained variance is {figure:.3g} over {CRITIC_STEPS} steps: a constant "
        "would predict the rewards to come better, so it adds noise to the advantages.",
    )


def check_not_finite(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """No metric is NaN or infinite."""
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if not bad:
        return None
    listed = ", ".join(f"{name} is {value}" for name, value in bad.items())
    return Finding(
        next(iter(bad.values())), 0.0, f"{listed}. RUN/ppo/bad_batch-step-N.pt holds the batch."
    )
