"""Answers of the roles to held-out prompts, measured.

Runs at the end of the PPO stage, on the loaded roles and with all ranks. Where the true reward is
known, `evaluation.gold` names a Python function that computes it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from chatllama.config.schema import Config
from chatllama.model.adapters import WEIGHTS
from chatllama.model.roles import Role
from chatllama.reporting.answers import telling_rows
from chatllama.reporting.statistics import mean_and_error, wilson_interval
from chatllama.runs.folder import RunFolder
from chatllama.runtime.digests import file_hashes
from chatllama.runtime.distributed import rank
from chatllama.runtime.files import write_json
from chatllama.runtime.jsonl import append_lines, keep_lines
from trainers.functions.functions import GOLD, gold_function
from trainers.ppo.data import Prompts
from trainers.ppo.ppo_math import masked
from trainers.ppo.rollout import Collector

NUM_SHOWN = 24
"""First prompts whose answers are kept, beside those of `telling_rows`."""
EVALUATION_SEED = 2**31 - 1


def evaluate_roles(cfg: Config, run: RunFolder, collector: Collector, prompts: Prompts) -> None:
    """Writes RUN/evaluation.json: every role's answers measured, PPO's compared with its start's.

    That is SFT's model, or without SFT the base. With `lora: null` the base is the result of SFT,
    so there is no row for it.
    """
    count = min(cfg.evaluation.num_prompts, len(prompts.held_out))
    if not count:
        return
    engine = collector.engine
    first = "sft" if "sft" in cfg.stages else "base"
    names: dict[str, Role] = {} if cfg.lora is None else {"base": "base"}
    names |= {first: _start(cfg), "ppo": "policy"}
    if "ema" in engine.model.adapter_names:
        names["ema"] = "ema"
    measured = {
        name: _measure(cfg, collector, role, prompts, count) for name, role in names.items()
    }
    measured = {name: answers.judged_like(measured[first]) for name, answers in measured.items()}
    roles = {name: answers.numbers for name, answers in measured.items()}
    roles["ppo"] |= win_rate(measured["ppo"].goodness, measured[first].goodness)
    texts: list[str] = prompts.held_out["text"][:count]
    told = telling_rows(measured["ppo"].goodness, measured[first].goodness).values()
    samples = [
        {
            "row": row,
            "prompt": texts[row],
            **{name: answers.texts[row] for name, answers in measured.items()},
            "gold" if cfg.evaluation.gold else "score": {
                name: answers.goodness[row] for name, answers in measured.items()
            },
        }
        for row in sorted({*range(min(count, NUM_SHOWN)), *told})
    ]
    asked = prompts.held_out.select(range(count)).remove_columns("input_ids").to_list()
    start = {"prompts": asked, **measured[first].kept}
    keep_answers(run, {0: start, cfg.ppo.steps: measured["ppo"].kept})
    judged = {
        "by": _judge(cfg, run),
        "prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "values": {name: answers.goodness for name, answers in measured.items()},
    }
    if rank() == 0:
        content = {"num_prompts": count, "roles": roles, "samples": samples, "judged": judged}
        write_json(run.evaluation, content)


def _judge(cfg: Config, run: RunFolder) -> str:
    """What the answers are judged by; equal for two runs whose values mean the same."""
    if cfg.evaluation.gold is not None:
        return f"gold {cfg.evaluation.gold}"
    adapters = [folder / WEIGHTS for folder in run.reward_members()]
    hashes = file_hashes([path for path in adapters if path.is_file()], fresh=False)
    terms = [source.model_dump() for source in cfg.ppo.rewards]
    settings = [terms, cfg.ppo.reward_ensemble, sorted(hashes.values())]
    return f"score {hashlib.sha256(json.dumps(settings).encode()).hexdigest()}"


def keep_answers(run: RunFolder, steps: Mapping[int, Mapping[str, Any]]) -> None:
    """Adds the answers of evaluations, by step, to RUN/ppo/evaluations.jsonl.

    Lines of the same steps and of later ones, from before a rollback or a resume, are replaced. A
    curve of over-optimisation that was made of earlier answers is removed.
    """
    if rank() == 0:
        run.overoptimisation.unlink(missing_ok=True)
        run.evaluations.parent.mkdir(parents=True, exist_ok=True)
        last = max(steps)
        keep_lines(run.evaluations, lambda line: line["step"] < last and line["step"] not in steps)
        append_lines(run.evaluations, [{"step": step, **steps[step]} for step in steps])


def measure_policy(
    cfg: Config, run: RunFolder, collector: Collector, prompts: Prompts, step: int
) -> dict[str, float]:
    """The policy's numbers on held-out prompts, as metrics of a PPO step; {} without prompts.

    Its answers are kept for the curve of over-optimisation (`reporting/overoptimisation.py`).
    """
    count = min(cfg.evaluation.num_prompts, len(prompts.held_out))
    if not count:
        return {}
    measured = _measure(cfg, collector, "policy", prompts, count)
    keep_answers(run, {step: measured.kept})
    numbers = measured.numbers
    names = {"kl": "kl_sequence", "kl_se": "kl_sequence_se"}
    return {
        f"ppo/eval_{names.get(name, name)}": value
        for name, value in numbers.items()
        if not (name.endswith("_se") and math.isinf(value))  # of one answer
    }


@dataclass(frozen=True)
class Answers:
    """A role's answers to held-out prompts."""

    texts: list[str]
    responses: list[list[int]]
    """Tokens of each."""
    goodness: list[float]
    """Gold where it is known, else the reward model's score."""
    numbers: dict[str, float]
    """Means and standard errors."""
    kept: dict[str, Any]
    """Of each answer: its text, score, and for the policy's own its KL to the start, nats."""

    def judged_like(self, start: "Answers") -> "Answers":
        """With the start's value where both give the same tokens, so that they tie.

        Each role's answers are scored in batches of their own, in which numbers round otherwise.
        """
        ours = zip(self.responses, self.goodness, strict=True)
        theirs = zip(start.responses, start.goodness, strict=True)
        pairs = zip(ours, theirs, strict=True)
        return replace(self, goodness=[b[1] if a[0] == b[0] else a[1] for a, b in pairs])


def _measure(
    cfg: Config, collector: Collector, role: Role, prompts: Prompts, count: int
) -> Answers:
    """Answers of a role to the first `count` held-out prompts, always with the same randomness."""
    records = prompts.held_out.select(range(count)).to_list()
    seed, reference = (cfg.seed, EVALUATION_SEED), _start(cfg)
    rollout, texts = collector.collect(role, records, seed, reference)
    goodness = rollout.scores.tolist()
    numbers = {
        "response_length": float(rollout.lengths.float().mean()),
        "eos_rate": float(rollout.finished.float().mean()),
    }
    kept: dict[str, Any] = {"answers": texts, "scores": goodness}
    numbers["score_mean"], numbers["score_se"] = mean_and_error(goodness)
    if role == "policy":  # log-probabilities are the policy's: KL holds for its own answers only
        kept["kl"] = kl = masked(rollout.kl, rollout.response_mask).sum(1).tolist()
        numbers["kl"], numbers["kl_se"] = mean_and_error(kl)
    if cfg.evaluation.gold is not None:
        goodness = gold_function(cfg.evaluation.gold, GOLD)(records, texts)
        numbers["gold_mean"], numbers["gold_se"] = mean_and_error(goodness)
    disagreement = collector.scorer.disagreement(rollout.member_scores)
    if disagreement is not None:
        numbers["ensemble_disagreement"] = float(disagreement.mean())
    return Answers(texts, rollout.responses(), goodness, numbers, kept)


def _start(cfg: Config) -> Role:
    """The role with the weights that PPO starts from: the reference, unless PPO refreshes that."""
    if not cfg.ppo.reference_refresh_every:
        return "reference"
    return "sft" if cfg.starts_from_sft else "base"


def win_rate(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Share of prompts on which `ours` is better, ties one half, with its Wilson interval."""
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True))
    low, high = wilson_interval(wins, len(ours))
    return {"win_rate": wins / len(ours), "win_rate_low": low, "win_rate_high": high}
