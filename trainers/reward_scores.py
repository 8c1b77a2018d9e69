"""How the reward model scores ranked answers, in training and on those held out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset

from chatllama.config import Config
from chatllama.distributed import device
from chatllama.roles import RoleModel
from chatllama.scoring import score_sequences
from chatllama.shared_prompts import score_shared
from data.answer_rows import AnswerRows, SharedPromptCollator
from data.collate import PreferenceCollator, answer_pairs
from trainers.dealing import collect, deal
from trainers.losses import pairwise_loss

Collator = PreferenceCollator | SharedPromptCollator


@dataclass(frozen=True)
class HeldOut:
    """How scores order answers that were not trained on; all prompts weigh the same."""

    accuracy: float
    """Share of pairs with the preferred answer scored higher; ties count one half."""
    loss: float
    """Mean pairwise loss, without margin, centring and smoothing."""
    num_pairs: int
    num_prompts: int


def collator_for(cfg: Config, pad_id: int) -> Collator:
    """Prompts shared by their answers, but with flash attention, which knows no such rows."""
    if cfg.backbone.attn_implementation == "flash_attention_2":
        return PreferenceCollator(pad_id)
    return SharedPromptCollator(pad_id, cfg.reward.max_length)


def scoring_of(inputs: tuple[torch.Tensor, ...]) -> Callable[..., torch.Tensor]:
    """What scores a collator's inputs, one number for each answer."""
    return score_shared if isinstance(inputs, AnswerRows) else score_sequences


def ordered(gap: torch.Tensor) -> torch.Tensor:
    """1 where the preferred answer scores higher, 0.5 for a tie."""
    return (gap > 0).float() + 0.5 * (gap == 0).float()


@torch.no_grad()
def score_answers(
    model: RoleModel, examples: Dataset, collator: Collator, microbatch_size: int
) -> torch.Tensor:
    """Scores of all answers, example by example, dealt out over the ranks: (N,) float32."""
    model.eval()
    counts = [len(ranks) for ranks in examples["ranks"][:]]
    firsts = [0]
    for count in counts:
        firsts.append(firsts[-1] + count)
    scores = torch.zeros(firsts[-1], device=device())
    for rows, counted in deal(len(examples), microbatch_size):
        inputs, _ = collator([examples[i] for i in rows])
        found = scoring_of(inputs)(model, *inputs)
        if counted:
            scores[firsts[rows[0]] : firsts[rows[-1] + 1]] = found
    return collect(scores)


def measure(examples: Dataset, scores: torch.Tensor) -> HeldOut:
    """Accuracy and loss of scores.

    Args:
        examples: held-out ones.
        scores: (N,) float32, of their answers, from `score_answers`.
    """
    pairs = answer_pairs(examples.select_columns(["ranks", "ratings"]).to_list())
    scores = scores.cpu()
    better, worse = scores[pairs.better], scores[pairs.worse]
    accuracy = (pairs.weight * ordered(better - worse)).sum() / len(examples)
    loss = pairwise_loss(better, worse, torch.zeros_like(better), pairs.weight, len(examples))
    return HeldOut(float(accuracy), float(loss), len(better), len(examples))
