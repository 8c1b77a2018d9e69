"""Small worlds for `alarms.py`: a LLaMA of a dozen tokens under real PPO, clean or broken one way.

A world is its seed: vocabulary, base, prompts, gold, algorithm and rates. Its half decides the kind
of gold, so that thresholds set on the calibration half meet other worlds in the held-out half.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from chatllama.config.model import LoraSection
from chatllama.config.ppo import DiagnosisName
from chatllama.config.schema import Config
from chatllama.model.roles import Adapter, Role, RoleModel, adapter_parameters
from chatllama.runs.folder import RunFolder
from trainers.ppo import rollout, train
from trainers.ppo.data import Prompts, StopTokens, prompt_row
from trainers.ppo.model import build_engine
from trainers.ppo.rewards import Scorer

Half = Literal["calibration", "held-out"]
STEPS = 40
LATE = 12
"""Step of the faults that come while the run goes on."""
EOS = 2
Score = Callable[[list[int], list[int]], float]
"""Of the ids of a prompt and of its answer."""


class Numbers(StopTokens):
    """Answers as their ids, the end included."""

    def decode(self, ids: Sequence[int]) -> str:
        """The ids with blanks between them."""
        return " ".join(map(str, ids))


@dataclass
class _Now:
    """What the functions that the config names compute with."""

    gold: Score = lambda prompt, answer: 0.0
    score: Score = lambda prompt, answer: 0.0


NOW = _Now()


def reward(prompt: str, response: str) -> float:
    """The training reward of the running world."""
    return NOW.score(ids(prompt), ids(response))


def gold(prompt: str, response: str) -> float:
    """The gold score of the running world."""
    return NOW.gold(ids(prompt), ids(response))


def ids(text: str) -> list[int]:
    """The ids that `decode` wrote."""
    return [int(word) for word in text.split()]


@dataclass(frozen=True)
class World:
    """What the seed of a run decides."""

    half: Half
    seed: int

    @property
    def luck(self) -> random.Random:
        """The world's random numbers, from their start."""
        return random.Random(f"{self.half} {self.seed}")

    @property
    def size(self) -> int:
        """Tokens of the vocabulary."""
        return 10 + self.luck.randrange(7)

    def gold(self) -> Score:
        """Better answers: of another kind in each half."""
        wanted = 3 + self.luck.randrange(self.size - 3)
        kinds: dict[Half, tuple[Score, ...]] = {
            "calibration": (
                lambda prompt, answer: min(answer.count(wanted), 2) + 0.5 * (answer[-1] == EOS),
                lambda prompt, answer: min(sum(each in prompt for each in answer), 3) / 2,
            ),
            "held-out": (
                lambda prompt, answer: min(sum(b > a for a, b in pairwise(answer)), 3) / 2,
                lambda prompt, answer: -abs(len(answer) - 2 * len(prompt)) / 4,
            ),
        }
        return kinds[self.half][self.seed % 2]

    def config(self, folder: Path, fault: "Fault") -> Config:
        """A run that goes well, but for what the fault changes."""
        luck = self.luck
        algorithm = "gae" if fault.needs_critic else luck.choice(["gae", "gae", "rloo", "grpo"])
        own: dict[str, Any] = {
            "steps": STEPS,
            "rollout_batch_size": 64,
            "samples_per_prompt": luck.choice([1, 4]) if algorithm == "gae" else 4,
            "minibatch_size": 32,
            "microbatch_size": 32,
            "epochs": luck.choice([1, 2, 4]),
            "advantage": algorithm,
            "learning_rate": luck.uniform(1e-3, 4e-3),
            "value_learning_rate": 1e-2,
            "lr_schedule": "constant",
            "rewards": [{"function": f"{__name__}:reward"}],
            "score_normalization_samples": 64,
            "eval_every": 4,
            "save_every": 0,
        }
        own |= {"kl_coef": luck.uniform(0.05, 0.3)} if algorithm != "grpo" else {}
        return Config.model_validate(
            {
                "run_dir": str(folder),
                "seed": self.seed,
                "backbone": {"path": "unused", "dtype": "float32"},
                "ppo": own | fault.settings(own),
                "generation": {"max_new_tokens": luck.choice([12, 18, 24]), **fault.generation},
                "evaluation": {"num_prompts": 32, "gold": f"{__name__}:gold"},
                "tracking": {"report_to": [], "sample_every": 0},
            }
        )

    def trainer(self, folder: Path, fault: "Fault") -> train.PpoTrainer:
        """A trainer whose policy equals the reference and whose critic says 0."""
        cfg = self.config(folder, fault)
        torch.manual_seed(self.seed)
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.25,
                tie_word_embeddings=False,
            )
        )
        lora, roles = LoraSection(r=4, alpha=8.0, dropout=fault.dropout), ["policy"]
        roles += ["value"] if cfg.ppo.advantage == "gae" else []
        model = RoleModel(
            llama.requires_grad_(False).eval(),
            {"reference": Adapter(lora)} | {r: Adapter(lora, trainable=True) for r in roles},
            heads=tuple(roles[1:]),
            dropout=fault.dropout > 0,
        )
        for head in model.heads.values():
            for parameter in head.parameters():
                parameter.data.zero_()
        luck = self.luck
        prompts = [[luck.randrange(3, self.size) for _ in range(n)] for n in (2, 3, 4) * 12]
        records = [prompt_row(ids, " ".join(map(str, ids))) for ids in prompts]
        data = Prompts(Dataset.from_list(records), Dataset.from_list(records[:32]))
        tokens = Numbers(None, [EOS], 0)  # pyright: ignore[reportArgumentType]
        engine, scorer = build_engine(cfg, model), Scorer(cfg, [])
        return train.PpoTrainer(cfg, RunFolder(folder), engine, scorer, data, tokens)


def _nothing() -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Fault:
    """One way to break a run; without arguments none."""

    told_by: tuple[DiagnosisName, ...] = ()
    """The diagnoses that name it; empty: none is made for it."""
    settings: Callable[[dict[str, Any]], dict[str, Any]] = lambda own: {}
    """Keys of `ppo` from the clean run's."""
    score: Callable[[Score, int], Score] = lambda gold, step: gold
    """The training reward from gold and the number of the step."""
    generation: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    patches: Callable[[], Iterator[None]] = _nothing
    before_step: Callable[[train.PpoTrainer, int], None] = lambda trainer, step: None
    needs_critic: bool = False
    learned: bool = False
    """The reward is the mean of models that were fitted to gold, and the monitor sees no gold."""


def _hotter(temperature: float, role: Role | None = None) -> Callable[[], Iterator[None]]:
    """Samples from other distributions than those that are scored."""

    def patches() -> Iterator[None]:
        sample = rollout.sample_responses

        def other(engine: Any, own: Role, prompts: Any, generation: Any, *rest: Any) -> Any:
            changed = generation.model_copy(update={"temperature": temperature})
            return sample(engine, role or own, prompts, changed, *rest)

        with patch.object(rollout, "sample_responses", other):
            yield

    return patches


def _targets(change: Callable[..., tuple[Any, ...]]) -> Callable[[], Iterator[None]]:
    """The update gets other advantages, returns and mask."""

    def patches() -> Iterator[None]:
        targets = train.Targets
        with patch.object(train, "Targets", lambda *given: targets(*change(*given))):
            yield

    return patches


def _shifted() -> Iterator[None]:
    """Log-probabilities of the rollout stand one token too late."""
    collect = rollout.Collector.collect

    def shifted(self: Any, role: Role, *rest: Any, **options: Any) -> Any:
        batch, texts = collect(self, role, *rest, **options)
        batch.logprobs[:] = batch.logprobs.roll(1, dims=1)
        return batch, texts

    with patch.object(rollout.Collector, "collect", shifted):
        yield


def _other_reference(trainer: train.PpoTrainer, step: int) -> None:
    if step == 1:
        for parameter in adapter_parameters(trainer.engine.model, "reference"):
            parameter.data.normal_(std=0.1)


def _nan_weight(trainer: train.PpoTrainer, step: int) -> None:
    if step == LATE:
        adapter_parameters(trainer.engine.model, "value")[-1].data[0, 0] = math.nan


def _other_answers() -> Iterator[None]:
    """Each answer gets the score of the one before it in the batch."""
    scores = Scorer.term_scores
    with patch.object(Scorer, "term_scores", lambda *given: scores(*given).roll(1, 0)):
        yield


def _features(size: int, answer: list[int]) -> torch.Tensor:
    """How often each token, and each pair of neighbours, is in the answer."""
    counts = torch.zeros(size + size * size, dtype=torch.float64)
    for number in [*answer, *(size + a * size + b for a, b in pairwise(answer))]:
        counts[number] += 1
    return counts


def learned(trainer: train.PpoTrainer, world: World, gold: Score) -> list[Score]:
    """Reward models as they are in life: each fits noisy labels of a part of SFT's answers.

    Ridge regressions on features that cannot say what gold is, of 72 answers drawn with
    replacement from 72: right where the reference writes, and different elsewhere.
    """
    records: list[Any] = [each for each in trainer.prompts.train for _ in range(2)]
    _, texts = trainer.collector.collect("reference", records, (world.seed, STEPS + 1))
    pairs = [(ids(r["text"]), ids(text)) for r, text in zip(records, texts, strict=True)]
    luck, size, members = random.Random(world.seed), world.size, list[Score]()
    x = torch.stack([_features(size, answer) for _, answer in pairs])
    y = torch.tensor([gold(*pair) + luck.gauss(0.0, 1.0) for pair in pairs], dtype=torch.float64)
    for _ in range(4):
        rows = [luck.randrange(len(pairs)) for _ in pairs]
        own, centred = x[rows], y[rows] - y.mean()
        ridge = own.T @ own + 3.0 * torch.eye(own.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(ridge, own.T @ centred)
        members.append(lambda prompt, answer, w=weights: float(_features(size, answer) @ w))
    return members


def _times(key: str, factor: float, **more: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda own: {key: own[key] * factor, **more}


FAULTS: dict[str, Fault] = {
    "clean": Fault(),
    "learning rate x 60": Fault(
        ("ratio_explosion", "clip_fraction_high", "kl_explosion", "entropy_collapse"),
        _times("learning_rate", 60.0),
    ),
    "16 epochs a batch": Fault(
        ("clip_fraction_high", "ratio_explosion", "kl_explosion"),
        _times("learning_rate", 3.0, epochs=16),
    ),
    "no KL, reward is a token": Fault(
        ("kl_explosion", "entropy_collapse", "reward_hacking"),
        _times("learning_rate", 3.0, kl_coef=0.0),
        lambda gold, step: lambda prompt, answer: answer.count(3) / len(answer),
    ),
    "reward pays length": Fault(
        ("length_drift", "eos_rate_falling"),
        lambda own: {"missing_eos_penalty": 0.0},
        lambda gold, step: lambda prompt, answer: gold(prompt, answer) + 0.5 * len(answer),
    ),
    "reward pays shortness": Fault(
        ("length_drift",), score=lambda gold, step: lambda prompt, answer: -float(len(answer))
    ),
    "reward for no end": Fault(
        ("eos_rate_falling",),
        lambda own: {"missing_eos_penalty": 0.0},
        lambda gold, step: lambda prompt, answer: float(answer[-1] != EOS),
    ),
    "top_p 0.5": Fault(("sampling_mismatch", "negative_kl"), generation={"top_p": 0.5}),
    "sampled at temperature 0.7": Fault(("sampling_mismatch", "negative_kl"), patches=_hotter(0.7)),
    "sampler of old weights": Fault(
        ("sampling_mismatch", "negative_kl"), patches=_hotter(1.0, "reference")
    ),
    "another reference": Fault(("initial_kl_not_zero",), before_step=_other_reference),
    "dropout 0.1": Fault(("first_ratio_not_one",), dropout=0.1),
    "log-probabilities one late": Fault(
        ("initial_kl_not_zero", "first_ratio_not_one"), patches=_shifted
    ),
    "returns negated": Fault(
        ("critic_explained_variance_negative",),
        patches=_targets(lambda advantages, returns, mask: (advantages, -returns, mask)),
        needs_critic=True,
    ),
    "critic's rate x 30": Fault(
        ("critic_explained_variance_negative",), _times("value_learning_rate", 30.0),
        needs_critic=True,
    ),
    "constant reward": Fault(
        ("dead_rewards",),
        lambda own: {"score_normalization": "none"},
        lambda gold, step: lambda prompt, answer: 1.0,
    ),
    f"reward dies at step {LATE}": Fault(
        ("dead_rewards",),
        score=lambda gold, step: gold if step < LATE else lambda prompt, answer: 0.0,
    ),
    f"reward x 300 at step {LATE}": Fault(
        ("grad_norm_explosion",),
        score=lambda gold, step: (
            lambda prompt, answer: gold(prompt, answer) * (300.0 if step >= LATE else 1.0)
        ),
        needs_critic=True,
    ),
    f"NaN in the critic at step {LATE}": Fault(
        ("not_finite",), before_step=_nan_weight, needs_critic=True
    ),
    "advantages negated": Fault(
        ("score_falling",),
        patches=_targets(lambda advantages, returns, mask: (-advantages, returns, mask)),
    ),
    "scores of other answers": Fault(("scores_not_repeatable",), patches=_other_answers),
    "no KL, learned reward": Fault(
        ("reward_hacking",), _times("learning_rate", 2.0, kl_coef=0.0), learned=True
    ),
    "learned reward, KL kept": Fault(learned=True),
}  # fmt: skip
