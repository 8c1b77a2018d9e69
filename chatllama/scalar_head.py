"""The head of a reward or value model."""

import torch
from torch import nn


class ScalarHead(nn.Linear):
    """One float32 number per position, whatever the type of the backbone.

    Weights start from N(0, 1 / sqrt(H + 1)) (Stiennon 2020; Huang 2024, arXiv 2403.17031). A
    reward head has no bias, so that it loads as the `score` of a classification model.
    """

    def __init__(self, hidden_size: int, bias: bool) -> None:
        super().__init__(hidden_size, 1, bias=bias, dtype=torch.float32)
        nn.init.normal_(self.weight, std=(hidden_size + 1) ** -0.5)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Scores of hidden states: (..., H) any float -> (...) float32."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float()).squeeze(-1)
