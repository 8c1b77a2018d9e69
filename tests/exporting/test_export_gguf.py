"""GGUF files: names, order and frequencies of tensors; vocabularies; what is refused."""

from pathlib import Path

import gguf
import pytest
import torch
from tiny_gguf import byte_level_tokenizer
from tiny_models import tiny_llama
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chatllama.exporting.gate import same_tokens
from chatllama.exporting.gguf_writer import (
    _add_tokenizer,
    _rope_factors,
    check_gguf,
    gguf_name,
    interleaved,
)
from chatllama.importing.gguf_file import GgufFile
from chatllama.importing.gguf_tokenizer import write_tokenizer
from chatllama.importing.hugging_face import halves_together
from chatllama.text.byte_level import SPLITS
from chatllama.text.encoding import encode, encode_text
from chatllama.text.tokenizer import load_tokenizer


def test_gguf_names_and_order() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    assert gguf_name(names, "model.embed_tokens.weight") == "token_embd.weight"
    assert (
        gguf_name(names, "model.layers.11.self_attn.o_proj.weight") == "blk.11.attn_output.weight"
    )
    with pytest.raises(ValueError, match=r"no tensor for model\.layers\.0\.self_attn\.x"):
        gguf_name(names, "model.layers.0.self_attn.x.weight")
    config = tiny_llama().config  # 4 query heads and 2 key heads of 8 channels
    rows = torch.arange(32.0)[:, None]
    mixed = interleaved(rows, "model.layers.0.self_attn.q_proj", config)
    assert mixed[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(halves_together(mixed, 4), rows)
    keys = interleaved(rows[:16], "model.layers.0.self_attn.k_proj", config)
    assert torch.equal(halves_together(keys, 2), rows[:16])
    assert interleaved(rows, "model.layers.0.self_attn.v_proj", config) is rows


def test_llama_31s_frequencies() -> None:
    assert _rope_factors(tiny_llama().config) is None
    factors = _rope_factors(tiny_llama(rope="llama3").config)
    # Wavelengths 2 pi, 63, 628, 6283; original length 16, factors 1 and 4: all but the first are
    # longer than 16 and slow down by 8; the first lies between 4 and 16 and is interpolated.
    assert factors is not None and factors[1:].tolist() == pytest.approx([8.0] * 3)
    smooth = (16 / 6.283185 - 1) / 3
    assert float(factors[0]) == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-5)


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, path: Path, rows: int = 300) -> GgufFile:
    """A GGUF file with the tokenizer alone, read back."""
    writer = gguf.GGUFWriter(path, "llama")
    _add_tokenizer(writer, tokenizer, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return GgufFile(path)


@pytest.mark.parametrize("pre", SPLITS)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_byte_level_vocabularies_come_back(pre: str, adds_bos: bool, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path / "own", pre, adds_bos=adds_bos)
    check_gguf(tiny_llama().config, tokenizer)
    file = vocabulary_of(tokenizer, tmp_path / "own.gguf")
    assert file.text("tokenizer.ggml.pre") == pre
    assert file.flag("tokenizer.ggml.add_bos_token", not adds_bos) == adds_bos
    assert file.index("tokenizer.ggml.padding_token_id", 300) == 0
    kinds = file.array("tokenizer.ggml.token_type", int)
    assert kinds[:4] == [3, 3, 3, 1] and kinds[-1] == 5
    file.metadata["tokenizer.ggml.eos_token_id"] = 2
    (again := tmp_path / "again").mkdir()
    back = write_tokenizer(file, again)
    for text in ("the cat123  sing\n\n", "naïve 日本 <|im_end|>'ll"):
        assert encode(back, text) == encode(tokenizer, text)
        assert encode_text(back, text) == encode_text(tokenizer, text)


def test_sentencepiece_vocabularies_come_back(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    check_gguf(tiny_llama().config, tokenizer)
    file = vocabulary_of(tokenizer, tmp_path / "own.gguf", 310)
    assert file.flag("tokenizer.ggml.add_bos_token", False)
    file.metadata["tokenizer.ggml.eos_token_id"] = 2
    (again := tmp_path / "again").mkdir()
    back = write_tokenizer(file, again)
    assert len(back) == 300
    for text in ("  Anna paints", "naïve 日本</s>"):
        assert encode_text(back, text) == encode_text(tokenizer, text)


def test_what_llama_cpp_cannot_read_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    config = tiny_llama().config
    rope = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
    config.rope_parameters = {**rope, "rope_type": "longrope"}
    known = "default, linear, dynamic, yarn, llama3"
    with pytest.raises(ValueError, match=f"rope_type 'longrope' is not written; {known} are"):
        check_gguf(config, tokenizer)
    config.rope_parameters = {**rope, "rope_type": "yarn"}
    check_gguf(config, tokenizer)
    for key, value in (("truncate", False), ("beta_fast", 4.0), ("beta_slow", 0.5)):
        config.rope_parameters = {**rope, "rope_type": "yarn", key: value}
        with pytest.raises(ValueError, match=f"yarn with {key} {value}; llama.cpp computes"):
            check_gguf(config, tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="splits text as one of gpt-2, smollm, llama-bpe, qwen2"):
        check_gguf(tiny_llama().config, tokenizer)


@pytest.mark.parametrize(
    ("tail", "same"),
    [("", True), ("\n", True), (" \n\n", True), ("\n<|im_start|>", False), ("x", False)],
)
def test_blanks_after_the_last_turn_are_no_other_tokens(
    tail: str, same: bool, tmp_path: Path
) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    text = "<|im_start|>user\nhi<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert same_tokens(tokenizer, text + tail, ids) == same
    assert not same_tokens(tokenizer, "a" + text, ids)
