"""Joining what routed and shared experts return by learned numbers, one pair per token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.init import Init, normal


class LearnedMix(nn.Module):
    """``a routed + b shared`` with ``a, b = softmax(W x + c)``.

    Args:
        width: D.
        init: draws W; c starts at 0, so that fresh weights mix about half and half.
    Shape:
        three times ``(T, D)``: tokens, routed and shared outputs -> ``(T, D)``.

    Source: DeepSpeed, ``deepspeed/moe/layer.py``, ``use_residual``.
    """

    def __init__(self, width: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.mix_weight = nn.Parameter(torch.empty(2, width))
        self.mix_bias = nn.Parameter(torch.zeros(2))
        (init or normal(0.02))(self.mix_weight, width)

    def forward(self, x_TD: Tensor, routed_TD: Tensor, shared_TD: Tensor) -> Tensor:
        """Mix each token's two outputs."""
        mix = F.linear(x_TD, self.mix_weight, self.mix_bias).softmax(dim=-1)
        return (mix[:, :1] * routed_TD + mix[:, 1:] * shared_TD).to(routed_TD.dtype)
