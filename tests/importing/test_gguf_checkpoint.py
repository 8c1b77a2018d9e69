"""GGUF files of every type as Hugging Face folders, and what is refused."""

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import CHATML, K_QUANTS, PLAIN, QUANTISED, TinyGguf
from tiny_models import ROPES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from chatllama import cli
from chatllama.importing import hugging_face
from chatllama.importing.gguf_checkpoint import import_gguf
from chatllama.importing.gguf_file import GgufFile
from chatllama.importing.gguf_loss import losses


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


KEPT = {"F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize(
    "kind",
    [
        *PLAIN,
        *("Q8_0", "Q4_0", "Q4_1", "Q4_K"),
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in (*QUANTISED[3:], *K_QUANTS)
            if k != "Q4_K"
        ),
    ],
)
def test_every_type_gives_the_weights_that_the_package_dequantises(kind: str, path: Path) -> None:
    expected = TinyGguf(kind).write(path)
    out = import_gguf(path)
    assert out == path.with_name("tiny-hf")
    assert_equal(tensors_of(out), {n: t.to(KEPT.get(kind, t.dtype)) for n, t in expected.items()})
    info = json.loads((out / "chatllama.json").read_text())
    assert info["logit_difference"] < 1e-4 and info["stored"][kind]["tensors"] >= 16
    assert info["source"] == "tiny.gguf" and str(path.parent) not in json.dumps(info)


_SCALING = "llama.rope.scaling."
YARN = {f"{_SCALING}type": "yarn", f"{_SCALING}factor": 4.0}
YARN |= {f"{_SCALING}original_context_length": 16}
YARN_KEYS = {f"{_SCALING}attn_factor": 1.25, f"{_SCALING}yarn_beta_fast": 4.0}
YARN_KEYS |= {f"{_SCALING}yarn_beta_slow": 0.5}


@pytest.mark.parametrize(
    "made",
    [
        TinyGguf(tied=True),
        TinyGguf(biases=True),
        TinyGguf(head_dim=32),
        TinyGguf(rope="llama3"),
        TinyGguf(metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
        TinyGguf(metadata=YARN),
        TinyGguf(metadata={**YARN, **YARN_KEYS}),
        TinyGguf(metadata={"llama.rope.freq_base": 500000.0, "llama.block_count": 2}),
        TinyGguf(metadata={"llama.attention.head_count_kv": [2, 2]}),
        TinyGguf(family="qwen2", head_dim=32),
        TinyGguf("Q8_0", family="qwen2", tied=True),
        TinyGguf(family="qwen3", metadata={"qwen3.rope.freq_base": 1000.0}),
        TinyGguf("Q4_1", family="qwen3", tied=True, head_dim=32),
    ],
    ids=[
        "tied",
        "biases",
        "head_dim",
        "llama3",
        "linear",
        "yarn",
        "yarn's keys",
        "theta",
        "per layer",
        "qwen2",
        "qwen2 tied",
        "qwen3",
        "qwen3 tied",
    ],
)
def test_every_form_of_the_graph(made: TinyGguf, path: Path) -> None:
    expected = made.write(path)
    out = import_gguf(path)
    assert_equal(tensors_of(out), expected)
    config, theirs = AutoConfig.from_pretrained(out), made.config()
    assert type(config) is type(theirs)
    model = type(AutoModelForCausalLM.from_pretrained(out)).__name__
    assert config.architectures == [model]
    rope: Any = dict(ROPES[made.rope])
    if "llama.rope.scaling.type" in made.metadata:
        rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    if made.metadata.get("llama.rope.scaling.type") == "yarn":
        keyed = "llama.rope.scaling.attn_factor" in made.metadata
        rope |= {"rope_type": "yarn", "original_max_position_embeddings": 16}
        rope |= {"beta_fast": 4.0 if keyed else 32.0, "beta_slow": 0.5 if keyed else 1.0}
        usual = 1 + 0.1 * math.log(4)
        rope["attention_factor"] = pytest.approx(1.25 * usual if keyed else usual)
    rope["rope_theta"] = made.metadata.get(f"{made.family}.rope.freq_base", rope["rope_theta"])
    assert config.rope_parameters == rope
    same = ("head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings", "rms_norm_eps")
    same += ("max_position_embeddings", "num_key_value_heads", "vocab_size", "hidden_size")
    found, expected = config.to_dict(), theirs.to_dict()
    assert {k: found.get(k) for k in same} == {k: expected.get(k) for k in same}


def test_what_plain_transformers_reads(path: Path) -> None:
    """Model, tokenizer, chat template, pad token and ends of an answer."""
    metadata = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eos_token_id": 2}
    TinyGguf("Q8_0", metadata=metadata).write(path)
    out = import_gguf(path, max_file_bytes=20_000, dtype="bfloat16", max_positions=64)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 64
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert model.config.pad_token_id == 0  # the file's is its EOS
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|end|>", "<|im_end|>")
    assert tokenizer.chat_template == CHATML
    text = " the cat 1234, naïve 日本\n\n  sing"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_llama_31s_numbers_of_a_real_context() -> None:
    from chatllama.importing.reference import llama3_divisor, rope_speeds

    rope = {"rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    found = llama3_divisor(rope, rope_speeds(5e5, 128)).tolist()
    # Wavelengths below 2048 positions stay, above 8192 they are 8 times as long.
    assert found[:28] == [1.0] * 28 and found[35:] == pytest.approx([8.0] * 29)
    assert all(1 < each < 8 for each in found[29:35])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_the_rounding_error_that_is_reported_is_the_real_one(kind: str, path: Path) -> None:
    TinyGguf("F32").write(path)
    exact = GgufFile(path)
    TinyGguf(kind).write(other := path.with_name("other.gguf"))
    rounded = GgufFile(other)
    matrices = [name for name, each in exact.tensors.items() if len(each.shape) == 2]
    errors = [(rounded.tensor(name) - exact.tensor(name)).square().sum() for name in matrices]
    powers = [exact.tensor(name).square().sum() for name in matrices]
    real = float((torch.stack(errors).sum() / torch.stack(powers).sum()).sqrt())
    first, second = losses(rounded)
    assert first.kind == kind and first.error == pytest.approx(real, rel=0.25)
    assert second.error is None and "errors" not in str(second)


def test_what_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TinyGguf("Q4_0").write(path)
    assert cli.main(["import", str(path), "--out", str(path.parent / "out")]) == 0
    said = capsys.readouterr().out
    assert "16 tensors Q4_0: 99.6% of the weights, rounded to 4.5 bits: errors of about " in said
    assert said.endswith("what quantisation has rounded away does not come back\n")
    TinyGguf("F16").write(path)
    import_gguf(path)
    said = capsys.readouterr().out
    assert "16 tensors F16: 99.6% of the weights\n" in said and "rounded" not in said


TOKENS = "tokenizer.ggml."
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "family": (
        {"general.architecture": "gemma"},
        {},
        "is 'gemma'; llama, qwen2, qwen3 are imported",
    ),
    "adapter": ({"general.type": "adapter"}, {}, "its general.type is 'adapter', not model"),
    "experts": ({"llama.expert_count": 8}, {}, "it has a mixture of experts"),
    "split": ({"split.count": 2}, {}, "one of 2 files of a model; put them together"),
    "no layers": ({"llama.block_count": None}, {}, "no llama.block_count"),
    "layers": ({"llama.block_count": 3}, {}, "9 tensors of the model are missing, such as layer"),
    "huge": ({"llama.block_count": 2**31}, {}, "tensors of the model are missing"),
    "text": ({"llama.embedding_length": "big"}, {}, "llama.embedding_length must be a number"),
    "eps": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}, "above 0, not nan"),
    "heads": ({"llama.attention.head_count_kv": 3}, {}, "4 attention heads, but 3 of keys"),
    "by layer": ({"llama.feed_forward_length": [64, 32]}, {}, "differs from layer to layer"),
    "partial": ({"llama.rope.dimension_count": 8}, {}, "rope.dimension_count is 8 with heads"),
    "longrope": ({f"{_SCALING}type": "longrope"}, {}, "scaling.type 'longrope' is not imported"),
    "yarn, no factor": ({f"{_SCALING}type": "yarn"}, {}, "no llama.rope.scaling.factor"),
    "yarn, mscale": ({**YARN, f"{_SCALING}yarn_log_multiplier": 0.5}, {}, "multiplier 0.5 is not"),
    "yarn, factors": (YARN, {"rope_freqs.weight": np.ones(8)}, "beside llama.rope.scaling.type"),
    "factors": ({}, {"rope_freqs.weight": np.linspace(1, 3, 8)}, "not those of LLaMA-3.1's"),
    "length": ({}, {"rope_freqs.weight": np.ones(5)}, "rope_freqs.weight has shape (5,)"),
    "missing": ({}, {"blk.1.attn_q.weight": None}, "missing, such as layers.1.attention.wq"),
    "strange": (
        {},
        {"blk.0.attn_q_norm.weight": np.ones(8)},
        "no place for, such as blk.0.attn_q_",
    ),
    "short": ({}, {"output_norm.weight": np.ones(8)}, "norm.weight has shape (8,), expected"),
    "half": ({}, {"blk.0.attn_q.bias": np.ones(64)}, "such as layers.0.attention.wk.bias"),
    "nan": ({}, {"output_norm.weight": np.full(64, np.nan)}, "norm.weight holds NaN or infinity"),
    "model": ({TOKENS + "model": "bert"}, {}, "tokenizer.ggml.model is 'bert'"),
    "pre": ({TOKENS + "pre": "default"}, {}, "is 'default'; known: deepseek-r1-qwen, gpt-2"),
    "no pre": ({TOKENS + "pre": None}, {}, "is None; known"),
    "kinds": ({TOKENS + "token_type": [1, 1]}, {}, "token_type has 2 entries, expected"),
    "eos": ({TOKENS + "eos_token_id": None}, {}, "the tokenizer has no EOS token"),
    "beyond": ({TOKENS + "bos_token_id": 9999}, {}, "bos_token_id is 9999; the file has"),
    "merge": ({TOKENS + "merges": ["a b", "ab"]}, {}, "the merge 'a b' is not of two tokens"),
    "flag": ({TOKENS + "add_bos_token": "yes"}, {}, "add_bos_token must be true or false"),
    "template": ({"tokenizer.chat_template": 1}, {}, "chat_template must be a text, not 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_imported_exactly_is_refused(
    name: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata, tensors, message = WRONG[name]
    tensors = {n: t if t is None else t.astype(np.float32) for n, t in tensors.items()}
    architecture = metadata.pop("general.architecture", None)
    TinyGguf(metadata=metadata, tensors=tensors).write(path)
    if architecture:
        data = path.read_bytes()
        at = data.index(b"general.architecture") + len("general.architecture") + 4
        new = struct.pack("<Q", len(architecture)) + architecture.encode()
        path.write_bytes(data[:at] + new + data[at + 8 + len("llama") :])
    assert cli.main(["import", str(path)]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and len(said.splitlines()) == 1, said
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_the_logit_check_finds_wrong_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyGguf(rope="llama3").write(path)
    with monkeypatch.context() as patch:
        patch.setattr(hugging_face, "halves_together", lambda rows, heads: rows)
        with pytest.raises(ValueError, match="logits differ from those of Meta's architecture by"):
            import_gguf(path)
    from chatllama.importing import gguf_checkpoint

    plain = {"rope_type": "default", "rope_theta": 10000.0}
    monkeypatch.setattr(gguf_checkpoint, "rope_parameters", lambda *_: plain)
    with pytest.raises(ValueError, match="logits differ from those of Meta's architecture by"):
        import_gguf(path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_type_that_is_not_dequantised_and_two_places(path: Path) -> None:
    TinyGguf("F32").write(path)
    (path.parent / "tiny-hf").mkdir()
    with pytest.raises(ValueError, match="tiny-hf exists; name another folder with --out"):
        import_gguf(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_norm.weight") + len("blk.0.attn_norm.weight") + 4 + 8
    data[at : at + 4] = struct.pack("<I", gguf.GGMLQuantizationType.I32.value)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"blk.0.attn_norm.weight is of type I32, which is not"):
        import_gguf(path, path.parent / "other")
    shutil.rmtree(path.parent / "tiny-hf")
