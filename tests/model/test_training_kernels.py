"""Liger's kernels in the backbone: what is asked of Liger, what is refused, the same results.

Where liger-kernel and Triton are installed without a GPU, `TRITON_INTERPRET=1` lets Triton's
interpreter run the kernels.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import (
    joint_gradients,
    logits_of,
    ragged_batch,
    role_model,
    tiny_config,
    tiny_llama,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from chatllama.config.model import BackboneSection, without_training_kernels
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.model import backbone
from chatllama.model.backbone import check_kernels, load_backbone, use_liger
from chatllama.model.families import FAMILIES, family_class
from chatllama.model.roles import acting_as
from chatllama.runtime.distributed import device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = 2e-5
"""In float32, of the largest number of a tensor."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def section(path: Path | str = "p", **changes: Any) -> BackboneSection:
    settings = {"path": str(path), "dtype": "float32", "liger_kernel": True}
    return BackboneSection.model_validate(settings | changes)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LlamaForCausalLM, dict[str, Any]]]:
    """A machine with a GPU and a Liger that only notes its calls."""
    calls: list[tuple[LlamaForCausalLM, dict[str, Any]]] = []

    def patch(model: LlamaForCausalLM, **kernels: bool) -> None:
        calls.append((model, kernels))
        # What Liger does to every model of the family that is made later.
        names = vars(sys.modules[type(model).__module__])
        for part in ("MLP", "RMSNorm"):
            names[type(model).__name__.replace("ForCausalLM", part)] = nn.Identity

    liger, rope = (ModuleType(f"liger_kernel.{name}") for name in ("transformers", "rope"))
    for family in FAMILIES:
        vars(liger)[f"apply_liger_kernel_to_{family}"] = patch
    vars(rope)["liger_rotary_pos_emb"] = lambda q, k, cos, sin: (q, k)  # rotates nothing
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.rope", rope)
    monkeypatch.setattr(backbone, "find_spec", lambda name: name)
    monkeypatch.setattr(backbone, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(backbone, "_placement", dict)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_liger_gets_the_bare_model_and_leaves_the_loss_alone(
    family: str, tmp_path: Path, on_a_gpu: list
) -> None:
    tiny_llama(form=family).save_pretrained(base := tmp_path / "base")
    llama = load_backbone(section(base), str(base))
    ((patched, kernels),) = on_a_gpu
    assert patched is llama
    assert kernels == {
        "rope": False,
        "rms_norm": True,
        "swiglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    later = load_backbone(section(base, liger_kernel=False), str(base))
    first = later.model.layers[0]
    assert type(later.model.norm) is family_class(later.config, "RMSNorm") is not nn.Identity
    assert type(first.mlp) is family_class(later.config, "MLP") is not nn.Identity
    assert len(on_a_gpu) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_another_rotary_embedding_is_that_of_one_model_only(
    family: str, tmp_path: Path, on_a_gpu: list
) -> None:
    tiny_llama(form=family).save_pretrained(base := tmp_path / "base")
    # Without rotation the layers do not see positions: the last token's states are those of any
    # order of the tokens before it. Models of the same process with another setting still see them.
    tokens = torch.tensor([[1, 20, 30, 40], [30, 1, 20, 40]])
    rotary, apart = modeling_llama.apply_rotary_pos_emb, dict[bool, float]()
    models = {
        liger: load_backbone(section(base, liger_kernel=liger), str(base))
        for liger in (True, False)
    }
    for liger, llama in models.items():
        with torch.no_grad():
            one, other = llama.model.layers[0](
                llama.model.embed_tokens(tokens),
                attention_mask=None,
                position_embeddings=llama.model.rotary_emb(torch.zeros(1), torch.arange(4)[None]),
            )
        apart[liger] = float((one[-1] - other[-1]).abs().max())
    assert apart[True] < 1e-5 < 1e-3 < apart[False]
    assert modeling_llama.apply_rotary_pos_emb is rotary


def test_what_cannot_work_is_refused_before_weights_are_read(
    base: Path, on_a_gpu: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=rf"backbone\.liger_kernel.* {message}"):
            load_backbone(section(base), str(base))

    monkeypatch.setattr(backbone.AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(AssertionError, match="weights were read"):
        load_backbone(section(base), str(base))
    del vars(sys.modules["liger_kernel.transformers"])["apply_liger_kernel_to_llama"]
    refused("liger-kernel cannot be used: module .* has no attribute 'apply_liger_kernel_to_llama'")
    for missing in ("liger_kernel", "triton"):
        found = {"liger_kernel", "triton"} - {missing}
        monkeypatch.setattr(
            backbone, "find_spec", lambda name, found=found: name if name in found else None
        )
        refused(r"pip install 'chatllama\[liger\]'")
    monkeypatch.setattr(backbone, "device", lambda: torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    refused("need a CUDA GPU, and this process sees none; set it to false")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused(r"pip install 'chatllama\[liger\]'")


def test_models_that_liger_would_compute_wrongly_are_refused(on_a_gpu: list) -> None:
    gelu = LlamaConfig(hidden_act="gelu")
    with pytest.raises(ValueError, match=r"SwiGLU computes silu, .* hidden_act 'gelu'"):
        check_kernels(section(), gelu)
    check_kernels(section(liger_kernel=False), gelu)

    class OwnLlama(LlamaForCausalLM):
        """Like one that brings code of its own."""

    with pytest.raises(ValueError, match="for LlamaForCausalLM of transformers, not for OwnL"):
        use_liger(OwnLlama(tiny_config()))
    assert on_a_gpu == []


def test_answering_goes_without() -> None:
    asked = section(dtype="bfloat16", attn_implementation="varlen", quantization="int8")
    found = without_training_kernels(asked)
    changed = {"liger_kernel": False, "attn_implementation": "sdpa"}
    assert found.model_dump() == asked.model_dump() | changed
    eager = section(attn_implementation="eager")
    assert without_training_kernels(eager).attn_implementation == "eager"


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's own kernels, on a GPU or in Triton's interpreter."""
    for package in ("liger_kernel", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1")
    if not INTERPRETED:
        return
    # Two things that the interpreter lacks: numbers with a type, and CUDA's own rsqrt.
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    language: Any = importlib.import_module("triton.language")
    rms_norm = importlib.import_module("liger_kernel.ops.rms_norm")
    converted = interpreter._implicit_cvt

    def typed(value: Any) -> Any:
        if not isinstance(value, float):
            return converted(value)
        number = torch.tensor([value]).numpy()
        handle = interpreter.TensorHandle(number, language.float32)
        return language.tensor(handle, language.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", typed)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: language.math.rsqrt(x))


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.slow
def test_logits_gradients_and_answers_are_those_without_it(base: Path, kernels_run: None) -> None:
    where = device()
    batch = ragged_batch((1, 3), (2, 1))
    for tensor in ("tokens", "mask", "response_mask"):
        setattr(batch, tensor, vars(batch)[tensor].to(where))
    found: list[tuple[torch.Tensor, dict[str, torch.Tensor], list[list[int]]]] = []
    for liger in (False, True):
        model = role_model(load_backbone(section(base, liger_kernel=liger), str(base))).to(where)
        logits = logits_of(model, "policy", batch.tokens)
        with acting_as(model, "policy"):
            uniforms = torch.zeros(2, 3)
            answers = generate(model.llama, [[5, 6, 7], [8]], Sampling(3, 0.0), [], uniforms, 2)
        if liger:
            assert model.llama.model.norm._get_name() == "LigerRMSNorm"
            model.enable_gradient_checkpointing()
        found.append((logits, joint_gradients(model.train(), batch), answers))
    (logits, gradients, answers), (own_logits, own_gradients, own_answers) = found
    assert near(own_logits, logits) and own_answers == answers
    # Two layers, seven matrices of the policy, three of the value model, A and B; and its head.
    assert len(gradients) == 2 * 2 * (7 + 3) + 2
    for name, gradient in gradients.items():
        assert near(own_gradients[name], gradient), name


@pytest.mark.slow
def test_all_weights_train_with_it(base: Path, kernels_run: None) -> None:
    where = device()
    tokens = torch.tensor([[1, 20, 30, 40]], device=where)
    found: list[dict[str, torch.Tensor]] = []
    for liger in (False, True):
        llama: Any = load_backbone(section(base, liger_kernel=liger), str(base))
        llama.to(where).requires_grad_(True)
        llama(tokens).logits.square().mean().backward()
        found.append({n: p.grad for n, p in llama.named_parameters() if p.grad is not None})
    plain, own = found
    assert plain.keys() == own.keys() and "model.layers.0.input_layernorm.weight" in plain
    for name, gradient in plain.items():
        assert near(own[name], gradient), name
