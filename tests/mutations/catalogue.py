"""Bugs that PPO-RLHF code bases have shipped, each as one changed line, and the tests that see it.

`run.py` plants them one at a time in a copy of the project. Every named test must fail. Bugs around
the arithmetic (rollback, health, resume ...) are in `run_bugs.py`.
"""

from mutation import Mutation
from run_bugs import RUN_BUGS


def _selftest(case: str) -> str:
    return f"tests/selftest/test_selftest.py::{case}"


LAMBDA_1 = _selftest("test_gradient[lambda-1]")
TEMPERED = _selftest("test_gradient[lambda-1-tempered]")
LAMBDA_95 = _selftest("test_gradient[lambda-0.95]")
CLIPPED = _selftest("test_gradient[clipped]")
KL_K2, KL_K3 = _selftest("test_gradient[k2]"), _selftest("test_gradient[k3]")
RLOO, GRPO = _selftest("test_gradient[rloo]"), _selftest("test_gradient[grpo]")
GAE = _selftest("test_identity[gae]")
RATIO = _selftest("test_identity[ratio]")
KL_MEANS = _selftest("test_identity[kl]")
START = _selftest("test_identity[start]")
SAMPLER = _selftest("test_identity[sampler]")
BRADLEY_TERRY = _selftest("test_identity[bradley-terry]")

PPO_MATH, ROLES, ROLLOUT = (
    "trainers/ppo/ppo_math.py",
    "chatllama/model/roles.py",
    "trainers/ppo/rollout.py",
)
UPDATE, LOOP, REWARDS = "trainers/ppo/update.py", "trainers/ppo/train.py", "trainers/ppo/rewards.py"
SETUP, SAMPLING = "trainers/ppo/model.py", "chatllama/generation/sampling.py"
PACKED = "tests/model/test_packed_attention.py"
SCORING, METRICS = "chatllama/model/scoring.py", "trainers/ppo/metrics.py"

_GUARDS = "tests/ppo/test_ppo_guards.py::test_"
_MATH = "tests/ppo/test_ppo_math.py::test_"
_RULES = "tests/ppo/test_ppo_update_rules.py::test_"
_TARGETS = "tests/ppo/test_ppo_options.py::test_targets_are_what_plain_python_computes"
_SCORES = "tests/ppo/test_ppo_rewards.py::test_shaped_scores_by_hand"
_KL_LINE = "rewards = masked(-kl_coef * kl, mask)"
_LAST = "return rewards.scatter_add(1, last_index(mask)[:, None], "

REWARD_BUGS = (
    Mutation(
        "KL with the wrong sign",
        PPO_MATH,
        _KL_LINE,
        "rewards = masked(kl_coef * kl, mask)",
        (LAMBDA_1, _MATH + "the_score_goes_to_the_last_true_position"),
    ),
    Mutation(
        "no KL penalty",
        PPO_MATH,
        _KL_LINE,
        "rewards = masked(0.0 * kl, mask)",
        (LAMBDA_1, _MATH + "the_score_goes_to_the_last_true_position"),
    ),
    Mutation(
        "k2 in the reward",
        PPO_MATH,
        _KL_LINE,
        "rewards = masked(-kl_coef * 0.5 * kl.square(), mask)",
        (LAMBDA_1, RLOO),
    ),
    Mutation(
        "k3 in the reward",
        PPO_MATH,
        _KL_LINE,
        "rewards = masked(-kl_coef * (torch.expm1(-kl) + kl), mask)",
        (LAMBDA_1, RLOO),
    ),
    Mutation(
        "KL averaged over a response's tokens",
        PPO_MATH,
        _KL_LINE,
        "rewards = masked(-kl_coef * kl / mask.sum(1, keepdim=True), mask)",
        (LAMBDA_1, RLOO),
    ),
    Mutation(
        "score on the first token",
        PPO_MATH,
        _LAST,
        "return rewards.scatter_add(1, 0 * last_index(mask)[:, None], ",
        (LAMBDA_1, _MATH + "the_score_goes_to_the_last_true_position"),
    ),
    Mutation(
        "score on the last slot, past the end",
        PPO_MATH,
        _LAST,
        "return rewards.scatter_add(1, 0 * last_index(mask)[:, None] + mask.shape[1] - 1, ",
        (LAMBDA_1, _MATH + "the_score_goes_to_the_last_true_position"),
    ),
    Mutation(
        "score on every token",
        PPO_MATH,
        "return rewards.scatter_add(1, last_index(mask)[:, None], "
        "scores[:, None].to(rewards.dtype))",
        "return masked(rewards + scores[:, None], mask)",
        (LAMBDA_1, RLOO),
    ),
    Mutation(
        "missing-EOS penalty as a bonus",
        REWARDS,
        "scores = scores - section.missing_eos_penalty",
        "scores = scores + section.missing_eos_penalty",
        (LAMBDA_1, _SCORES),
    ),
    Mutation(
        "length penalty as a bonus",
        REWARDS,
        "return scores - section.length_penalty",
        "return scores + section.length_penalty",
        (_SCORES, _TARGETS),
    ),
    Mutation(
        "scores multiplied by their deviation",
        REWARDS,
        "scores = (scores - statistics.mean) / statistics.deviation",
        "scores = (scores - statistics.mean) * statistics.deviation",
        (_SCORES, _TARGETS),
    ),
    Mutation(
        "weight of a reward source ignored",
        REWARDS,
        "total = total + term.weight * column",
        "total = total + column",
        (LAMBDA_1, "tests/ppo/test_ppo_rewards.py::test_sources_are_added_with_their_weights"),
    ),
    Mutation(
        "reward whitening that shifts the mean",
        LOOP,
        "rewards = whiten(rewards, mask, shift_mean=False)",
        "rewards = whiten(rewards, mask, shift_mean=True)",
        (_TARGETS,),
    ),
    Mutation(
        "adaptive KL controller with the wrong sign",
        PPO_MATH,
        "min(max(kl_sequence / target - 1, -0.2), 0.2)",
        "min(max(1 - kl_sequence / target, -0.2), 0.2)",
        (_MATH + "adaptive_controller",),
    ),
    Mutation(
        "adaptive KL controller fed with the KL per token",
        LOOP,
        'kl, count = metrics["ppo/kl_sequence"],',
        'kl, count = metrics["ppo/kl_token"],',
        (_GUARDS + "the_adaptive_controller_is_fed_with_the_kl_of_whole_responses",),
    ),
)

ADVANTAGE_BUGS = (
    Mutation(
        "values behind the end not zeroed",
        PPO_MATH,
        "masked(rewards, mask).detach(), masked(values, mask).detach()",
        "masked(rewards, mask).detach(), values.detach()",
        (LAMBDA_95, _MATH + "gae_ignores_what_stands_after_the_end"),
    ),
    Mutation(
        "discount of 0.9 left in",
        PPO_MATH,
        "running = delta + gamma * lam * running",
        "running = delta + 0.9 * gamma * lam * running",
        (LAMBDA_1, GAE),
    ),
    Mutation(
        "lambda ignored",
        PPO_MATH,
        "running = delta + gamma * lam * running",
        "running = delta + gamma * running",
        (GAE, _MATH + "gae_three_by_three_by_hand"),
    ),
    Mutation(
        "the next value left out of the delta",
        PPO_MATH,
        "delta = rewards[:, t] + gamma * next_value - values[:, t]",
        "delta = rewards[:, t] - values[:, t]",
        (LAMBDA_1, GAE),
    ),
    Mutation(
        "returns without the baseline",
        PPO_MATH,
        "return masked(advantages, mask), masked(advantages + values, mask)",
        "return masked(advantages, mask), masked(advantages, mask)",
        (LAMBDA_1, _MATH + "gae_three_by_three_by_hand"),
    ),
    Mutation(
        "returns from whitened advantages",
        LOOP,
        "advantages = whiten(advantages, mask)",
        "advantages = whiten(advantages, mask); returns = advantages + rollout.values",
        (_TARGETS,),
    ),
    Mutation(
        "whitening with statistics of the padding too",
        PPO_MATH,
        "mean, var = mean_and_variance(x, mask)",
        "mean, var = mean_and_variance(x, torch.ones_like(mask))",
        (_MATH + "whiten_by_hand", _TARGETS),
    ),
    Mutation(
        "mean and variance that ignore the mask",
        PPO_MATH,
        "inside = masked(x, mask).double()",
        "inside = x.double()",
        (_MATH + "mean_and_variance_by_hand",),
    ),
    Mutation(
        "whitening by the variance",
        PPO_MATH,
        "scaled = (x - mean) * (var + 1e-8) ** -0.5",
        "scaled = (x - mean) / (var + 1e-8)",
        (_MATH + "whiten_by_hand", _TARGETS),
    ),
    Mutation(
        "whitening inverted: shift_mean keeps the mean",
        PPO_MATH,
        "return masked(scaled if shift_mean else scaled + mean, mask)",
        "return masked(scaled + mean if shift_mean else scaled, mask)",
        (_MATH + "whiten_by_hand", _TARGETS),
    ),
    Mutation(
        "rloo without the leave-one-out factor",
        PPO_MATH,
        "return _on_tokens(centred * group_size / (group_size - 1), mask)",
        "return _on_tokens(centred, mask)",
        (RLOO, _MATH + "rloo_by_hand"),
    ),
    Mutation(
        "grpo without the deviation",
        PPO_MATH,
        "normalised = masked(centred / (deviation + GROUP_EPSILON), ~equal)",
        "normalised = centred",
        (GRPO, _MATH + "grpo_adds_the_kl_after_dividing"),
    ),
    Mutation(
        "KL of grpo divided by the deviation too",
        PPO_MATH,
        "return _on_tokens(normalised - penalty, mask)",
        "return _on_tokens(normalised - penalty / (deviation + GROUP_EPSILON), mask)",
        (GRPO, _MATH + "grpo_adds_the_kl_after_dividing"),
    ),
    Mutation(
        "scores that hardly differ divided by their deviation",
        PPO_MATH,
        "equal = deviation <= GROUP_EPSILON * groups.abs()",
        "equal = deviation <= ROUNDING * groups.abs()",
        (_MATH + "grpo_takes_scores_that_hardly_differ_for_equal",),
    ),
    Mutation(
        "explained variance of returns, which hold the values",
        LOOP,
        "to_go = rewards_to_go(rewards, mask, gamma)",
        "to_go = returns",
        (_selftest("test_gradient[lambda-0]"), _TARGETS),
    ),
    Mutation(
        "the critic's own lambda ignored",
        LOOP,
        "if section.critic_lam is not None:",
        "if False:",
        (LAMBDA_95, _TARGETS),
    ),
    Mutation(
        "least spread of scores whatever their size",
        LOOP,
        "least = section.health.min_score_std * max(1.0, abs(statistics.mean))",
        "least = section.health.min_score_std",
        ("tests/ppo/test_ppo_options.py::test_rewards_that_hardly_differ_are_refused",),
    ),
    Mutation(
        "KL error over responses instead of prompts",
        METRICS,
        "(error := clustered_error(values, numbers))",
        "(error := clustered_error(values, torch.arange(len(kl))))",
        ("tests/ppo/test_ppo_options.py::test_the_error_of_the_kl_is_that_of_the_prompts_means",),
    ),
    Mutation(
        "error of the KL for that of the score",
        METRICS,
        '(("kl_sequence", kl), ("score", scores))',
        '(("kl_sequence", kl), ("score", kl))',
        ("tests/ppo/test_ppo_options.py::test_metrics_of_a_rollout_by_hand",),
    ),
    Mutation(
        "raw deviation of the shaped scores",
        METRICS,
        "float(rollout.scores.double().std(correction=0))",
        "float(scores.double().std(correction=0))",
        ("tests/ppo/test_ppo_options.py::test_metrics_of_a_rollout_by_hand",),
    ),
    Mutation(
        "samples compared with those of other prompts",
        PPO_MATH,
        "groups = totals.view(-1, group_size)",
        "groups = totals.view(group_size, -1).T.contiguous()",
        (RLOO, _MATH + "rloo_by_hand"),
    ),
    Mutation(
        "filter keeps the unfinished responses",
        LOOP,
        "mask = mask & rollout.finished[:, None]",
        "mask = mask & ~rollout.finished[:, None]",
        (_TARGETS,),
    ),
)

LOSS_BUGS = (
    Mutation(
        "advantage with the wrong sign",
        PPO_MATH,
        "    advantages = masked(advantages, mask)",
        "    advantages = masked(-advantages, mask)",
        (LAMBDA_1, RATIO),
    ),
    Mutation(
        "optimistic branch of the clip",
        PPO_MATH,
        "loss = torch.maximum(plain, clipped).sum() / num_tokens",
        "loss = torch.minimum(plain, clipped).sum() / num_tokens",
        (CLIPPED, _MATH + "clipping_takes_the_pessimistic_branch"),
    ),
    Mutation(
        "ratio never clipped",
        PPO_MATH,
        "clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)",
        "clipped = -advantages * ratio",
        (CLIPPED, _MATH + "clipping_takes_the_pessimistic_branch"),
    ),
    Mutation(
        "ratio against the present policy",
        UPDATE,
        "new, old, ref = scores.logprobs, rollout.logprobs, rollout.ref_logprobs",
        "new, old, ref = scores.logprobs, scores.logprobs.detach(), rollout.ref_logprobs",
        (CLIPPED, "tests/ppo/test_ppo_update.py::test_two_steps_are_what_the_oracle_does[plain]"),
    ),
    Mutation(
        "log ratios that overflow",
        PPO_MATH,
        "ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()",
        "ratio = log_ratio.exp()",
        (_MATH + "ratios_beyond_all_reason_stay_finite",),
    ),
    Mutation(
        "k3 that overflows",
        PPO_MATH,
        "k = k.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
        "k = k + 0.0",
        (_MATH + "ratios_beyond_all_reason_stay_finite",),
    ),
    Mutation(
        "policy and critic clipped by their joint norm",
        "trainers/engine/group_steps.py",
        "together = groups if each else",
        "together = groups if False else",
        (
            _RULES + "the_critics_gradient_does_not_shrink_the_policys_step",
            "tests/engine/test_engine.py::test_it_is_adamw_with_clipping_on_two_groups",
        ),
    ),
    Mutation(
        "a resting group steps with gradients of zero",
        "trainers/engine/group_steps.py",
        "parameter.grad = None",
        "parameter.grad = torch.zeros_like(parameter)",
        (
            _RULES + "the_policys_clocks_begin_after_the_critics_warm_up",
            "tests/engine/test_engine.py::test_a_group_that_rests_keeps_its_clock",
        ),
    ),
    Mutation(
        "the policy's schedule runs on while it rests",
        "chatllama/config/batch_sizes.py",
        "lr_factor(done - (total - own), own, schedule, warmup)",
        "lr_factor(done, total, schedule, warmup)",
        (_RULES + "the_policys_clocks_begin_after_the_critics_warm_up",),
    ),
    Mutation(
        "one step count of AdamW for all when resuming",
        "trainers/engine/sharded_state.py",
        "shard, step = shard_of(parameter, optimizer), saved.step(name)",
        "shard, step = shard_of(parameter, optimizer), max(map(saved.step, saved._steps))",
        ("tests/engine/test_engine.py::test_a_group_that_rests_keeps_its_clock",),
    ),
    Mutation(
        "mean of microbatch means",
        PPO_MATH,
        "loss = torch.maximum(plain, clipped).sum() / num_tokens",
        "loss = torch.maximum(plain, clipped).sum() / mask.sum() / 13",
        (LAMBDA_1, _MATH + "any_split_into_microbatches_gives_the_same_loss_and_gradient"),
    ),
    Mutation(
        "tokens of one microbatch as the normaliser",
        UPDATE,
        "num_tokens = float(max(1, sum(microbatch.num_tokens for microbatch in microbatches)))",
        "num_tokens = float(max(1, microbatches[0].num_tokens))",
        (LAMBDA_1, "tests/ppo/test_ppo_update.py::test_two_steps_are_what_the_oracle_does[plain]"),
    ),
    Mutation(
        "1 / length per response",
        PPO_MATH,
        "loss = torch.maximum(plain, clipped).sum() / num_tokens",
        "loss = (torch.maximum(plain, clipped) / mask.sum(1, keepdim=True)).sum() / num_tokens",
        (LAMBDA_1, _MATH + "policy_loss_sums_tokens_and_divides_by_the_given_number"),
    ),
    Mutation(
        "mask ignored in the ratio",
        PPO_MATH,
        "log_ratio = masked(logprobs, mask) - masked(old_logprobs, mask)",
        "log_ratio = logprobs - old_logprobs",
        (_MATH + "garbage_outside_the_mask_gets_gradient_zero",),
    ),
    Mutation(
        "value clipped around the new value",
        PPO_MATH,
        "near = old_values + (values - old_values).clamp(-clip_range, clip_range)",
        "near = values + (old_values - values).clamp(-clip_range, clip_range)",
        (CLIPPED, _MATH + "value_loss_by_hand"),
    ),
    Mutation(
        "optimistic branch of the value clip",
        PPO_MATH,
        "loss = 0.5 * torch.maximum(plain, clipped).sum() / num_tokens",
        "loss = 0.5 * torch.minimum(plain, clipped).sum() / num_tokens",
        (CLIPPED, _MATH + "value_loss_by_hand"),
    ),
    Mutation(
        "value loss with the wrong sign",
        UPDATE,
        "loss = loss + section.vf_coef * critic.loss",
        "loss = loss - section.vf_coef * critic.loss",
        (LAMBDA_1, "tests/ppo/test_ppo_update.py::test_two_steps_are_what_the_oracle_does[plain]"),
    ),
    Mutation(
        "k3 of the KL loss the wrong way round",
        PPO_MATH,
        "torch.expm1(-k) + k",
        "torch.expm1(k) - k",
        (KL_K3, KL_MEANS),
    ),
    Mutation(
        "KL loss against the rollout's policy",
        UPDATE,
        "drift = kl_loss(new, ref, mask,",
        "drift = kl_loss(new, old, mask,",
        (KL_K2, KL_K3),
    ),
    Mutation(
        "learning rate that stays at its start",
        UPDATE,
        "position = self.step * len(drawn) + number",
        "position = 0",
        ("tests/ppo/test_ppo_update.py::test_two_steps_are_what_the_oracle_does[plain]",),
    ),
    Mutation(
        "decay of the average inverted",
        "trainers/engine/engine.py",
        "_local(target).lerp_(_local(source), 1 - decay)",
        "_local(target).lerp_(_local(source), decay)",
        ("tests/ppo/test_ppo_loop.py::test_the_average_moves_with_every_optimizer_step",),
    ),
    Mutation(
        "SFT's loss divided by each microbatch's own tokens",
        "trainers/sft/train.py",
        "loss = losses.loss_sum / num_tokens",
        "loss = losses.loss_sum / num_trained(batch)",
        ("tests/sft/test_sft.py::test_microbatches_change_neither_losses_nor_weights",),
    ),
    Mutation(
        "norms and biases decay",
        "trainers/engine/engine.py",
        '"weight_decay": decay * g.decays}',
        '"weight_decay": decay}',
        ("tests/sft/test_sft.py::test_norms_and_biases_do_not_decay",),
    ),
    Mutation(
        "preference turned round in Bradley-Terry",
        "trainers/reward/loss.py",
        "gap = better - worse - margin",
        "gap = worse - better - margin",
        (
            BRADLEY_TERRY,
            "tests/reward/test_pairwise_loss.py::test_margin_is_subtracted_from_the_gap",
        ),
    ),
)

SCORING_BUGS = (
    Mutation(
        "log-probabilities shifted by one",
        SCORING,
        "predicts[:, -response_mask.shape[1] :] = response_mask",
        "predicts[:, -response_mask.shape[1] - 1 : -1] = response_mask",
        (LAMBDA_1, START),
    ),
    Mutation(
        "log-probability of the likeliest token",
        "chatllama/model/lm_head.py",
        "picked = logits.gather(1, targets[rows, None])",
        "picked = logits.amax(-1, keepdim=True)",
        (LAMBDA_1, START),
    ),
    Mutation(
        "temperature only in sampling",
        "chatllama/model/lm_head.py",
        "logits /= temperature",
        "logits /= 1.0",
        (TEMPERED, SAMPLER),
    ),
    Mutation(
        "temperature only in scoring",
        SAMPLING,
        "scaled = logits.float() / rows.temperature if",
        "scaled = logits.float() if",
        (
            SAMPLER,
            "tests/generation/test_sampling.py::test_next_tokens_follow_the_softmax_over_the_whole_vocabulary",
        ),
    ),
    Mutation(
        "value that sees the action",
        SCORING,
        'states = _before_responses(model, "value", tokens, mask, response_mask)',
        'states = _before_responses(model, "value", tokens.roll(-1, 1), mask, response_mask)',
        (LAMBDA_1, "tests/model/test_scoring.py::test_values_are_of_the_state_before_the_token"),
    ),
    Mutation(
        "rows of a packed batch see each other",
        "chatllama/model/packed_attention.py",
        'return {"row_lengths": lengths, "attention_mask": NO_MASK}',
        'return {"row_lengths": [sum(lengths)], "attention_mask": NO_MASK}',
        (LAMBDA_1, START),
    ),
    Mutation(
        "positions of a packed batch run on",
        SCORING,
        "tokens, positions = tokens[mask][None], positions[mask][None]",
        "tokens, positions = tokens[mask][None], positions[mask].cumsum(0)[None]",
        (LAMBDA_1, START),
    ),
    Mutation(
        "the last layer's wanted positions see the token after them",
        "chatllama/model/last_layer.py",
        "sees = (columns <= own[:, None]) & (columns > own[:, None] - back)",
        "sees = (columns <= own[:, None] + 1) & (columns > own[:, None] - back)",
        (
            LAMBDA_1,
            "tests/model/test_packed_attention.py::test_states_that_are_wanted_are_those_of_the_whole",
        ),
    ),
    Mutation(
        "the last layer looks back beyond its window",
        "chatllama/model/last_layer.py",
        "back = window(layer.config, layer.layer_idx) or max(lengths)",
        "back = max(lengths)",
        (f"{PACKED}::test_each_row_is_what_it_is_alone[mistral, window-sdpa]",),
    ),
    Mutation(
        "packed rows look back beyond the window",
        "chatllama/model/packed_attention.py",
        "within_window(None, q, k, sliding_window)",
        "within_window(None, q, k, None)",
        (f"{PACKED}::test_each_row_is_what_it_is_alone[qwen3, biases, window-sdpa]",),
    ),
    Mutation(
        "a token looks one further than the window",
        "chatllama/model/packed_attention.py",
        "return mask & (later < window)",
        "return mask & (later <= window)",
        (
            "tests/generation/test_generate.py::"
            "test_greedy_equals_transformers_for_ragged_prompts[mistral, window]",
        ),
    ),
    Mutation(
        "the last layer's queries and keys without their norms",
        "chatllama/model/last_layer.py",
        "if family_of(layer.config).head_norms:",
        "if False:",
        (f"{PACKED}::test_states_that_are_wanted_are_those_of_the_whole[True-qwen3-sdpa]",),
    ),
    Mutation(
        "adapter added to the weight without its scale",
        "chatllama/model/lora.py",
        "return product(x, torch.addmm(weight, up, down, alpha=scale).T)",
        "return product(x, torch.addmm(weight, up, down).T)",
        ("tests/model/test_lora.py::test_it_is_pefts_layer",),
    ),
    Mutation(
        "a layer's weight that trains gets no gradient from oneDNN's product",
        "chatllama/runtime/products.py",
        "x if ctx.needs_input_grad[1] else None",
        "None",
        ("tests/runtime/test_products.py::test_a_layers_numbers_and_gradients",),
    ),
    Mutation(
        "critic's gradients without its coefficient",
        UPDATE,
        "return None, None, *(slopes[0] * gradient for gradient in ctx.gradients)",
        "return None, None, *ctx.gradients",
        ("tests/ppo/test_ppo_update.py::test_two_steps_are_what_the_oracle_does[plain]",),
    ),
    Mutation(
        "reward read at the token before the last",
        SCORING,
        "last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)",
        "last = mask & (mask.flip(1).cumsum(1).flip(1) == 2)",
        (LAMBDA_1, "tests/model/test_scoring.py::test_scores_for_padding_on_either_side[left]"),
    ),
    Mutation(
        "dropout in PPO",
        ROLES,
        "lora_dropout=lora.dropout if dropout else 0.0,",
        "lora_dropout=lora.dropout,",
        ("tests/model/test_roles.py::test_dropout_only_where_it_is_asked_for",),
    ),
    Mutation(
        "reference is the policy",
        ROLLOUT,
        "compared = response_logprobs(model, reference, *batch, temperature)",
        'compared = response_logprobs(model, "policy", *batch, temperature)',
        (LAMBDA_1, KL_MEANS),
    ),
    Mutation(
        "reference is the bare base",
        ROLLOUT,
        "compared = response_logprobs(model, reference, *batch, temperature)",
        'compared = response_logprobs(model, "base", *batch, temperature)',
        (LAMBDA_1, START),
    ),
    Mutation(
        "reference built without SFT's weights",
        SETUP,
        'adapters["reference"] = start',
        'adapters["reference"] = Adapter(sft.lora)',
        (LAMBDA_1, START),
    ),
    Mutation(
        "policy starts from the bare base",
        SETUP,
        'adapters["policy"] = Adapter(start.lora, start.state, trainable=True)',
        'adapters["policy"] = Adapter(start.lora, None, trainable=True)',
        (START,),
    ),
    Mutation(
        "reward head on SFT's adapter",
        SETUP,
        "adapters[role] = Adapter(saved.lora, saved.state)",
        "adapters[role] = Adapter(saved.lora, start.state)",
        (LAMBDA_1, RLOO),
    ),
    Mutation(
        "EOS masked out (padding found by its id)",
        ROLLOUT,
        "response_ids, response_mask = pad_right(responses, pad_id)",
        "response_ids, _ = pad_right(responses, pad_id); response_mask = response_ids != pad_id",
        (LAMBDA_1, RLOO),
    ),
    Mutation(
        "no mask behind EOS",
        ROLLOUT,
        "response_ids, response_mask = pad_right(responses, pad_id)",
        "response_ids, _ = pad_right(responses, pad_id);"
        " response_mask = torch.ones_like(response_ids) > 0",
        (LAMBDA_1, "tests/ppo/test_rollout.py::test_arranged_by_hand"),
    ),
    Mutation(
        "every response counts as finished",
        ROLLOUT,
        "finished=torch.tensor([response[-1] in stop_ids for response in responses])",
        "finished=torch.tensor([True for response in responses])",
        (LAMBDA_1, "tests/ppo/test_rollout.py::test_arranged_by_hand"),
    ),
    Mutation(
        "values of the rollout left at zero",
        ROLLOUT,
        'filled["values"][rows, :width] = values',
        'filled["values"][rows, :width] = 0 * values',
        (LAMBDA_1, CLIPPED),
    ),
    Mutation(
        "top 50 where all tokens were asked for",
        SAMPLING,
        "section.top_k, section.top_p)",
        "section.top_k or 50, section.top_p)",
        ("tests/generation/test_sampling.py::test_sampling_is_read_from_the_config",),
    ),
    Mutation(
        "the sampler attends to the padding",
        "chatllama/generation/kv_cache.py",
        "return columns >= starts, self.end - starts",
        "return columns >= 0 * starts, self.end - starts",
        (
            SAMPLER,
            "tests/generation/test_generate.py::test_greedy_equals_transformers_for_ragged_prompts",
        ),
    ),
    Mutation(
        "positions that stand still in sampling",
        "chatllama/generation/decoding_batch.py",
        "position_ids=positions,",
        "position_ids=0 * positions,",
        (
            SAMPLER,
            "tests/generation/test_generate.py::test_greedy_equals_transformers_for_ragged_prompts",
        ),
    ),
)

MUTATIONS = (*REWARD_BUGS, *ADVANTAGE_BUGS, *LOSS_BUGS, *SCORING_BUGS, *RUN_BUGS)
