"""No microbatch waits for the device: on `meta` every look at a tensor's numbers is an error."""

from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from tiny_models import ragged_batch, role_model, tiny_llama

from chatllama.config.ppo import PpoSection
from chatllama.model.roles import RoleModel, adapter_parameters
from chatllama.model.scoring import score_sequences, score_shared
from chatllama.runtime import distributed
from chatllama.runtime.distributed import to_device
from data.batches import SharedPromptCollator
from trainers.ppo import rollout
from trainers.ppo import update as ppo_update
from trainers.ppo.data import PtxLoader
from trainers.ppo.rollout import arrange
from trainers.ppo.update import Targets, Update

META = torch.device("meta")


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Tensors that were pinned, with `meta` in the GPU's place."""
    tensors: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no `meta`
    for module in (distributed, rollout, ppo_update):
        monkeypatch.setattr(module, "device", lambda: META)
    return tensors


def test_copies_are_from_pinned_memory(pinned: list[torch.Tensor]):
    tensor = torch.ones(3)
    moved = to_device(tensor)
    assert moved.device == META and [id(each) for each in pinned] == [id(tensor)]
    assert to_device(moved).device == META and len(pinned) == 1


def test_on_the_cpu_nothing_is_copied():
    tensor = torch.ones(3)
    assert to_device(tensor) is tensor


def on_meta() -> RoleModel:
    return role_model(tiny_llama()).to(META)


def ragged_rollout() -> rollout.Rollout:
    batch = ragged_batch()
    return arrange(batch.prompts, batch.responses, [2], 0)


def test_scoring_does_not_wait(pinned: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch):
    arranged, shapes = ragged_rollout(), []

    def gather_rows(numbers: torch.Tensor) -> torch.Tensor:
        shapes.append((numbers.device, tuple(numbers.shape)))
        return torch.zeros(numbers.shape)

    monkeypatch.setattr(rollout, "gather_rows", gather_rows)
    rollout.score(on_meta(), arranged, 0.7, 2, ["reward"])
    assert shapes == [(META, (4, 5))] * 4 + [(META, (4, 1))] and pinned


@pytest.mark.parametrize("equal", [False, True])
def test_the_update_does_not_wait(pinned: list[torch.Tensor], equal: bool):
    model, arranged = on_meta(), ragged_rollout()
    if equal:
        arranged = arrange([[1, 5]] * 4, [[7, 8, 2]] * 4, [2], 0)
    losses: list[torch.Tensor] = []

    class Engine:
        """Runs the model; keeps what is walked back."""

        def __init__(self) -> None:
            self.trained = {"value": adapter_parameters(model, "value")}

        def __call__(self, function: Any, *inputs: object) -> Any:
            return function(model, *inputs)

        def is_zero3(self) -> bool:
            return False

        def backward(self, loss: torch.Tensor) -> None:
            loss.backward()
            losses.append(loss)

    rows = [{"input_ids": [1, *[9] * n], "mask": [1] * (n + 1)} for n in (1, 3)]
    ptx = PtxLoader(cast(Any, rows), per_microbatch=1, pad_id=0, seed=0)
    numbers = torch.zeros(arranged.response_mask.shape)
    sizes = {"rollout_batch_size": 4, "minibatch_size": 4, "microbatch_size": 2}
    losses_too = {"kl_loss_coef": 1.0, "ptx_coef": 1.0, "ptx_data": [{"path": "x"}]}
    section = PpoSection.model_validate({**sizes, **losses_too})
    update = Update(
        engine=cast(Any, Engine()),
        rollout=arranged,
        targets=Targets(numbers, numbers, arranged.response_mask),
        section=section,
        temperature=0.7,
        step=0,
        seed=0,
        lr_factors=lambda done: {"policy": 1.0},
        ptx=ptx,
        after_step=lambda: None,
    )
    update._accumulate(update._microbatches(), 0, first=True)
    assert [loss.device for loss in losses] == [META] * 2
    gradient = adapter_parameters(model, "policy")[0].grad
    assert gradient is not None and gradient.device == META


def test_rewards_do_not_wait(pinned: list[torch.Tensor]):
    model, batch = on_meta(), ragged_batch()
    assert score_sequences(model, batch.tokens, batch.mask).device == META
    example = {"answer_ids": [[1, 5, 2], [1, 6, 7, 2]], "prompt_length": 1, "ranks": [0, 1]}
    rows, _ = SharedPromptCollator(0, 9)([{**example, "ratings": [0.0, 0.0]}])
    assert score_shared(model, *rows).device == META
