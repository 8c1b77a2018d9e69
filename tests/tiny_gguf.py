"""Tiny GGUF files made with the `gguf` package alone, and the weights that an import must find."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from tiny_models import ROPES
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from chatllama.text.byte_level import byte_letters, byte_level_pipeline
from chatllama.text.sentencepiece_bpe import read_model
from chatllama.text.tokenizer import load_tokenizer

PLAIN = ("F32", "F16", "BF16")
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
# Bytes of a block and where its float16 scales lie.
K_QUANTS = {"Q2_K": (84, (80, 82)), "Q3_K": (110, (108,)), "Q4_K": (144, (0, 2))}
K_QUANTS |= {"Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
CONTROLS = ("<|end|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level_tokens() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their kinds, and merges: control tokens, bytes, a few words."""
    tokens, merges = [*CONTROLS, *byte_letters()], list[str]()
    for word in ("Ġthe", "Ġcat", "12", "123", "ing"):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    return tokens, [3] * len(CONTROLS) + [1] * (len(tokens) - len(CONTROLS)), merges


@dataclass
class TinyGguf:
    """What the file is to hold; `metadata` replaces what would be written, None leaves it out."""

    kind: str = "F32"
    rope: str = "default"
    tied: bool = False
    biases: bool = False
    head_dim: int = 0
    """0: the width over the heads."""
    sentencepiece: Path | None = None
    pre: str = "smollm"
    rows: int = 300
    family: str = "llama"
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray | None] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """K-quants have blocks of 256 weights, the others of 32."""
        return 256 if self.kind in K_QUANTS else 64

    def config(self) -> LlamaConfig:
        config = AutoConfig.for_model(
            self.family,
            vocab_size=self.rows,
            hidden_size=self.width,
            intermediate_size=self.width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=self.head_dim or self.width // 4,
            max_position_embeddings=128,
            rope_parameters=dict(ROPES[self.rope]),
            initializer_range=0.1,
            tie_word_embeddings=self.tied,
            **(dict.fromkeys(("attention_bias", "mlp_bias"), True) if self.biases else {}),
        )
        return cast(LlamaConfig, config)

    def write(self, path: Path) -> dict[str, torch.Tensor]:
        """Writes the file; returns the weights in float32, under Hugging Face's names."""
        config = self.config()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            weights = AutoModelForCausalLM.from_config(config).state_dict()
            for name, weight in weights.items():
                if name.endswith(("bias", "norm.weight")):
                    weight.add_(torch.randn_like(weight) * 0.1)
        writer, expected = gguf.GGUFWriter(path, self.family), dict[str, torch.Tensor]()
        self._add_metadata(writer, config)
        tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] = {}
        for name, weight in weights.items():
            if self.tied and name == "lm_head.weight":
                continue
            raw, kind = quantised(weight.numpy(), self.kind if weight.dim() == 2 else "F32")
            expected[name] = torch.from_numpy(gguf.dequantize(raw, kind).copy()).view(weight.shape)
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            heads = heads if self.family == "llama" else None
            tensors[gguf_name(name)] = (interleaved(raw, heads) if heads else raw, kind)
        if self.rope == "llama3":
            tensors["rope_freqs.weight"] = (factors(config), gguf.GGMLQuantizationType.F32)
        for name, array in self.tensors.items():
            if array is None:
                del tensors[name]
            else:
                tensors[name] = (array, gguf.GGMLQuantizationType.F32)
        for name, (array, kind) in tensors.items():
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return expected

    def _add_metadata(self, writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
        values: dict[str, Any] = {
            "block_count": 2,
            "context_length": 128,
            "embedding_length": self.width,
            "feed_forward_length": self.width,
            "attention.head_count": 4,
            "attention.head_count_kv": 2,
            "attention.key_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.freq_base": 10000.0,
        }
        values = {f"{self.family}.{key}": value for key, value in values.items()}
        if self.sentencepiece is None:
            values |= byte_level_metadata(self.pre)
        else:
            values |= sentencepiece_metadata(self.sentencepiece)
        values["tokenizer.chat_template"] = CHATML
        for key, value in (values | self.metadata).items():
            if value is not None:
                add(writer, key, value)


def byte_level_metadata(pre: str) -> dict[str, Any]:
    tokens, kinds, merges = byte_level_tokens()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def sentencepiece_metadata(file: Path) -> dict[str, Any]:
    model = read_model(file)
    assert model is not None
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [float(piece.score) for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One value, of the type that converters give its kind."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def gguf_name(name: str) -> str:
    inner, _, kind = name.rpartition(".")
    if not inner.startswith("model.layers."):
        return f"{NAMES[inner]}.{kind}"
    _, _, layer, inner = inner.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half beside row i of its second half, as llama.cpp rotates them."""
    pairs = rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(rows.shape))


def quantised(array: np.ndarray, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """A matrix as bytes of a type. The package writes no K-quants: those are random blocks."""
    known = gguf.GGMLQuantizationType[kind]
    if kind not in K_QUANTS:
        return gguf.quantize(array, known), known
    size, scales = K_QUANTS[kind]
    luck = np.random.default_rng(len(array))
    blocks = luck.integers(0, 256, (array.size // 256, size), dtype=np.uint8)
    for place in scales:
        scale = luck.uniform(1e-4, 2e-4, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return blocks.reshape(len(array), -1), known


def factors(config: LlamaConfig) -> np.ndarray:
    """LLaMA-3.1's divisors of the frequencies, as llama.cpp's converter computes them."""
    rope: Any = config.rope_parameters
    channels: Any = config.head_dim
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    found = []
    for pair in range(0, channels, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (pair / channels)
        ratio = rope["original_max_position_embeddings"] / wave
        smooth = (ratio - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        found.append(1.0 if wave < high else rope["factor"] if wave > low else between)
    return np.array(found, np.float32)


def byte_level_tokenizer(
    folder: Path, pre: str = "smollm", bos: str | None = "<|im_start|>", adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer like SmolLM2's (BOS is a turn's first token, pad is EOS), or like others."""
    tokens, _, merges = byte_level_tokens()
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    pipeline = byte_level_pipeline(
        pre,
        {token: index for index, token in enumerate(tokens)},
        pairs,
        dict.fromkeys(range(len(CONTROLS)), True),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=pipeline,
        bos_token=bos,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|end|>",
        add_bos_token=adds_bos,
        chat_template=CHATML,
    ).save_pretrained(folder)
    return load_tokenizer(folder)
