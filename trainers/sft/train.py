"""Stage 1: supervised instruction tuning (LLaMA-I): the loss of a step and the evaluation.

The loop is in `trainers/stages/loop.py`, the rows in `data.py`, the forward pass in `model.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from chatllama.config.schema import Config
from chatllama.config.stages import SftSection
from chatllama.reporting.tracker import Tracker
from chatllama.runs.folder import RunFolder
from chatllama.runtime.distributed import all_sum, device, rank
from trainers.engine.engine import Engine
from trainers.engine.microbatches import distribute
from trainers.sft.data import RowCollator, Rows, num_trained, row_lengths
from trainers.sft.model import token_losses
from trainers.stages.loop import train_steps


class Trained(NamedTuple):
    """What is trained, and what each forward pass needs to know."""

    section: SftSection
    engine: Engine
    rows: Rows
    collator: Callable[..., dict[str, torch.Tensor]]
    """`RowCollator`."""
    use_bfloat16: bool
    """Whether the forward pass runs under autocast to bfloat16."""


def train_sft(
    cfg: Config,
    run: RunFolder,
    rows: Rows,
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    resume: bool,
    is_backbone: bool = False,
) -> dict[str, float]:
    """Trains the model in place and returns the closing numbers.

    Args:
        rows: from `load_rows`.
        engine: from `build_engine`.
        resume: go on from the newest checkpoint, if there is one.
        is_backbone: a backbone from text trains, which a signal ends without saving it.

    Raises:
        ValueError: there are checkpoints and `resume` is off.
    """
    section = cfg.sft
    # Flash attention reads document boundaries from one long row only.
    flat = cfg.backbone.attn_implementation == "flash_attention_2"
    collator = RowCollator(cast(int, tokenizer.pad_token_id), flat)
    trained = Trained(section, engine, rows, collator, cfg.backbone.dtype == "bfloat16")
    ends = slice(section.batch_size - 1, None, section.batch_size)
    tokens_after = np.cumsum(row_lengths(rows.train))[ends].tolist()

    def step_and_tokens(step: int, factor: float) -> dict[str, float]:
        return optimizer_step(trained, step, factor) | {"sft/tokens": tokens_after[step]}

    title = "backbone" if is_backbone else None
    with Tracker(run, "sft", cfg.tracking, rows.steps, rank(), title) as tracker:
        loss = train_steps(
            cfg,
            section,
            run,
            "sft",
            engine,
            tracker,
            rows.steps,
            seed=cfg.seed,
            resume=resume,
            optimizer_step=step_and_tokens,
            evaluate=partial(evaluate, trained),
            batch=partial(whole_batch, trained),
            interrupted=None if is_backbone else run,
        )
        held_out = evaluate(trained)
        if held_out:
            tracker.log(rows.steps, held_out)
    numbers = {"loss": loss, "steps": rows.steps, "tokens": tokens_after[-1]}
    numbers |= {name.removeprefix("sft/"): value for name, value in held_out.items()}
    return numbers | rows.facts


def optimizer_step(trained: Trained, step: int, factor: float) -> dict[str, float]:
    """One step of the optimiser; its metrics over all ranks.

    The loss is the sum over the trained tokens of the whole batch, divided by their number: the
    same for any split into microbatches and ranks.
    """
    section, engine = trained.section, trained.engine
    engine.model.train()
    first = step * section.batch_size
    batches = [
        trained.collator([trained.rows.train[first + place] for place in places])
        for places, _ in distribute(section.batch_size, section.microbatch_size)
    ]
    own_tokens = sum(num_trained(batch) for batch in batches)
    num_tokens = all_sum(torch.tensor(own_tokens, device=device())).clamp(min=1)
    sums = torch.zeros(2, dtype=torch.float64, device=device())
    for number, batch in enumerate(batches):
        engine.show("microbatch", number, len(batches))
        losses = engine(token_losses, batch, trained.use_bfloat16)
        loss = losses.loss_sum / num_tokens
        engine.backward(loss)
        sums += torch.stack([loss.detach(), losses.num_correct / num_tokens])
    norm = engine.step(factor)
    loss_sum, accuracy = all_sum(sums).tolist()
    return {
        "sft/loss": loss_sum,
        "sft/accuracy": accuracy,
        "sft/lr": section.learning_rate * factor,
        "sft/grad_norm": norm,
    }


def whole_batch(trained: Trained, step: int) -> dict[str, torch.Tensor]:
    """The batch of all ranks in a step from 0, for the file that shows why it is not finite."""
    first, count = step * trained.section.batch_size, trained.section.batch_size
    return trained.collator([trained.rows.train[first + place] for place in range(count)])


@torch.no_grad()
def evaluate(trained: Trained) -> dict[str, float]:
    """Token mean of loss and accuracy on the held-out rows, over all ranks; empty without any."""
    rows, engine = trained.rows.held_out, trained.engine
    if rows is None:
        return {}
    engine.model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device())
    for places, counted in distribute(len(rows), trained.section.microbatch_size):
        batch = trained.collator([rows[place] for place in places])
        losses = engine(token_losses, batch, trained.use_bfloat16)
        if counted:
            totals[:2] += torch.stack([losses.loss_sum, losses.num_correct])
            totals[2] += num_trained(batch)
    loss, correct, tokens = all_sum(totals).tolist()
    return {"sft/eval_loss": loss / max(tokens, 1), "sft/eval_accuracy": correct / max(tokens, 1)}
