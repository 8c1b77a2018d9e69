import json
import math
import random
import re
from collections.abc import Callable
from typing import Literal, get_args

import pytest

from chatllama.config.ppo import DiagnosisName, HealthSection
from trainers.ppo.health.monitor import Diagnosis, HealthMonitor, decide
from trainers.ppo.health.rules import RULES

STEPS = 60
EVAL_EVERY = 10
Metrics = dict[str, float]
Fault = Callable[[int, Metrics], None]


def healthy(step: int, seed: int = 0) -> Metrics:
    """Figures like those of a PPO run that goes well, with noise as of 128 responses."""
    rng = random.Random(1000 * seed + step)
    done = 1 - math.exp(-(step - 1) / 20)  # 0 at the first step, 0.95 at step 60
    kl = 3.75 * done
    metrics = {
        "ppo/score_mean": 1.7 * done + rng.gauss(0, 0.08),
        "ppo/score_std": 1.0 - 0.4 * done,
        "ppo/score_se": 0.08,
        "ppo/length_correlation": 0.5 - 0.2 * done + rng.gauss(0, 0.05),
        "ppo/kl_abs_mean": 0.0 if step == 1 else 0.1 + 0.2 * done,
        "ppo/rm_score_std": 2.5 - done,
        "ppo/rm_score_mean": 30.0 + 4 * done,
        "ppo/kl_abs_max": 0.0 if step == 1 else 0.5 + 4 * done,
        "ppo/kl_sequence": kl + rng.gauss(0, 0.01 + 0.2 * done) if step > 1 else 0.0,
        "ppo/kl_sequence_se": 0.01 + 0.2 * done if step > 1 else 0.0,
        "ppo/surprise_gap": rng.gauss(0, 0.02),
        "ppo/surprise_gap_se": 0.02,
        "ppo/kl_token": kl / 25,
        "ppo/response_length": 24 * (1 + 0.3 * done) + rng.gauss(0, 0.7),
        "ppo/eos_rate": 0.9 + 0.1 * done - 0.03 * rng.random(),
        "ppo/explained_variance": 0.6 - 0.8 * math.exp(-(step - 1) / 4) + rng.gauss(0, 0.05),
        "ppo/policy_loss": rng.gauss(-0.02, 0.01),
        "ppo/clip_fraction": 0.12 + 0.05 * rng.random(),
        "ppo/approx_kl": 0.02,
        "ppo/entropy": 1.6 - 0.9 * done + rng.gauss(0, 0.03),
        "ppo/ratio_max": 2.0 + 6 * rng.random(),
        "ppo/first_log_ratio": 0.0,
        "ppo/first_log_ratio_mean": 0.0,
        "ppo/grad_norm": 2.0 * math.exp(rng.gauss(0, 0.4)) - 0.5 * done,
        "ppo/ensemble_disagreement": 0.30 + 0.1 * done + rng.gauss(0, 0.02),
    }
    if step % 10 == 1:
        metrics["ppo/rescore_gap"] = 0.02 * rng.random()
    if step % EVAL_EVERY == 0:
        metrics |= {
            "ppo/eval_score_mean": 1.7 * done + rng.gauss(0, 0.04),
            "ppo/eval_gold_mean": 0.7 + 2.7 * done + rng.gauss(0, 0.06),
            "ppo/eval_gold_se": 0.06,
        }
    return metrics


def watch(
    fault: Fault | None = None,
    section: HealthSection | None = None,
    steps: int = STEPS,
    seed: int = 0,
) -> list[Diagnosis]:
    """All diagnoses of a run whose metrics `fault` changes in place."""
    monitor, found = HealthMonitor(section or HealthSection()), []
    for step in range(1, steps + 1):
        metrics = healthy(step, seed)
        if fault is not None:
            fault(step, metrics)
        found += monitor.observe(step, metrics)
    return found


def setting(name: str, value: Callable[[int], float], since: int = 1) -> Fault:
    """A fault that replaces one metric from a step on."""

    def fault(step: int, metrics: Metrics) -> None:
        if step >= since and (name in metrics or not re.search("eval|rescore", name)):
            metrics[name] = value(step)

    return fault


def length(value: float, correlation: float) -> Fault:
    """From step 30 on answers of another length, and what length is worth then."""

    def fault(step: int, metrics: Metrics) -> None:
        if step >= 30:
            changed = {"ppo/response_length": value, "ppo/length_correlation": correlation}
            metrics |= changed

    return fault


def gold_falls(step: int, metrics: Metrics) -> None:
    if step >= 40 and "ppo/eval_gold_mean" in metrics:
        metrics["ppo/eval_gold_mean"] = 2.5 - 0.03 * (step - 40)


# name -> a fault, the first step at which it must be told, and a tame fault that must not be.
FAULTS: dict[str, tuple[Fault, int, Fault]] = {
    "not_finite": (
        setting("ppo/policy_loss", lambda _: math.nan, 7),
        7,
        setting("ppo/policy_loss", lambda _: -1e6, 7),
    ),
    "initial_kl_not_zero": (
        setting("ppo/kl_abs_max", lambda _: 0.02),
        1,
        setting("ppo/kl_abs_max", lambda _: 5e-4),
    ),
    "first_ratio_not_one": (
        setting("ppo/first_log_ratio", lambda _: 0.6, 3),
        3,
        setting("ppo/first_log_ratio", lambda _: 9e-4, 3),
    ),
    # One outlier (every other step) is no explosion.
    "ratio_explosion": (
        setting("ppo/ratio_max", lambda _: 400.0, 5),
        6,
        setting("ppo/ratio_max", lambda s: 400.0 if s % 2 else 3.0, 5),
    ),
    "grad_norm_explosion": (
        setting("ppo/grad_norm", lambda _: 60.0, 30),
        31,
        setting("ppo/grad_norm", lambda s: 60.0 if s == 30 else 4.0, 30),
    ),
    "kl_explosion": (
        setting("ppo/kl_token", lambda s: 0.1 * (s - 10), 10),
        22,  # 1.1 at step 21, 1.2 at step 22
        setting("ppo/kl_token", lambda s: 0.9, 10),
    ),
    # 4 errors of 0.02 are 0.08 for one step.
    "sampling_mismatch": (
        setting("ppo/surprise_gap", lambda _: -0.09),
        1,
        setting("ppo/surprise_gap", lambda _: -0.035),  # 4 * 0.02 / sqrt(5) = 0.036
    ),
    # -0.5 with a standard error of about 0.2 / sqrt(5) = 0.09 for the mean of 5 steps.
    "negative_kl": (
        setting("ppo/kl_sequence", lambda _: -0.5, 30),
        34,
        setting("ppo/kl_sequence", lambda _: -0.2, 30),
    ),
    # Mean of steps 6..10: 3 times about 0.15, twice 0.4, which is 0.25.
    "clip_fraction_high": (
        setting("ppo/clip_fraction", lambda _: 0.4, 9),
        10,
        setting("ppo/clip_fraction", lambda _: 0.19, 9),
    ),
    "dead_rewards": (
        setting("ppo/score_std", lambda _: 0.0, 12),
        14,
        setting("ppo/score_std", lambda s: 0.0 if s % 3 else 0.5, 12),
    ),
    # Of the checks at steps 1, 11, 21: means 0.45, then 0.6.
    "scores_not_repeatable": (
        setting("ppo/rescore_gap", lambda _: 0.9, 11),
        21,
        setting("ppo/rescore_gap", lambda _: 0.49),
    ),
    # About 0.16 at first; three errors of the difference are 3 * 0.08 * sqrt(2 / 5) = 0.152.
    "score_falling": (
        setting("ppo/score_mean", lambda _: -0.8, 30),
        32,  # (1.26 + 1.28 - 3 * 0.8) / 5 = 0.03; a step before 0.45
        setting("ppo/score_mean", lambda _: 0.05, 30),
    ),
    # Best at step 30: about 2.8; then 2.5, 2.2: two below 2.8 - 3 * 0.085.
    "reward_hacking": (gold_falls, 50, setting("ppo/eval_gold_mean", lambda _: 2.6, 40)),
    "eos_rate_falling": (
        setting("ppo/eos_rate", lambda s: 0.9 - 0.04 * (s - 20), 20),
        27,  # means of 5 steps, 0.9 at first: 0.71 at step 26, 0.70 at 27 (baseline .885..)
        setting("ppo/eos_rate", lambda _: 0.75, 20),
    ),
    "length_drift": (
        length(60.0, 0.5),
        33,
        length(60.0, 0.3),  # good answers are longer, and by now long enough
    ),
    "entropy_collapse": (
        setting("ppo/entropy", lambda _: 0.05, 30),
        33,  # (4 * 0.05 + about 0.9) / 5 is 0.22, of about 1.5 at first
        setting("ppo/entropy", lambda _: 0.4, 30),
    ),
    "critic_explained_variance_negative": (
        setting("ppo/explained_variance", lambda _: -0.3),
        20,
        setting("ppo/explained_variance", lambda s: -4 + 0.15 * s),  # poor, but it learns
    ),
}


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_diagnosis(seed: int) -> None:
    assert watch(steps=200, seed=seed) == []


def test_every_diagnosis_has_its_fault() -> None:
    assert {rule.name for rule in RULES} == set(FAULTS) == set(get_args(DiagnosisName))


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_its_own_diagnosis_and_no_other(name: str) -> None:
    fault, expected_step, _ = FAULTS[name]
    found = watch(fault)
    assert {diagnosis.name for diagnosis in found} == {name}
    assert abs(found[0].step - expected_step) <= (1 if name == "eos_rate_falling" else 0)
    if name != "not_finite":
        assert math.isfinite(found[0].figure) and found[0].figure != found[0].threshold


@pytest.mark.parametrize("name", FAULTS)
def test_a_tame_fault_has_none(name: str) -> None:
    assert watch(FAULTS[name][2]) == []


@pytest.mark.parametrize("name", FAULTS)
def test_ignored_diagnoses_are_not_made(name: DiagnosisName) -> None:
    assert watch(FAULTS[name][0], HealthSection(ignore=[name])) == []


@pytest.mark.parametrize(
    ("deviation", "mean", "dead"),
    [
        (1e-6, 0.2, True),  # normalised by itself it would be a spread of 1
        (0.0, 1.0, True),  # a constant, whose missing-EOS penalty varies
        (0.03, 500.0, True),
        (0.03, -500.0, True),
        (0.06, 500.0, False),
        (2e-4, 0.2, False),
    ],
)
def test_raw_scores_that_hardly_differ_are_dead_whatever_the_shaped_ones_say(
    deviation: float, mean: float, dead: bool
) -> None:
    def fault(step: int, metrics: Metrics) -> None:
        if step >= 12:
            metrics |= {"ppo/rm_score_std": deviation, "ppo/rm_score_mean": mean}

    found = [(each.name, each.step) for each in watch(fault, steps=20)]
    assert found == ([("dead_rewards", 14)] if dead else [])
    once = setting("ppo/rm_score_std", lambda s: deviation if s % 3 else 0.5, 12)
    assert watch(once, steps=20) == []


@pytest.mark.parametrize(
    ("deviation", "mean", "dead"),
    [(0.0, 1.0, True), (1e-6, 0.2, True), (0.03, -500.0, True), (2e-4, 0.2, False)],
)
def test_scores_that_differ_between_prompts_alone_are_dead(
    deviation: float, mean: float, dead: bool
) -> None:
    def fault(step: int, metrics: Metrics) -> None:
        metrics["ppo/rm_score_group_std"] = deviation if step >= 12 else 0.5
        metrics["ppo/rm_score_mean"] = mean

    found = watch(fault, steps=20)
    assert [(each.name, each.step) for each in found] == ([("dead_rewards", 14)] if dead else [])
    assert all("depends on the prompt alone" in each.message for each in found)
    once = setting("ppo/rm_score_group_std", lambda s: deviation if s % 3 else 0.5, 12)
    assert watch(once, steps=20) == []


def test_an_update_without_any_bounds_is_told_and_not_an_overflow() -> None:
    (found, *_) = watch(setting("ppo/approx_kl", lambda _: 1e7, 3), steps=4)
    assert found.name == "ratio_explosion" and found.figure == 1e7


def test_ratios_far_from_one_on_the_whole_explode_at_once() -> None:
    """Half the square of log 2 is 0.24: every ratio is 2 or 1/2."""
    (found, *_) = watch(setting("ppo/approx_kl", lambda _: 0.5 * math.log(2) ** 2, 3))
    assert (found.name, found.step, found.threshold) == ("ratio_explosion", 3, 0.2)
    assert "2 times as likely" in found.message
    assert watch(setting("ppo/approx_kl", lambda _: 0.19, 3)) == []


def test_a_small_sampling_mismatch_shows_in_the_mean_of_five_steps() -> None:
    """4 errors of 0.02 over the root of n steps: 0.04 for n = 4, 0.036 for n = 5."""
    (found, *_) = watch(setting("ppo/surprise_gap", lambda _: -0.038), steps=5)
    assert (found.name, found.step) == ("sampling_mismatch", 5)
    assert found.threshold == pytest.approx(-4 * 0.02 / math.sqrt(5))


@pytest.mark.parametrize(
    ("norms", "step"),
    [
        ([1.0, 1.0, 1.0, 50.0, 50.0, 60.0, 60.0], 7),  # the median of the five before is 1
        ([1.0, 1.0, 1.0, 60.0, 60.0], None),  # three before are too few
        ([1.0] * 5 + [60.0, 9.0, 60.0, 9.0], None),
        ([1.0] * 30 + [11.0, 11.0], 32),
        ([0.0] * 9 + [0.1, 0.1], None),  # no answer had a score of its own yet
    ],
)
def test_the_usual_gradient_norm_is_that_before(norms: list[float], step: int | None) -> None:
    monitor, found = HealthMonitor(HealthSection()), []
    for number, norm in enumerate(norms, start=1):
        found += monitor.observe(number, {"ppo/grad_norm": norm})
    assert [(each.name, each.step) for each in found] == (
        [("grad_norm_explosion", step)] if step else []
    )


@pytest.mark.parametrize(
    ("slope", "told"), [(0.0, True), (0.01, True), (0.019, True), (0.021, False)]
)
def test_a_poor_critic_is_excused_where_it_clearly_improves(slope: float, told: bool) -> None:
    """The means of the two halves of ten steps are five slopes apart; 0.1 excuses."""
    fault = setting("ppo/explained_variance", lambda s: -1.0 + slope * s)
    found = {each.name for each in watch(fault, steps=20)}
    assert found == ({"critic_explained_variance_negative"} if told else set())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("gap", "told"), [(0.009, False), (0.0101, True)])
def test_kernels_may_differ_by_a_hundredth_of_a_nat(sign: int, gap: float, told: bool) -> None:
    """With so many tokens four standard errors are far less."""

    def fault(step: int, metrics: Metrics) -> None:
        metrics |= {"ppo/surprise_gap": sign * gap, "ppo/surprise_gap_se": 1e-6}

    found = watch(fault, steps=3)
    assert [each.name for each in found] == (["sampling_mismatch"] if told else [])
    assert not told or found[0].threshold == sign * 0.01


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kl", "told"), [(-0.019, False), (-0.021, True)])
def test_rounding_may_leave_a_kl_below_zero(seed: int, kl: float, told: bool) -> None:
    """With so many responses four standard errors are far less."""

    def fault(step: int, metrics: Metrics) -> None:
        metrics |= {"ppo/kl_sequence": kl, "ppo/kl_sequence_se": 1e-6}

    found = watch(fault, steps=6, seed=seed)
    assert [each.name for each in found] == (["negative_kl"] if told else [])
    assert not told or found[0].threshold == -0.02


@pytest.mark.parametrize(("baseline", "window"), [(5, 5), (3, 5), (8, 2), (1, 1)])
def test_a_change_is_measured_once_both_windows_stand_apart(baseline: int, window: int) -> None:
    """A tenth from the first step after the baseline on: told when the window holds no other."""
    section = HealthSection(baseline_steps=baseline, window=window, min_entropy_fraction=0.7)
    monitor, found = HealthMonitor(section), []
    for step in range(1, 20):
        entropy = 2.0 if step <= baseline else 0.2
        found += monitor.observe(step, {"ppo/entropy": entropy})
    assert (found[0].step, found[0].figure) == (baseline + window, pytest.approx(0.1))


def test_unlikely_tokens_are_a_sampling_mismatch_too() -> None:
    (found, *_) = watch(setting("ppo/surprise_gap", lambda _: 0.3, 20))
    assert found.name == "sampling_mismatch" and found.threshold > 0
    assert "unlikelier" in found.message


def with_first_correlation(value: float, fault: Fault) -> Fault:
    """The fault after steps in which score and length had this correlation."""

    def both(step: int, metrics: Metrics) -> None:
        metrics["ppo/length_correlation"] = value
        fault(step, metrics)

    return both


@pytest.mark.parametrize(
    ("tokens", "before", "paid", "told"),
    [
        (60.0, 0.5, 0.41, True),
        (60.0, 0.5, 0.36, False),  # less than 0.8 of it, in a window of 5
        (60.0, -0.5, -0.5, False),  # the score pays for short answers
        (60.0, -0.5, 0.21, True),
        (60.0, 0.0, 0.19, False),
        (44.0, 0.5, 0.5, False),
        (8.0, -0.5, -0.41, True),
        (8.0, -0.5, -0.36, False),
        (8.0, 0.5, 0.5, False),
    ],
)
def test_a_length_for_which_the_score_pays_no_more_is_no_drift(
    tokens: float, before: float, paid: float, told: bool
) -> None:
    found = watch(with_first_correlation(before, length(tokens, paid)), steps=34)
    assert [each.name for each in found] == (["length_drift"] if told else [])


@pytest.mark.parametrize("deviation", [0.01, 1.0, 40.0])
def test_a_fall_of_the_score_is_told_from_the_second_step_on(deviation: float) -> None:
    """Of 7 errors (0.1 over 0.01 sqrt(2)), where it is over a tenth of the deviation."""
    monitor, found = HealthMonitor(HealthSection()), []
    for step, score in enumerate([1.0, 0.9, 0.9, 0.9], start=1):
        metrics = {"score_mean": score, "score_se": 0.01, "score_std": deviation}
        found += monitor.observe(step, {f"ppo/{name}": v for name, v in metrics.items()})
    assert [(each.name, each.step) for each in found] == (
        [("score_falling", 2)] if deviation < 1 else []
    )
    assert not found or found[0].threshold == pytest.approx(-3 * 0.01 * math.sqrt(2))


@pytest.mark.parametrize(
    ("before", "now", "spread", "told"),
    [
        (0.0, -2.1, 4.0, True),
        (0.0, -1.9, 4.0, False),
        (0.0, -30.0, 1.0, False),  # 31 / 16 of the first variance
        (0.0, -1.1, 5.0, False),  # more spread than at first: 2.1 of that of now
        (0.0, -2.1, 5.0, True),
        (-0.04, -5.0, 4.0, True),
        (-0.06, -5.0, 4.0, False),
    ],
)
def test_a_critic_that_was_useful_and_is_lost_is_told_at_once(
    before: float, now: float, spread: float, told: bool
) -> None:
    monitor, found = HealthMonitor(HealthSection(baseline_steps=3)), []
    for step, value in enumerate([-9.0, before, -1.0, now], start=1):
        metrics = {"explained_variance": value, "score_std": spread if step == 4 else 4.0}
        found += monitor.observe(step, {f"ppo/{name}": v for name, v in metrics.items()})
    expected = [("critic_explained_variance_negative", 4)] if told else []
    assert [(each.name, each.step) for each in found] == expected


@pytest.mark.parametrize("zero", [1, 8, 40])
def test_metrics_that_are_zero_at_first_are_nothing_to_compare_with(zero: int) -> None:
    """A rare reward: every answer of the first steps has the same score, so nothing is learnt."""

    def rare(step: int, metrics: Metrics) -> None:
        if step <= zero:
            metrics |= dict.fromkeys(metrics.keys() - {"ppo/response_length"}, 0.0)

    assert {each.name for each in watch(rare)} <= {"dead_rewards"}


def test_short_answers_are_a_length_drift_too() -> None:
    (found, *_) = watch(with_first_correlation(-0.4, length(8.0, -0.4)))
    assert found.name == "length_drift" and found.threshold == 0.5 > found.figure
    assert "pays for it (correlation -0.40, -0.40 at first)" in found.message


def test_an_ensemble_that_disagrees_while_the_score_rises() -> None:
    disagrees = setting("ppo/ensemble_disagreement", lambda _: 0.9, 30)
    (found, *_) = watch(disagrees)
    assert (found.name, found.step, found.threshold) == ("reward_hacking", 32, 2.0)
    assert "reward models disagree" in found.message

    def and_score_falls(step: int, metrics: Metrics) -> None:
        disagrees(step, metrics)
        metrics["ppo/score_mean"] = -0.002 * step

    assert watch(and_score_falls) == []


@pytest.mark.parametrize(("later", "told"), [(0.29, False), (0.33, True)])
def test_an_ensemble_that_agreed_better_before_it_disagrees(later: float, told: bool) -> None:
    """0.3 at first, 0.15 in ten steps between: the lowest mean of five counts."""

    def fault(step: int, metrics: Metrics) -> None:
        middle = 0.15 if step < 40 else later
        metrics["ppo/ensemble_disagreement"] = middle if step >= 30 else 0.3

    assert [each.step for each in watch(fault)] == ([44] if told else [])


@pytest.mark.parametrize("size", [0.02, 35.0, -4000.0])
def test_members_that_differ_by_rounding_agree(size: float) -> None:
    """Their disagreement grows tenfold, within a millionth of the scores."""

    def alike(share: float) -> Fault:
        def fault(step: int, metrics: Metrics) -> None:
            metrics["ppo/rm_score_mean"] = size
            share_now = share if step < 30 else 10 * share
            metrics["ppo/ensemble_disagreement"] = share_now * max(1.0, abs(size))

        return fault

    assert watch(alike(1e-7)) == []
    assert "reward models disagree" in watch(alike(1e-4))[0].message


@pytest.mark.parametrize(("gold", "told"), [(1.7, False), (1.59, False), (1.56, True)])
def test_the_error_of_the_best_gold_counts_too(gold: float, told: bool) -> None:
    """Best 2.0, then twice less, each with an error of 0.1: three of sqrt(0.02) are 0.424."""
    monitor, found = HealthMonitor(HealthSection()), []
    for step, mean in enumerate([1.0, 2.0, gold, gold], start=1):
        metrics = {"gold_mean": mean, "gold_se": 0.1, "score_mean": 0.5 * step}
        found += monitor.observe(step, {f"ppo/eval_{n}": value for n, value in metrics.items()})
    assert [(each.name, each.step) for each in found] == ([("reward_hacking", 4)] if told else [])


def test_falling_gold_with_a_falling_score_is_no_hacking() -> None:
    def both_fall(step: int, metrics: Metrics) -> None:
        gold_falls(step, metrics)
        if "ppo/eval_score_mean" in metrics and step >= 40:
            metrics["ppo/eval_score_mean"] = 0.2

    assert watch(both_fall) == []


def test_what_holds_on_is_repeated_after_some_steps_only() -> None:
    steps = [found.step for found in watch(setting("ppo/kl_token", lambda _: 3.0, 9))]
    assert steps == [10, 30, 50]
    fatal = [found.step for found in watch(setting("ppo/first_log_ratio", lambda _: 3.0, 58))]
    assert fatal == [58, 59, 60]


def test_the_negative_kl_test_weighs_the_standard_error() -> None:
    """Means of 5 steps at -0.2: 4 errors of 0.2 / sqrt(5) are 0.36, of 0.05 / sqrt(5) 0.09."""

    def shifted(error: float) -> Fault:
        def fault(step: int, metrics: Metrics) -> None:
            if step > 1:
                metrics |= {"ppo/kl_sequence": -0.2, "ppo/kl_sequence_se": error}

        return fault

    assert watch(shifted(0.2)) == []
    found = watch(shifted(0.05))[0]
    assert found.name == "negative_kl" and found.step == 5  # step 1: 0 exactly, without error
    assert found.figure == pytest.approx(-0.2 * 4 / 5)
    assert found.threshold == pytest.approx(-4 * 0.05 * math.sqrt(4) / 5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_names_the_metrics_and_others_are_still_judged(value: float) -> None:
    def fault(step: int, metrics: Metrics) -> None:
        metrics["ppo/kl_token"] = 3.0
        if step == 12:
            metrics |= {"ppo/entropy": value, "ppo/score_mean": value}

    found = watch(fault, steps=12)
    assert [(each.name, each.step) for each in found] == [("kl_explosion", 2), ("not_finite", 12)]
    assert f"ppo/entropy is {value}" in found[1].message and "ppo/score_mean" in found[1].message


@pytest.mark.parametrize(
    ("name", "largest", "mean"),
    [
        ("initial_kl_not_zero", "ppo/kl_abs_max", "ppo/kl_abs_mean"),
        ("first_ratio_not_one", "ppo/first_log_ratio", "ppo/first_log_ratio_mean"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "figures", "expected"),
    [
        ("float32", (0.01, 0.0001), "fatal"),
        ("float32", (0.0009, 0.0001), None),
        ("bfloat16", (0.0009, 0.0001), None),
        ("bfloat16", (0.01, 0.0001), "note"),
        ("bfloat16", (0.9, 0.019), "note"),
        ("bfloat16", (0.9, 0.021), "fatal"),
        ("bfloat16", (0.9, 0.6), "fatal"),
    ],
)
def test_what_is_computed_twice_is_equal_in_float32_and_on_average_in_bfloat16(
    name: str,
    largest: str,
    mean: str,
    dtype: Literal["float32", "bfloat16"],
    figures: tuple[float, float],
    expected: str | None,
) -> None:
    metrics = {**healthy(1), largest: figures[0], mean: figures[1]}
    section = HealthSection(action="stop")
    found = HealthMonitor(section, dtype).observe(1, metrics)
    assert [(each.name, each.severity) for each in found] == (
        [(name, expected)] if expected else []
    )
    assert decide(section, found, 0) == ("stop" if expected == "fatal" else "go on")
    if expected == "fatal":
        assert found[0].figure == figures[0 if dtype == "float32" else 1]


def test_state_is_exact_through_json() -> None:
    def fault(step: int, metrics: Metrics) -> None:
        for name, (each, _, _) in FAULTS.items():
            if name not in ("not_finite", "first_ratio_not_one"):
                each(step, metrics)

    whole = watch(fault)
    assert len({each.name for each in whole}) == len(FAULTS) - 2
    for cut in (1, 4, 5, 19, 33, 45):
        monitor, found = HealthMonitor(HealthSection()), []
        for step in range(1, STEPS + 1):
            metrics = healthy(step)
            fault(step, metrics)
            found += monitor.observe(step, metrics)
            if step == cut:
                state = json.loads(json.dumps(monitor.state()))
                monitor = HealthMonitor(HealthSection())
                monitor.restore(state)
        assert found == whole


def test_the_first_steps_are_the_yardstick() -> None:
    """Entropies 1, 2, 3 make 2; then 0.39 is less than a fifth of that."""
    monitor, found = HealthMonitor(HealthSection(baseline_steps=3, window=1)), []
    for step, entropy in enumerate([1.0, 2.0, 3.0, 0.41, 0.39], start=1):
        found += monitor.observe(step, {"ppo/entropy": entropy})
    assert [(each.step, each.figure) for each in found] == [(5, pytest.approx(0.195))]


def test_a_restored_monitor_goes_on_from_its_step() -> None:
    monitor = HealthMonitor(HealthSection())
    monitor.observe(7, healthy(7))
    other = HealthMonitor(HealthSection())
    other.restore(monitor.state())
    with pytest.raises(AssertionError):
        other.observe(7, healthy(7))


def test_state_stays_small() -> None:
    monitor, sizes = HealthMonitor(HealthSection()), []
    for step in range(1, 301):
        monitor.observe(step, healthy(step))
        sizes.append(len(json.dumps(monitor.state())))
    assert sizes[-1] < 1.1 * sizes[99] < 15_000


def test_a_diagnosis_is_readable() -> None:
    (found, *_) = watch(setting("ppo/kl_token", lambda _: 3.0, 9))
    assert str(found) == (
        "kl_explosion at step 10: 3, threshold 1\n"
        "  The policy is 3 nats a token away from the reference: far outside the text on which "
        "the reward model can be trusted.\n"
        "  Likely causes: KL penalty too weak for the scores; learning rate too high; reward "
        "hacking.\n"
        "  Config keys to change: ppo.kl_coef (higher), ppo.learning_rate (lower), "
        "ppo.kl_controller (adaptive)."
    )
