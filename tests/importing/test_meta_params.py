"""Meta's sizes and arithmetic by hand."""

import math
from pathlib import Path

import pytest
import torch

from chatllama.importing.hugging_face import halves_together
from chatllama.importing.meta_params import MetaParams, read_params
from chatllama.importing.reference import rms_norm, rotate, rotations


def test_params_defaults(tmp_path: Path) -> None:
    file = tmp_path / "params.json"
    file.write_text(
        '{"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-06, "n_kv_heads": null}'
    )
    params = read_params(file)
    assert (params.n_kv_heads, params.rope_theta, params.vocab_size) == (32, 10000.0, None)
    assert params.ffn_dim() is None


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "expected"),
    # Published: LLaMA 7B, 13B and 65B; LLaMA-2 70B.
    [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 256, None, 22016),
        (8192, 4096, 1.3, 28672),
    ],
)
def test_ffn_width(dim: int, multiple_of: int, multiplier: float | None, expected: int) -> None:
    params = MetaParams(dim, 1, 8, 8, 1e-5, 1e4, None, None, multiple_of, multiplier)
    assert params.ffn_dim() == expected


def test_rows_of_a_head_are_sorted_by_parity() -> None:
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    assert halves_together(rows, 2)[:, 1].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_reference_arithmetic_by_hand() -> None:
    # Root mean square of (3, 4) is sqrt(12.5).
    normed = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    assert normed[0].tolist() == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5])
    # Head of 4 channels, theta 100: pairs turn by 1 and 1/10 a position.
    params = MetaParams(4, 1, 1, 1, 1e-5, 100.0, None, None, None, None)
    heads = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 4).expand(3, 1, 4)
    turned = rotate(heads, rotations(params.shape(tied=False).speeds, 3))[2, 0].tolist()
    cos, sin = math.cos, math.sin
    assert turned == pytest.approx([cos(2), sin(2), -sin(0.2), cos(0.2)], abs=1e-6)
