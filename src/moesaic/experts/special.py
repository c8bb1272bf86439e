"""Experts that compute next to nothing: zero, copy and constant (MoE++, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.init import Init, normal


class ZeroExpert(nn.Module):
    """Returns zeros: a token that chose it skips the layer, or half of it at K=2.

    Shape:
        ``(M, D)`` -> ``(M, D)``.
    """

    def forward(self, x_MD: Tensor) -> Tensor:
        """Zeros in the shape of the rows."""
        return torch.zeros_like(x_MD)


class CopyExpert(nn.Module):
    """Returns its input.

    Shape:
        ``(M, D)`` -> ``(M, D)``.
    """

    def forward(self, x_MD: Tensor) -> Tensor:
        """The rows as they are."""
        return x_MD


class ConstantExpert(nn.Module):
    """Replaces a part of its input by one learned vector: ``a x + b v``, where ``a, b = softmax(W x)``.

    Args:
        width: D.
        init: draws ``W``; the vector ``v`` starts standard normal, as in the authors' code.
    Shape:
        ``(M, D)`` -> ``(M, D)``.

    Source: MoE++ eq. 5.
    """

    def __init__(self, width: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.mix_weight = nn.Parameter(torch.empty(2, width))
        self.constant_D = nn.Parameter(torch.randn(width))
        (init or normal(0.02))(self.mix_weight, width)

    def forward(self, x_MD: Tensor) -> Tensor:
        """Mix each row with the vector."""
        mix = F.linear(x_MD, self.mix_weight).softmax(dim=-1)
        return (mix[:, :1] * x_MD + mix[:, 1:] * self.constant_D).to(x_MD.dtype)
