"""Training and held-out data of the reward stage: ranked answers as tokens, and the Bayes limit."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from chatllama.config.batch_sizes import optimizer_steps
from chatllama.config.schema import Config, EvaluationSection
from data.batches import ordered_pairs
from data.mixture import all_begin_alike, load_examples
from trainers.functions.functions import GOLD, gold_function
from trainers.stages.forecast import announce

SAMPLED = 1000
"""Examples whose lengths are measured for the tokens of the stage."""


@dataclass(frozen=True)
class Preferences:
    """Tokenised examples, each a prompt with its ranked answers."""

    train: Dataset
    held_out: Dataset
    left_out: dict[str, int]
    """Number of records and examples that were left out or shortened, by reason."""
    bayes_accuracy: float | None = None
    """The best accuracy on held-out pairs that any model can reach, where gold is known."""


def load_preferences(cfg: Config, tokenizer: PreTrainedTokenizerFast) -> Preferences:
    """Training and held-out examples, read, split and tokenised by the config.

    Raises:
        ValueError: bad records, or nothing is left to train on or to hold out.
    """
    examples = load_examples(cfg.reward, "preferences", cfg.reward.max_length, cfg, tokenizer)
    if not len(examples.held_out):
        advice = all_begin_alike([examples.mixture.train])
        advice = advice or "; set reward.eval_data or a larger reward.eval_fraction"
        raise ValueError(f"reward: no held-out pairs{advice}")
    rated = any(len(set(ratings)) > 1 for ratings in examples.train["ratings"][:])
    if cfg.reward.margin_coef and not rated:
        raise ValueError(
            f"reward.margin_coef {cfg.reward.margin_coef:g}: no pair of reward.data has a margin; "
            "give the records a `margin` (or name its column in `format`), or set "
            "reward.margin_coef=0"
        )
    left_out: Counter[str] = Counter()
    for read in examples.mixture.reports:
        left_out.update(read.left_out)
    for report in examples.reports:
        left_out.update(report.left_out)
        left_out.update(report.changed)
    steps = optimizer_steps(cfg.reward, len(examples.train))
    answers = examples.train["answer_ids"][:SAMPLED]
    each = sum(len(ids) for answer in answers for ids in answer) / len(answers)
    announce(
        cfg,
        "reward",
        **examples.reports[0].lengths("reward.max_length"),
        examples=len(examples.train),
        steps=steps,
        tokens=each * steps * cfg.reward.batch_size,
    )
    limit = bayes_accuracy(cfg.evaluation, examples.mixture.held_out)
    return Preferences(examples.train, examples.held_out, dict(left_out), limit)


def bayes_accuracy(evaluation: EvaluationSection, held_out: Dataset) -> float | None:
    """Mean of max(p, 1 - p) over the pairs, p the probability of the label by the gold score.

    Every prompt weighs the same. None where `evaluation` has no gold or no scale of label noise.
    """
    if evaluation.gold is None or evaluation.label_scale is None:
        return None
    records, total = list(cast(Iterable[dict[str, Any]], held_out)), 0.0
    prompts: list[dict[str, Any]] = []
    for each in records:
        asked = {"text": each["prompt"][-1]["content"], "messages": each["prompt"]}
        prompts += [{**asked, "where": each["where"], "columns": "{}"}] * len(each["answers"])
    answers = [answer for record in records for answer in record["answers"]]
    found = iter(gold_function(evaluation.gold, GOLD)(prompts, answers))
    for record in records:
        scores = [next(found) for _ in record["answers"]]
        gaps = [abs(scores[i] - scores[j]) for i, j in ordered_pairs(record["ranks"])]
        total += sum(1 / (1 + math.exp(-evaluation.label_scale * g)) for g in gaps) / len(gaps)
    return total / len(held_out)
