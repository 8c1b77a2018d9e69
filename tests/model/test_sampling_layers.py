"""The layers of sampling: few kernels, the numbers of the layers of training, always up to date."""

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from kernel_counts import KernelCounts, llama_7b, made_fake
from tiny_models import FORMS, LORA, ragged_batch, role_model, tiny_llama
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from chatllama.config.model import LoraSection
from chatllama.generation.decoding_batch import DecodingBatch, Request
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.model import roles
from chatllama.model.roles import (
    Adapter,
    Role,
    RoleModel,
    acting_as,
    adapter_parameters,
    adapter_state,
    autocast,
    sampling_as,
)
from chatllama.model.sampling_layers import SamplingLayers, _Down, _Norm, _Projection
from chatllama.model.scoring import policy_and_value, response_logprobs, score_sequences

ROLES: tuple[Role, ...] = ("base", "policy", "reward")
PROMPTS = [[5, 9, 30], [7], [11, 40, 41, 42, 80, 3, 12], [20, 21], [33, 60, 61, 9], [8, 8]]
UNIFORMS = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))


def in_bfloat16(model: RoleModel) -> RoleModel:
    """The base in bfloat16, adapters and heads float32, as a stage loads them."""
    trained = {id(p) for role in model.lora for p in adapter_parameters(model, role)}
    for parameter in model.llama.parameters():
        if id(parameter) not in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert model.llama.dtype == torch.bfloat16
    return model


# --- kernels -------------------------------------------------------------------------------------


@lru_cache
def fake_7b(num_layers: int, targets: str) -> tuple[RoleModel, FakeTensorMode]:
    """Some of 7B's layers, with adapters, on fake tensors of this mode."""
    lora = LoraSection.model_validate(
        {"target_modules": targets.split() if " " in targets else targets}
    )
    with torch.device("meta"):
        adapters = {"reference": Adapter(lora), "policy": Adapter(lora, trainable=True)}
        model = RoleModel(llama_7b(num_layers), adapters).eval()
    with FakeTensorMode() as mode:
        made_fake(model)
    return model, mode


def kernels_of_a_step(num_layers: int, role: Role, targets: str) -> int:
    """Of four rows of different lengths."""
    model, mode = fake_7b(num_layers, targets)
    lengths = range(6, 10)
    with mode, sampling_as(model, role):
        batch = DecodingBatch(model.llama, 4)
        with KernelCounts():
            batch.admit([Request([3] * n, Sampling(50), [], torch.rand(50)) for n in lengths])
        with KernelCounts() as counts:
            batch.step()
    return counts.kernels.total()


@pytest.mark.parametrize(
    ("role", "targets"),
    [
        ("base", "all-linear"),
        ("policy", "all-linear"),
        ("reference", "all-linear"),
        ("policy", "q_proj v_proj"),
    ],
)
def test_a_step_of_a_7b_model_is_at_most_1500_kernels(role: Role, targets: str):
    one, two = (kernels_of_a_step(n, role, targets) for n in (1, 2))
    assert 600 < one + 31 * (two - one) <= 1300  # of the 1,500 that are the goal


# --- the same numbers ----------------------------------------------------------------------------


def own_layers(model: RoleModel, role: Role) -> SamplingLayers:
    """Of a float32 model, where a mistake cannot hide behind rounding."""
    return SamplingLayers(model.llama, model.adapter_names[role])


@pytest.mark.parametrize(
    ("form", "role"),
    [*((form, "policy") for form in FORMS), ("llama", "base"), ("llama", "reward")],
)
@torch.no_grad()
def test_in_float32_they_give_what_the_models_layers_give(form: str, role: Role):
    model = role_model(tiny_llama(form=form))
    tokens = torch.tensor([[5, 9, 30, 11, 7], [3, 4, 80, 81, 82]])
    with acting_as(model, role):
        expected = model.llama(tokens).logits
        answers = generate(model.llama, PROMPTS, Sampling(20), [2], UNIFORMS, 4)
        with own_layers(model, role).in_place():
            norms = [m for m in model.llama.model.layers.modules() if "Norm" in type(m).__name__]
            assert norms and {type(norm) for norm in norms} == {_Norm}
            torch.testing.assert_close(model.llama(tokens).logits, expected, rtol=0, atol=2e-4)
            assert generate(model.llama, PROMPTS, Sampling(20), [2], UNIFORMS, 4) == answers
        assert torch.equal(model.llama(tokens).logits, expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("role", ROLES)
@torch.no_grad()
def test_in_16_bits_they_round_no_more(role: Role, kind: torch.dtype):
    model = role_model(tiny_llama(dtype=kind))
    exact = copy.deepcopy(model)
    nn.Module.to(exact, torch.float32)
    tokens = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(1))
    with acting_as(exact, role):
        wanted = exact.llama(tokens).logits.log_softmax(-1)
    with acting_as(model, role), autocast(model):
        before = model.llama(tokens).logits.float().log_softmax(-1)
    with sampling_as(model, role):
        hidden = model.llama.model(tokens).last_hidden_state
        logits = model.llama.lm_head(hidden.flatten(0, 1))
    assert hidden.dtype == kind and logits.dtype == torch.float32
    mine = logits.view(wanted.shape).log_softmax(-1)
    assert (mine - wanted).abs().mean() <= 1.05 * (before - wanted).abs().mean()


def test_matrices_in_other_places_have_a_product_of_their_own():
    """A layer that is asked with another input than its neighbours, and out of turn."""
    model = role_model(tiny_llama())
    attention: Any = model.llama.model.layers[0].self_attn
    one, other = torch.randn(2, 3, 32), torch.randn(1, 5, 32)
    with torch.no_grad(), acting_as(model, "policy"):
        expected = [attention.k_proj(one), attention.q_proj(other), attention.v_proj(one)]
        with own_layers(model, "policy").in_place():
            found = [attention.k_proj(one), attention.q_proj(other), attention.v_proj(one)]
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-4)


# --- up to date, and without traces --------------------------------------------------------------


@torch.no_grad()
def logits(model: RoleModel, role: Role) -> torch.Tensor:
    with sampling_as(model, role):
        return model.llama.lm_head(model.llama.model(torch.tensor([[5, 9, 30]])).last_hidden_state)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.add_(0.1),
        lambda p: p.add_(0.1),
        lambda p: setattr(p, "data", p.data + 0.1),  # as a gather of ZeRO-3 does
    ],
)
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_a_model_that_trains_samples_with_its_newest_weights(role: Role, change):
    model = in_bfloat16(role_model(tiny_llama()))
    first, layers = logits(model, role), model._sampling[role]
    with torch.no_grad():
        for parameter in adapter_parameters(model, role):
            change(parameter)
    second = logits(model, role)
    assert model._sampling[role] is layers  # at the addresses that a compiled step knows
    assert not torch.equal(first, second)
    del model._sampling[role]
    assert torch.equal(logits(model, role), second)


def test_a_frozen_model_copies_its_adapter_once(monkeypatch: pytest.MonkeyPatch):
    model = in_bfloat16(RoleModel(tiny_llama(), {"policy": Adapter(LORA)})).eval()
    monkeypatch.setattr(SamplingLayers, "refresh", lambda _: pytest.fail("copied again"))
    assert torch.equal(logits(model, "policy"), logits(model, "policy"))


def test_a_role_that_is_replaced_is_sampled_from_its_new_adapter():
    model = in_bfloat16(RoleModel(tiny_llama(), {"policy": Adapter(LORA)})).eval()
    seen = [logits(model, "base")]
    own = adapter_state(model, "policy")
    for scale in (0.3, 0.5):
        model.add("added", Adapter(LORA, {n: torch.full_like(t, scale) for n, t in own.items()}))
        assert torch.equal(logits(model, "base"), seen[0])
        seen.append(logits(model, "added"))
        model.remove("added")
    assert not any(torch.equal(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_nothing_is_left_behind():
    model = in_bfloat16(role_model(tiny_llama()))
    modules, names = list(model.modules()), list(model.state_dict())
    with pytest.raises(ZeroDivisionError), sampling_as(model, "policy"):
        with sampling_as(model, "reward"):
            pass
        attention: Any = model.llama.model.layers[0].self_attn
        assert type(attention.q_proj) is type(attention.o_proj) is _Projection
        model.llama.model(torch.tensor([[5, 9, 30]]))
        kept = [m for m in model.modules() if isinstance(m, _Down)]
        assert len(kept) == 2 * 4 and not any(m._input is not None for m in kept)
        assert not any(m._product is not None for m in kept)
        _ = 1 / 0
    assert list(model.modules()) == modules and list(model.state_dict()) == names
    assert "forward" not in vars(model.llama.lm_head) and model.acting == "base"
    with sampling_as(role_model(tiny_llama()), "policy"):  # float32: as ever
        assert not any(isinstance(m, _Projection) for m in model.modules())


@torch.no_grad()
def test_weights_that_are_split_over_ranks_stay_in_their_layers():
    model = in_bfloat16(role_model(tiny_llama()))
    tokens = torch.tensor([[5, 9, 30]])
    with acting_as(model, "policy"), autocast(model):
        expected = model.llama.model(tokens).last_hidden_state
    layer: Any = model.llama.model.layers[1]
    parameter = layer.mlp.up_proj.base_layer.weight
    whole, parameter.data = parameter.data, torch.empty(0, dtype=torch.bfloat16)
    with sampling_as(model, "policy"):
        parameter.data = whole  # as ZeRO-3 does before the layer
        assert torch.equal(model.llama.model(tokens).last_hidden_state, expected)
        assert model.llama.lm_head(expected[0]).dtype == torch.float32
    assert not model._sampling


# --- inputs are not widened ----------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(3, 9, 1, 6), (4, 4, 4, 4), (1, 2, 30, 2)])
def test_without_pefts_cast_of_inputs_every_bit_is_the_same(lengths: tuple[int, ...]):
    batch = ragged_batch(lengths)
    inputs = (batch.tokens, batch.mask, batch.response_mask)
    seen: list[list[torch.Tensor]] = []
    casts: list[int] = []
    for cast in (False, True):
        model = in_bfloat16(role_model(tiny_llama()))
        assert not any(layer.cast_input_dtype_enabled for layer in model._lora_layers)
        for layer in model._lora_layers:
            layer.cast_input_dtype_enabled = cast
        with KernelCounts() as counts:
            policy_and_value(model, *inputs, 0.7)
        casts.append(counts.kernels["_to_copy"])
        scores, values = policy_and_value(model, *inputs, 0.7)
        assert values is not None
        (scores.logprobs.sum() + values.square().sum()).backward()
        with torch.no_grad():
            more = [
                response_logprobs(model, "reference", *inputs, 1.0).logprobs,
                score_sequences(model, batch.tokens, batch.mask),
            ]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        seen.append([scores.logprobs, values, *more, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
    assert casts[0] < casts[1]


def test_a_role_that_is_added_later_is_not_widened_either():
    model = RoleModel(tiny_llama(), {"policy": Adapter(LORA)}).eval()
    state = {name: torch.ones_like(t) for name, t in adapter_state(model, "policy").items()}
    model.add("added", Adapter(LORA, state))
    assert not any(layer.cast_input_dtype_enabled for layer in roles._lora_layers(model.backbone))
