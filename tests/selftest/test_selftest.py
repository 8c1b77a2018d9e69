"""The self-test's own truths by hand, and its checks as tests; mutations/ names them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from chatllama import cli
from trainers.selftest import run as selftest_run
from trainers.selftest.convergence import converge
from trainers.selftest.exact import DenseRole, Enumeration, Optimum
from trainers.selftest.gradient_oracle import SETTINGS, Outcome, Setting
from trainers.selftest.run import WORLD_SEED, Check, converged, gradient, identities, selftest
from trainers.selftest.world import PROMPTS, STOP, World, all_responses, reward

FAST = ("clipped",)
"""Settings of the gradient oracle that run in the unit tier."""


def short(setting: Setting) -> str:
    """`lambda 0.95, exact values` -> `lambda-0.95`."""
    words = setting.name.replace(",", " ,").split()
    name = "-".join(words[:2]) if words[0] == "lambda" else words[0]
    if setting.kl_loss is not None:
        name = setting.kl_loss
    return f"{name}-tempered" if setting.temperature != 1 else name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"), WORLD_SEED)


# --- the checks


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(s, id=short(s), marks=[] if short(s) in FAST else pytest.mark.slow)
        for s in SETTINGS
    ],
)
def test_gradient(world: World, setting: Setting):
    check = gradient(world, setting)
    assert check.passed, check


@pytest.mark.parametrize(
    "number",
    [
        *(pytest.param(i, id=n) for i, n in enumerate(["gae", "ratio", "kl", "start"])),
        pytest.param(4, id="sampler", marks=pytest.mark.slow),
        pytest.param(5, id="bradley-terry", marks=pytest.mark.slow),
        pytest.param(6, id="rollback", marks=pytest.mark.slow),
    ],
)
def test_identity(world: World, number: int):
    check = identities(world, only=number)[0]
    assert check.passed, check


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_reaches_the_best_policy(tmp_path: Path, seed: int):
    run = converge(World.make(tmp_path, seed))
    assert converged(run), run.progress
    for progress in run.progress:
        # The same distance by two ways: J* - J = beta KL(pi || pi*).
        missing = (run.best - progress.objective) / 0.3
        assert progress.kl_to_best == pytest.approx(missing, abs=1e-6)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("half"), WORLD_SEED, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 4])
def test_gradients_of_a_bfloat16_backbone(half: World, number: int):
    check = gradient(half, SETTINGS[number])
    assert check.passed, check


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_identities_of_a_bfloat16_backbone(half: World, number: int):
    check = identities(half, only=number)[0]
    assert check.passed, check


@pytest.mark.parametrize(
    ("dtype", "worse"),
    [
        ("float32", {"policy_error": 2e-5}),
        ("float32", {"first_log_ratio": 1e-7}),
        ("bfloat16", {"policy_error": 0.11}),
        ("bfloat16", {"value_error": 0.11}),
        ("bfloat16", {"explained_error": 0.02}),
        ("bfloat16", {"first_log_ratio": 0.11}),
        ("bfloat16", {"reference_error": 0.13}),
        ("bfloat16", {}),
    ],
)
def test_limits_are_those_of_the_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, worse: dict[str, float]
):
    noise = {"float32": 1e-6, "bfloat16": 1e-3}[dtype]
    errors = {"policy_error": noise, "value_error": noise, "explained_error": noise}
    errors |= {"first_log_ratio": 0.0, "reference_error": noise}
    monkeypatch.setattr(selftest_run, "check_gradient", lambda *_: Outcome(**(errors | worse)))
    assert gradient(World(tmp_path, 1, dtype), SETTINGS[0]).passed == (not worse)


# --- the truth they are compared with


def test_a_response_is_words_and_a_stop_or_words_to_the_limit():
    assert all_responses(1) == [(STOP,), (1,), (2,), (3,), (4,), (5,)]
    assert len(all_responses(3)) == 1 + 5 + 25 + 125
    assert len(set(all_responses(3))) == 156


def test_reward_by_hand():
    # One word known (.6), one not (-.2), no repeat; 2 words where the prompt of 2 wants 1 (-.7).
    assert reward("ash bay", "bay cod") == pytest.approx(0.6 - 0.2 - 0.7)
    # Two known, one repeat (-.8), as many as wanted.
    assert reward("ash bay cod", "cod cod") == pytest.approx(1.2 - 0.8)
    assert reward("ash", "") == 0.0


def test_probabilities_sum_to_one_and_states_agree(world: World):
    every = Enumeration(world)
    with torch.no_grad():
        logprobs = every.logprobs(DenseRole(world, None), 1.0)
    assert float(every.probabilities(logprobs).sum()) == pytest.approx(1.0, abs=1e-6)
    # The first token has the same log-probability in every response that begins with it.
    firsts = {float(lp[0]) for (p, r), lp in zip(every.rows, logprobs, strict=True) if r[0] == 2}
    assert len(firsts) == len(PROMPTS)
    assert not logprobs[~every.mask].any()


def test_values_of_a_constant_reward_are_that_constant(world: World):
    every = Enumeration(world, 2)
    with torch.no_grad():
        logprobs = every.logprobs(DenseRole(world, None), 1.0)
    last = torch.zeros_like(logprobs)
    last[torch.arange(len(last)), every.mask.sum(1) - 1] = 3.0
    values = every.state_values(logprobs, last)
    torch.testing.assert_close(values, torch.where(every.mask, 3.0, 0.0).double())


def test_the_optimum_of_two_responses_by_hand():
    # pi_ref = (1/4, 3/4), r = (log 2, 0), beta 1: Z = 1/4 * 2 + 3/4 = 5/4, pi* = (2/5, 3/5).
    reference = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    optimum = Optimum(reference, torch.tensor([math.log(2), 0.0], dtype=torch.float64), 1.0, 1)
    assert optimum.best == pytest.approx(math.log(1.25))
    best = torch.tensor([0.4, 0.6], dtype=torch.float64).log()
    assert float(optimum.objective(best)) == pytest.approx(optimum.best)
    assert optimum.kl_to_best(best) == pytest.approx(0.0, abs=1e-12)
    assert float(optimum.objective(reference)) == pytest.approx(math.log(2) / 4)
    missing = optimum.best - math.log(2) / 4
    assert optimum.kl_to_best(reference) == pytest.approx(missing)


def test_the_dense_role_is_differentiated_right(world: World):
    """A directional derivative of J by finite differences."""
    every = Enumeration(world, 2, PROMPTS[1:2])
    role = DenseRole.saved(world, world.run.reward_adapter)
    role.head = []
    with torch.no_grad():
        reference = every.logprobs(DenseRole(world, None), 1.0).sum(1)
    scores = torch.randn(len(reference), generator=torch.Generator().manual_seed(0)).double()
    optimum = Optimum(reference, scores, 0.3, 1)

    def objective() -> torch.Tensor:
        return optimum.objective(every.logprobs(role, 1.0).sum(1))

    gradient = role.gradient(objective())
    direction = gradient / gradient.norm()
    values = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            start = 0
            for parameter in role.parameters:
                part = direction[start : start + parameter.numel()].view_as(parameter)
                parameter += step * part
                start += parameter.numel()
            values.append(float(objective()))
            start = 0
            for parameter in role.parameters:
                part = direction[start : start + parameter.numel()].view_as(parameter)
                parameter -= step * part
                start += parameter.numel()
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(gradient.norm()), rel=1e-3)


# --- the command


@pytest.mark.parametrize("passed", [True, False])
def test_the_verdict_is_printed_and_returned(
    passed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    made = Check("a check", passed, "1e-7", "1e-5", 1.0)
    monkeypatch.setattr(selftest_run, "identities", lambda world: [made])
    monkeypatch.setattr(selftest_run, "SETTINGS", ())
    assert selftest([], quick=True) is passed
    printed = capsys.readouterr().out
    assert "a check" in printed and ("all pass" in printed) is passed
    assert ("FAILED: a check" in printed) is not passed


@pytest.mark.parametrize("passed", [True, False])
def test_the_command_line(passed: bool, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[list[int], bool, str]] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def note(seeds: list[int], quick: bool, dtype: str) -> bool:
        asked.append((seeds, quick, dtype))
        return passed

    monkeypatch.setattr(selftest_run, "selftest", note)
    for words in ("selftest", "selftest --seeds 4 5 --quick --dtype bfloat16"):
        if passed:
            assert cli.main(words.split()) == 0
        else:
            with pytest.raises(SystemExit) as caught:
                cli.main(words.split())
            assert caught.value.code == 1
    assert asked == [([0, 1, 2], False, "float32"), ([4, 5], True, "bfloat16")]
