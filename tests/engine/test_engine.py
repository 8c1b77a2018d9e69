import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from workers.engine_worker import (
    EPS,
    MAX_GRAD_NORM,
    PEAKS,
    build,
    data,
    elsewhere,
    run,
    step,
    weights,
)

from chatllama.config.schema import DeepSpeedSection
from chatllama.config.stages import StageSection
from chatllama.model.roles import RoleModel, adapter_parameters
from trainers.engine import engine as engine_module
from trainers.engine import start
from trainers.engine.engine import Engine, ParameterGroup, seed_step

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return str(folder)


def assert_weights_equal(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=tolerance, msg=name)


# --- one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [1, 2, 4])
def test_microbatches_change_nothing(base: str, microbatch_size: int):
    whole, split = build(base, microbatch_size=8), build(base, microbatch_size=microbatch_size)
    assert (whole.accumulation_steps, split.accumulation_steps) == (1, 8 // microbatch_size)
    before = weights(whole, trained=True)
    for number in range(3):
        loss, norm = step(whole, number)
        assert step(split, number) == (pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-6))
    assert_weights_equal(weights(split, trained=True), weights(whole, trained=True), 1e-6)
    for name, tensor in weights(whole, trained=True).items():
        assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("clip_each", [True, False])
def test_it_is_adamw_with_clipping_on_two_groups(base: str, clip_each: bool):
    # The same two steps by torch's own pieces, all eight sequences in one backward.
    engine = build(base, microbatch_size=8, max_grad_norm=0.05, clip_each=clip_each)
    plain = build(base).model
    groups = [
        {"params": adapter_parameters(plain, "policy"), "lr": PEAKS[0]},
        {
            "params": [*adapter_parameters(plain, "value"), *plain.heads["value"].parameters()],
            "lr": PEAKS[1],
        },
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS, weight_decay=0.01)
    for number in (3, 5):
        _, norm = step(engine, number)
        tokens, mask, response_mask = data()
        from chatllama.model.scoring import policy_and_value, response_logprobs, score_sequences

        arguments = (tokens, mask, response_mask, 0.8)
        with torch.no_grad():
            reference = response_logprobs(plain, "reference", *arguments).logprobs
            targets = score_sequences(plain, tokens, mask)
        scores, values = policy_and_value(plain, *arguments)
        assert values is not None
        error = ((values - targets[:, None]) * response_mask).square().sum()
        loss = (scores.logprobs - reference).square().sum() - scores.logprobs.sum() + error
        optimizer.zero_grad()
        (loss / response_mask.sum()).backward()
        parts = [group["params"] for group in groups]
        squares = [sum(float(p.grad.double().square().sum()) for p in part) for part in parts]
        assert norm == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
        for part, own in zip(parts, squares, strict=True):
            length = math.sqrt(own if clip_each else sum(squares))
            assert length > 0.05
            for parameter in part:
                parameter.grad *= 0.05 / (length + 1e-6)
        for group, peak in zip(optimizer.param_groups, PEAKS, strict=True):
            group["lr"] = peak * (1 - number / 10)
        optimizer.step()
    own = {n: p.detach() for n, p in plain.named_parameters() if p.requires_grad}
    assert_weights_equal(weights(engine, trained=True), own, 1e-6)


def test_a_group_that_rests_keeps_its_clock(base: str, tmp_path: Path):
    # The value's gradient is the policy's too where its head is on the policy's trunk.
    rested, fresh = build(base), build(base)
    before = weights(rested, trained=True)
    step(rested, 0)
    policy = {name for name in before if ".policy." in name}
    after = weights(rested, trained=True)
    assert policy == {name for name in before if torch.equal(after[name], before[name])}
    states = {name: rested.optimizer.state[p] for name, p in rested.model.named_parameters()}
    assert {name for name in before if states[name]} == before.keys() - policy
    # Saved and loaded before the policy's first step, it makes that step as if it had not waited.
    rested.save(tmp_path, {})
    again = build(base)
    step(again, 1)
    again.load(tmp_path)
    for engine in (rested, again):
        _, norm = step(engine, 2)
        assert norm > MAX_GRAD_NORM
    with torch.no_grad():  # the same value weights, whose own clock does not matter here
        for parameter, theirs in zip(fresh.trained["value"], rested.trained["value"], strict=True):
            parameter.copy_(theirs)
    step(fresh, 2)
    for name in policy:
        assert torch.equal(weights(again, trained=True)[name], weights(rested, trained=True)[name])
        torch.testing.assert_close(
            weights(fresh, trained=True)[name], weights(rested, trained=True)[name]
        )
    again.save(tmp_path, {})
    clocks = {name: float(again.optimizer.state[p]["step"]) for name, p in trained_of(again)}
    assert clocks == {name: 1.0 if name in policy else 2.0 for name in before}


def trained_of(engine: Engine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in engine.model.named_parameters() if p.requires_grad]


@pytest.mark.slow
def test_checkpoints_with_one_step_count_for_all_are_read(base: str, tmp_path: Path):
    engine = build(base)
    step(engine, 1)
    step(engine, 2)
    engine.save(tmp_path, {})
    file = tmp_path / "trained-0.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith("step:")}
    save_file({**tensors, "step": torch.tensor([2.0])}, file)
    again = build(base)
    again.load(tmp_path)
    assert step(again, 3) == step(engine, 3)
    assert {float(again.optimizer.state[p]["step"]) for _, p in trained_of(again)} == {3.0}


@pytest.mark.slow
def test_resume_is_bit_exact_and_frozen_weights_stay(base: str, tmp_path: Path):
    out = run(base, tmp_path, stage=0)
    assert out["assigned"] == pytest.approx(0.7)
    assert out["frozen_kept"] and out["resumed"] and out["resumed_weights"]
    assert out["state"] == {"step": 2}
    for again, loss, norm in zip(
        out["checkpointed"], out["losses"][2:], out["norms"][2:], strict=False
    ):
        assert again == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))
    assert max(out["norms"]) > MAX_GRAD_NORM  # clipping was at work


def test_a_step_needs_all_microbatches(base: str):
    engine = build(base)
    with pytest.raises(AssertionError):
        engine.step(1.0)


def test_every_trainable_parameter_must_be_in_a_group(base: str):
    model: RoleModel = build(base).model
    groups = [ParameterGroup("policy", adapter_parameters(model, "policy"), 1e-3)]
    with pytest.raises(AssertionError):
        Engine(model, groups, StageSection(), DeepSpeedSection(), accumulation_steps=1)


def test_a_checkpoint_of_other_parameters_is_refused(base: str, tmp_path: Path):
    with pytest.raises(ValueError, match=rf"older version .* remove {tmp_path.parent}"):
        build(base).load(tmp_path)
    (tmp_path / "state.pt").touch()
    with pytest.raises(ValueError, match=r"does not hold what is trained now: 58 of 58 param.*lor"):
        build(base).load(tmp_path)
    engine = build(base)
    head = cast(torch.Tensor, engine.model.heads["value"].weight)
    engine.model.heads["value"].weight = torch.nn.Parameter(torch.cat([head, head], dim=1))
    engine.save(tmp_path, {})
    with pytest.raises(ValueError, match=r": 1 of 58 .* unexpected, such as heads.value.weight\."):
        build(base).load(tmp_path)


def test_before_the_first_step_there_is_nothing_but_weights(base: str, tmp_path: Path):
    begun, engine = build(base), build(base, seed=7)
    begun.save(tmp_path, {"step": 0})
    step(engine, 0)
    engine.load(tmp_path)
    assert_weights_equal(weights(engine, trained=True), weights(begun, trained=True), 0)
    for state in engine.optimizer.state.values():
        assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_seeds_of_steps_differ_and_repeat():
    seen = set()
    for seed in (0, 1):
        for number in range(3):
            seed_step(seed, number)
            first = torch.rand(1).item()
            seed_step(seed, number)
            assert torch.rand(1).item() == first
            seen.add(first)
    assert len(seen) == 6


def test_whether_to_gather_is_settled_once(base: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[RoleModel] = []
    monkeypatch.setattr(engine_module, "whole_model_fits", lambda model: bool(asked.append(model)))
    whole, split = build(base), build(base)
    assert whole.gather_for_rollouts and not asked  # nothing is split
    monkeypatch.setattr(split, "is_zero3", lambda: True)
    assert not split.gather_for_rollouts and not split.gather_for_rollouts
    assert asked == [split.model]


@pytest.mark.parametrize(
    ("local_rank", "gpus", "index"), [("3", 1, "0"), ("3", 8, "3"), ("3", 0, "3")]
)
def test_deepspeed_is_told_the_gpu_and_the_limit(
    base: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    local_rank: str,
    gpus: int,
    index: str,
):
    told: list[str] = []

    def initialize(**given: Any) -> tuple:
        told.append(os.environ["LOCAL_RANK"])
        engine = SimpleNamespace(zero_optimization=lambda: False)
        return engine, given["optimizer"], None, None

    stub = SimpleNamespace(
        ops=SimpleNamespace(__compatible_ops__={}),
        init_distributed=lambda verbose: None,
        utils=SimpleNamespace(groups=SimpleNamespace(_WORLD_GROUP=None)),
        initialize=initialize,
    )
    monkeypatch.setitem(sys.modules, "deepspeed", stub)
    for name, value in {
        "WORLD_SIZE": "1",
        "LOCAL_RANK": local_rank,
        "DEEPSPEED_TIMEOUT": "3",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(str(device)))
    monkeypatch.setattr(start, "open_groups", lambda minutes: told.append(minutes))
    monkeypatch.setattr(torch.distributed, "new_group", lambda timeout: timeout)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    start.initialise(DeepSpeedSection(timeout_minutes=7.0))
    assert told == ([f"cuda:{index}"] if gpus else []) + [7.0]
    assert start.wait_limit() == stub.utils.groups._WORLD_GROUP
    assert "DEEPSPEED_TIMEOUT has no effect here; deepspeed.timeout_minutes is 7" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(
        start, "device", lambda: torch.device("cpu" if not gpus else f"cuda:{index}")
    )
    told.clear()
    with start.gpu_as_local_rank():
        told.append(os.environ["LOCAL_RANK"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else the model went there
    build(base)
    assert told == [index, index] and os.environ["LOCAL_RANK"] == local_rank


# --- two ranks under the launcher ----------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(base: str, folder: Path, stage: int, alone: Path) -> list[dict[str, Any]]:
    """Both ranks' results of the worker on the CPU."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(PROJECT),
    }
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        *("--num_gpus", "2", "--master_port", str(free_port())),
        str(PROJECT / "tests" / "workers" / "engine_worker.py"),
        *(base, str(folder), str(stage), str(alone)),
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [torch.load(folder / f"out-{stage}-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The worker's results in this one process (the stage means nothing here)."""
    folder = tmp_path_factory.mktemp("alone")
    return run(base, folder, stage=2) | {"checkpoint": folder / "checkpoint-2"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_give_what_one_process_gives(
    base: str, alone: dict[str, Any], tmp_path: Path, stage: int
):
    ranks = launch(base, tmp_path, stage, alone["checkpoint"])
    for out in ranks:
        assert out["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert out["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        assert_weights_equal(out["weights"], alone["weights"], 1e-5)
        assert out["assigned"] == pytest.approx(0.7)
        assert out["frozen_kept"] and out["resumed"] and out["resumed_weights"]
        assert out["state"]["step"] == 2
        assert out["partitioned"] == (stage == 3)
        for place in ("from one process", "under another stage"):
            assert_goes_on(out[place], alone)
        for again, loss, norm in zip(
            out["checkpointed"], alone["losses"][2:], alone["norms"][2:], strict=False
        ):
            assert again == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5))
        if stage >= 2:
            assert out["types"] == (["torch.bfloat16", "torch.float32"], ["torch.float32"])
            for low, exact in zip(out["low"], alone["low"], strict=True):
                assert low == (pytest.approx(exact[0], rel=0.02), pytest.approx(exact[1], rel=0.1))
    answers = alone["answers"]
    assert [ranks[i % 2]["answers"][i // 2] for i in range(len(answers))] == answers
    assert_goes_on(elsewhere(base, stage, tmp_path / f"checkpoint-{stage}"), alone)


def assert_goes_on(out: dict[str, Any], alone: dict[str, Any]) -> None:
    """Resumed in another layout, it ends as the run of one process."""
    assert out["state"] == {"step": 2}
    losses, norms = zip(*out["steps"], strict=True)
    assert losses == pytest.approx(alone["losses"][2:], rel=1e-5)
    assert norms == pytest.approx(alone["norms"][2:], rel=1e-5)
    assert_weights_equal(out["weights"], alone["weights"], 1e-5)
