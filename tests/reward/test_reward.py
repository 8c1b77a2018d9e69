"""The reward model: scores, training in this process, Bradley-Terry recovery, the gate."""

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM

from chatllama.config.model import LoraSection
from chatllama.config.schema import Config, EvaluationSection, RewardSection
from chatllama.model.roles import Adapter, RoleModel, adapter_parameters
from chatllama.reporting.statistics import wilson_interval
from chatllama.runs.folder import RunFolder
from chatllama.runtime.files import write_json
from data.batches import PreferenceCollator, SharedPromptCollator, answer_pairs
from data.token_report import TokenReport
from trainers.engine.engine import Engine
from trainers.reward import data as reward_data
from trainers.reward import evaluate as reward_scores
from trainers.reward import train as reward
from trainers.reward.data import Preferences, bayes_accuracy
from trainers.reward.diagnosis.calibration import best_scale, calibration_error, reliability
from trainers.reward.evaluate import check_gate

LORA = LoraSection(r=4, alpha=8.0)


def config(**reward_section: Any) -> Config:
    """For training in this process on token lists."""
    section = {"data": [], "batch_size": 8, "microbatch_size": 4, **reward_section}
    return Config.model_validate(
        {
            "run_dir": "none",
            "backbone": {"path": "none", "dtype": "float32"},
            "lora": LORA.model_dump(),
            "tracking": {"report_to": []},
            "reward": section,
        }
    )


def reward_model(seed: int = 0) -> RoleModel:
    """A random adapter on a seeded tiny LLaMA."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = Adapter(LORA, trainable=True)
        model = RoleModel(tiny_llama(), {"reward": adapter}, ("reward",), dropout=True)
        for parameter in adapter_parameters(model, "reward"):
            parameter.data.normal_(std=0.1)
    return model


def lists(count: int, seed: int = 0, sizes: tuple[int, ...] = (2, 3, 4)) -> Dataset:
    """Ranked answers of several lengths; better ones hold more of the token 5."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        size = rng.choice(sizes)
        answers = [
            [5] * (2 * (size - place)) + [rng.randrange(10, 90) for _ in range(rng.randrange(1, 6))]
            for place in range(size)
        ]
        for answer in answers:
            rng.shuffle(answer)
        prompt = [1, rng.randrange(10, 90)]
        rows.append(
            {
                "answer_ids": [[*prompt, *answer, 2] for answer in answers],
                "ranks": list(range(size)),
                "ratings": [0.5 * (size - place) for place in range(size)],
                "prompt_length": 2,
                "where": f"f:{number}",
            }
        )
    return Dataset.from_list(rows)


def train(cfg: Config, data: Preferences, folder: Path, model: RoleModel) -> reward.Member:
    return reward.train_member(cfg, RunFolder(folder), 0, data, model, pad_id=0, resume=False)


# --- scores


@pytest.mark.parametrize("microbatch_size", [1, 3, 16])
def test_scores_do_not_depend_on_microbatches(microbatch_size: int):
    model, examples = reward_model(), lists(10)
    alone = [
        reward_scores.score_sequences(
            model.eval(), torch.tensor([ids]), torch.ones(1, len(ids)).bool()
        )
        for row in examples.to_list()
        for ids in row["answer_ids"]
    ]
    for collator in (PreferenceCollator(0), SharedPromptCollator(0, 256)):
        found = reward_scores.score_answers(model, examples, collator, microbatch_size)
        torch.testing.assert_close(found, torch.cat(alone).detach(), rtol=0, atol=1e-5)
        assert found.std() > 0.1


def test_accuracy_by_hand_ties_count_half_and_prompts_weigh_alike():
    examples = Dataset.from_list(
        [
            {"ranks": [0, 1], "ratings": [0.0, 0.0]},
            {"ranks": [0, 1, 2], "ratings": [0.0] * 3},
            {"ranks": [0, 0, 1], "ratings": [0.0] * 3},
        ]
    )
    scores = torch.tensor([1.0, 1.0, 3.0, 1.0, 2.0, 0.0, 5.0, 1.0])
    # A tie: 1/2. Right, right, wrong: 2/3. The first of two wrong, the second right: 1/2.
    held_out = reward_scores.measure(examples, scores)
    assert held_out.accuracy == pytest.approx((1 / 2 + 2 / 3 + 1 / 2) / 3)
    assert (held_out.num_pairs, held_out.num_prompts) == (6, 3)
    soft = {d: math.log1p(math.exp(-d)) for d in (0.0, 1.0, 2.0, -1.0, 4.0)}
    losses = [soft[0.0], (soft[2.0] + soft[1.0] + soft[-1.0]) / 3, (soft[-1.0] + soft[4.0]) / 2]
    assert held_out.loss == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_wilson_interval_by_hand():
    low, high = wilson_interval(8, 10, z=2.0)  # (0.8 + 0.2 +- 2 sqrt(0.016 + 0.01)) / 1.4
    assert (low, high) == (pytest.approx(0.483936, abs=1e-6), pytest.approx(0.944636, abs=1e-6))


def gold(prompt: str, response: str) -> float:
    assert prompt == "q"
    return float(len(response))


async def later(completions: list[str], messages: list) -> list[float]:
    assert messages[0] == [{"role": "user", "content": "q"}]
    return [float(len(each)) for each in completions]


def twice(prompt: str, response: str, twin: str) -> float:
    return 0.0


def test_bayes_limit_by_hand():
    records = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "q"}],
                "answers": ["aaa", "a"],
                "ranks": [0, 1],
                "where": "a.jsonl:1",
            },
            {
                "prompt": [{"role": "user", "content": "q"}],
                "answers": ["a", "a", "aaa"],
                "ranks": [0, 1, 1],
                "where": "a.jsonl:2",
            },
        ]
    )
    sigmoid1 = 1 / (1 + math.exp(-1.0))
    # Gaps 2; then 0 and 2 (the label was wrong), the tie of the last two left out.
    expected = (sigmoid1 + (0.5 + sigmoid1) / 2) / 2
    for name in ("gold", "later"):
        evaluation = EvaluationSection(gold=f"{__name__}:{name}", label_scale=0.5)
        assert bayes_accuracy(evaluation, records) == pytest.approx(expected)
    evaluation = EvaluationSection(gold=f"{__name__}:twice", label_scale=0.5)
    with pytest.raises(
        ValueError, match=r"evaluation\.gold .*:twice needs 'twin', which a\.jsonl:1"
    ):
        bayes_accuracy(evaluation, records)
    assert bayes_accuracy(EvaluationSection(), records) is None


# --- training in this process


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, RoleModel]:
    """Microbatch size -> a model after three steps on lists of 2 to 4 answers."""
    data = Preferences(lists(24), lists(6, seed=1), {})
    options = {"steps": 3, "learning_rate": 1e-2, "margin_coef": 1.0, "label_smoothing": 0.1}
    models = {}
    for size in (8, 2, 1):
        models[size] = reward_model()
        cfg = config(**options, microbatch_size=size)
        train(cfg, data, tmp_path_factory.mktemp("run"), models[size])
    return models


def test_every_trainable_parameter_moves_and_no_other(trained: dict[int, RoleModel]):
    before = dict(reward_model().named_parameters())
    for name, parameter in trained[8].named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    moved = [name for name, p in trained[8].named_parameters() if p.requires_grad]
    assert "heads.reward.weight" in moved and len(moved) == 2 * 7 * 2 + 1  # A and B of 14 layers


@pytest.mark.parametrize("size", [2, 1])
def test_microbatches_change_nothing(trained: dict[int, RoleModel], size: int):
    expected = dict(trained[8].named_parameters())
    for name, parameter in trained[size].named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)


class StubEngine:
    """Scores answers 0, 1, 2 ... in the order in which they come, and keeps the losses."""

    def __init__(self) -> None:
        self.model = reward_model()
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def __call__(self, function: object, rows: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        assert function is reward_scores.score_shared
        self.tokens.append(int((more[1] >= 0).sum()))
        return torch.arange(len(more[3])).float()

    def backward(self, loss: torch.Tensor) -> None:
        self.losses.append(float(loss))

    def step(self, factor: float) -> float:
        return 0.0

    def show(self, *_: object) -> None:
        """The display of a running step."""


def stub_step(examples: Dataset, **section: Any) -> tuple[StubEngine, dict[str, float]]:
    engine, size = StubEngine(), len(examples)
    cfg = config(**{"batch_size": size, "microbatch_size": 1, **section})
    batch, collator = list(range(size)), reward_scores.collator_for(cfg, 0)
    return engine, reward.optimizer_step(cfg, cast(Engine, engine), examples, batch, collator, 1.0)


def test_all_answers_to_a_prompt_go_through_the_model_once():
    examples = lists(2, sizes=(9,))
    engine, _ = stub_step(examples)
    # Not 36 pairs of two, and the prompt of two tokens once.
    answers = [sum(len(ids) - 2 for ids in row["answer_ids"]) for row in examples.to_list()]
    assert engine.tokens == [2 + max(answers), 2 + min(answers)]


def test_microbatches_hold_about_equally_many_tokens():
    # four long lists, then four pairs: two at a time as they come would be far apart
    examples = concatenate_datasets([lists(4, sizes=(9,)), lists(4, sizes=(2,))])
    engine, _ = stub_step(examples, microbatch_size=2)
    lengths = [sum(len(ids) - 2 for ids in row["answer_ids"]) + 2 for row in examples.to_list()]
    assert len(engine.tokens) == 4 and sum(engine.tokens) == sum(lengths)
    assert max(engine.tokens) <= max(lengths[:4]) + max(lengths[4:])


def test_every_option_of_the_loss_is_used():
    pair = lists(1, sizes=(2,))  # scores 0 and 1, ratings 1 and 0.5
    soft = {d: math.log1p(math.exp(-d)) for d in (1.0, -1.0, 2.0, -2.0)}
    cases: list[tuple[dict[str, float], float]] = [
        ({"center_coef": 0.0}, soft[-1.0]),
        ({"center_coef": 0.5}, soft[-1.0] + 0.5),
        ({"center_coef": 0.0, "margin_coef": 2.0}, soft[-2.0]),
        ({"center_coef": 0.0, "label_smoothing": 0.2}, 0.8 * soft[-1.0] + 0.2 * soft[1.0]),
    ]
    for section, expected in cases:
        engine, found = stub_step(pair, **section)
        assert engine.losses == [pytest.approx(expected)] == [found["reward/loss"]]
        assert (found["reward/accuracy"], found["reward/margin"]) == (0.0, -1.0)


# --- Bradley-Terry recovery


def drawn_pairs(count: int, seed: int, weights: torch.Tensor) -> tuple[Dataset, torch.Tensor]:
    """Pairs of 10 random tokens, labelled with probability sigmoid(gold gap); the gaps."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, 10 + len(weights), (count, 2, 10), generator=generator)
    gold = weights[tokens - 10].sum(-1)
    gaps = gold[:, 0] - gold[:, 1]
    swapped = torch.rand(count, generator=generator) > gaps.sigmoid()
    tokens[swapped], gaps[swapped] = tokens[swapped].flip(1), -gaps[swapped]
    rows = [
        {
            "answer_ids": [[1, *answer, 2] for answer in pair],
            "ranks": [0, 1],
            "ratings": [0.0, 0.0],
            "prompt_length": 1,
            "where": f"f:{number}",
        }
        for number, pair in enumerate(tokens.tolist())
    ]
    return Dataset.from_list(rows), gaps


@pytest.mark.slow
def test_bradley_terry_is_recovered_up_to_the_bayes_limit(tmp_path: Path, tiny_llama_dir: Path):
    weights = torch.randn(16, generator=torch.Generator().manual_seed(4))
    weights = (weights - weights.mean()) / weights.std() / math.sqrt(10)  # gold's deviation is 1
    train_set, _ = drawn_pairs(6000, 0, weights)
    held_out, gold = drawn_pairs(4000, 1, weights)
    bayes = gold.abs().sigmoid().mean().item()
    assert bayes == pytest.approx(0.725, abs=0.01)  # E[sigmoid(|d|)], d ~ N(0, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = Adapter(LoraSection(r=16, alpha=32.0), trainable=True)
        llama = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
        model = RoleModel(llama, {"reward": adapter}, ("reward",))
    cfg = config(epochs=2.0, batch_size=64, microbatch_size=64, learning_rate=4e-3, warmup_steps=10)
    member = train(cfg, Preferences(train_set, held_out, {}), tmp_path, model)
    pairs = answer_pairs(held_out.to_list())
    scores = torch.tensor(member.scores)
    gaps = scores[pairs.better] - scores[pairs.worse]
    ones = np.ones(len(gaps))
    assert (gaps > 0).float().mean() == pytest.approx(bayes, abs=0.02)
    assert torch.corrcoef(torch.stack([gaps, gold]))[0, 1] > 0.98
    assert calibration_error(reliability(gaps.numpy(), ones)) < 0.03
    assert best_scale(gaps.numpy(), ones) == pytest.approx(1.0, abs=0.15)


# --- the gate


def gated(folder: Path, accuracy: float, low: float, **numbers: float) -> RunFolder:
    run = RunFolder(folder)
    high = 2 * accuracy - low
    result = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    write_json(run.result("reward"), {**result, "num_eval_pairs": 40, **numbers})
    return run


def test_ppo_is_refused_a_model_no_better_than_guessing(tmp_path: Path):
    weak = gated(tmp_path, 0.55, 0.4)
    with pytest.raises(ValueError) as caught:
        check_gate(weak, RewardSection())
    for part in ("55.0%", "40.0% to 70.0%", "40 pairs", "doctor.json", "reward.allow_weak=true"):
        assert part in str(caught.value)
    (warning,) = check_gate(weak, RewardSection(allow_weak=True))
    assert "cannot be distinguished from guessing" in warning
    with pytest.raises(ValueError, match="guessing"):
        check_gate(gated(tmp_path, 0.6, 0.5), RewardSection())


def test_ppo_is_warned_far_below_the_bayes_limit(tmp_path: Path):
    assert check_gate(gated(tmp_path, 0.8, 0.7), RewardSection()) == []
    assert check_gate(gated(tmp_path, 0.8, 0.7, bayes_accuracy=0.84), RewardSection()) == []
    (warning,) = check_gate(gated(tmp_path, 0.8, 0.7, bayes_accuracy=0.9), RewardSection())
    assert "0.800" in warning and "0.900" in warning


UNRATED = [[[0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0]], [[2.0, 2.0]]]
RATED = [[[0.0, 0.0], [0.5, 0.0]], [[3.0, 2.0, 2.0]], [[-1.0, -2.0]]]


@pytest.mark.parametrize("ratings", [*UNRATED, *RATED])
def test_a_margin_coefficient_needs_margins(
    ratings: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = SimpleNamespace(reports=[], held_out=[], train=[])
    columns = {"ratings": ratings, "answer_ids": [[[5], [6]]] * len(ratings)}
    report = TokenReport(len(ratings), len(ratings), {}, {})
    train = SimpleNamespace(train=columns, held_out=[1], mixture=mixture, reports=[report])
    monkeypatch.setattr(reward_data, "load_examples", lambda *_: train)
    tokenizer: Any = None
    assert reward_data.load_preferences(config(), tokenizer)
    wanted = config(margin_coef=0.25)
    if ratings in RATED:
        assert reward_data.load_preferences(wanted, tokenizer)
        return
    with pytest.raises(ValueError, match=r"margin_coef 0\.25: no pair .* has a margin.*coef=0$"):
        reward_data.load_preferences(wanted, tokenizer)
