"""Checks over the metrics of past PPO steps; each returns a finding or None, or raises TooFewSteps.

Pure functions; names, causes and remedies are in `rules.py`, thresholds in `config/ppo.py`.
"""

import math
from statistics import fmean, median

from chatllama.config.ppo import HealthSection
from trainers.ppo.health.history import LONGEST, Finding, History, Metrics, error_of_mean

GRAD_NORM_STEPS, GRAD_NORM_LEAST = LONGEST - 2, 5
DEAD_STEPS = 3
CRITIC_STEPS, CRITIC_RISE = 10, 0.1
CRITIC_LOST = -2.0
"""Explained variance of the first scores' spread at which a critic that was useful diverges."""
SCORE_FLOOR = 0.1
"""Share of the scores' deviation by which their mean may fall."""
LENGTH_PAID, LEAST_PAID = 0.8, 0.2
"""Share of the first steps' correlation of score and length, and correlation, that still pay."""
SURPRISE_FLOOR = 0.01
"""Nats per token that different kernels in sampling and scoring may cause."""
KL_FLOOR = 0.02
"""Nats per response by which an estimate below 0 is rounding."""
ROUNDING = 1e-6
"""Share of the scores' size by which the members of an ensemble differ when they are the same."""


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
    usual = median(before) if len(before) >= GRAD_NORM_LEAST else 0.0
    if not usual:  # of steps whose answers all had the same score
        return None
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
    figure = fmean(history.last["ppo/surprise_gap"][-section.window :])
    error = error_of_mean(history.last["ppo/surprise_gap_se"][-section.window :])
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
    figure, error = fmean(kl), error_of_mean(errors)
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
        fmean(last),
        section.max_clip_fraction,
        f"{fmean(last):.0%} of the tokens leave the clip range on the side that they are pushed to "
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
    """The reward models of an ensemble agree as much as they did, or the score does not rise."""
    name, window = "ppo/ensemble_disagreement", section.window
    first, now = history.change(name, section)
    score = history.change("ppo/score_mean", section)
    last = history.last[name]  # it may first fall, while answers get more alike
    least = min(first, *(fmean(last[i : i + window]) for i in range(len(last) - window + 1)))
    size = max(1.0, abs(history.recent("ppo/rm_score_mean", 1)[0]))
    if least <= ROUNDING * size or score[1] <= score[0]:
        return None
    return _above(
        now / least,
        section.max_disagreement_factor,
        f"The reward models disagree {now / least:.3g} times as much as they did while the score "
        f"rose from {score[0]:.3g} to {score[1]:.3g}: the policy has left their training data.",
    )


def check_score_falls(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """The mean score is not below that of the first steps; at first of fewer steps than later."""
    count = min(section.baseline_steps, section.window, history.steps // 2)
    last, errors = history.recent("ppo/score_mean", count), history.recent("ppo/score_se", count)
    first, first_errors = (history.first[f"ppo/score_{name}"][:count] for name in ("mean", "se"))
    if not count:
        return None
    error = math.hypot(error_of_mean(errors), error_of_mean(first_errors))
    floor = SCORE_FLOOR * fmean(history.first["ppo/score_std"][:count])
    return _below(
        fmean(last) - fmean(first),
        -max(section.score_drop_errors * error, floor),
        f"The mean score fell from {fmean(first):.3g} in the first {count} steps to "
        f"{fmean(last):.3g} (standard error of the difference {error:.2g}): the updates make worse "
        "answers likelier.",
    )


def check_rescored(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """An answer gets the same score when it is scored again, in other company."""
    figure = fmean(history.last["ppo/rescore_gap"][-section.window :])
    return _above(
        figure,
        section.max_rescore_gap,
        f"Answers of the batch were scored again, and {figure:.0%} of the scores' variance was not "
        "found again: the scores are noise, or those of other answers.",
    )


def check_eos(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """About as many responses end with a stop token as at first."""
    before, now = history.change("ppo/eos_rate", section)
    return _below(
        now,
        before - section.max_eos_drop,
        f"{now:.0%} of the responses end by themselves, {before:.0%} did at first. The score of "
        "cut ones cannot be trusted: rewards are made for whole answers.",
    )


def check_length(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """Responses are about as long as at first, or no score is left in going on.

    Where good answers are of another length, its correlation with the score falls once they have
    it. A reward for length itself pays as before.
    """
    lengths = history.change("ppo/response_length", section)
    factor, limit = lengths[1] / lengths[0], section.max_length_factor
    sign = 1 if factor > 1 else -1
    before, paid = (sign * c for c in history.change("ppo/length_correlation", section))
    if 1 / limit <= factor <= limit or paid < max(LENGTH_PAID * before, LEAST_PAID):
        return None
    return Finding(
        factor,
        limit if factor > 1 else 1 / limit,
        f"Responses have {lengths[1]:.1f} tokens, {factor:.2g} times the {lengths[0]:.1f} of the "
        f"first steps, and the score pays for it (correlation {sign * paid:+.2f}, "
        f"{sign * before:+.2f} at first).",
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
    figure, half = fmean(last), CRITIC_STEPS // 2
    if fmean(last[half:]) > fmean(last[:half]) + CRITIC_RISE:
        return None
    return _below(
        figure,
        section.min_explained_variance,
        f"The critic's explained variance is {figure:.3g} over {CRITIC_STEPS} steps: a constant "
        "would predict the rewards to come better, so it adds noise to the advantages.",
    )


def check_critic_lost(history: History, section: HealthSection, metrics: Metrics) -> Finding | None:
    """A critic that was as good as a constant does not become far worse in a step.

    Its error is measured by the larger spread of scores, at first or now: either may be 0.
    """
    values = *history.first["ppo/explained_variance"], *history.last["ppo/explained_variance"]
    usual = max(fmean(history.first["ppo/score_std"]), metrics["ppo/score_std"])
    if not usual or max(values) < section.min_explained_variance:
        return None
    figure = 1 - (1 - metrics["ppo/explained_variance"]) * (metrics["ppo/score_std"] / usual) ** 2
    return _below(
        figure,
        CRITIC_LOST,
        f"The critic was as good as a constant, and now the square of its error is {1 - figure:.3g}"
        " times the variance of the scores: it diverges.",
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
