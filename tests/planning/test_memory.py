"""The closed forms against the stages' own code, run on tensors without numbers."""

import pytest
import torch
from fake_runs import GPU_CHUNK, fake_model, measure, packed
from transformers import LlamaConfig

from chatllama.config.schema import Config
from chatllama.planning.memory import Place, StageMemory, plan_memory
from chatllama.planning.shape import read_shape
from chatllama.runs.folder import STAGES, Stage

SHAPES = {
    "multi-head": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8},
    "grouped queries": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


def llama(shape: str, layers: int = 4) -> LlamaConfig:
    sizes = {"vocab_size": 4096, "tie_word_embeddings": False, "max_position_embeddings": 2048}
    return LlamaConfig(**(sizes | SHAPES[shape]), num_hidden_layers=layers)


def config(**backbone: object) -> Config:
    lora = backbone.pop("lora", {"r": 8})
    ppo = {
        "max_prompt_length": 96,
        "microbatch_size": 2,
        "minibatch_size": 4,
        "rollout_batch_size": 4,
    }
    return Config.model_validate(
        {
            "run_dir": "unused",
            "backbone": {"path": "unused", **backbone},
            "lora": lora,
            "sft": {"microbatch_size": 2, "batch_size": 4, "max_length": 256},
            "reward": {"microbatch_size": 2, "batch_size": 4, "max_length": 128},
            "ppo": ppo,
            "generation": {"max_new_tokens": 64, "batch_size": 8},
        }
    )


def planned(cfg: Config, shape: LlamaConfig, stage: Stage) -> StageMemory:
    place = Place(ranks=1, launched=False, device="cuda")
    return plan_memory(cfg, read_shape(shape.to_dict(), "here"), place, stage)


def phases(plan: StageMemory) -> dict[str, float]:
    """Peaks by what `measure` can tell apart: a pass at its head and backward are one."""
    found: dict[str, float] = {}
    for name, peak in plan.peaks.items():
        known = {"LM head": "step", "backward": "step"}.get(name, name.partition(",")[0])
        found[known] = max(found.get(known, 0.0), peak)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16", "gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"dtype": "float32", "gradient_checkpointing": True},
        {"dtype": "float32"},
        {"dtype": "bfloat16", "lora": None},
        {"dtype": "float32", "lora": None, "gradient_checkpointing": True},
        {"dtype": "bfloat16", "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
        {"dtype": "bfloat16", "quantization": "nf4", "gradient_checkpointing": True},
        {"dtype": "float32", "quantization": "nf4"},
    ],
    ids=str,
)
def test_peaks_are_those_of_the_real_code(settings: dict, shape: str) -> None:
    if "quantization" in settings:
        pytest.importorskip("bitsandbytes")
    cfg, model = config(**settings), llama(shape)
    off: dict[str, float] = {}
    for stage in STAGES:
        plan, found = planned(cfg, model, stage), measure(cfg, model, stage, GPU_CHUNK)
        off[f"{stage} always"] = plan.held / found.resident - 1
        own = phases(plan)
        off |= {f"{stage} {name}": own[name] / most - 1 for name, most in found.peaks.items()}
    wrong = {name: round(each, 3) for name, each in off.items() if abs(each) > 0.1}
    assert not wrong, off


def test_texts_beyond_a_window_keep_a_mask_in_each_layer() -> None:
    cfg = config(dtype="float32")
    cfg = cfg.model_copy(update={"sft": cfg.sft.model_copy(update={"packing": False})})
    values = llama("multi-head").to_dict() | {"model_type": "mistral"}

    def kept(window: int | None) -> float:
        shape = read_shape(values | {"sliding_window": window}, "here")
        plan = plan_memory(cfg, shape, Place(launched=False), "sft")
        return next(x.bytes for x in plan.phases["backward"] if x.name.startswith("activations"))

    # 2 rows of 256 x 256 float32 numbers in each of 4 layers
    assert kept(255) - kept(None) == 4 * 2 * 256**2 * 4
    assert kept(256) == kept(None)


@pytest.mark.slow
def test_matrices_in_4_bits_have_the_bytes_of_packed_ones() -> None:
    """What the harness puts in a matrix's place, against bitsandbytes' own packing of numbers."""
    functional = pytest.importorskip("bitsandbytes.functional")
    model = fake_model(config(quantization="nf4"), llama("multi-head", 1), "sft")
    for layer in packed(model):
        numbers = torch.randn(layer.out_features, layer.in_features)
        weight, state = functional.quantize_4bit(
            numbers, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        own = layer.weight.quant_state
        pairs = [(layer.weight, weight), (own.absmax, state.absmax)]
        pairs += [(own.state2.absmax, state.state2.absmax)]
        assert [(a.shape, a.dtype) for a, _ in pairs] == [(b.shape, b.dtype) for _, b in pairs]
    assert len(packed(model)) == 7
