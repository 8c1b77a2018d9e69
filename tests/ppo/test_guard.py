"""Rollbacks and the state of checkpoints: what comes back, what is lowered, what is counted."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppo_runs import TinyRun, nudge, weights

from chatllama.model.roles import adapter_parameters
from chatllama.reporting.tracker import Tracker
from chatllama.runs.folder import RunFolder
from chatllama.runtime.jsonl import read_lines
from trainers.ppo.guard import Guard
from trainers.ppo.rewards import Statistics
from trainers.ppo.state import PpoState, load_state, save_state
from trainers.ppo.train import PpoTrainer

ROLLBACK = {"action": "rollback", "rollback_lr_factor": 0.25}
EXPLODED = "ppo/approx_kl"
"""Above 0.2 it is diagnosed at once."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("guard"), tiny_tokenizer_dir)


class Faulty(PpoTrainer):
    """A trainer whose steps of the given numbers explode, each as often as it is listed."""

    faults: list[int]
    made: list[tuple[int, float]]
    """Step and learning rate of every step made."""

    def advance(self, state: PpoState) -> Any:
        """One step; the fault is in its metrics."""
        state, rollout, texts, metrics = super().advance(state)
        metrics[EXPLODED] = 0.0
        if state.step in self.faults:
            self.faults.remove(state.step)
            metrics[EXPLODED] = 1.0
        self.made.append((state.step, metrics["ppo/lr"]))
        return state, rollout, texts, metrics


def faulty(tiny: TinyRun, folder: Path, faults: list[int], **ppo: Any) -> Faulty:
    """With a constant learning rate of 3e-3 and checkpoints after every step."""
    health = {**ROLLBACK, **ppo.pop("health", {})}
    settings = {"steps": 4, "save_every": 1, "lr_schedule": "constant", "health": health, **ppo}
    t = tiny.trainer(ppo=settings, tracking={"sample_every": 1})
    run = RunFolder(folder)
    trainer = Faulty(t.cfg, run, t.engine, t.scorer, t.prompts, t.stop_tokens)
    trainer.faults, trainer.made = faults, []
    return trainer


def logged_steps(run: RunFolder, name: str = "metrics") -> list[int]:
    path = run.metrics("ppo") if name == "metrics" else run.samples("ppo")
    return [line["step"] for line in read_lines(path)]


# --- one rollback


def test_a_rollback_restores_everything_and_lowers_the_learning_rates(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trainer = faulty(tiny, tmp_path, [], ema_decay=0.9)
    model, optimizer, guard = trainer.engine.model, trainer.engine.optimizer, trainer.guard
    step_three = trainer.advance(PpoState(2, 0.05, Statistics(5, 1.0, 2.0)))[0]
    good = replace(step_three, lr_scale=0.5, rollbacks=1)
    guard.monitor.observe(3, {"ppo/entropy": 1.5})
    before = weights(model)
    moments = [{n: t.clone() for n, t in state.items()} for state in optimizer.state.values()]
    guard.save(good)
    trainer.advance(good)
    nudge(trainer)
    guard.monitor.observe(4, {"ppo/entropy": 9.0})
    for parameter in adapter_parameters(model, "ema"):
        parameter.data += 1.0

    back = guard._rolled_back(replace(good, step=4, kl_coef=9.0, statistics=Statistics()))

    assert replace(back, health={}) == replace(good, lr_scale=0.125, rollbacks=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    for mine, theirs in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    assert guard.monitor.state()["history"]["last"]["ppo/entropy"] == [1.5]
    assert "back to step 3, learning rates times 0.125" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_rollback_lowers_the_rates_once_more(tiny: TinyRun, tmp_path: Path, count: int):
    trainer = tiny.trainer(ppo={"save_every": 1, "health": ROLLBACK})
    guard = Guard(trainer.cfg, RunFolder(tmp_path), trainer.engine)
    state = PpoState(1, 0.05, Statistics())
    guard.save(state)
    for _ in range(count):
        state = guard._rolled_back(replace(state, step=2))
        guard.save(state)
    assert (state.step, state.lr_scale, state.rollbacks) == (1, 0.25**count, count)
    assert (again := load_state(trainer.cfg, trainer.engine, step_one(tmp_path))).lr_scale == (
        state.lr_scale
    )
    assert again.rollbacks == count


def step_one(folder: Path) -> Path:
    return RunFolder(folder).checkpoints("ppo") / "step-1"


@pytest.mark.parametrize(
    "state",
    [
        PpoState(0, 0.05, Statistics()),
        PpoState(3, 0.7, Statistics(12, -3.5, 8.0), lr_scale=0.25, rollbacks=2),
        PpoState(9, 0.0, Statistics(1, 2.0, 0.0), 1.0, 1, {"history": {"steps": 9}}),
    ],
    ids=["start", "lowered", "watched"],
)
def test_a_checkpoint_holds_the_whole_state(tiny: TinyRun, tmp_path: Path, state: PpoState):
    trainer = tiny.trainer(ppo={"ema_decay": 0.5, "reference_refresh_every": 1})
    run, model = RunFolder(tmp_path), trainer.engine.model
    changing = [p for role in ("ema", "reference") for p in adapter_parameters(model, role)]
    for number, parameter in enumerate(changing):
        parameter.data.fill_(0.01 * number)
    save_state(trainer.cfg, run, trainer.engine, state)
    for parameter in changing:
        parameter.data.fill_(5.0)
    folder = run.checkpoints("ppo") / f"step-{state.step}"
    assert load_state(trainer.cfg, trainer.engine, folder) == state
    for number, parameter in enumerate(changing):
        assert float(parameter.min()) == float(parameter.max()) == pytest.approx(0.01 * number)


@pytest.mark.parametrize(
    ("metrics", "offered"),
    [
        ({EXPLODED: 1.0}, True),
        ({EXPLODED: 0.3, "ppo/entropy": 1.0}, True),
        ({EXPLODED: 1.0, "ppo/kl_token": 90.0}, True),
        ({"ppo/policy_loss": math.nan}, False),
        ({"ppo/grad_norm": math.inf, EXPLODED: 1.0}, False),
        ({"ppo/kl_abs_max": 1.0}, False),
    ],
    ids=str,
)
def test_going_on_with_a_warning_is_offered_where_it_is_possible(
    tiny: TinyRun, tmp_path: Path, metrics: dict[str, float], offered: bool
):
    nothing: Any = None
    rollout: Any = SimpleNamespace(tokens=torch.ones(1, 1))
    state = PpoState(1, 0.05, Statistics())
    guards = {
        action: Guard(tiny.config(ppo={"health": {"action": action}}), RunFolder(tmp_path), nothing)
        for action in ("stop", "warn")
    }
    for guard in guards.values():
        guard.begin(state, new_run=True)
    with pytest.raises(ValueError, match="stopped after step 1") as error:
        guards["stop"].after_step(nothing, state, metrics, rollout)
    assert ("or set ppo.health.action: warn" in str(error.value)) == offered
    assert (guards["warn"].check(state, metrics, rollout) == "go on") == offered


# --- whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "made"),
    [
        ([], [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0)]),
        ([1], [(1, 1.0), (1, 0.25), (2, 0.25), (3, 0.25), (4, 0.25)]),
        ([3], [(1, 1.0), (2, 1.0), (3, 1.0), (3, 0.25), (4, 0.25)]),
        ([2, 4], [(1, 1.0), (2, 1.0), (2, 0.25), (3, 0.25), (4, 0.25), (4, 0.0625)]),
    ],
    ids=str,
)
def test_a_run_goes_back_and_ends(
    tiny: TinyRun, tmp_path: Path, faults: list[int], made: list[tuple[int, float]]
):
    trainer, run, count = faulty(tiny, tmp_path, list(faults)), RunFolder(tmp_path), len(faults)
    result = trainer.train(resume=False)
    assert result["steps"] == 4
    assert trainer.made == [(step, pytest.approx(3e-3 * scale)) for step, scale in made]
    # What was undone is in no file but that of the diagnoses, which says why.
    assert logged_steps(run) == logged_steps(run, "samples") == [1, 2, 3, 4]
    told = [json.loads(line) for line in (tmp_path / "ppo/health.jsonl").read_text().splitlines()]
    assert [(line["name"], line["step"], line["decision"]) for line in told] == [
        ("ratio_explosion", step, "rollback") for step in faults
    ]
    last = load_state(trainer.cfg, trainer.engine, run.checkpoints("ppo") / "step-4")
    assert (last.rollbacks, last.lr_scale) == (count, 0.25**count)


@pytest.mark.slow
def test_after_the_last_rollback_the_stage_stops_and_a_resumed_one_counts_on(
    tiny: TinyRun, tmp_path: Path
):
    health = {"max_rollbacks": 2}
    trainer = faulty(tiny, tmp_path, [2, 2, 2], health=health)
    with pytest.raises(ValueError, match="stopped after step 2 by the health monitor"):
        trainer.train(resume=False)
    assert [step for step, _ in trainer.made] == [1, 2, 2, 2]
    # The checkpoint was written before the rollbacks: the resumed run has two of its own.
    again = faulty(tiny, tmp_path, [3, 4, 4], health=health)
    with pytest.raises(ValueError, match="stopped after step 4"):
        again.train(resume=True)
    assert [step for step, _ in again.made] == [2, 3, 3, 4, 4]
    assert [rate / 3e-3 for _, rate in again.made] == pytest.approx([1, 1, 0.25, 0.25, 0.0625])
    # Step 3 was saved after one rollback: that one counts, and so does its learning rate.
    third = faulty(tiny, tmp_path, [4, 4], health=health)
    with pytest.raises(ValueError, match="stopped after step 4"):
        third.train(resume=True)
    assert [rate / 3e-3 for _, rate in third.made] == pytest.approx([0.25, 0.0625])


@pytest.mark.slow
def test_a_rollback_goes_on_as_a_run_that_never_went_wrong(tiny: TinyRun, tmp_path: Path):
    trainer, plain = (faulty(tiny, tmp_path / n, f) for n, f in (("a", [3]), ("b", [])))
    trainer.train(resume=False)
    state = plain.start()
    for step in (1, 2, 3, 4):
        state = plain.advance(replace(state, lr_scale=1.0 if step < 3 else 0.25))[0]
    mine, theirs = (weights(t.engine.model) for t in (trainer, plain))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["reference", "running", "none"])
def test_the_sample_that_is_shown_has_the_normalised_score(
    tiny: TinyRun, tmp_path: Path, normalization: str
):
    trainer = faulty(tiny, tmp_path, [], steps=2, score_normalization=normalization)
    trainer.train(resume=False)
    plain = faulty(tiny, tmp_path / "plain", [], steps=2, score_normalization=normalization)
    state, expected = plain.start(), []
    for _ in range(2):
        state, rollout, texts, _ = plain.advance(state)
        statistics = state.statistics
        mean, deviation = (0.0, 1.0) if normalization == "none" else (
            statistics.mean, (statistics.squares / (statistics.count - 1)) ** 0.5
        )  # fmt: skip
        expected.append(((float(rollout.scores[0]) - mean) / deviation, texts[0]))
    shown = [(line["score"], line["response"]) for line in read_lines(trainer.run.samples("ppo"))]
    assert [text for _, text in shown] == [text for _, text in expected]
    assert [score for score, _ in shown] == pytest.approx([score for score, _ in expected])


def test_the_guard_saves_at_its_rhythm_and_after_no_rollback(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trainer = faulty(tiny, tmp_path, [], save_every=2)
    cfg, run = trainer.cfg, trainer.run
    rollout = trainer._roll_out(0)[0]
    fine, exploded = {EXPLODED: 0.0}, {EXPLODED: 1.0}
    with Tracker(run, "ppo", cfg.tracking, 4, 0) as tracker:
        state = PpoState(0, 0.05, Statistics())
        trainer.guard.save(state)
        for step in (1, 2, 3):
            tracker.log(step, fine)
            state = trainer.guard.after_step(tracker, replace(state, step=step), fine, rollout)
        assert [path.name for path in sorted(run.checkpoints("ppo").iterdir())] == [
            "step-0",
            "step-2",
        ]
        tracker.log(4, exploded)
        back = trainer.guard.after_step(tracker, replace(state, step=4), exploded, rollout)
        tracker.log(3, fine)
    assert (back.step, back.rollbacks) == (2, 1)
    assert logged_steps(run) == [1, 2, 3]
    assert "ratio_explosion at step 4" in capsys.readouterr().err


@pytest.mark.parametrize("eval_every", [0, 1, 2])
def test_an_update_that_breaks_the_weights_is_named_also_where_an_evaluation_is_due(
    tiny: TinyRun, tmp_path: Path, eval_every: int, monkeypatch: pytest.MonkeyPatch
):
    """The evaluation would sample from the broken weights and end the stage by its own error."""
    trainer = faulty(tiny, tmp_path, [], eval_every=eval_every, health={"action": "warn"})
    update = trainer._update

    def broken(*given: Any) -> dict[str, float]:
        metrics = update(*given)
        if given[2].step == 1:
            adapter_parameters(trainer.engine.model, "policy")[-1].data.fill_(math.nan)
            metrics["ppo/policy_loss"] = math.nan
        return metrics

    monkeypatch.setattr(trainer, "_update", broken)
    evaluations = RunFolder(tmp_path).evaluations
    evaluations.parent.mkdir()
    evaluations.write_text('{"step": 0}\n')  # of a stage that was begun before
    with pytest.raises(ValueError, match="stopped after step 2 by the health monitor"):
        trainer.train(resume=False)
    assert [line["step"] for line in read_lines(evaluations)] == [1] * (eval_every == 1)
    (line,) = read_lines(tmp_path / "ppo" / "health.jsonl")
    assert (line["name"], line["step"]) == ("not_finite", 2)
    assert (tmp_path / "ppo" / "bad_batch-step-2.pt").is_file()
