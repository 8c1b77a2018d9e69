"""Scores of ranked answers, held-out accuracy, the padding check and PPO's gate; no training."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from datasets import Dataset

from chatllama.config.schema import Config, RewardSection
from chatllama.model.roles import RoleModel
from chatllama.model.scoring import score_sequences, score_shared
from chatllama.reporting.summary import below_bayes
from chatllama.runs.folder import RunFolder
from chatllama.runtime.distributed import device
from chatllama.runtime.json_files import held_to_be_whole
from chatllama.text.padding import pad_left, pad_right
from data.batches import AnswerRows, PreferenceCollator, SharedPromptCollator, answer_pairs
from trainers.engine.microbatches import distribute, gather_rows
from trainers.reward.loss import pairwise_loss

PADDING_SAMPLE = 8
Collator = PreferenceCollator | SharedPromptCollator


@dataclass(frozen=True)
class HeldOut:
    """Accuracy and loss on held-out answers; all prompts weigh the same."""

    accuracy: float
    """Share of pairs with the preferred answer scored higher; ties count one half."""
    loss: float
    """Mean pairwise loss, without margin, centring and smoothing."""
    num_pairs: int
    num_prompts: int


def collator_for(cfg: Config, pad_id: int) -> Collator:
    """Rows that share a prompt among its answers, except with flash attention, which lacks them."""
    if cfg.backbone.attn_implementation == "flash_attention_2":
        return PreferenceCollator(pad_id)
    return SharedPromptCollator(pad_id, cfg.reward.max_length)


def scoring_of(inputs: tuple[torch.Tensor, ...]) -> Callable[..., torch.Tensor]:
    """The function that scores a collator's inputs, one number for each answer."""
    return score_shared if isinstance(inputs, AnswerRows) else score_sequences


def ordered(gap: torch.Tensor) -> torch.Tensor:
    """1 where the preferred answer scores higher, 0.5 for a tie."""
    return (gap > 0).float() + 0.5 * (gap == 0).float()


@torch.no_grad()
def score_answers(
    model: RoleModel, examples: Dataset, collator: Collator, microbatch_size: int
) -> torch.Tensor:
    """Scores of all answers, example by example: (N,) float32. Ranks split the work."""
    model.eval()
    firsts = [0, *accumulate(len(ranks) for ranks in examples["ranks"][:])]
    scores = torch.zeros(firsts[-1], device=device())
    for rows, counted in distribute(len(examples), microbatch_size):
        inputs, _ = collator([examples[i] for i in rows])
        found = scoring_of(inputs)(model, *inputs)
        if counted:
            scores[firsts[rows[0]] : firsts[rows[-1] + 1]] = found
    return gather_rows(scores)


def measure(examples: Dataset, scores: torch.Tensor) -> HeldOut:
    """Accuracy and loss of the examples' scores, (N,) float32 from `score_answers`."""
    pairs = answer_pairs(examples.select_columns(["ranks", "ratings"]).to_list())
    scores = scores.cpu()
    better, worse = scores[pairs.better], scores[pairs.worse]
    accuracy = (pairs.weight * ordered(better - worse)).sum() / len(examples)
    loss = pairwise_loss(better, worse, torch.zeros_like(better), pairs.weight, len(examples))
    return HeldOut(float(accuracy), float(loss), len(better), len(examples))


@dataclass(frozen=True)
class PaddingError:
    """Change of scores with padding and neighbours; see `padding_error`."""

    error: float
    tolerance: float


@dataclass(frozen=True)
class Member:
    """Results of a trained member of the ensemble."""

    loss: float
    """Of its last optimizer step."""
    scores: list[float]
    """Of every held-out answer, example by example."""
    padding: PaddingError


@torch.no_grad()
def padding_error(model: RoleModel, held_out: Dataset, pad_id: int) -> PaddingError:
    """Largest change of a score between alone, padded left and padded right in one batch.

    Takes the first few examples; every rank must call with the same ones. Types narrower than
    float32 round differently with the shape of a batch, which the tolerance allows for.
    """
    model.eval()
    examples = [held_out[i] for i in range(min(PADDING_SAMPLE, len(held_out)))]
    rows = [ids for example in examples for ids in example["answer_ids"]][: 2 * PADDING_SAMPLE]

    def scores(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return score_sequences(model, ids, mask).cpu()

    alone = torch.cat([scores(*pad_right([row], pad_id)) for row in rows])
    together = [scores(*pad(rows, pad_id)) for pad in (pad_left, pad_right)]
    error = max(float((batch - alone).abs().max()) for batch in together)
    share_of_spread = 1e-3 if model.llama.dtype == torch.float32 else 0.1
    return PaddingError(error, share_of_spread * max(1e-2, float(alone.std())))


def check_gate(run: RunFolder, section: RewardSection) -> list[str]:
    """Warnings about the reward model before PPO starts.

    Raises:
        ValueError: its held-out accuracy is no better than guessing, without `reward.allow_weak`.
    """
    if section.adapter is not None:
        return [f"how good the reward model is has not been measured here: {section.adapter}"]
    numbers, names = run.read_result("reward"), ("accuracy", "accuracy_low", "accuracy_high")
    with held_to_be_whole(run.result("reward")):
        accuracy, low, high = (numbers[name] for name in names)
    warnings = []
    if low <= 0.5:
        text = (
            f"the reward model orders {accuracy:.1%} of the held-out pairs as the labels do (95 % "
            f"interval {low:.1%} to {high:.1%}, {int(numbers['num_eval_pairs'])} pairs): that "
            "cannot be distinguished from guessing, and PPO would climb noise"
        )
        if not section.allow_weak:
            raise ValueError(
                f"{text}. See {run.reward_diagnosis}. Remedies: more or cleaner "
                "pairs, more held-out pairs, reward.epochs, reward.learning_rate, lora.r; or "
                "reward.allow_weak=true to start all the same"
            )
        warnings.append(text)
    if text := below_bayes(accuracy, numbers.get("bayes_accuracy")):
        warnings.append(f"the reward model's {text}")
    return warnings
