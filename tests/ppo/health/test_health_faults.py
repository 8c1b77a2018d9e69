"""Real PPO runs of a tiny LLaMA, each broken in one way: the monitor must name that way.

The healthy run must raise nothing. A run takes a few CPU seconds; a broken one ends at its own
diagnosis. Rewards are functions of this module, named in the config as a user would.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_llama

from chatllama.config.model import LoraSection
from chatllama.config.ppo import DiagnosisName, HealthSection
from chatllama.config.schema import Config
from chatllama.model.roles import Adapter, Role, RoleModel, adapter_parameters
from chatllama.runs.folder import RunFolder
from trainers.ppo import model as ppo_setup
from trainers.ppo import rollout
from trainers.ppo import train as ppo
from trainers.ppo.data import Prompts, prompt_row
from trainers.ppo.health.monitor import Diagnosis, HealthMonitor, decide
from trainers.ppo.ppo_math import masked
from trainers.ppo.rewards import Scorer
from trainers.stages.not_finite import dump_batch

pytestmark = pytest.mark.slow

STEPS = 24
VOCABULARY = 12
EOS, WANTED = 2, 5


class SpelledEnds(rollout.StopTokens):
    """Answers as their ids, the end included."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def words(response: str) -> list[int]:
    return [int(word) for word in response.split()]


def wanted(prompt: str, response: str) -> float:
    """A reward that a good policy earns without leaving the reference far behind."""
    ids = words(response)
    return min(ids.count(WANTED), 2) + 0.5 * (ids[-1] == EOS)


def only_wanted(prompt: str, response: str) -> float:
    ids = words(response)
    return ids.count(WANTED) / len(ids)


def in_moderation(prompt: str, response: str) -> float:
    """Gold that agrees with `only_wanted` up to a share of 0.3 and falls beyond."""
    share = only_wanted(prompt, response)
    return min(share, 0.6 - share)


def endless(prompt: str, response: str) -> float:
    return float(words(response)[-1] != EOS)


def unwanted(prompt: str, response: str) -> float:
    return -only_wanted(prompt, response)


def grudging(prompt: str, response: str) -> float:
    return 0.2 * wanted(prompt, response) - 1.5


def short(prompt: str, response: str) -> float:
    return -float(len(words(response)))


def constant(prompt: str, response: str) -> float:
    return 1.0


SCALE = [1.0]


def scaled(prompt: str, response: str) -> float:
    return SCALE[0] * wanted(prompt, response)


@dataclass(frozen=True)
class Fault:
    """One way to break a run."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Changed keys of `ppo`."""
    reward: Callable[[str, str], float] = wanted
    generation: dict[str, Any] = field(default_factory=dict)
    gold: Callable[[str, str], float] | None = None
    dropout: float = 0.0
    patch: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None
    before_step: Callable[[ppo.PpoTrainer, int], None] = lambda trainer, step: None
    along: tuple[DiagnosisName, ...] = ()
    """Other diagnoses that come before its own."""


def other_reference(trainer: ppo.PpoTrainer, step: int) -> None:
    if step == 1:
        generator = torch.Generator().manual_seed(1)
        for parameter in adapter_parameters(trainer.engine.model, "reference"):
            parameter.data.normal_(std=0.1, generator=generator)


def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's own refusals at step 1 are out of the monitor's way."""
    monkeypatch.setattr(ppo, "_check_start", lambda *_: None, raising=False)
    monkeypatch.setattr(ppo, "_check_first_ratio", lambda *_: None, raising=False)


def stale_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses come from the weights before step 1, which are the reference's."""
    sample = rollout.sample_responses

    def stale(engine: Any, role: Role, *rest: Any) -> list[list[int]]:
        return sample(engine, "reference", *rest)

    monkeypatch.setattr(rollout, "sample_responses", stale)


def negated_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic learns the returns with the wrong sign."""
    targets = ppo.Targets
    monkeypatch.setattr(ppo, "Targets", lambda a, returns, mask: targets(a, -returns, mask))


def negated_advantages(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ppo.Targets
    monkeypatch.setattr(ppo, "Targets", lambda a, returns, mask: targets(-a, returns, mask))


def scores_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer gets the score of the one before it in the batch."""
    scores = Scorer.term_scores
    monkeypatch.setattr(Scorer, "term_scores", lambda *given: scores(*given).roll(1, 0))


def larger_scores(trainer: ppo.PpoTrainer, step: int) -> None:
    SCALE[0] = 300.0 if step >= 12 else 1.0


def nan_weight(trainer: ppo.PpoTrainer, step: int) -> None:
    if step == 4:
        # behind the last attention, whose kernel may lose a NaN
        adapter_parameters(trainer.engine.model, "value")[-1].data[0, 0] = math.nan


FAULTS: dict[DiagnosisName, Fault] = {
    "not_finite": Fault(before_step=nan_weight),
    "initial_kl_not_zero": Fault(before_step=other_reference, patch=no_checks),
    "first_ratio_not_one": Fault(dropout=0.2, patch=no_checks),
    "ratio_explosion": Fault(settings={"learning_rate": 0.3}),
    "grad_norm_explosion": Fault(reward=scaled, before_step=larger_scores),
    "kl_explosion": Fault(
        settings={"learning_rate": 0.02, "kl_coef": 0.0},
        reward=only_wanted,
        along=("clip_fraction_high",),
    ),
    "sampling_mismatch": Fault(generation={"top_p": 0.5}),
    "negative_kl": Fault(patch=stale_sampler, along=("sampling_mismatch",)),
    "clip_fraction_high": Fault(settings={"learning_rate": 0.01, "epochs": 4, "clip_range": 0.05}),
    # The missing-EOS penalty varies, so the shaped scores do.
    "dead_rewards": Fault(settings={"score_normalization": "none"}, reward=constant),
    "reward_hacking": Fault(
        settings={"learning_rate": 0.01, "kl_coef": 0.0, "eval_every": 4},
        reward=only_wanted,
        gold=in_moderation,
        along=("kl_explosion", "clip_fraction_high"),
    ),
    "eos_rate_falling": Fault(settings={"missing_eos_penalty": 0.0}, reward=endless),
    "length_drift": Fault(reward=short),
    "entropy_collapse": Fault(
        settings={"learning_rate": 0.01, "kl_coef": 0.0},
        reward=only_wanted,
        along=("kl_explosion", "clip_fraction_high"),
    ),
    "critic_explained_variance_negative": Fault(patch=negated_returns),
    "scores_not_repeatable": Fault(patch=scores_of_others),
    "score_falling": Fault(patch=negated_advantages),
}


def build(fault: Fault, folder: Path) -> ppo.PpoTrainer:
    """A trainer over a LLaMA of 12 tokens, its policy equal to the reference, its critic zero."""
    evaluation = {}
    if fault.gold is not None:
        evaluation = {"num_prompts": 32, "gold": f"{__name__}:{fault.gold.__name__}"}
    cfg = Config.model_validate(
        {
            "run_dir": str(folder),
            "backbone": {"path": "unused", "dtype": "float32"},
            "ppo": {
                "steps": STEPS,
                "rollout_batch_size": 64,
                "minibatch_size": 32,
                "microbatch_size": 32,
                "epochs": 2,
                "learning_rate": 3e-3,
                "value_learning_rate": 1e-2,
                "lr_schedule": "constant",
                "kl_coef": 0.2,
                "rewards": [{"function": f"{__name__}:{fault.reward.__name__}"}],
                "score_normalization_samples": 64,
                **fault.settings,
            },
            "generation": {"max_new_tokens": 24, **fault.generation},
            "evaluation": evaluation,
            "tracking": {"report_to": [], "sample_every": 0},
        }
    )
    torch.manual_seed(5)
    lora = LoraSection(r=4, alpha=8.0, dropout=fault.dropout)
    model = RoleModel(
        tiny_llama(VOCABULARY),
        {
            "reference": Adapter(lora),
            "policy": Adapter(lora, trainable=True),
            "value": Adapter(lora, trainable=True),
        },
        heads=("value",),
        dropout=fault.dropout > 0,
    )
    for parameter in model.heads["value"].parameters():
        parameter.data.zero_()
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in (2, 3, 4) * 8]
    records = [prompt_row(ids, str(ids)) for ids in prompts]
    train, held_out = Dataset.from_list(records), Dataset.from_list((records * 2)[:32])
    return ppo.PpoTrainer(
        cfg,
        RunFolder(folder),
        ppo_setup.build_engine(cfg, model),
        Scorer(cfg, []),
        Prompts(train, held_out),
        SpelledEnds(None, [EOS], 0),  # pyright: ignore[reportArgumentType]
    )


def figures(batch: rollout.Rollout) -> dict[str, float]:
    """What the monitor asks of a rollout beside the loop's own metrics."""
    mask = batch.response_mask
    surprise = masked(-batch.logprobs - batch.entropy, mask)
    return {
        "ppo/kl_abs_max": float(masked(batch.kl, mask).abs().max()),
        "ppo/surprise_gap": float(surprise.sum() / mask.sum()),
        "ppo/surprise_gap_se": float(surprise.square().sum().sqrt() / mask.sum()),
    }


def watched(
    trainer: ppo.PpoTrainer, fault: Fault, until: str, monitor: HealthMonitor
) -> tuple[list[Diagnosis], rollout.Rollout]:
    """Diagnoses of a run up to the one named `until`, and the last rollout."""
    state, found = trainer.start(), []
    while True:
        fault.before_step(trainer, state.step + 1)
        state, batch, _, metrics = trainer.advance(state)
        found += monitor.observe(state.step, figures(batch) | metrics)
        if state.step == STEPS or until in {diagnosis.name for diagnosis in found}:
            return found, batch


def test_a_healthy_run_raises_nothing(tmp_path: Path) -> None:
    fault = Fault()
    found, _ = watched(build(fault, tmp_path), fault, "", HealthMonitor(HealthSection()))
    assert found == []


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_raises_its_own_diagnosis(
    name: DiagnosisName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = FAULTS[name]
    fault.patch(monkeypatch)
    monitor = HealthMonitor(HealthSection())
    found, batch = watched(build(fault, tmp_path), fault, name, monitor)
    names = {each.name for each in found}
    assert names == {name, *fault.along}
    if name == "not_finite":
        assert decide(HealthSection(), found, 0) == "stop"
        path = dump_batch(tmp_path / "ppo", found[0].step, vars(batch))
        rows = torch.load(path, weights_only=True)["not_finite_rows"]
        assert rows["values"] == list(range(64)) and rows["logprobs"] == rows["scores"] == []
