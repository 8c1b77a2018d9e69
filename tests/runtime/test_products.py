"""Products by oneDNN are those of torch but for rounding, with their gradients."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from chatllama.model.lora import MergingLinear
from chatllama.runtime import products
from chatllama.runtime.products import OneDnnLinear, is_plain, prefers_onednn, product, use_onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def calls(monkeypatch):
    """Shapes that oneDNN multiplies, on any processor."""
    made, real = [], torch.ops.mkldnn._linear_pointwise

    def multiply(left, right, *rest):
        made.append((tuple(left.shape), tuple(right.shape)))
        return real(left, right, *rest)

    operations = SimpleNamespace(mkldnn=SimpleNamespace(_linear_pointwise=multiply))
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products.torch, "ops", operations)
    return made


def exact(*tensors):
    return [each.detach().double().requires_grad_(each.requires_grad) for each in tensors]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_layers_numbers_and_gradients(calls, bias, trained):
    torch.manual_seed(0)
    layer = nn.Linear(200, 400, bias=bias).requires_grad_(trained)
    model = nn.Sequential(layer, nn.Linear(400, 2))
    names = list(model.state_dict())
    use_onednn(model)
    assert type(layer) is OneDnnLinear and type(model[1]) is nn.Linear  # too small
    assert is_plain(layer) and list(model.state_dict()) == names
    x = torch.randn(3, 5, 200, requires_grad=True)
    slope = torch.randn(3, 5, 400)
    result = layer(x)
    (result * slope).sum().backward()
    wide, weight, wide_slope = exact(x, layer.weight, slope)
    expected = wide @ weight.T + (layer.bias.detach().double() if bias else 0.0)
    (expected * wide_slope).sum().backward()
    assert (result - expected).abs().max() < 1e-5
    assert x.grad is not None and (x.grad - wide.grad).abs().max() < 1e-5
    if trained:
        assert (cast(Tensor, layer.weight.grad) - weight.grad).abs().max() < 1e-5
    else:
        assert layer.weight.grad is None
    assert len(calls) == 2  # the gradient of the weight is a small product here
    with torch.no_grad():
        assert torch.equal(layer(x), result)  # log-probabilities before and while training


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, "small", "autocast"])
def test_what_torch_keeps(calls, kind):
    dtype = kind if isinstance(kind, torch.dtype) else torch.float32
    left, right = torch.randn(4, 256, dtype=dtype), torch.randn(256, 256, dtype=dtype)
    if kind == "small":
        right = right[:, :255]
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        result = product(left, right)
        assert torch.equal(result, left @ right)
    assert not calls


@pytest.mark.slow
def test_a_compiled_layer_is_the_compilers(monkeypatch):
    layer = nn.Linear(256, 256).requires_grad_(False)
    model = nn.Sequential(layer)
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    use_onednn(model)
    monkeypatch.setattr(products, "prefers_onednn", lambda: pytest.fail("asked by a compiler"))
    x = torch.randn(4, 256)
    result = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert torch.equal(result, nn.functional.linear(x, layer.weight, layer.bias))


def test_adapted_layers_and_their_gradients(calls):
    torch.manual_seed(0)
    base = nn.Linear(256, 256, bias=False).requires_grad_(False)
    use_onednn(base)
    config = LoraConfig(r=4)
    layer: Any = MergingLinear(base, "policy", config=config, r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_B["policy"].weight, std=0.1)
    x, results = torch.randn(600, 256), []
    for layer.merges in (False, True):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        output = layer(inputs)
        output.square().sum().backward()
        down, up = (side["policy"].weight.grad for side in (layer.lora_A, layer.lora_B))
        results.append((output, inputs.grad, down, up))
    for plain, merged in zip(*results, strict=True):
        assert (plain - merged).abs().max() < 1e-4 * plain.abs().max()
    shapes = [((600, 256), (256, 256))] * 4  # twice there and back
    assert [each for each in calls if each[0] == (600, 256)] == shapes
    assert ((4, 600), (256, 600)) in calls  # the gradient of A


@pytest.mark.parametrize(
    ("flags", "vectors", "preferred"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True),
        ("vendor_id : AuthenticAMD", "AVX2", False),
        ("vendor_id : GenuineIntel", "AVX512", False),
        (None, "AVX512", False),
    ],
)
def test_which_processors(monkeypatch, tmp_path, flags, vectors, preferred):
    file = tmp_path / "cpuinfo"
    if flags:
        file.write_text(flags)
    monkeypatch.setattr(products, "CPU_FLAGS", file)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    assert prefers_onednn.__wrapped__() is preferred
