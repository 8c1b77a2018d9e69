"""The loop: prompts and seeds, checks at the start, which roles there are and which move."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppo_runs import TinyRun, make_prompts, nudge, weights

import trainers.ppo.train as ppo_module
from chatllama.config.batch_sizes import policy_steps
from chatllama.config.schema import Config
from chatllama.model.roles import adapter_parameters
from chatllama.runs.folder import RunFolder
from data.batches import batch_indices
from trainers.ppo.rewards import Statistics
from trainers.ppo.rollout import Rollout
from trainers.ppo.state import PpoState
from trainers.ppo.train import PpoTrainer
from trainers.ppo.update import Update

RLOO = {"advantage": "rloo", "samples_per_prompt": 2}
GRPO = {"advantage": "grpo", "samples_per_prompt": 4}
GOLD = "ppo_runs:count_words"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("loop"), tiny_tokenizer_dir)


def build(tiny: TinyRun, *, seed: int = 0, **ppo: Any) -> PpoTrainer:
    return tiny.trainer(ppo=ppo, seed=seed)


def row_ids(rollout: Rollout, row: int) -> list[int]:
    return rollout.tokens[row][rollout.mask[row]].tolist()


# --- prompts, samples, seeds


def test_samples_of_a_prompt_stand_together_and_differ(tiny: TinyRun):
    trainer = build(tiny, samples_per_prompt=4)
    prompts = make_prompts().train["input_ids"][:]
    for step in (0, 1):
        rollout, _ = trainer._roll_out(step)
        chosen = batch_indices(7, 2, step, 0)
        for row in range(8):
            prompt = prompts[chosen[row // 4]]
            assert row_ids(rollout, row)[: len(prompt)] == prompt
        for start in (0, 4):
            assert len({str(rollout.response_ids(row)) for row in range(start, start + 4)}) > 1


def test_every_prompt_comes_up_before_any_comes_again(tiny: TinyRun):
    trainer = build(tiny)
    prompts, seen = make_prompts().train["input_ids"][:], []
    for step in range(7):  # 56 places for 7 prompts
        rollout, _ = trainer._roll_out(step)
        width = rollout.tokens.shape[1] - rollout.response_mask.shape[1]
        for row in range(8):
            seen.append(
                prompts.index(rollout.tokens[row, :width][rollout.mask[row, :width]].tolist())
            )
    passes = [seen[start : start + 7] for start in range(0, 56, 7)]
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert len({str(each) for each in passes}) > 1


def test_the_seed_decides_prompts_and_samples(tiny: TinyRun):
    first, same, other = (build(tiny, seed=seed)._roll_out(0)[0] for seed in (0, 0, 1))
    assert torch.equal(first.tokens, same.tokens)
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)


def test_every_step_samples_anew(tiny: TinyRun):
    trainer = build(tiny)
    prompts = make_prompts().train
    trainer.prompts = replace(trainer.prompts, train=prompts.select([2] * 8))
    one, two = trainer._roll_out(0)[0], trainer._roll_out(1)[0]
    assert [one.response_ids(r) for r in range(8)] != [two.response_ids(r) for r in range(8)]


# --- checks at the start


def apart(trainer: PpoTrainer, folder: Path) -> PpoTrainer:
    """The trainer, writing metrics and diagnoses into a folder of its own."""
    t = trainer
    return PpoTrainer(t.cfg, RunFolder(folder), t.engine, t.scorer, t.prompts, t.stop_tokens)


def test_before_step_one_policy_and_reference_are_the_same(tiny: TinyRun):
    trainer = build(tiny)
    _, rollout, _, metrics = trainer.advance(trainer.start())
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    assert metrics["ppo/kl_sequence"] == 0 and metrics["ppo/kl_abs_max"] == 0
    assert metrics["ppo/first_log_ratio"] == 0


def test_a_reference_that_is_another_model_is_refused(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trainer = apart(build(tiny), tmp_path)
    nudge(trainer)
    with pytest.raises(
        ValueError,
        match=r"stopped after step 1 by the health .*named there and go on with --resume$",
    ):
        trainer.train(resume=False)
    assert "initial_kl_not_zero at step 1" in capsys.readouterr().err


def test_a_forward_pass_that_does_not_repeat_is_refused(
    tiny: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    class Nudged(Update):
        def run(self) -> dict[str, float]:
            nudge(trainer)
            return super().run()

    monkeypatch.setattr(ppo_module, "Update", Nudged)
    trainer = apart(build(tiny), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"stopped after step 1 by the health .*named there and go on with --resume$",
    ):
        trainer.train(resume=False)
    assert "first_ratio_not_one at step 1" in capsys.readouterr().err


def noise(trainer: PpoTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token in a hundred (here one of all) scores 0.01 nats apart, as other kernels may."""

    class Noisy(Update):
        def __post_init__(self) -> None:
            logprobs = self.rollout.logprobs.clone()
            logprobs[0, 0] += 0.01
            self.rollout = replace(self.rollout, logprobs=logprobs)
            super().__post_init__()

    monkeypatch.setattr(ppo_module, "Update", Noisy)


def dropout(trainer: PpoTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in trainer.engine.model._lora_layers:
        layer.lora_dropout["policy"] = torch.nn.Dropout(0.5)


@pytest.mark.parametrize("action", ["warn", "stop"])
@pytest.mark.parametrize(
    ("fault", "dtype", "stops"),
    [(noise, "bfloat16", False), (noise, "float32", True), (dropout, "bfloat16", True)],
)
def test_in_bfloat16_rounding_is_reported_and_another_forward_pass_refused(
    tiny: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[PpoTrainer, pytest.MonkeyPatch], None],
    dtype: str,
    stops: bool,
    action: str,
):
    health = {"action": action, "ignore": ["ratio_explosion"]}
    trainer = tiny.trainer(ppo={"steps": 1, "health": health}, backbone={"dtype": dtype})
    trainer = apart(trainer, tmp_path)
    fault(trainer, monkeypatch)
    if stops:
        with pytest.raises(ValueError, match="stopped after step 1 by the health monitor"):
            trainer.train(resume=False)
    else:
        metrics = trainer.train(resume=False)
        assert metrics["first_log_ratio"] == pytest.approx(0.01, rel=0.01)
        assert 0 < metrics["first_log_ratio_mean"] < 0.001
    assert "first_ratio_not_one at step 1" in capsys.readouterr().err


# --- who is in memory, who changes


@pytest.mark.parametrize("changes", [RLOO, GRPO], ids=["rloo", "grpo"])
def test_without_a_critic_there_is_no_value_model(tiny: TinyRun, changes: dict[str, Any]):
    trainer = build(tiny, **changes)
    assert "value" not in trainer.engine.model.adapter_names
    assert set(trainer.engine.model.heads) == {"reward"}
    assert not [n for n, _ in trainer.engine.model.named_parameters() if "value" in n]
    metrics = trainer.advance(trainer.start())[3]
    assert not [name for name in metrics if "value" in name or "variance" in name]


def test_a_value_head_on_the_policy_has_no_adapter_of_its_own(tiny: TinyRun):
    trainer = build(tiny, value_model="policy_trunk")
    names = [n for n, _ in trainer.engine.model.named_parameters() if "lora_A.value" in n]
    assert not names and trainer.engine.model.adapter_names["value"] == "policy"


def policy_history(
    trainer: PpoTrainer, monkeypatch: pytest.MonkeyPatch
) -> list[list[torch.Tensor]]:
    """The policy's weights after every optimizer step to come."""
    history: list[list[torch.Tensor]] = []
    step = trainer.engine.step

    def recorded(*args: Any) -> float:
        norm = step(*args)
        policy = adapter_parameters(trainer.engine.model, "policy")
        history.append([p.detach().clone() for p in policy])
        return norm

    monkeypatch.setattr(trainer.engine, "step", recorded)
    return history


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_moves_with_every_optimizer_step(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, decay: float
):
    trainer = build(tiny, ema_decay=decay)
    history = policy_history(trainer, monkeypatch)
    policy = adapter_parameters(trainer.engine.model, "policy")
    average = [p.detach().double().clone() for p in policy]
    state = trainer.start()
    for _ in range(2):
        state = trainer.advance(state)[0]
    assert len(history) == 8  # 2 steps of 2 epochs of 2 minibatches
    for moment in history:
        average = [decay * a + (1 - decay) * p for a, p in zip(average, moment, strict=True)]
    found = adapter_parameters(trainer.engine.model, "ema")
    for mine, expected, last in zip(found, average, policy, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(mine, last) == (decay == 0)
        assert not mine.requires_grad


def test_a_refreshed_reference_is_the_policy_of_that_moment(tiny: TinyRun):
    trainer = build(tiny, reference_refresh_every=2, steps=4)
    model = trainer.engine.model
    sft = [p.detach().clone() for p in adapter_parameters(model, "reference")]
    state, kls = trainer.start(), []
    for step in (1, 2, 3, 4):
        state, _, _, metrics = trainer.advance(state)
        kls.append(metrics["ppo/kl_sequence"])
        reference, policy = (adapter_parameters(model, r) for r in ("reference", "policy"))
        equal = [torch.equal(r, p) for r, p in zip(reference, policy, strict=True)]
        assert all(equal) if step in (2, 4) else not any(equal)
    assert kls[0] == 0 and kls[2] == 0 and kls[1] != 0 and kls[3] != 0
    kept = adapter_parameters(model, "sft")
    assert all(torch.equal(mine, before) for mine, before in zip(kept, sft, strict=True))


def test_frozen_roles_and_the_base_stay(tiny: TinyRun):
    trainer = build(tiny, ema_decay=0.5, reference_refresh_every=1, score_normalization="none")
    before = weights(trainer.engine.model)
    trainer.advance(trainer.start())
    moved = {
        name
        for name, tensor in weights(trainer.engine.model).items()
        if not torch.equal(tensor, before[name])
    }
    roles = {name.split(".")[-2] for name in moved if "lora_" in name}
    assert roles == {"policy", "value", "ema", "reference"}
    assert {name for name in moved if "lora_" not in name} == {
        "heads.value.weight",
        "heads.value.bias",
    }


def test_held_out_prompts_are_measured_on_their_steps(tiny: TinyRun):
    trainer = tiny.trainer(ppo={"eval_every": 2}, evaluation={"num_prompts": 3, "gold": GOLD})
    state, seen = trainer.start(), []
    for _ in range(4):
        state, _, _, metrics = trainer.advance(state)
        seen.append({name for name in metrics if name.startswith("ppo/eval_")})
    names = ["score_mean", "score_se", "gold_mean", "gold_se", "kl_sequence", "kl_sequence_se"]
    names += ["response_length", "eos_rate"]
    assert seen[1] == seen[3] == {f"ppo/eval_{name}" for name in names}
    assert seen[0] == seen[2] == set()


@pytest.mark.parametrize(("spare", "words"), [(1, ""), (0, "just reaches"), (-1, "never reaches")])
def test_a_warm_up_as_long_as_the_stage_is_said(
    spare: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class Begun(Exception):
        pass

    def advance(_: PpoState) -> None:
        raise Begun

    content = {"run_dir": str(tmp_path), "backbone": {"path": "m"}, "tracking": {"report_to": []}}
    cfg = Config.model_validate(content | {"ppo": {"steps": 2}})
    total = policy_steps(cfg.ppo, 2)
    cfg = Config.model_validate(content | {"ppo": {"steps": 2, "warmup_steps": total - spare}})
    stub: Any = SimpleNamespace(
        cfg=cfg, run=RunFolder(tmp_path), servers=None, advance=advance, engine=SimpleNamespace(),
        start=lambda: PpoState(0, 0.05, Statistics()),
        guard=SimpleNamespace(begin=lambda *_, **__: None, saving_without_servers=nullcontext),
    )  # fmt: skip
    with pytest.raises(Begun):
        PpoTrainer.train(stub, resume=False)
    said = capsys.readouterr().err
    assert (f"ppo.warmup_steps {total - spare} is not shorter" in said) == bool(words)
    assert words in said


def test_a_step_shows_its_phases(tiny: TinyRun):
    trainer, shown = build(tiny), list[tuple[str, int, int]]()
    trainer.engine.show = lambda *phase: shown.append(phase)
    trainer.advance(replace(trainer.start(), step=1))  # the first step scores some twice
    del shown[: [name for name, *_ in shown].index("scoring")]  # of the reference's answers
    first = [name for name, *_ in shown].index("sampling")
    sampling, rest = [p for p in shown[first:] if p[0] == "sampling"], shown[first:]
    assert sampling[-1] == ("sampling", 8, 8) and sampling[0][1] < 8
    # 8 responses in passes of 2; 2 epochs of minibatches of 4
    assert rest[len(sampling) :] == [
        *(("scoring", number, 4) for number in range(4)),
        *(("update", number, 4) for number in range(4)),
    ]
