"""Backbones in 8 and 4 bits: training (QLoRA), answering, what is refused."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import TinyRun, ppo_config, weights
from tiny_models import LORA
from transformers import LlamaForCausalLM

from chatllama.config.loader import dump_config
from chatllama.config.model import BackboneSection
from chatllama.config.schema import with_weights
from chatllama.exporting.cli import ExportOptions
from chatllama.exporting.export import export_run
from chatllama.inference.load import load_run
from chatllama.model import backbone
from chatllama.model.backbone import load_backbone, weight_bytes
from chatllama.model.roles import Adapter, RoleModel, adapter_parameters, adapter_state, mergeable
from chatllama.model.scoring import response_logprobs
from chatllama.runs.folder import RunFolder

KINDS = ["int8", "nf4"]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def logits(llama: Any) -> torch.Tensor:
    with torch.no_grad():
        return llama(torch.tensor([[1, 80, 90, 100, 110, 120]])).logits[0].float()


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_backbone_takes_less_memory(
    kind: Any, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = BackboneSection(path=str(tiny_llama_dir), dtype="float32", quantization=kind)
    llama = load_backbone(section, str(tiny_llama_dir))
    whole = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    layers = sum(p.numel() for n, p in whole.named_parameters() if "_proj" in n)
    saved = weight_bytes(whole) - weight_bytes(llama)
    assert saved == pytest.approx(layers * (4 - {"int8": 1, "nf4": 0.5}[kind]), rel=0.01)
    assert f"backbone: {kind}, 0." in capsys.readouterr().err
    assert not any(p.requires_grad for p in llama.parameters())
    expected = logits(whole)
    error = float((logits(llama) - expected).norm() / expected.norm())
    assert error < {"int8": 0.05, "nf4": 0.2}[kind]


@needs_bitsandbytes
@pytest.mark.slow
def test_gradients_through_4_bits_are_those_of_the_rounded_weights(tiny_llama_dir: Path) -> None:
    functional = importlib.import_module("bitsandbytes.functional")
    section = BackboneSection(path=str(tiny_llama_dir), dtype="float32", quantization="nf4")
    rough = load_backbone(section, str(tiny_llama_dir))
    whole: Any = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    for name, layer in whole.named_modules():
        if "_proj" in name:
            four: Any = rough.get_submodule(name).weight
            weight = functional.dequantize_4bit(four, four.quant_state)
            error = (weight - layer.weight).norm() / layer.weight.norm()
            assert error.item() < 0.12
            layer.weight.data = weight
    found: list[dict[str, torch.Tensor]] = []
    tokens = torch.tensor([[1, 80, 90, 100, 110, 120]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for llama in (rough, whole):
        torch.manual_seed(5)
        model = RoleModel(llama, {"policy": Adapter(LORA, trainable=True)}).eval()
        for parameter in adapter_parameters(model, "policy"):
            parameter.data.normal_(std=0.2)
        with torch.no_grad():  # sampling comes before training, and must not change the weights
            response_logprobs(model, "policy", tokens, mask, mask[:, 1:], 1.0)
        response_logprobs(model, "policy", tokens, mask, mask[:, 1:], 1.0).logprobs.sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2 * 2 * 7
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.slow
def test_ppo_trains_on_8_bits_and_export_takes_the_unquantised_base(
    tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    tiny = TinyRun.make(tmp_path, tiny_tokenizer_dir)
    trainer = tiny.trainer(backbone={"quantization": "int8"})
    model = trainer.engine.model
    assert not mergeable(model)
    before = weights(model)
    trainer.advance(trainer.start())
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained and all(torch.isfinite(after[name]).all() for name in changed)

    run, cfg = RunFolder(tiny.folder), tiny.config(backbone={"quantization": "int8"})
    dump_config(cfg, run.config)
    eight, half = load_run(run), load_run(run, with_weights(cfg, "float16", "none"))
    mlp: Any = eight.model.llama.model.layers[0].mlp
    assert mlp.up_proj.base_layer.weight.dtype == torch.int8
    assert half.model.llama.dtype == torch.float16
    adapter = adapter_state(half.model, "reference")
    for name, tensor in adapter_state(eight.model, "reference").items():
        assert tensor.dtype == torch.float32 and torch.equal(adapter[name], tensor)
    out = export_run(run.root, ExportOptions(merged=True))
    assert (out / "merged" / "model.safetensors").stat().st_size > 4 * 30_000
    with pytest.raises(ValueError, match="no multiple of 64, and this model has 32; use int8"):
        load_run(run, with_weights(cfg, None, "nf4"))


def test_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path
) -> None:
    quantised = {"quantization": "nf4"}
    with pytest.raises(ValueError, match="nf4: ZeRO-3 cannot split quantised weights"):
        ppo_config("b", tmp_path, backbone=quantised, deepspeed={"stage": 3})
    with pytest.raises(ValueError, match="quantised ones cannot be trained"):
        ppo_config("b", tmp_path, backbone=quantised, lora=None)
    monkeypatch.setattr(backbone, "find_spec", lambda name: None)
    section = BackboneSection(path=str(tiny_llama_dir), quantization="int8")
    with pytest.raises(ValueError, match=r"pip install 'chatllama\[bitsandbytes\]'"):
        load_backbone(section, str(tiny_llama_dir))


def test_half_precision_is_for_inference_only(tmp_path: Path) -> None:
    cfg = ppo_config("b", tmp_path)
    assert with_weights(cfg, None, None) == cfg
    changed = with_weights(cfg, "float16", "int8").backbone
    assert (changed.dtype, changed.quantization, changed.path) == ("float16", "int8", "b")
    with pytest.raises(ValueError, match=r"float16 is for inference only .* small gradients"):
        ppo_config("b", tmp_path, backbone={"dtype": "float16"})
