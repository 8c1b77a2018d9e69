"""The layer that adds the adapter to the weight first, against PEFT's own."""

from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from tiny_models import tiny_llama
from torch import nn

from chatllama.config.model import LoraSection
from chatllama.model import lora as lora_layer
from chatllama.model.lora import MergingLinear, merge_products
from chatllama.model.roles import Adapter, RoleModel, lora_config

IN, OUT, RANK = 6, 10, 2
MANY = 40  # rows: 40 * 16 > 60


def layers(bias: bool, **settings: Any) -> tuple[MergingLinear, lora.Linear]:
    """Ours, merging, and PEFT's with the same weights."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=5, **settings)
    made = [
        kind(base, "policy", config=config, r=RANK, lora_alpha=5)
        for kind in (MergingLinear, lora.Linear)
    ]
    for layer in made:
        generator = torch.Generator().manual_seed(1)
        for part in (layer.lora_A, layer.lora_B):
            weight = cast(nn.Linear, part["policy"]).weight
            weight.data = torch.randn(weight.shape, generator=generator)
    merge_products(made[0])
    return cast(MergingLinear, made[0]), made[1]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product that was merged."""
    counted: list[int] = []
    apply = lora_layer._MergedProduct.apply

    def counting(x: torch.Tensor, *others: Any) -> Any:
        counted.append(x.shape[0])
        return apply(x, *others)

    monkeypatch.setattr(lora_layer._MergedProduct, "apply", counting)
    return counted


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(MANY, IN), (4, MANY // 4, IN)])
def test_it_is_pefts_layer(shape: tuple[int, ...], bias: bool, products: list[int]):
    ours, theirs = layers(bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    slopes = torch.randn(*shape[:-1], OUT, generator=torch.Generator().manual_seed(3))
    seen = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        result = layer(own)
        (result * slopes).sum().backward()
        thin = [cast(nn.Linear, part["policy"]).weight for part in (layer.lora_A, layer.lora_B)]
        seen.append([result.detach(), own.grad, *(weight.grad for weight in thin)])
    for mine, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    assert products == [shape[0]]


def test_inputs_without_gradient_and_passes_without_any(products: list[int]):
    ours, theirs = layers(bias=False)
    x = torch.randn(MANY, IN)
    ours(x).sum().backward()
    theirs(x).sum().backward()
    for part in ("lora_A", "lora_B"):
        mine, wanted = (
            cast(Any, getattr(layer, part)["policy"]).weight for layer in (ours, theirs)
        )
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert len(products) == 2


def test_no_second_copy_of_a_weight_waits_for_backward():
    ours, _ = layers(bias=False)
    kept: list[torch.Tensor] = []
    x = torch.randn(MANY, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x)
    weight = cast(nn.Linear, ours.base_layer).weight
    assert [t.data_ptr() for t in kept if t.shape == weight.shape] == [weight.data_ptr()]


def test_where_it_would_be_slower_or_inexact_it_is_pefts_to_the_bit(products: list[int]):
    ours, theirs = layers(bias=False)
    assert torch.equal(ours(torch.ones(3, IN)), theirs(torch.ones(3, IN)))  # 3 * 16 < 60
    x = torch.randn(MANY, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    ours.merges = False
    assert torch.equal(ours(x), theirs(x))
    ours.merges = True
    ours._disable_adapters = True
    assert torch.equal(ours(x), cast(nn.Linear, ours.base_layer)(x))
    dropping, _ = layers(bias=False, lora_dropout=0.5)
    assert (dropping(x) != dropping(x)).any()
    assert not products


def test_roles_are_made_of_such_layers_which_merge_when_told():
    model = RoleModel(tiny_llama(), {"policy": Adapter(LoraSection(r=2), trainable=True)})
    assert model._lora_layers and all(type(x) is MergingLinear for x in model._lora_layers)
    assert not any(cast(MergingLinear, layer).merges for layer in model._lora_layers)
    merge_products(model)
    assert all(cast(MergingLinear, layer).merges for layer in model._lora_layers)


def test_other_kinds_of_matrices_keep_pefts_own_layer():
    class Special(nn.Linear):
        """Stands for a quantised one."""

    model = nn.Sequential(Special(IN, OUT))
    config = lora_config(LoraSection(r=2, target_modules=["0"]))
    config.task_type = None
    layer = cast(Any, get_peft_model(cast(Any, model), config)).base_model.model[0]
    assert type(layer) is lora.Linear


WRONG_TARGETS = [
    (["q_proj", "nonsense"], "'nonsense'"),
    (["q_proj", "Q_proj", "c_attn"], "'Q_proj', 'c_attn'"),
    (["q_proj", "lm_head"], "'lm_head'"),
    (["embed_tokens", "v_proj"], "'embed_tokens'"),
    (["self_attn"], "'self_attn'"),
    (["q_proj", "layers.9.self_attn.q_proj"], "'layers.9.self_attn.q_proj'"),
    (["q_proj", ""], "''"),
    (["all-linear"], "'all-linear'"),
]


@pytest.mark.parametrize(("names", "wrong"), WRONG_TARGETS)
def test_names_that_match_no_layer_are_refused_beside_others(names: list[str], wrong: str):
    with pytest.raises(ValueError, match="target_modules: ") as caught:
        RoleModel(tiny_llama(), {"reward": Adapter(LoraSection(r=2, target_modules=names))})
    assert f"lora.target_modules: {wrong} names no linear layer" in str(caught.value)
    assert "these have down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in (
        str(caught.value)
    )


@pytest.mark.parametrize(
    ("names", "layers"), [(["q_proj"], 2), (["self_attn.q_proj", "1.mlp.up_proj"], 3)]
)
def test_names_as_peft_matches_them(names: list[str], layers: int):
    model = RoleModel(tiny_llama(), {"policy": Adapter(LoraSection(r=2, target_modules=names))})
    assert len(model._lora_layers) == layers
