"""From answers to scores, rewards and advantages: every key against numbers of plain Python."""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppo_runs import STOPS, TinyRun, nudge

import trainers.ppo.train as ppo_module
from chatllama.model.roles import acting_as
from data.batches import batch_indices
from trainers.ppo.health.monitor import HealthMonitor
from trainers.ppo.rewards import Statistics
from trainers.ppo.rollout import Rollout, sample_responses
from trainers.ppo.train import PpoState, PpoTrainer
from trainers.ppo.update import Update

WORDS = {"function": "ppo_runs:count_words"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("options"), tiny_tokenizer_dir, members=2)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[Update]:
    """Every update that would be made, with its rollout and targets; none is."""
    made: list[Update] = []

    class Recorded(Update):
        def run(self) -> dict[str, float]:
            made.append(self)
            return {}

    monkeypatch.setattr(ppo_module, "Update", Recorded)
    return made


def build(tiny: TinyRun, *, seed: int = 0, **ppo: Any) -> PpoTrainer:
    """A trainer on the first reward adapter alone, unless `rewards` says otherwise."""
    return tiny.trainer(ppo={"rewards": [{"adapter": tiny.reward_adapter}], **ppo}, seed=seed)


@pytest.fixture(scope="module")
def nudged(tiny: TinyRun) -> PpoTrainer:
    trainer = build(tiny)
    nudge(trainer)
    return trainer


def with_section(tiny: TinyRun, trainer: PpoTrainer, changes: dict[str, Any]) -> PpoTrainer:
    """The same models under another section (what it says about roles is without effect)."""
    cfg = tiny.config(ppo={"rewards": trainer.cfg.ppo.model_dump()["rewards"], **changes})
    t = trainer
    return PpoTrainer(cfg, t.run, t.engine, t.scorer, t.prompts, t.stop_tokens)


@torch.no_grad()
def raw_score(trainer: PpoTrainer, ids: list[int], role: str = "reward") -> float:
    model: Any = trainer.engine.model
    with acting_as(model, role):
        hidden = model.llama.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return float(hidden @ model.heads[role].weight[0])


@torch.no_grad()
def value_after(trainer: PpoTrainer, ids: list[int]) -> float:
    model: Any = trainer.engine.model
    with acting_as(model, "value"):
        hidden = model.llama.model(torch.tensor([ids])).last_hidden_state[0, -1]
    head = model.heads["value"]
    return float(hidden @ head.weight[0] + head.bias)


def row_ids(rollout: Rollout, row: int) -> list[int]:
    return rollout.tokens[row][rollout.mask[row]].tolist()


# --- from scores to advantages


def rewards_by_hand(
    section: Any, rollout: Rollout, mean: float, deviation: float, kl_coef: float
) -> list[list[float]]:
    rows = []
    for row in range(len(rollout.tokens)):
        length = int(rollout.response_mask[row].sum())
        score = float(rollout.scores[row])
        if section.score_normalization != "none":
            score = (score - mean) / deviation
        if section.score_clip is not None:
            score = max(-section.score_clip, min(score, section.score_clip))
        if section.missing_eos == "penalty" and not rollout.finished[row]:
            score -= section.missing_eos_penalty
        score -= section.length_penalty * length
        logprobs, ref = rollout.logprobs[row], rollout.ref_logprobs[row]
        rewards = [-kl_coef * float(logprobs[t] - ref[t]) for t in range(length)]
        rewards[-1] += score
        rows.append(rewards)
    if section.whiten_rewards:
        flat = [reward for row in rows for reward in row]
        middle, spread = statistics.fmean(flat), statistics.pstdev(flat)
        rows = [[(reward - middle) / spread + middle for reward in row] for row in rows]
    return rows


def sum_of_kl(rollout: Rollout, row: int) -> float:
    length = int(rollout.response_mask[row].sum())
    return sum(rollout.kl[row, :length].tolist())


def advantages_by_hand(
    section: Any, rollout: Rollout, rewards: list[list[float]], kl_coef: float
) -> tuple[list[list[float]], list[list[float]]]:
    advantages, returns = [], []
    size = section.samples_per_prompt
    for row, own in enumerate(rewards):
        length = len(own)
        if section.advantage == "gae":
            values = [*rollout.values[row, :length].tolist(), 0.0]
            deltas = [own[t] + section.gamma * values[t + 1] - values[t] for t in range(length)]
            found, learnt = (
                [
                    sum((section.gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
                    for t in range(length)
                ]
                for lam in (section.lam, section.critic_lam or section.lam)
            )
            returns.append([a + v for a, v in zip(learnt, values, strict=False)])
        else:
            group = [sum(r) for r in rewards[row // size * size : (row // size + 1) * size]]
            others = group[: row % size] + group[row % size + 1 :]
            if section.advantage == "rloo":
                advantage = sum(own) - statistics.fmean(others)
            else:  # the KL is added once the scores have been divided
                first = row // size * size
                kls = [sum_of_kl(rollout, first + i) for i in range(size)]
                shaped = [total + kl_coef * kl for total, kl in zip(group, kls, strict=True)]
                mine = shaped[row - first] - statistics.fmean(shaped)
                advantage = mine / (statistics.stdev(shaped) + 1e-4)
                advantage -= kl_coef * (kls[row - first] - statistics.fmean(kls))
            found = [advantage] * length
            returns.append([0.0] * length)
        advantages.append(found)
    counts = [section.missing_eos != "filter" or bool(done) for done in rollout.finished.tolist()]
    if section.whitens:
        flat = [a for row, yes in zip(advantages, counts, strict=True) if yes for a in row]
        middle, spread = statistics.fmean(flat), statistics.pstdev(flat)
        advantages = [[(a - middle) / spread for a in row] for row in advantages]
    return advantages, returns


RLOO = {"advantage": "rloo", "samples_per_prompt": 2}
GRPO = {"advantage": "grpo", "samples_per_prompt": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl_coef": 2.0},
        {"kl_coef": 0.0},
        {"gamma": 0.8},
        {"lam": 0.3},
        {"lam": 0.3, "critic_lam": 1.0, "gamma": 0.9},
        {"whiten_advantages": False},
        {"whiten_rewards": True, "whiten_advantages": False},
        {"score_normalization": "none"},
        {"score_normalization": "running"},
        {"score_clip": 0.4, "whiten_advantages": False},
        {"missing_eos_penalty": 3.0},
        {"missing_eos": "filter"},
        {"length_penalty": 0.5},
        {"advantage": "gae", "samples_per_prompt": 4},
        RLOO,
        {**RLOO, "whiten_advantages": True},
        {**RLOO, "missing_eos": "filter", "kl_coef": 1.0},
        GRPO,
        {**GRPO, "kl_coef": 0.7, "length_penalty": 0.2},
        {**GRPO, "kl_coef": 2.0, "missing_eos_penalty": 3.0, "score_normalization": "none"},
    ],
    ids=str,
)
def test_targets_are_what_plain_python_computes(
    tiny: TinyRun, nudged: PpoTrainer, updates: list[Update], changes: dict[str, Any]
):
    trainer = with_section(tiny, nudged, changes)
    start = Statistics(count=3, mean=0.3, squares=0.72)  # deviation sqrt(0.72 / 2) = 0.6
    section = trainer.cfg.ppo
    state, rollout, _, metrics = trainer.advance(PpoState(1, section.kl_coef, start))
    targets = updates[0].targets
    assert rollout.kl.abs().max() > 0.05 and 0 < rollout.finished.float().mean() < 1
    mean, deviation = 0.3, 0.6
    if section.score_normalization == "running":
        # 3 numbers with that mean and deviation, and the 8 of this rollout
        old = [0.3 - 0.6, 0.3, 0.3 + 0.6]
        numbers = old + rollout.scores.tolist()
        mean, deviation = statistics.fmean(numbers), statistics.stdev(numbers)
        assert state.statistics.mean == pytest.approx(mean)
        assert state.statistics.deviation == pytest.approx(deviation)
    rewards = rewards_by_hand(section, rollout, mean, deviation, section.kl_coef)
    advantages, returns = advantages_by_hand(section, rollout, rewards, section.kl_coef)
    for row, (expected, goals) in enumerate(zip(advantages, returns, strict=True)):
        learnt = section.missing_eos == "penalty" or bool(rollout.finished[row])
        assert int(targets.mask[row].sum()) == (len(expected) if learnt else 0)
        if learnt:
            found = targets.advantages[row, : len(expected)].tolist()
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        if section.advantage == "gae":
            found = targets.returns[row, : len(goals)].tolist()
            assert found == pytest.approx(goals, rel=1e-4, abs=1e-5)
    totals = [sum(row) for row in rewards]
    assert metrics["ppo/reward_mean"] == pytest.approx(statistics.fmean(totals), rel=1e-4, abs=1e-5)
    if section.advantage == "gae":
        flat = [
            (
                sum(section.gamma ** (k - t) * row[k] for k in range(t, len(row))),
                float(rollout.values[r, t]),
            )
            for r, row in enumerate(rewards)
            for t in range(len(row))
        ]
        missed = statistics.pvariance([to_go - value for to_go, value in flat])
        spread = statistics.pvariance([to_go for to_go, _ in flat])
        assert metrics["ppo/explained_variance"] == pytest.approx(1 - missed / spread, rel=1e-3)


def error_over_prompts(trainer: PpoTrainer, numbers: list[float], step: int) -> float:
    """Standard error of the mean: only different prompts' numbers are independent."""
    times, mean = trainer.cfg.ppo.samples_per_prompt, statistics.fmean(numbers)
    texts = [record["text"] for record in trainer._prompts(step) for _ in range(times)]
    sums = [
        sum(n - mean for n, t in zip(numbers, texts, strict=True) if t == text)
        for text in set(texts)
    ]
    count = len(sums)
    return math.sqrt(count / (count - 1) * sum(s * s for s in sums)) / len(numbers)


def test_metrics_of_a_rollout_by_hand(tiny: TinyRun, nudged: PpoTrainer, updates: list[Update]):
    trainer = with_section(tiny, nudged, {"score_normalization": "none", "kl_coef": 0.5})
    _, rollout, texts, metrics = trainer.advance(PpoState(1, 0.5, Statistics()))
    kls, token_kls, gaps = [], [], []
    for row in range(8):
        length = int(rollout.response_mask[row].sum())
        own = (rollout.logprobs - rollout.ref_logprobs)[row, :length].tolist()
        kls.append(sum(own))
        token_kls += own
        gaps += (-rollout.logprobs - rollout.entropy)[row, :length].tolist()
    tokens = len(token_kls)
    shaped = [s - (not f) for s, f in zip(rollout.scores.tolist(), rollout.finished, strict=True)]
    expected = {
        "kl_sequence": statistics.fmean(kls),
        "kl_sequence_se": error_over_prompts(trainer, kls, step=1),
        "kl_token": sum(kls) / tokens,
        "kl_abs_max": max(map(abs, token_kls)),
        "surprise_gap": statistics.fmean(gaps),
        "surprise_gap_se": math.sqrt(sum(gap**2 for gap in gaps)) / tokens,
        "response_length": tokens / 8,
        "eos_rate": statistics.fmean(map(float, rollout.finished)),
        "rm_score_mean": statistics.fmean(rollout.scores.tolist()),
        "rm_score_std": statistics.pstdev(rollout.scores.tolist()),
        "score_mean": statistics.fmean(shaped),
        "score_std": statistics.pstdev(shaped),
        "score_se": error_over_prompts(trainer, shaped, step=1),
        "length_correlation": statistics.correlation(
            rollout.scores.tolist(), list(map(float, rollout.lengths))
        ),
        "kl_coef": 0.5,
    }
    for name, value in expected.items():
        assert metrics[f"ppo/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert texts == [trainer.stop_tokens.decode(rollout.response_ids(row)) for row in range(8)]


def test_the_trainers_own_coefficient_is_in_the_reward(
    tiny: TinyRun, nudged: PpoTrainer, updates: list[Update]
):
    """The adaptive controller's, which leaves the config's behind."""
    trainer = with_section(tiny, nudged, {"whiten_advantages": False, "kl_coef": 0.3})
    rewards = {}
    for coef in (0.3, 0.6):
        metrics = trainer.advance(PpoState(1, coef, Statistics(3, 0.0, 2.0)))[3]
        rewards[coef] = metrics["ppo/reward_mean"]
        assert metrics["ppo/kl_coef"] == coef
    kl = metrics["ppo/kl_sequence"]
    assert rewards[0.3] - rewards[0.6] == pytest.approx(0.3 * kl, rel=1e-3) and kl > 0.01


# --- KL controllers


def test_a_fixed_coefficient_stays(tiny: TinyRun):
    trainer = build(tiny, kl_coef=0.3)
    nudge(trainer)
    state = trainer.advance(PpoState(1, 0.3, Statistics()))[0]
    assert (state.step, state.kl_coef) == (2, 0.3)


@pytest.mark.parametrize("target", [0.05, 1.0, 1000.0])
def test_an_adaptive_coefficient_follows_the_sequence_kl(tiny: TinyRun, target: float):
    trainer = build(tiny, kl_controller="adaptive", kl_target=target, kl_horizon=40, kl_coef=0.3)
    nudge(trainer, 0.05)
    state, _, _, metrics = trainer.advance(PpoState(1, 0.3, Statistics()))
    error = max(-0.2, min(metrics["ppo/kl_sequence"] / target - 1, 0.2))
    assert state.kl_coef == pytest.approx(0.3 * (1 + error * 8 / 40))
    assert metrics["ppo/kl_coef"] == 0.3 and state.kl_coef != 0.3
    again = trainer.advance(state)[3]
    assert again["ppo/kl_coef"] == state.kl_coef


# --- normalisation of scores at the start


def reference_answers(trainer: PpoTrainer, count: int) -> list[tuple[list[int], str]]:
    """Ids of prompt and answer, and the answer's text, of the first `count` prompts in order."""
    train = trainer.prompts.train
    chosen = batch_indices(len(train), count, 0, trainer.cfg.seed)
    prompts = [train[i]["input_ids"] for i in chosen]
    answers = sample_responses(
        trainer.engine, "reference", prompts, trainer.cfg.generation, STOPS, (trainer.cfg.seed, 0)
    )
    texts = [trainer.stop_tokens.decode(answer) for answer in answers]
    return [(p + a, text) for p, a, text in zip(prompts, answers, texts, strict=True)]


@pytest.mark.parametrize("count", [6, 9])
def test_scores_are_normalised_by_those_of_the_reference(tiny: TinyRun, count: int):
    trainer = build(tiny, score_normalization_samples=count)
    scores = [raw_score(trainer, ids) for ids, _ in reference_answers(trainer, count)]
    state = trainer.start()
    assert state.statistics.count == count and state.step == 0 and state.kl_coef == 0.05
    assert state.statistics.mean == pytest.approx(statistics.fmean(scores), rel=1e-5)
    assert state.statistics.deviation == pytest.approx(statistics.stdev(scores), rel=1e-5)
    # they stay for the whole stage
    assert trainer.advance(state)[0].statistics == state.statistics


def test_values_start_as_normalised_scores(tiny: TinyRun):
    trainer = build(tiny)
    prefixes = [[1, 90], [1, 90, 80, 77], [1, 250, 2]]
    before = [raw_score(trainer, ids) for ids in prefixes]
    assert [value_after(trainer, ids) for ids in prefixes] == pytest.approx(before, abs=1e-5)
    found = trainer.start().statistics
    expected = [(score - found.mean) / found.deviation for score in before]
    assert [value_after(trainer, ids) for ids in prefixes] == pytest.approx(expected, abs=1e-5)
    assert [raw_score(trainer, ids) for ids in prefixes] == before


def test_without_normalisation_values_start_as_raw_scores(tiny: TinyRun):
    trainer = build(tiny, score_normalization="none")
    state = trainer.start()
    assert state.statistics == Statistics()
    assert value_after(trainer, [1, 90]) == pytest.approx(raw_score(trainer, [1, 90]), abs=1e-5)


def test_values_follow_the_weight_of_their_source(tiny: TinyRun):
    sources = [{**WORDS, "weight": 0.1}, {"adapter": tiny.reward_adapter, "weight": -2.0}]
    trainer = build(tiny, rewards=sources)
    answers = reference_answers(trainer, 6)
    raw = [raw_score(trainer, ids) for ids, _ in answers]
    # every prompt is "question N": two words
    totals = [0.1 * (20 + len(text)) - 2 * s for s, (_, text) in zip(raw, answers, strict=True)]
    found = trainer.start().statistics
    assert found.mean == pytest.approx(statistics.fmean(totals), rel=1e-5)
    assert found.deviation == pytest.approx(statistics.stdev(totals), rel=1e-5)
    value = -2 * (raw_score(trainer, [1, 90]) - statistics.fmean(raw)) / found.deviation
    assert value_after(trainer, [1, 90]) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("how", ["mean", "min"])
def test_values_begin_as_the_scores_of_the_first_member(tiny: TinyRun, how: str):
    trainer = build(tiny, rewards=[{"adapter": "run"}], reward_ensemble=how)
    prefix = [1, 90, 80]
    first, second = raw_score(trainer, prefix), raw_score(trainer, prefix, "reward_1")
    assert (
        value_after(trainer, prefix) == pytest.approx(first, abs=1e-5) and abs(first - second) > 0.1
    )
    answers = [ids for ids, _ in reference_answers(trainer, 6)]
    found = trainer.start().statistics
    own = statistics.fmean(raw_score(trainer, ids) for ids in answers)
    expected = (first - own) / found.deviation
    assert value_after(trainer, prefix) == pytest.approx(expected, abs=1e-5)
    assert abs(own - statistics.fmean(raw_score(trainer, ids, "reward_1") for ids in answers)) > 0.1


@pytest.mark.parametrize("changes", [{"value_model": "policy_trunk"}, {"rewards": [WORDS]}])
def test_values_without_a_reward_head_to_copy_start_from_zero(
    tiny: TinyRun, changes: dict[str, Any]
):
    trainer = build(tiny, **changes)
    state = trainer.start()
    assert state.statistics.count == 6
    assert value_after(trainer, [1, 90]) == 0
    _, rollout, _, _ = trainer.advance(state)
    assert not rollout.values.any()
    assert value_after(trainer, [1, 90]) != 0


def test_running_statistics_are_those_of_all_scores_so_far(tiny: TinyRun):
    trainer = build(tiny, score_normalization="running")
    scores = [raw_score(trainer, ids) for ids, _ in reference_answers(trainer, 6)]
    state = trainer.start()
    for _ in range(3):
        state, rollout, _, _ = trainer.advance(state)
        scores += rollout.scores.tolist()
        assert state.statistics.count == len(scores)
        assert state.statistics.mean == pytest.approx(statistics.fmean(scores), rel=1e-5)
        assert state.statistics.deviation == pytest.approx(statistics.stdev(scores), rel=1e-5)


@pytest.mark.parametrize(
    ("size", "spread", "dead"),
    [
        (3.0, 0.0, True),
        (0.0, 1e-6, True),  # normalised, noise of the sixth digit would look like any score
        (0.0, 1e-3, False),
        (500.0, 0.03, True),
        (500.0, 0.3, False),
        (-500.0, 0.03, True),
    ],
)
def test_rewards_that_hardly_differ_are_refused(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, size: float, spread: float, dead: bool
):
    import ppo_runs

    scores = [size + spread * (-1) ** number for number in range(6)]
    monkeypatch.setattr(ppo_runs, "count_words", lambda prompt, response: scores.pop())
    trainer = build(tiny, rewards=[WORDS])
    if dead:
        said = rf"all 6 answers .* same score: mean {size:g}, .*min_score_std.*ppo\.rewards"
        with pytest.raises(ValueError, match=said):
            trainer.start()
    else:  # the unbiased deviation of six numbers, three at each end
        assert trainer.start().statistics.deviation == pytest.approx(spread * (6 / 5) ** 0.5, 1e-3)


# --- reward sources in the loop


def test_an_ensemble_of_the_run_is_loaded_whole(tiny: TinyRun):
    combined: dict[str, Callable[..., float]] = {"mean": lambda a, b: (a + b) / 2, "min": min}
    for how, combine in combined.items():
        trainer = build(tiny, rewards=[{"adapter": "run"}], reward_ensemble=how)
        _, rollout, _, metrics = trainer.advance(trainer.start())
        ids = [row_ids(rollout, row) for row in range(8)]
        pairs = [(raw_score(trainer, each), raw_score(trainer, each, "reward_1")) for each in ids]
        expected = [combine(*pair) for pair in pairs]
        assert rollout.scores.tolist() == pytest.approx(expected, abs=1e-5)
        assert max(abs(a - b) for a, b in pairs) > 0.1
        apart = statistics.fmean(statistics.stdev(pair) for pair in pairs)
        assert metrics["ppo/ensemble_disagreement"] == pytest.approx(apart, rel=1e-3)


def test_functions_and_adapters_are_added_in_the_loop(tiny: TinyRun):
    second = str(tiny.folder / "reward" / "adapter-1")
    sources = [{**WORDS, "weight": 0.01}, {"adapter": second, "weight": 0.5}]
    trainer = build(tiny, rewards=[{"adapter": tiny.reward_adapter}, *sources])
    _, rollout, texts, metrics = trainer.advance(trainer.start())
    for row in range(8):
        ids = row_ids(rollout, row)
        expected = raw_score(trainer, ids) + 0.01 * (20 + len(texts[row]))
        expected += 0.5 * raw_score(trainer, ids, "reward_1")
        assert float(rollout.scores[row]) == pytest.approx(expected, abs=1e-5)
    assert "ppo/ensemble_disagreement" not in metrics


@pytest.mark.parametrize(("samples", "shift"), [(1, 0.0), (2, 0.3)])
def test_a_few_answers_are_scored_again_with_their_own_prompts(
    tiny: TinyRun, nudged: PpoTrainer, updates: list[Update], samples: int, shift: float
):
    """Every second score is `shift` off the first: half of its square over their variance."""
    changes = {"samples_per_prompt": samples, "score_normalization": "none"}
    trainer, calls = with_section(tiny, nudged, changes), []
    collect = trainer.collector.collect

    def shifted(*given: Any, **more: Any) -> tuple[Rollout, list[str]]:
        batch, texts = collect(*given, **more)
        calls.append(batch)
        return (replace(batch, scores=batch.scores + shift) if more else batch), texts

    trainer.collector = SimpleNamespace(collect=shifted)  # pyright: ignore
    metrics = trainer.advance(PpoState(10, 0.5, Statistics()))[3]
    first, again = calls
    rows = [row_ids(first, row) for row in range(8)]
    assert [row_ids(again, row) for row in range(8)] == rows[::-1]
    expected = shift**2 / (2 * statistics.pvariance(first.scores.tolist()))
    assert metrics["ppo/rescore_gap"] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_scores_are_checked_again_every_tenth_step_unless_that_is_ignored(
    tiny: TinyRun, nudged: PpoTrainer, updates: list[Update]
):
    def has_it(step: int, **health: Any) -> bool:
        changes = {"score_normalization": "none", "health": health}
        trainer = with_section(tiny, nudged, changes)
        return "ppo/rescore_gap" in trainer.advance(PpoState(step, 0.5, Statistics()))[3]

    assert has_it(0) and not has_it(1)
    assert not has_it(0, ignore=["scores_not_repeatable"])


@pytest.mark.parametrize("count", [1, 2])
def test_one_response_has_no_standard_error(
    tiny: TinyRun, nudged: PpoTrainer, updates: list[Update], count: int
):
    sizes = dict.fromkeys(("rollout_batch_size", "minibatch_size", "microbatch_size"), count)
    trainer = with_section(tiny, nudged, {"score_normalization": "none", **sizes})
    metrics = trainer.advance(PpoState(1, 0.5, Statistics()))[3]
    for name in ("kl_sequence_se", "score_se", "score_std", "length_correlation"):
        assert (f"ppo/{name}" in metrics) == (count > 1), name
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("samples", [2, 4, 8])
def test_the_error_of_the_kl_is_that_of_the_prompts_means(
    tiny: TinyRun, nudged: PpoTrainer, updates: list[Update], samples: int
):
    changes = {"advantage": "rloo", "samples_per_prompt": samples, "score_normalization": "none"}
    trainer = with_section(tiny, nudged, changes)
    _, rollout, _, metrics = trainer.advance(PpoState(0, 0.5, Statistics()))
    raw = rollout.scores.tolist()
    spreads = [statistics.pstdev(raw[i : i + samples]) for i in range(0, 8, samples)]
    assert metrics["ppo/rm_score_group_std"] == pytest.approx(statistics.fmean(spreads), rel=1e-5)
    kls = [sum_of_kl(rollout, row) for row in range(8)]
    means = [statistics.fmean(kls[i : i + samples]) for i in range(0, 8, samples)]
    if samples == 8:
        assert "ppo/kl_sequence_se" not in metrics
    else:
        expected = statistics.stdev(means) / math.sqrt(len(means))
        assert metrics["ppo/kl_sequence_se"] == pytest.approx(expected, rel=1e-4)
    assert "ppo/score_std" in metrics


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_a_batch_of_one_prompt_trains_and_raises_no_alarm(tiny: TinyRun, advantage: str):
    count = 1 if advantage == "gae" else 2
    sizes = dict.fromkeys(("rollout_batch_size", "minibatch_size", "microbatch_size"), count)
    running = {"score_normalization": "running", "samples_per_prompt": count}
    trainer = build(tiny, advantage=advantage, **running, **sizes, steps=5)
    monitor, state = HealthMonitor(trainer.cfg.ppo.health), trainer.start()
    for _ in range(4):
        state, _, _, metrics = trainer.advance(state)
        assert all(math.isfinite(value) for value in metrics.values())
        assert [each.name for each in monitor.observe(state.step, metrics)] == []


def test_a_filter_that_leaves_no_response_is_said(
    tiny: TinyRun, nudged: PpoTrainer, updates: list[Update], capsys: pytest.CaptureFixture[str]
):
    trainer = with_section(tiny, nudged, {"missing_eos": "filter", "score_normalization": "none"})
    trainer.advance(PpoState(1, 0.5, Statistics()))
    assert "trains on nothing" not in capsys.readouterr().err
    rollout = updates[-1].rollout
    unfinished = replace(rollout, finished=torch.zeros_like(rollout.finished))
    trainer._targets(unfinished, PpoState(1, 0.5, Statistics()))
    said = capsys.readouterr().err
    assert "step 2 trains on nothing" in said and "all 8 responses" in said
