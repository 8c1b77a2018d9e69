"""The metrics of a PPO step, which docs/ppo.md explains: of its rollout and of its update."""

from collections.abc import Mapping

import torch
from torch import Tensor

from chatllama.config.ppo import PpoSection
from chatllama.runtime.distributed import all_max, all_sum
from trainers.ppo.ppo_math import PolicyLoss, ValueLoss, masked
from trainers.ppo.rollout import Rollout


def rollout_metrics(rollout: Rollout, scores: Tensor, rewards: Tensor) -> dict[str, float]:
    """Metrics of a rollout batch. KL estimates are k1: per response, and per token.

    One response has no deviation, and the responses to one prompt no standard error. Raw score and
    length correlate by 0 where either is the same for all.

    Args:
        scores: (B,) float32, shaped.
        rewards: (B, R) float32.
    """
    mask = rollout.response_mask
    token_kl = masked(rollout.kl, mask)
    kl, num_tokens = token_kl.sum(1), mask.sum()
    # Mean 0 where tokens come from the distribution that scores them.
    surprise = masked(-rollout.logprobs - rollout.entropy, mask)
    some: dict[str, float] = {}
    numbers = _prompt_numbers(rollout)
    for name, values in (("kl_sequence", kl), ("score", scores)):
        if (error := clustered_error(values, numbers)) is not None:
            some[f"ppo/{name}_se"] = error
    if len(scores) > 1:
        some["ppo/score_std"] = float(scores.std(correction=0))
        some["ppo/rm_score_std"] = float(rollout.scores.double().std(correction=0))
        pair = torch.stack([rollout.scores.double(), rollout.lengths.double()])
        some["ppo/length_correlation"] = float(torch.corrcoef(pair)[0, 1].nan_to_num())
    return some | {
        "ppo/score_mean": float(scores.mean()),
        "ppo/rm_score_mean": float(rollout.scores.mean()),
        "ppo/reward_mean": float(rewards.sum(1).mean()),
        "ppo/kl_sequence": float(kl.mean()),
        "ppo/kl_token": float(kl.sum() / num_tokens),
        "ppo/kl_abs_mean": float(token_kl.abs().sum() / num_tokens),
        "ppo/kl_abs_max": float(token_kl.abs().max()),
        "ppo/surprise_gap": float(surprise.sum() / num_tokens),
        "ppo/surprise_gap_se": float(surprise.square().sum().sqrt() / num_tokens),
        "ppo/response_length": float(rollout.lengths.float().mean()),
        "ppo/eos_rate": float(rollout.finished.float().mean()),
    }


def _prompt_numbers(rollout: Rollout) -> Tensor:
    """(B,) int64: equal for responses to the same prompt."""
    width = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
    ids = torch.where(rollout.mask[:, :width], rollout.tokens[:, :width], -1)
    return torch.unique(ids, dim=0, return_inverse=True)[1]


def clustered_error(values: Tensor, clusters: Tensor) -> float | None:
    """Standard error of the mean of numbers that are independent between clusters alone.

    sqrt(C / (C - 1) * sum over C clusters of (sum of value - mean)^2) / N; of clusters of equal
    size, the standard error of the mean of their means. None for one cluster.

    Args:
        values: (N,) float32.
        clusters: (N,) int64, from 0.
    """
    count = int(clusters.max()) + 1
    if count == 1:
        return None
    sums = torch.zeros(count).double().index_add(0, clusters, (values - values.mean()).double())
    return float((count / (count - 1) * sums.square().sum()).sqrt() / len(values))


class UpdateSums:
    """Sums over this rank's tokens of an update, and peaks; on the device, so that nothing waits.

    `sums` are approx_kl, the losses (policy, value, KL, ptx) times their divisors, and numbers of
    clipped and value-clipped tokens, entropy and tokens; `first` are |log ratio| and tokens of the
    first minibatch; `peaks` ratio and first |log ratio|.
    """

    def __init__(self, place: torch.device) -> None:
        self.sums = torch.zeros(9, device=place)
        self.first = torch.zeros(2, device=place)
        self.peaks = torch.zeros(2, device=place)

    @property
    def approx_kl(self) -> Tensor:
        """() sum of 0.5 (log pi - log pi_old)^2 so far."""
        return self.sums[0].clone()

    @torch.no_grad()
    def add(
        self,
        policy: PolicyLoss,
        critic: ValueLoss | None,
        drift: Tensor,
        ptx_loss: Tensor,
        entropy: Tensor,
        mask: Tensor,
        num_tokens: float,
        first_log_ratio: Tensor | None,
    ) -> None:
        """Adds a microbatch.

        Args:
            drift: () the KL loss.
            entropy: (B, R) float32, nats.
            mask: (B, R) bool, tokens that count in the loss.
            num_tokens: of the minibatch, by which losses are divided.
            first_log_ratio: (B, R) |log ratio|, in the first minibatch only.
        """
        zero = torch.zeros_like(drift)
        value, value_clipped = (zero, zero) if critic is None else (critic.loss, critic.clipped)
        losses = (policy.loss * num_tokens, value * num_tokens, drift * num_tokens, ptx_loss)
        counts = (policy.clipped, value_clipped, masked(entropy, mask).sum(), mask.sum())
        self.sums += torch.stack([policy.approx_kl, *losses, *counts])
        largest = self.peaks[1]
        if first_log_ratio is not None:
            self.first += torch.stack([masked(first_log_ratio, mask).sum(), mask.sum()])
            largest = first_log_ratio.max()
        self.peaks = torch.maximum(self.peaks, torch.stack([policy.ratio_max, largest]))

    def metrics(
        self, section: PpoSection, norms: list[float], factors: Mapping[str, float], planned: int
    ) -> dict[str, float]:
        """Metrics over tokens, epochs and ranks.

        Args:
            norms: gradient norm of each optimizer step.
            factors: share of its peak learning rate of each group that moved in the last step.
            planned: optimizer steps, had the update not stopped early.
        """
        *sums, first, first_tokens = all_sum(torch.cat([self.sums, self.first])).tolist()
        ratio_max, first_log_ratio = all_max(self.peaks).tolist()
        tokens = max(sums[-1], 1.0)
        approx_kl, policy, value, drift, _, clipped, value_clipped, entropy, _ = (
            total / tokens for total in sums
        )
        metrics = {
            "ppo/policy_loss": policy,
            "ppo/clip_fraction": clipped,
            "ppo/approx_kl": approx_kl,
            "ppo/entropy": entropy,
            "ppo/ratio_max": ratio_max,
            "ppo/first_log_ratio": first_log_ratio,
            "ppo/first_log_ratio_mean": first / max(first_tokens, 1.0),
            "ppo/grad_norm": sum(norms) / len(norms),
            "ppo/lr": section.learning_rate * factors.get("policy", 0.0),
            "ppo/optimizer_steps": float(len(norms)),
        }
        if "value" in factors:
            rate = section.value_learning_rate or section.learning_rate
            metrics |= {"ppo/value_loss": value, "ppo/value_clip_fraction": value_clipped}
            metrics["ppo/value_lr"] = rate * factors["value"]
        if section.kl_loss_coef:
            metrics["ppo/kl_loss"] = drift
        if section.ptx_coef:
            metrics["ppo/ptx_loss"] = sums[4] / len(norms)
        if section.target_kl is not None:
            metrics["ppo/update_share"] = len(norms) / planned
        return metrics
