"""Stage 2: the reward model, an adapter that starts from SFT's plus a scalar head.

The loss is in `losses.py`. Scores are read at the last token, which is the end of turn; pairs come
from `data/preferences.py`.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from chatllama.backbone import base_path, load_backbone
from chatllama.batching import lr_factor, microbatches_per_step, optimizer_steps
from chatllama.chat_format import check_contract
from chatllama.checkpoint import checkpoint_to_resume, save_step
from chatllama.config import Config, EvaluationSection
from chatllama.distributed import all_sum, barrier, device, rank, world_size
from chatllama.export import load_adapter, save_adapter
from chatllama.roles import Adapter, RoleModel, adapter_parameters, adapter_state, score_sequences
from chatllama.run_folder import RunFolder
from chatllama.statistics import wilson_interval
from chatllama.tracking import Tracker
from chatllama.user_functions import load_function
from data.collate import PairCollator, batch_indices
from data.mixture import load_mixture
from data.preferences import tokenize_preferences
from trainers.dealing import collect, deal, microbatches
from trainers.engine import (
    Engine,
    OptimizerSettings,
    ParameterGroup,
    gathered,
    partitioned_loading,
    seed_step,
)
from trainers.losses import pairwise_loss


@dataclass(frozen=True)
class Pairs:
    """Tokenised preference pairs."""

    train: Dataset
    held_out: Dataset
    bayes_accuracy: float | None
    """The best accuracy on held-out pairs that any model can have, where gold is known."""


@dataclass(frozen=True)
class HeldOut:
    """How the scores order pairs that were not trained on."""

    accuracy: float
    """Share of pairs with the preferred answer scored higher; ties count one half."""
    loss: float
    """Mean pairwise loss, without margin and centring."""
    num_pairs: int


def load_pairs(cfg: Config, tokenizer: PreTrainedTokenizerFast) -> Pairs:
    """Training and held-out pairs, read, split and tokenised as the config says.

    Raises:
        ValueError: bad records, or no pair is left to train on or to hold out.
    """
    section = cfg.reward
    mixture = load_mixture(
        section.data, section.eval_data, section.eval_fraction, cfg.seed, "preferences"
    )
    if rank() == 0:
        print(mixture.summary())
    parts = []
    for name, records in (("training", mixture.train), ("held-out", mixture.held_out)):
        if not len(records):
            raise ValueError(f"reward: no {name} pairs; set reward.eval_data or eval_fraction")
        tokens, report = tokenize_preferences(records, tokenizer, cfg.chat, section.max_length)
        if rank() == 0:
            print(f"{name} pairs: {report.summary()}")
        parts.append(tokens)
    return Pairs(parts[0], parts[1], bayes_accuracy(cfg.evaluation, mixture.held_out))


def bayes_accuracy(evaluation: EvaluationSection, pairs: Dataset) -> float | None:
    """Mean of max(p, 1 - p) over the pairs, p the probability of the label that gold gives.

    Args:
        evaluation: names gold and the scale of the labels' noise; without them there is no limit.
        pairs: records with prompt, chosen and rejected texts.
    """
    if evaluation.gold is None or evaluation.label_scale is None:
        return None
    gold = load_function(evaluation.gold, "evaluation.gold")
    total = 0.0
    for pair in cast(Iterable[dict[str, Any]], pairs):
        prompt = pair["prompt"][-1]["content"]
        gap = gold(prompt, pair["chosen"]) - gold(prompt, pair["rejected"])
        total += 1 / (1 + math.exp(-evaluation.label_scale * abs(gap)))
    return total / len(pairs)


def build_reward_model(
    cfg: Config, run: RunFolder, tokenizer: PreTrainedTokenizerFast
) -> RoleModel:
    """The frozen base with a trainable reward adapter, SFT's where there is one, and a new head.

    Raises:
        ValueError: SFT's adapter is missing, damaged, or made under another chat contract.
    """
    state = None
    if cfg.lora is not None:
        sft = load_adapter(run.sft_adapter)
        check_contract(sft.info["contract"], tokenizer, cfg.chat, str(run.sft_adapter))
        state = sft.state
    with partitioned_loading(cfg.deepspeed, cfg.backbone.dtype):
        backbone = load_backbone(cfg.backbone, base_path(cfg, run))
    torch.manual_seed(cfg.seed)
    adapter = Adapter(cfg.adapter_lora, state, trainable=True)
    model = RoleModel(backbone, {"reward": adapter}, heads=("reward",), dropout=True)
    if cfg.backbone.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def train_reward(
    cfg: Config,
    run: RunFolder,
    pairs: Pairs,
    model: RoleModel,
    pad_id: int,
    resume: bool,
) -> dict[str, float]:
    """Trains adapter and head; returns the stage's closing numbers."""
    section = cfg.reward
    accumulation = microbatches_per_step(section, world_size(), "reward")
    parameters = adapter_parameters(model, "reward") + list(model.heads["reward"].parameters())
    engine = Engine(
        model,
        [ParameterGroup("reward", parameters, section.learning_rate)],
        OptimizerSettings(
            section.adam_betas, section.adam_eps, section.weight_decay, section.max_grad_norm
        ),
        cfg.deepspeed,
        microbatch_size=section.microbatch_size,
        accumulation_steps=accumulation,
    )
    total = optimizer_steps(section, len(pairs.train))
    collator = PairCollator(pad_id)
    checkpoint = checkpoint_to_resume(run, "reward", resume)
    first = 0
    started = time.monotonic()
    metrics: dict[str, float] = {}
    with Tracker(run, "reward", cfg.tracking, total, rank()) as tracker:
        if checkpoint is not None:
            first = engine.load(checkpoint)["step"]
            tracker.resume_from(first)
        for step in range(first, total):
            seed_step(cfg.seed, step)
            batch = batch_indices(len(pairs.train), section.batch_size, step, cfg.seed)
            factor = lr_factor(step, total, section.lr_schedule, section.warmup_steps)
            metrics = _optimizer_step(cfg, engine, pairs.train, batch, collator, factor)
            done = step + 1
            if done % cfg.tracking.log_every == 0 or done == total:
                tracker.log(done, metrics)
            if section.eval_every and done % section.eval_every == 0 and done < total:
                held_out = evaluate_pairs(model, pairs.held_out, collator, section.microbatch_size)
                tracker.log(done, _evaluation_metrics(held_out))
            if section.save_every and done % section.save_every == 0:
                save_step(
                    run,
                    "reward",
                    done,
                    section.save_total_limit,
                    lambda folder, done=done: engine.save(folder, {"step": done}),
                )
        held_out = evaluate_pairs(model, pairs.held_out, collator, section.microbatch_size)
        tracker.log(total, _evaluation_metrics(held_out))
    low, high = wilson_interval(held_out.accuracy * held_out.num_pairs, held_out.num_pairs)
    return {
        "accuracy": held_out.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        **({} if pairs.bayes_accuracy is None else {"bayes_accuracy": pairs.bayes_accuracy}),
        "eval_loss": held_out.loss,
        "num_eval_pairs": held_out.num_pairs,
        "loss": metrics.get("reward/loss", float("nan")),
        "steps": total,
        "wall_seconds": time.monotonic() - started,
    }


def _optimizer_step(
    cfg: Config,
    engine: Engine,
    train: Dataset,
    batch: list[int],
    collator: PairCollator,
    factor: float,
) -> dict[str, float]:
    """One step of the optimiser over `batch`; its metrics over all ranks."""
    section = cfg.reward
    engine.model.train()
    sums = torch.zeros(4, device=device())
    for rows in microbatches(batch, section.microbatch_size):
        inputs = collator([train[i] for i in rows])
        tokens, mask = inputs["input_ids"].to(device()), inputs["mask"].to(device())
        margin = section.margin_coef * inputs["margin"].to(device())
        chosen, rejected = engine("scores", tokens, mask).chunk(2)
        loss = pairwise_loss(chosen, rejected, margin, section.center_coef, len(batch))
        engine.backward(loss)
        with torch.no_grad():
            gap = chosen - rejected
            sums += torch.stack(
                [loss, _ordered(gap).sum(), gap.sum(), (chosen + rejected).sum() / 2]
            )
    norm = engine.step(factor)
    loss_sum, ordered, gaps, scores = all_sum(sums).tolist()
    return {
        "reward/loss": loss_sum,
        "reward/accuracy": ordered / len(batch),
        "reward/margin": gaps / len(batch),
        "reward/score_mean": scores / len(batch),
        "reward/grad_norm": norm,
        "reward/lr": section.learning_rate * factor,
    }


def _ordered(gap: torch.Tensor) -> torch.Tensor:
    """1 where the preferred answer scores higher, 0.5 for a tie."""
    return (gap > 0).float() + 0.5 * (gap == 0).float()


@torch.no_grad()
def evaluate_pairs(
    model: RoleModel, held_out: Dataset, collator: PairCollator, microbatch_size: int
) -> HeldOut:
    """Accuracy and loss of the reward head on held-out pairs, dealt out over the ranks."""
    model.eval()
    gaps = torch.zeros(len(held_out), device=device())
    for rows, counts in deal(len(held_out), microbatch_size):
        inputs = collator([held_out[i] for i in rows])
        scores = score_sequences(
            model, inputs["input_ids"].to(device()), inputs["mask"].to(device())
        )
        chosen, rejected = scores.chunk(2)
        if counts:
            gaps[rows] = chosen - rejected
    gaps = collect(gaps)
    zeros = torch.zeros_like(gaps)
    loss = pairwise_loss(gaps, zeros, zeros, 0.0, len(gaps))
    return HeldOut(float(_ordered(gaps).mean()), float(loss), len(gaps))


def _evaluation_metrics(held_out: HeldOut) -> dict[str, float]:
    return {"reward/eval_accuracy": held_out.accuracy, "reward/eval_loss": held_out.loss}


def export_reward(cfg: Config, run: RunFolder, model: RoleModel, info: dict[str, object]) -> None:
    """Writes the reward adapter with its head to RUN/reward/adapter; every rank must call."""
    with gathered(list(model.parameters())):
        if rank() == 0:
            save_adapter(
                run.reward_adapter,
                adapter_state(model, "reward"),
                cfg.adapter_lora,
                info,
                head=dict(model.heads["reward"].named_parameters()),
            )
    barrier()
