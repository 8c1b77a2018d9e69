"""Stage 2: the reward model, an adapter that starts from SFT's plus a scalar head.

An ensemble is N of them, trained one after another, each from its own seed and with its own data
order; member 0 equals a single reward model. Scores are read at the last token, which is the end of
turn. The loop is in `trainers/stages/loop.py`, the loss in `loss.py`, the data in `data.py`, the
examination of scores in `diagnosis/`.
"""

import gc
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from chatllama.config.batch_sizes import optimizer_steps
from chatllama.config.schema import Config
from chatllama.model.roles import RoleModel
from chatllama.reporting.statistics import wilson_interval
from chatllama.reporting.tracker import Tracker
from chatllama.runs.checkpoints import check_resume
from chatllama.runs.folder import RunFolder
from chatllama.runtime.distributed import all_sum, barrier, device, rank, to_device
from chatllama.runtime.files import write_json
from chatllama.runtime.json_files import read_json
from data.batches import PreferenceCollator, batch_indices
from trainers.engine.engine import Engine
from trainers.engine.microbatches import microbatches
from trainers.reward.data import Preferences
from trainers.reward.evaluate import (
    Collator,
    Member,
    collator_for,
    measure,
    ordered,
    padding_error,
    score_answers,
    scoring_of,
)
from trainers.reward.loss import pairwise_loss
from trainers.reward.model import build_engine, build_reward_model, export_reward, member_seed
from trainers.stages.loop import train_steps


def train_ensemble(
    cfg: Config,
    run: RunFolder,
    data: Preferences,
    tokenizer: PreTrainedTokenizerFast,
    info: dict[str, object],
    resume: bool,
) -> list[Member]:
    """Trains and exports every member but those that an interrupted start has finished.

    `info` is written beside each adapter.

    Raises:
        ValueError: members or checkpoints exist and `resume` is not set, or SFT's adapter is
            missing, damaged, or made under another chat contract.
    """
    assert isinstance(tokenizer.pad_token_id, int)
    members = _finished_members(run.members, resume)
    for number in range(len(members), cfg.reward.ensemble):
        model = build_reward_model(cfg, run, tokenizer, member_seed(cfg.seed, number))
        member = train_member(cfg, run, number, data, model, tokenizer.pad_token_id, resume)
        export_reward(cfg, run.reward_member(number), model, info)
        members.append(member)
        if cfg.reward.ensemble > 1 and rank() == 0:
            write_json(run.members, [asdict(each) for each in members])
        barrier()
        del model
        gc.collect()  # the next member loads a backbone of its own
    if rank() == 0:
        for folder in run.reward_members()[cfg.reward.ensemble :]:
            shutil.rmtree(folder)  # of an earlier, larger ensemble
    return members


def _finished_members(path: Path, resume: bool) -> list[Member]:
    if not path.is_file():
        return []
    check_resume(path, resume)
    return read_json(path, list[Member])


def train_member(
    cfg: Config,
    run: RunFolder,
    number: int,
    data: Preferences,
    model: RoleModel,
    pad_id: int,
    resume: bool,
) -> Member:
    """Trains adapter and head of one member, then scores the held-out answers."""
    section = cfg.reward
    own_run, seed = run.reward_run(number), member_seed(cfg.seed, number)
    engine = build_engine(cfg, model)
    total = optimizer_steps(section, len(data.train))
    collator = collator_for(cfg, pad_id)
    score = partial(score_answers, model, data.held_out, collator, section.microbatch_size)

    def step_on_batch(step: int, factor: float) -> dict[str, float]:
        batch = batch_indices(len(data.train), section.batch_size, step, seed)
        return optimizer_step(cfg, engine, data.train, batch, collator, factor)

    def whole_batch(step: int) -> dict[str, torch.Tensor]:
        rows = batch_indices(len(data.train), section.batch_size, step, seed)
        (tokens, mask), pairs = PreferenceCollator(pad_id)([data.train[row] for row in rows])
        return {"rows": torch.tensor(rows), "tokens": tokens, "mask": mask, **vars(pairs)}

    title = f"reward, member {number + 1} of {section.ensemble}" if section.ensemble > 1 else None
    with Tracker(own_run, "reward", cfg.tracking, total, rank(), title) as tracker:
        loss = train_steps(
            cfg,
            section,
            own_run,
            "reward",
            engine,
            tracker,
            total,
            seed=seed,
            resume=resume,
            optimizer_step=step_on_batch,
            evaluate=lambda: evaluation_metrics(data.held_out, score()),
            batch=whole_batch,
            interrupted=run,
        )
        scores = score()
        tracker.log(total, evaluation_metrics(data.held_out, scores))
    return Member(loss, scores.tolist(), padding_error(model, data.held_out, pad_id))


def optimizer_step(
    cfg: Config, engine: Engine, train: Dataset, batch: list[int], collator: Collator, factor: float
) -> dict[str, float]:
    """One optimizer step over `batch`; returns its metrics over all ranks.

    All answers to a prompt go through the model together, once: as separate, shuffled pairs each
    would be seen K - 1 times an epoch, and overfitted (InstructGPT, 3.5).
    """
    section = cfg.reward
    engine.model.train()
    sums = torch.zeros(4, device=device())
    examples = [train[i] for i in batch]
    lengths = [collator.num_tokens(example) for example in examples]
    own = list(microbatches(lengths, section.microbatch_size))
    for number, places in enumerate(own):
        engine.show("microbatch", number, len(own))
        inputs, pairs = collator([examples[place] for place in places])
        scores = engine(scoring_of(inputs), *inputs)
        better, worse = (scores[to_device(places)] for places in (pairs.better, pairs.worse))
        weight = to_device(pairs.weight)
        loss = pairwise_loss(
            better,
            worse,
            section.margin_coef * to_device(pairs.margin),
            weight,
            len(batch),
            center_coef=section.center_coef,
            label_smoothing=section.label_smoothing,
        )
        engine.backward(loss)
        with torch.no_grad():
            gap, middle = better - worse, (better + worse) / 2
            means = [(weight * x).sum() for x in (ordered(gap), gap, middle)]
            sums += torch.stack([loss, *means])
    norm = engine.step(factor)
    loss_sum, right, gaps, middles = all_sum(sums).tolist()
    return {
        "reward/loss": loss_sum,
        "reward/accuracy": right / len(batch),
        "reward/margin": gaps / len(batch),
        "reward/score_mean": middles / len(batch),
        "reward/grad_norm": norm,
        "reward/lr": section.learning_rate * factor,
    }


def evaluation_metrics(held_out: Dataset, scores: torch.Tensor) -> dict[str, float]:
    """Metrics of the scores of held-out answers."""
    found = measure(held_out, scores)
    return {"reward/eval_accuracy": found.accuracy, "reward/eval_loss": found.loss}


def closing_numbers(cfg: Config, data: Preferences, members: list[Member]) -> dict[str, float]:
    """The stage's result: accuracy of the members' mean score, with its interval."""
    scores = torch.tensor([member.scores for member in members]).mean(0)
    held_out = measure(data.held_out, scores)
    right = held_out.accuracy * held_out.num_prompts
    # Pairs of one prompt are not independent: each prompt counts as one draw.
    low, high = wilson_interval(right, held_out.num_prompts)
    return {
        "accuracy": held_out.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        **({} if data.bayes_accuracy is None else {"bayes_accuracy": data.bayes_accuracy}),
        "eval_loss": held_out.loss,
        "num_eval_pairs": held_out.num_pairs,
        "num_eval_prompts": held_out.num_prompts,
        "loss": members[0].loss,
        "steps": optimizer_steps(cfg.reward, len(data.train)),
        "ensemble": len(members),
    }
