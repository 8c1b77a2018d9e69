"""LlamaForCausalLM in its published forms: sizes, and each kind of rotary embedding and layer."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from chatllama.config.model import BackboneSection
from chatllama.generation.generate import generate
from chatllama.generation.sampling import Sampling
from chatllama.generation.static_kv_cache import StaticKVCache
from chatllama.model.backbone import load_backbone
from chatllama.model.llama_config import check_architecture, tensor_shapes
from chatllama.model.roles import RoleModel
from chatllama.model.scoring import response_logprobs
from chatllama.planning import published
from chatllama.planning.published import published_shape
from chatllama.planning.shape import read_shape

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
LLAMA3 |= {"original_max_position_embeddings": 8192}
SMALLER = {**LLAMA3, "factor": 32.0}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "vocab_size", "max_position_embeddings", "rope_theta")
# As their config.json have it: the sizes above, whether tied, the scaling; then the parameters.
PUBLISHED: dict[str, tuple[tuple[int, ...], bool, dict[str, Any] | None, int]] = {
    "huggyllama/llama-7b":
        ((4096, 11008, 32, 32, 32, 32000, 2048, 10000), False, None, 6_738_415_616),
    "huggyllama/llama-13b":
        ((5120, 13824, 40, 40, 40, 32000, 2048, 10000), False, None, 13_015_864_320),
    "huggyllama/llama-30b":
        ((6656, 17920, 60, 52, 52, 32000, 2048, 10000), False, None, 32_528_943_616),
    "huggyllama/llama-65b":
        ((8192, 22016, 80, 64, 64, 32000, 2048, 10000), False, None, 65_285_660_672),
    "meta-llama/Llama-2-7b-hf":
        ((4096, 11008, 32, 32, 32, 32000, 4096, 10000), False, None, 6_738_415_616),
    "meta-llama/Llama-2-13b-hf":
        ((5120, 13824, 40, 40, 40, 32000, 4096, 10000), False, None, 13_015_864_320),
    "meta-llama/Llama-2-70b-hf":
        ((8192, 28672, 80, 64, 8, 32000, 4096, 10000), False, None, 68_976_648_192),
    "meta-llama/Meta-Llama-3-8B":
        ((4096, 14336, 32, 32, 8, 128256, 8192, 500000), False, None, 8_030_261_248),
    "meta-llama/Meta-Llama-3-70B":
        ((8192, 28672, 80, 64, 8, 128256, 8192, 500000), False, None, 70_553_706_496),
    "meta-llama/Llama-3.1-8B":
        ((4096, 14336, 32, 32, 8, 128256, 131072, 500000), False, LLAMA3, 8_030_261_248),
    "meta-llama/Llama-3.1-70B":
        ((8192, 28672, 80, 64, 8, 128256, 131072, 500000), False, LLAMA3, 70_553_706_496),
    "meta-llama/Llama-3.1-405B":
        ((16384, 53248, 126, 128, 8, 128256, 131072, 500000), False, LLAMA3, 405_853_388_800),
    "meta-llama/Llama-3.2-1B":
        ((2048, 8192, 16, 32, 8, 128256, 131072, 500000), True, SMALLER, 1_235_814_400),
    "meta-llama/Llama-3.2-3B":
        ((3072, 8192, 28, 24, 8, 128256, 131072, 500000), True, SMALLER, 3_212_749_824),
    "meta-llama/Llama-3.3-70B-Instruct":
        ((8192, 28672, 80, 64, 8, 128256, 131072, 500000), False, LLAMA3, 70_553_706_496),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B":
        ((4096, 14336, 32, 32, 8, 128256, 131072, 500000), False, LLAMA3, 8_030_261_248),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B":
        ((8192, 28672, 80, 64, 8, 128256, 131072, 500000), False, LLAMA3, 70_553_706_496),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0":
        ((2048, 5632, 22, 32, 4, 32000, 2048, 10000), False, None, 1_100_048_384),
    "HuggingFaceTB/SmolLM2-135M":
        ((576, 1536, 30, 9, 3, 49152, 8192, 100000), True, None, 134_515_008),
    "HuggingFaceTB/SmolLM2-360M":
        ((960, 2560, 32, 15, 5, 49152, 8192, 100000), True, None, 361_821_120),
    "HuggingFaceTB/SmolLM2-1.7B":
        ((2048, 8192, 24, 32, 32, 49152, 8192, 130000), True, None, 1_711_376_384),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str, tmp_path: Path) -> None:
    sizes, tied, scaling, count = PUBLISHED[name]
    values = dict(zip(SIZES, sizes, strict=True))
    values |= {"model_type": "llama", "tie_word_embeddings": tied, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(values))
    llama: Any = AutoConfig.from_pretrained(tmp_path)
    check_architecture(llama, tmp_path)
    assert sum(prod(shape) for _, shape in tensor_shapes(llama)) == count
    assert read_shape(values, name) == published_shape(name)
    assert read_shape(values, name).parameters == count
    wanted = {"rope_theta": sizes[-1], **(scaling or {"rope_type": "default"})}
    assert llama.rope_parameters == wanted


OTHERS = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
}
"""Models of the other families, and the parameters that the hub counts."""


@pytest.mark.parametrize("name", OTHERS)
def test_published_sizes_of_other_families(name: str) -> None:
    shape = published_shape(name)
    assert shape is not None and shape.parameters == OTHERS[name]


def test_no_listed_shape_is_untested() -> None:
    tested = {name.removesuffix("-Instruct") for name in PUBLISHED | OTHERS}
    assert tested == published.PUBLISHED.keys()


ORIGINAL, POSITIONS = 16, 64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
FORMS: dict[str, dict[str, Any]] = {
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": ORIGINAL}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn, all its keys": {
        "rope_scaling": {
            **YARN, "attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False
        },
    },
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "a key head for every query head": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 12},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "Llama 3.2": {
        "rope_scaling": {**SMALLER, "original_max_position_embeddings": ORIGINAL},
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
}  # fmt: skip


def make(folder: Path, changes: dict[str, Any]) -> Any:
    """The form as plain transformers runs it, and a folder with a published config's keys."""
    values = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
        "max_position_embeddings": POSITIONS, "pad_token_id": None, "rope_theta": 10000.0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = LlamaForCausalLM(LlamaConfig.from_dict(values | changes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    file = folder / "config.json"
    saved = {k: v for k, v in json.loads(file.read_text()).items() if k != "rope_parameters"}
    file.write_text(json.dumps(saved | values | changes))
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def loaded(folder: Path) -> LlamaForCausalLM:
    return load_backbone(BackboneSection(path=str(folder), dtype="float32"), str(folder))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_logits_packed_rows_and_samples_are_transformers(form: str, tmp_path: Path) -> None:
    """Up to the last position: four times the length before scaling."""
    theirs = make(tmp_path, FORMS[form])
    ours = loaded(tmp_path)
    rows = torch.randint(3, 96, (3, POSITIONS), generator=torch.Generator().manual_seed(1))
    lengths = (POSITIONS, 9, 30)
    mask = torch.arange(POSITIONS) < torch.tensor(lengths)[:, None]
    packed = response_logprobs(RoleModel(ours, {}), "base", rows, mask, mask[:, 1:], 1.0).logprobs
    for row, length, found in zip(rows, lengths, packed, strict=True):
        logits = theirs(row[None, :length]).logits[0]
        torch.testing.assert_close(ours(row[None, :length]).logits[0], logits, rtol=1e-5, atol=1e-5)
        expected = logits[:-1].log_softmax(-1).gather(1, row[1:length, None])[:, 0]
        torch.testing.assert_close(found[: length - 1], expected, rtol=1e-5, atol=1e-5)
    prompts = [
        row[:length].tolist() for row, length in zip(rows, (ORIGINAL + 4, 1, 9), strict=True)
    ]
    new = POSITIONS - ORIGINAL - 4
    greedy = Sampling(new, temperature=0.0)
    answers = generate(ours, prompts, greedy, [], torch.zeros(3, new), 2)  # the third joins later
    for prompt, answer in zip(prompts, answers, strict=True):
        settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
        assert (
            theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() == answer
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dynamic", "yarn", "llama3"])
def test_compiled_steps_sample_the_same(form: str, tmp_path: Path) -> None:
    make(tmp_path, FORMS[form])
    ours = loaded(tmp_path)
    given: dict[str, Any] = {"prompts": [[5, 9], [7] * 20, [8]], "stop_ids": [2], "batch_size": 2}
    given |= {"sampling": Sampling(40, temperature=0.0), "uniforms": torch.zeros(3, 40)}
    plain = generate(ours, **given)
    assert generate(ours, **given, compiled=StaticKVCache(ours, "eager")) == plain


def test_dynamic_scaling_ends_where_it_would_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond it, frequencies would depend on the longest text of a batch."""
    make(tmp_path, FORMS["dynamic"])
    ours = loaded(tmp_path)
    assert f"beyond {POSITIONS} tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"do not fit the model's {POSITIONS} positions"):
        generate(ours, [[5] * 60], Sampling(5), [2], torch.zeros(1, 5), 1)
    rope: Any = json.loads((tmp_path / "config.json").read_text())["rope_scaling"]
    assert ours.config.rope_parameters == {"rope_theta": 10000.0, **rope}  # exported as it was


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        {"rope_type": "proportional"},
        {"rope_type": "axial"},
    ],
)
def test_other_scalings_are_refused_by_name(rope: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path, {})
    file = tmp_path / "config.json"
    rope = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, **rope}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": rope}))
    with pytest.raises(ValueError, match=f"rope_type '{rope['rope_type']}' is not computed here"):
        loaded(tmp_path)
