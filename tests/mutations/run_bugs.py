"""Bugs around a PPO run and in the diagnosis of reward models, as data like `catalogue.py`'s."""

from judging_bugs import JUDGING_BUGS
from mutation import Mutation

CHECKS = "trainers/ppo/health/checks.py"
HISTORY = "trainers/ppo/health/history.py"
MONITOR = "trainers/ppo/health/monitor.py"
GUARD = "trainers/ppo/guard.py"
STATE = "trainers/ppo/state.py"
EVALUATE = "trainers/ppo/evaluate.py"
POOL = "trainers/ppo/servers/pool.py"
LOOP = "trainers/ppo/train.py"
SETUP = "trainers/ppo/model.py"
UPDATE = "trainers/ppo/update.py"
LENGTH = "trainers/reward/diagnosis/length.py"
CALIBRATION = "trainers/reward/diagnosis/calibration.py"

_GUARD = "tests/ppo/test_guard.py::test_"
_HEALTH = "tests/ppo/health/test_health.py::test_"
_ACTIONS = "tests/ppo/health/test_health_actions.py::test_"
_EVALUATE = "tests/ppo/test_evaluate.py::test_"
_SERVERS = "tests/ppo/servers/test_server_pool.py::test_"
_OPTIONS = "tests/ppo/test_ppo_options.py::test_"
_DIAGNOSIS = "tests/reward/test_diagnosis.py::test_"
_UPDATE = "tests/ppo/test_ppo_update.py::test_"

ROLLBACK_BUGS = (
    Mutation(
        "rollbacks are not counted",
        GUARD,
        "rollbacks=state.rollbacks + 1)",
        "rollbacks=1)",
        (_GUARD + "every_rollback_lowers_the_rates_once_more",),
    ),
    Mutation(
        "metrics of undone steps stay",
        GUARD,
        "tracker.rewind(state.step)",
        "pass",
        (_GUARD + "the_guard_saves_at_its_rhythm_and_after_no_rollback",),
    ),
    Mutation(
        "checkpoints without the monitor's memory",
        GUARD,
        "health=self.monitor.state())",
        "health={})",
        (_GUARD + "a_rollback_restores_everything_and_lowers_the_learning_rates",),
    ),
    Mutation(
        "no checkpoint before the first step to go back to",
        LOOP,
        'if section.health.action == "rollback":',
        "if False:",
        (_GUARD + "a_run_goes_back_and_ends",),
    ),
    Mutation(
        "one rollback too many",
        MONITOR,
        "rollbacks_done < section.max_rollbacks",
        "rollbacks_done <= section.max_rollbacks",
        (_ACTIONS + "decisions",),
    ),
    Mutation(
        "warn goes on after a fatal diagnosis",
        MONITOR,
        '(section.action == "warn" and not fatal)',
        '(section.action == "warn")',
        (_ACTIONS + "decisions",),
    ),
    Mutation(
        "what led to a rollback is forgotten",
        MONITOR,
        'line["step"] <= resumed_step or line["decision"] != "go on"',
        'line["step"] <= resumed_step',
        (_ACTIONS + "diagnoses_are_written_and_cut_at_a_resume",),
    ),
    Mutation(
        "rollback that lowers no learning rate",
        GUARD,
        "scale = state.lr_scale * self.section.rollback_lr_factor",
        "scale = state.lr_scale",
        (
            _GUARD + "every_rollback_lowers_the_rates_once_more",
            "tests/selftest/test_selftest.py::test_identity[rollback]",
        ),
    ),
    Mutation(
        "rollback that keeps the present weights",
        STATE,
        "saved = engine.load(checkpoint)",
        'saved = torch.load(checkpoint / "state.pt", weights_only=True)',
        (
            _GUARD + "a_rollback_restores_everything_and_lowers_the_learning_rates",
            "tests/selftest/test_selftest.py::test_identity[rollback]",
        ),
    ),
    Mutation(
        "rewards with the config's coefficient",
        LOOP,
        "shape_rewards(scores, rollout.kl, mask, state.kl_coef)",
        "shape_rewards(scores, rollout.kl, mask, section.kl_coef)",
        (_OPTIONS + "the_trainers_own_coefficient_is_in_the_reward",),
    ),
)

HEALTH_BUGS = (
    Mutation(
        "an update that broke the weights is evaluated",
        LOOP,
        "step % section.eval_every == 0 and not broken:",
        "step % section.eval_every == 0:",
        (_GUARD + "an_update_that_breaks_the_weights_is_named_also_where_an_evaluation_is_due[1]",),
    ),
    Mutation(
        "the spread of a prompt's scores over the prompts",
        LOOP,
        "groups.std(1, correction=0)",
        "groups.std(0, correction=0)",
        (_OPTIONS + "the_error_of_the_kl_is_that_of_the_prompts_means[4]",),
    ),
    Mutation(
        "rewards of the prompt alone are not dead",
        CHECKS,
        'deviations = history.recent("ppo/rm_score_group_std", DEAD_STEPS)',
        'deviations = history.recent("ppo/rm_score_mean", DEAD_STEPS)',
        (_HEALTH + "scores_that_differ_between_prompts_alone_are_dead[1e-06-0.2-True]",),
    ),
    Mutation(
        "the usual gradient norm holds the outliers",
        CHECKS,
        "before, last = values[:-2][-GRAD_NORM_STEPS:], values[-2:]",
        "before, last = values[-GRAD_NORM_STEPS:], values[-2:]",
        (_HEALTH + "the_usual_gradient_norm_is_that_before",),
    ),
    Mutation(
        "error of a mean that does not fall with its number",
        HISTORY,
        "return math.sqrt(math.fsum(e * e for e in errors)) / len(errors)",
        "return math.sqrt(math.fsum(e * e for e in errors) / len(errors))",
        (_HEALTH + "the_negative_kl_test_weighs_the_standard_error",),
    ),
    Mutation(
        "no floor of the negative KL",
        CHECKS,
        "-max(section.min_kl_errors * error, KL_FLOOR)",
        "-section.min_kl_errors * error",
        (_HEALTH + "rounding_may_leave_a_kl_below_zero",),
    ),
    Mutation(
        "error of the best gold left out",
        CHECKS,
        "math.sqrt(error**2 + best_error**2)",
        "error",
        (_HEALTH + "the_error_of_the_best_gold_counts_too",),
    ),
    Mutation(
        "disagreement counts where the score falls",
        CHECKS,
        "if least <= ROUNDING * size or score[1] <= score[0]:",
        "if least <= ROUNDING * size:",
        (_HEALTH + "an_ensemble_that_disagrees_while_the_score_rises",),
    ),
    Mutation(
        "disagreement compared with the first alone",
        CHECKS,
        "least = min(first, *(fmean(last[i : i + window]) for i in range(len(last) - window + 1)))",
        "least = first",
        (_HEALTH + "an_ensemble_that_agreed_better_before_it_disagrees",),
    ),
    Mutation(
        "the critic has no patience",
        CHECKS,
        "if history.steps < section.critic_patience + CRITIC_STEPS:",
        "if history.steps < CRITIC_STEPS:",
        (_HEALTH + "each_fault_has_its_own_diagnosis_and_no_other",),
    ),
    Mutation(
        "any rise excuses the critic",
        CHECKS,
        "fmean(last[half:]) > fmean(last[:half]) + CRITIC_RISE",
        "fmean(last[half:]) > fmean(last[:half])",
        (_HEALTH + "a_poor_critic_is_excused_where_it_clearly_improves",),
    ),
    Mutation(
        "repeated a step too late",
        MONITOR,
        "step - reported < self.section.repeat_after",
        "step - reported <= self.section.repeat_after",
        (_HEALTH + "what_holds_on_is_repeated_after_some_steps_only",),
    ),
    Mutation(
        "largest KL of a token with its sign",
        "trainers/ppo/metrics.py",
        "float(token_kl.abs().max())",
        "float(token_kl.max())",
        ("tests/ppo/test_metrics.py::test_the_largest_difference_has_no_sign",),
    ),
    Mutation(
        "a change that overlaps its baseline",
        HISTORY,
        "if self.steps < section.baseline_steps + section.window:",
        "if self.steps < max(section.baseline_steps, section.window):",
        (_HEALTH + "a_change_is_measured_once_both_windows_stand_apart",),
    ),
    Mutation(
        "no floor of the sampling mismatch",
        CHECKS,
        "max(section.max_surprise_errors * error, SURPRISE_FLOOR)",
        "section.max_surprise_errors * error",
        (_HEALTH + "kernels_may_differ_by_a_hundredth_of_a_nat",),
    ),
    Mutation(
        "errors of a falling score left out",
        CHECKS,
        "-max(section.score_drop_errors * error, floor)",
        "-floor",
        (_HEALTH + "a_tame_fault_has_none[score_falling]",),
    ),
    Mutation(
        "no floor of a falling score",
        CHECKS,
        "-max(section.score_drop_errors * error, floor)",
        "-section.score_drop_errors * error",
        (_HEALTH + "a_fall_of_the_score_is_told_from_the_second_step_on",),
    ),
    Mutation(
        "a length that pays no more is a drift",
        CHECKS,
        "paid < max(LENGTH_PAID * before, LEAST_PAID)",
        "paid < LEAST_PAID",
        (_HEALTH + "a_length_for_which_the_score_pays_no_more_is_no_drift",),
    ),
    Mutation(
        "short answers pay where long ones do",
        CHECKS,
        "sign = 1 if factor > 1 else -1",
        "sign = 1",
        (_HEALTH + "a_length_for_which_the_score_pays_no_more_is_no_drift",),
    ),
    Mutation(
        "a critic that never was useful is lost",
        CHECKS,
        "if not usual or max(values) < section.min_explained_variance:",
        "if not usual:",
        (_HEALTH + "a_critic_that_was_useful_and_is_lost_is_told_at_once",),
    ),
    Mutation(
        "a rare reward's later spread is no measure of the critic",
        CHECKS,
        'max(fmean(history.first["ppo/score_std"]), metrics["ppo/score_std"])',
        'fmean(history.first["ppo/score_std"])',
        (_HEALTH + "a_critic_that_was_useful_and_is_lost_is_told_at_once",),
    ),
    Mutation(
        "gradient norms of 0 are something to compare with",
        CHECKS,
        "if not usual:  # of steps",
        "if len(before) < GRAD_NORM_LEAST:  # of steps",
        (_HEALTH + "the_usual_gradient_norm_is_that_before",),
    ),
    Mutation(
        "answers scored again for other prompts",
        LOOP,
        "prompts[row // self.cfg.ppo.samples_per_prompt]",
        "prompts[row % len(prompts)]",
        (_OPTIONS + "a_few_answers_are_scored_again_with_their_own_prompts[2-0.3]",),
    ),
    Mutation(
        "second scores compared with those of other answers",
        LOOP,
        "scores[rows]).square()",
        "scores[: len(rows)]).square()",
        (_OPTIONS + "a_few_answers_are_scored_again_with_their_own_prompts[1-0.0]",),
    ),
)

RESUME_BUGS = (
    Mutation(
        "the average starts anew when resumed",
        STATE,
        'return refreshed + (["ema"] if cfg.ppo.ema_decay is not None else [])',
        "return refreshed",
        (_GUARD + "a_checkpoint_holds_the_whole_state",),
    ),
    Mutation(
        "score statistics lost on resume",
        STATE,
        'statistics=Statistics(**saved["statistics"])',
        "statistics=Statistics()",
        (_GUARD + "a_checkpoint_holds_the_whole_state",),
    ),
    Mutation(
        "the controller starts anew when resumed",
        STATE,
        "known = {name: saved[name] for name in names}",
        'known = {name: saved[name] for name in names} | {"kl_coef": cfg.ppo.kl_coef}',
        (_GUARD + "a_checkpoint_holds_the_whole_state",),
    ),
    Mutation(
        "rollbacks lost on resume",
        STATE,
        '"lr_scale", "rollbacks", "health")',
        '"lr_scale", "health")',
        (_GUARD + "a_checkpoint_holds_the_whole_state",),
    ),
    Mutation(
        "the monitor's memory lost on resume",
        STATE,
        '"lr_scale", "rollbacks", "health")',
        '"lr_scale", "rollbacks")',
        (_GUARD + "a_checkpoint_holds_the_whole_state",),
    ),
    Mutation(
        "the line of the last step lost when resumed",
        LOOP,
        "tracker.resume_from(state.step)",
        "tracker.resume_from(state.step - 1)",
        ("tests/ppo/test_ppo_stage.py::test_a_resumed_run_is_the_uninterrupted_one",),
    ),
    Mutation(
        "moments restored from the weights",
        "trainers/engine/sharded_state.py",
        "saved.read(kind, name, shard.start, shard.count)",
        "saved.read(VALUE, name, shard.start, shard.count)",
        ("tests/engine/test_engine.py::test_a_group_that_rests_keeps_its_clock",),
    ),
    Mutation(
        "one checkpoint more than the limit",
        "chatllama/runs/checkpoints.py",
        "step_folders(folder)[:-limit]",
        "step_folders(folder)[: -limit - 1]",
        ("tests/runs/test_checkpoints.py::test_the_newest_are_kept",),
    ),
    Mutation(
        "lowered learning rates lost on resume",
        STATE,
        '"lr_scale", "rollbacks", "health")',
        '"rollbacks", "health")',
        (_GUARD + "a_checkpoint_holds_the_whole_state",),
    ),
)

EVALUATION_BUGS = (
    Mutation(
        "another seed in evaluation",
        EVALUATE,
        "seed, reference = (cfg.seed, EVALUATION_SEED)",
        "seed, reference = (cfg.seed, 0)",
        (_EVALUATE + "gold_scores_and_win_rates_by_hand",),
    ),
    Mutation(
        "win rate of SFT against PPO",
        EVALUATE,
        'win_rate(measured["ppo"].goodness, measured[first].goodness)',
        'win_rate(measured[first].goodness, measured["ppo"].goodness)',
        (_EVALUATE + "without_gold_the_reward_model_judges",),
    ),
    Mutation(
        "a refreshed reference taken for SFT",
        EVALUATE,
        'return "sft" if cfg.starts_from_sft else "base"',
        'return "reference"',
        (_EVALUATE + "sft_is_sft_after_the_reference_was_refreshed",),
    ),
    Mutation(
        "KL of answers that are not the policy's",
        EVALUATE,
        'if role == "policy":',
        'if role != "base":',
        (_EVALUATE + "the_policys_kl_is_measured_on_its_own_answers",),
    ),
    Mutation(
        "biased deviation in standard errors",
        "chatllama/reporting/statistics.py",
        "for value in values) / (count - 1)",
        "for value in values) / count",
        ("tests/reporting/test_statistics.py::test_mean_and_error_by_hand",),
    ),
    Mutation(
        "shown sample with its raw score",
        LOOP,
        "score = (float(rollout.scores[0]) - statistics.mean) / statistics.deviation",
        "score = float(rollout.scores[0])",
        (_GUARD + "the_sample_that_is_shown_has_the_normalised_score",),
    ),
    Mutation(
        "evaluation's KL averaged over slots",
        EVALUATE,
        "masked(rollout.kl, rollout.response_mask).sum(1)",
        "masked(rollout.kl, rollout.response_mask).mean(1)",
        (_EVALUATE + "the_policys_kl_is_measured_on_its_own_answers",),
    ),
)

SERVER_BUGS = (
    Mutation(
        "all prompts sampled with one seed",
        POOL,
        "prompt_seed(seed, i))",
        "prompt_seed(seed, 0))",
        (_SERVERS + "prompts_are_dealt_out_and_a_lost_server_s_are_taken_over",),
    ),
    Mutation(
        "answers in the order in which they came",
        POOL,
        "return [found[i] for i in range(len(prompts))]",
        "return list(found.values())",
        (_SERVERS + "answers_stand_in_the_order_of_their_prompts_with_seeds_of_their_own",),
    ),
    Mutation(
        "the reference's answers compared with the policy",
        POOL,
        'own = rollout.ref_logprobs if role == "reference" else rollout.logprobs',
        "own = rollout.logprobs",
        (_SERVERS + "servers_are_compared_with_the_role_that_answered",),
    ),
    Mutation(
        "a failed server is asked again at once",
        POOL,
        "member.resume_at = now + FIRST_PAUSE * 2 ** (member.failures - 1)",
        "member.resume_at = now",
        (_SERVERS + "pauses_double_and_failures_with_successes_between_drop_no_server",),
    ),
    Mutation(
        "failures that never count as over",
        POOL,
        "if started >= member.failed_at:",
        "if False:",
        (_SERVERS + "pauses_double_and_failures_with_successes_between_drop_no_server",),
    ),
    Mutation(
        "one seed for all steps",
        POOL,
        "np.random.SeedSequence([*seed, prompt])",
        "np.random.SeedSequence([seed[0], prompt])",
        (_SERVERS + "answers_stand_in_the_order_of_their_prompts_with_seeds_of_their_own",),
    ),
)

ENSEMBLE_BUGS = (
    Mutation(
        "one member of the run's ensemble",
        SETUP,
        'run.reward_members() if reward.adapter == "run"',
        '[run.reward_adapter] if reward.adapter == "run"',
        (_OPTIONS + "an_ensemble_of_the_run_is_loaded_whole",),
    ),
    Mutation(
        "the critic copied from the last reward model",
        SETUP,
        "first = first or saved",
        "first = saved",
        (_OPTIONS + "values_begin_as_the_scores_of_the_first_member",),
    ),
    Mutation(
        "the critic shifted by the mean of all members",
        SETUP,
        "mean = float(rollout.member_scores[:, 0].double().mean())",
        "mean = float(rollout.member_scores.double().mean())",
        (_OPTIONS + "values_begin_as_the_scores_of_the_first_member",),
    ),
)

ORDER_BUGS = (
    Mutation(
        "the same random numbers in every step",
        LOOP,
        'return self._collect("policy", records, (self.cfg.seed, step + 1))',
        'return self._collect("policy", records, (self.cfg.seed, 1))',
        ("tests/ppo/test_ppo_loop.py::test_every_step_samples_anew",),
    ),
    Mutation(
        "the same minibatches in every step",
        UPDATE,
        "manual_seed(hash((seed, step, epoch)) % 2**63)",
        "manual_seed(hash((seed, epoch)) % 2**63)",
        (_UPDATE + "every_epoch_holds_every_microbatch_once",),
    ),
    Mutation(
        "the same ptx texts in every step",
        "trainers/ppo/data.py",
        "batch_indices(len(self.rows), count, position, self.seed)",
        "batch_indices(len(self.rows), count, 0, self.seed)",
        ("tests/ppo/test_ppo_text.py::test_every_text_comes_up_before_any_comes_again",),
    ),
    Mutation(
        "ptx at the sampling temperature",
        UPDATE,
        'response_logprobs(model, "policy", *inputs, 1.0)',
        'response_logprobs(model, "policy", *inputs, self.temperature)',
        (_UPDATE + "two_steps_are_what_the_oracle_does[ptx tempered]",),
    ),
)

DIAGNOSIS_BUGS = (
    Mutation(
        "half-widths of controlled accuracy added",
        LENGTH,
        "low = math.hypot(a.value - a.low, b.value - b.low) / 2",
        "low = (a.value - a.low + b.value - b.low) / 2",
        (_DIAGNOSIS + "the_interval_of_controlled_accuracy_by_hand",),
    ),
    Mutation(
        "calibration error of chance without the mean of |x|",
        CALIBRATION,
        "spread = [2 / math.pi * b.confidence",
        "spread = [b.confidence",
        (_DIAGNOSIS + "the_calibration_error_of_chance_by_hand",),
    ),
    Mutation(
        "accuracy's interval by pairs",
        CALIBRATION,
        "max(1, round(float(weights.sum())))",
        "len(values)",
        (_DIAGNOSIS + "the_accuracys_interval_counts_prompts",),
    ),
    Mutation(
        "half of the evidence of wrong labels",
        CALIBRATION,
        "Flips(share, scale, 2 * (likelihood - start),",
        "Flips(share, scale, likelihood - start,",
        (
            "tests/reward/test_calibration.py::test_the_evidence_is_twice_the_gain_in_log_likelihood",
        ),
    ),
)

RUN_BUGS = (
    *ROLLBACK_BUGS,
    *HEALTH_BUGS,
    *RESUME_BUGS,
    *EVALUATION_BUGS,
    *SERVER_BUGS,
    *ENSEMBLE_BUGS,
    *ORDER_BUGS,
    *DIAGNOSIS_BUGS,
    *JUDGING_BUGS,
)
