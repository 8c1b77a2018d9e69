"""Names, order and frequencies of the tensors in GGUF files."""

import gguf
import pytest
import torch
from tiny_models import tiny_llama

from chatllama.exporting.gguf_writer import _rope_factors, gguf_name, interleaved
from chatllama.importing.hugging_face import halves_together


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
