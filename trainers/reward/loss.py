"""The reward model's loss as a pure function of tensors; shape legend: P pairs.

It divides by the prompts of the whole optimizer step, so that splitting the step into microbatches
and ranks changes nothing. SFT's loss is in `chatllama/model/lm_head.py`, PPO's in `ppo_math.py`.
"""

import torch
from torch.nn.functional import logsigmoid


def pairwise_loss(
    better: torch.Tensor,
    worse: torch.Tensor,
    margin: torch.Tensor,
    weight: torch.Tensor,
    num_prompts: int,
    *,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean over prompts of -log sigmoid(r_better - r_worse - margin), averaged over their pairs.

    With weight = 1 / C(K, 2) this is the loss of K ranked answers of InstructGPT (arXiv
    2203.02155, eq. 1), and for K = 2 plain Bradley-Terry. Margin as in LLaMA-2 (arXiv 2307.09288,
    3.2.2); centring, c (r_better + r_worse)^2, as in Eisenstein 2023 (arXiv 2312.09244). Smoothing
    weighs the opposite label: (1 - e) * -log sigmoid(d) + e * -log sigmoid(-d).

    Args:
        better: (P,) float32, scores of the preferred answers.
        worse: (P,) float32, scores of the others.
        margin: (P,) float32, subtracted from the difference of the scores.
        weight: (P,) float32, 1 / number of pairs of the pair's prompt.
        num_prompts: prompts of the whole optimizer step, over all ranks and microbatches.
        center_coef: c; with 0 the level of the scores is arbitrary.
        label_smoothing: e, the assumed share of wrong labels.
    """
    gap = better - worse - margin
    losses = -(1 - label_smoothing) * logsigmoid(gap) - label_smoothing * logsigmoid(-gap)
    losses = losses + center_coef * (better + worse).square()
    return (weight * losses).sum() / num_prompts
