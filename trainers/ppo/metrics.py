"""The metrics of a PPO step, which docs/ppo.md explains: of its rollout and of its update."""

import torch
from torch import Tensor

from chatllama.config.ppo import PpoSection
from chatllama.runtime.distributed import all_max, all_sum
from trainers.ppo.ppo_math import PolicyLoss, ValueLoss, masked
from trainers.ppo.rollout import Rollout


def rollout_metrics(rollout: Rollout, scores: Tensor, rewards: Tensor) -> dict[str, float]:
    """Metrics of a rollout batch. KL estimates are k1: per response, and per token.

    Args:
        scores: (B,) float32, shaped.
        rewards: (B, R) float32.
    """
    mask = rollout.response_mask
    token_kl = masked(rollout.kl, mask)
    kl, num_tokens = token_kl.sum(1), mask.sum()
    # Mean 0 where tokens come from the distribution that scores them.
    surprise = masked(-rollout.logprobs - rollout.entropy, mask)
    # One response has no standard error.
    error = {"ppo/kl_sequence_se": float(kl.std() / len(kl) ** 0.5)} if len(kl) > 1 else {}
    return error | {
        "ppo/score_mean": float(scores.mean()),
        "ppo/score_std": float(scores.std(correction=0)),
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
        self, section: PpoSection, norms: list[float], lr: float, planned: int, has_critic: bool
    ) -> dict[str, float]:
        """Metrics over tokens, epochs and ranks.

        Args:
            norms: gradient norm of each optimizer step.
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
            "ppo/lr": lr,
            "ppo/optimizer_steps": float(len(norms)),
        }
        if has_critic:
            metrics |= {"ppo/value_loss": value, "ppo/value_clip_fraction": value_clipped}
        if section.kl_loss_coef:
            metrics["ppo/kl_loss"] = drift
        if section.ptx_coef:
            metrics["ppo/ptx_loss"] = sums[4] / len(norms)
        if section.target_kl is not None:
            metrics["ppo/update_share"] = len(norms) / planned
        return metrics
