"""What the roles answer to held-out prompts, and how good that is.

Runs at the end of the PPO stage, on the roles that are loaded already and with all ranks. The gold
reward is a Python function of the user's, where the true reward is known (`evaluation.gold`).
"""

from collections.abc import Callable

from chatllama.config import Config
from chatllama.distributed import rank
from chatllama.roles import Role
from chatllama.run_folder import RunFolder, write_json
from chatllama.statistics import mean_and_error, wilson_interval
from chatllama.user_functions import load_function
from trainers.engine import Engine
from trainers.ppo_math import masked
from trainers.ppo_setup import Prompts, TurnEnds
from trainers.rollout import Rollout, arrange, sample_responses, score

Gold = Callable[[str, str], float]
NUM_SHOWN = 24
EVALUATION_SEED = 2**31 - 1


def evaluate_roles(
    cfg: Config, run: RunFolder, engine: Engine, prompts: Prompts, ends: TurnEnds
) -> None:
    """Writes RUN/evaluation.json: every role's answers measured, PPO's against SFT's.

    Args:
        cfg: `evaluation`, `generation`, `ppo.microbatch_size`.
        run: where to write.
        engine: of the four roles.
        prompts: the held-out ones are asked.
        ends: stop and pad ids.
    """
    count = min(cfg.evaluation.num_prompts, len(prompts.held_out))
    if not count:
        return
    gold = None
    if cfg.evaluation.gold is not None:
        gold = load_function(cfg.evaluation.gold, "evaluation.gold")
    asked = prompts.held_out.select(range(count))
    answers: dict[str, list[str]] = {}
    goodness: dict[str, list[float]] = {}
    roles: dict[str, dict[str, float]] = {}
    names: tuple[tuple[str, Role], ...] = (
        ("base", "base"),
        ("sft", "reference"),
        ("ppo", "policy"),
    )
    for name, role in names:
        rollout = _answer(cfg, engine, role, asked["input_ids"][:], ends)
        texts = [prompts.decode(rollout.response_ids(row)) for row in range(count)]
        values = rollout.scores.tolist()
        roles[name] = _describe(rollout, values)
        if gold is not None:
            values = [gold(p, r) for p, r in zip(asked["text"][:], texts, strict=True)]
            roles[name]["gold_mean"], roles[name]["gold_se"] = mean_and_error(values)
        answers[name], goodness[name] = texts, values
        if role == "policy":
            kl = masked(rollout.kl, rollout.response_mask).sum(1).tolist()
            roles[name]["kl"], roles[name]["kl_se"] = mean_and_error(kl)
    roles["ppo"] |= win_rate(goodness["ppo"], goodness["sft"])
    samples = [
        {
            "prompt": asked["text"][row],
            **{name: answers[name][row] for name in answers},
            "gold" if gold else "score": {name: goodness[name][row] for name in goodness},
        }
        for row in range(min(count, NUM_SHOWN))
    ]
    if rank() == 0:
        write_json(run.evaluation, {"num_prompts": count, "roles": roles, "samples": samples})


def win_rate(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Share of prompts on which `ours` is better, ties one half, with its Wilson interval."""
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True))
    low, high = wilson_interval(wins, len(ours))
    return {"win_rate": wins / len(ours), "win_rate_low": low, "win_rate_high": high}


def _answer(
    cfg: Config, engine: Engine, role: Role, asked: list[list[int]], ends: TurnEnds
) -> Rollout:
    """Answers of a role, scored by the reward model (log-probabilities are the policy's)."""
    seed = (cfg.seed, EVALUATION_SEED)
    responses = sample_responses(engine, role, asked, cfg.generation, ends.stop_ids, seed)
    unscored = arrange(asked, responses, ends.stop_ids, ends.pad_id)
    return score(engine.model, unscored, cfg.generation.temperature, cfg.ppo.microbatch_size)


def _describe(rollout: Rollout, scores: list[float]) -> dict[str, float]:
    mean, error = mean_and_error(scores)
    return {
        "score_mean": mean,
        "score_se": error,
        "response_length": float(rollout.lengths.float().mean()),
        "eos_rate": float(rollout.finished.float().mean()),
    }
