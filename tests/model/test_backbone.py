import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import sentencepiece
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from tiny_models import ragged_batch, tiny_config, tiny_llama
from transformers import GPT2Config

from chatllama.config.model import BackboneSection, FromScratch
from chatllama.config.schema import Config, with_weights
from chatllama.model import backbone
from chatllama.model.backbone import load_backbone
from chatllama.model.packed_attention import SDPA
from chatllama.runs.folder import RunFolder, backbone_path, base_path

ROW = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(base: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(base, tmp_path / "copy")


def section(path: Path | str, **changes) -> BackboneSection:
    return BackboneSection(path=str(path), **{"dtype": "float32", **changes})


def test_it_comes_frozen_and_in_eval_mode(base: Path):
    llama = load_backbone(section(base), str(base))
    assert not llama.training
    assert not any(p.requires_grad for p in llama.parameters())
    tokens = ragged_batch().tokens
    with torch.no_grad():
        expected = tiny_llama()(input_ids=tokens).logits
        assert torch.equal(llama(input_ids=tokens).logits, expected)


def test_type_and_attention_are_as_asked(base: Path):
    llama = load_backbone(section(base, dtype="bfloat16"), str(base))
    assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
    assert llama.config._attn_implementation == SDPA
    override = section(base, dtype="bfloat16", attn_implementation="eager")
    llama = load_backbone(override, str(base), dtype=torch.float32)
    assert {p.dtype for p in llama.parameters()} == {torch.float32}
    assert llama.config._attn_implementation == "eager"


def test_bfloat16_does_not_round_the_rotary_frequencies(base: Path):
    # FACTS: model.half().float() rounds them too, which moves the logits by 5e-3.
    low = load_backbone(section(base, dtype="bfloat16"), str(base)).model.rotary_emb
    full = load_backbone(section(base), str(base)).model.rotary_emb
    assert torch.equal(low.inv_freq, full.inv_freq)


def test_a_path_that_is_no_model_is_named(tmp_path: Path):
    path = tmp_path / "nothing"
    with pytest.raises(ValueError, match=rf"backbone\.path: no model at '{path}'"):
        load_backbone(section(path), str(path))
    with pytest.raises(ValueError, match=rf"backbone\.path: '{tmp_path}' cannot be loaded"):
        load_backbone(section(tmp_path), str(tmp_path))


def test_other_architectures_are_refused(tmp_path: Path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"backbone\.path: .* a 'gpt2' model, not one of llama, "):
        load_backbone(section(tmp_path), str(tmp_path))


def test_pickled_weights_are_refused(damaged: Path):
    state = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    torch.save(state, damaged / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no safetensors weights \(pickled checkpoints"):
        load_backbone(section(damaged), str(damaged))


def test_missing_tensors_are_refused_not_drawn_at_random(damaged: Path):
    state = load_file(damaged / "model.safetensors")
    del state[ROW]
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 of the model's tensors, such as {ROW}"):
        load_backbone(section(damaged), str(damaged))


def test_weights_cut_off_are_refused(damaged: Path):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"backbone\.path: .*model\.safetensors is damaged: \S+ of"
    ):
        load_backbone(section(damaged), str(damaged))


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 70}, r"(embed_tokens|lm_head)\.weight has shape .* should have \(70, 32\)"),
        ({"intermediate_size": 48}, r"mlp\.\w+\.weight has shape"),
        ({"hidden_size": 40, "head_dim": 10}, "do not belong together"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised by gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "is quantised by awq"),
    ],
)
def test_weights_that_are_not_what_the_config_says_are_refused(
    damaged: Path, changes: dict[str, object], words: str
):
    file = damaged / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"backbone\.path: .*{words}"):
        load_backbone(section(damaged), str(damaged))


@pytest.mark.parametrize(
    ("version", "fits"), [("0.48.2", False), ("0.49.9", False), ("0.50.0", True)]
)
def test_the_extra_asks_for_a_bitsandbytes_that_was_tried(version: str, fits: bool):
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("bitsandbytes = ")]
    assert Requirement(line.split('"')[1]).specifier.contains(version) is fits


@pytest.mark.parametrize("attention", ["flash_attention_2", "varlen"])
def test_attention_in_16_bits_is_refused_in_float32(base: Path, attention: str):
    values = {"path": str(base), "attn_implementation": attention, "dtype": "float32"}
    with pytest.raises(ValueError, match=rf"{attention} computes in bfloat16, not in dtype float3"):
        BackboneSection.model_validate(values)


def test_attention_in_16_bits_is_refused_in_float32_for_inference_too(base: Path):
    values = {"path": str(base), "attn_implementation": "flash_attention_2"}
    cfg = Config.model_validate({"run_dir": "-", "backbone": values})
    section = with_weights(cfg, "float32", None).backbone  # --dtype float32
    with pytest.raises(ValueError, match="flash_attention_2 computes in 16 bits, not in float32"):
        load_backbone(section, str(base))


@pytest.mark.parametrize(
    ("capability", "dtype", "warned"),
    [
        ((7, 5), "bfloat16", True),
        ((7, 0), "bfloat16", True),
        ((8, 0), "bfloat16", False),
        ((9, 0), "bfloat16", False),
        ((7, 5), "float32", False),
    ],
)
def test_bfloat16_on_an_old_gpu_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: tuple[int, int],
    dtype: str,
    warned: bool,
):
    monkeypatch.setattr(backbone, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    values = BackboneSection.model_validate({"path": "-", "dtype": dtype})
    backbone.check_kernels(values, tiny_config())
    found = capsys.readouterr().err
    assert ("Tesla T4 has compute capability 7." in found) is warned


def test_attention_without_its_package_is_refused(base: Path):
    section = BackboneSection(path=str(base), attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=r"attn_implementation: flash_attention_2 .* flash-attn"):
        load_backbone(section, str(base))


def test_code_that_comes_with_a_model_does_not_run(damaged: Path):
    config = json.loads((damaged / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "own.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ValueError, match=r"set backbone\.trust_remote_code: true$") as refused:
        load_backbone(section(damaged), str(damaged))
    assert "trust_remote_code=True" not in str(refused.value)


def test_paths_of_backbone_and_base(tmp_path: Path):
    run = RunFolder(tmp_path)
    given = Config(run_dir=str(tmp_path), backbone=BackboneSection(path="somewhere/llama"))
    assert backbone_path(given.backbone, run) == base_path(given, run) == "somewhere/llama"
    full = Config(run_dir=str(tmp_path), backbone=given.backbone, lora=None)
    assert backbone_path(full.backbone, run) == "somewhere/llama"
    assert base_path(full, run) == str(tmp_path / "sft" / "model")
    scratch = FromScratch.model_validate({"data": [{"path": "a.txt", "format": "text"}]})
    built = BackboneSection(from_scratch=scratch)
    assert backbone_path(built, run) == str(tmp_path / "backbone")


def test_a_real_trained_llama_reads_stories(testdata: Path):
    folder = testdata / "stories260k" / "hf"
    llama = load_backbone(section(folder), str(folder))
    assert sum(p.numel() for p in llama.parameters()) == 260_032
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    tokens = torch.tensor([[1, *pieces.encode(text)]])
    with torch.no_grad():
        loss = llama(input_ids=tokens, labels=tokens).loss
    assert loss < 1.5  # log 512 = 6.2 nats for a guess


@pytest.mark.parametrize(
    ("dtype", "flags", "warned"),
    [
        (torch.bfloat16, "flags : fpu avx2 avx512f", True),
        (torch.bfloat16, "flags : fpu avx512f avx512_bf16", False),
        (torch.bfloat16, "flags : fpu amx_bf16 amx_tile", False),
        (torch.bfloat16, "Features : fp asimd bf16 i8mm", False),
        (torch.bfloat16, None, False),
        (torch.float32, "flags : fpu avx2", False),
    ],
)
def test_bfloat16_that_is_emulated_is_not_silent(
    dtype: torch.dtype,
    flags: str | None,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(flags)
    monkeypatch.setattr(backbone, "CPU_FLAGS", file)
    monkeypatch.setattr(backbone, "device", lambda: torch.device("cpu"))
    backbone._warn_of_slow_bfloat16(dtype)
    said = capsys.readouterr()
    assert ("this CPU has no bfloat16 instructions" in said.err) == warned and not said.out
    monkeypatch.setattr(backbone, "rank", lambda: 1)
    backbone._warn_of_slow_bfloat16(dtype)
    assert not capsys.readouterr().err
    monkeypatch.setattr(backbone, "rank", lambda: 0)
    monkeypatch.setattr(backbone, "device", lambda: torch.device("cuda"))
    backbone._warn_of_slow_bfloat16(dtype)
    assert not capsys.readouterr().err
