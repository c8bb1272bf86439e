"""One decision for many tokens: logits from the mean of a span, for layers that merge their experts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.autocast import without_autocast
from moesaic.core.init import Init
from moesaic.routers.linear import LinearRouter, widened


class PooledRouter(LinearRouter):
    """A linear map from a pooled vector to a logit for each expert.

    Args:
        width: D.
        num_experts: E.
        normalized: normalise the layer of both the pooled vector and each row of the map, each with a learned gain and
            shift; the gain of the map starts at 0.01 (SMEAR).
        init: draws the map.
    Shape:
        ``(S, D)`` -> ``(S, E)``, float32 or wider.

    Source: with ``normalized``, the authors' code of SMEAR; without, Lory section 3.1.
    """

    def __init__(self, width: int, num_experts: int, *, normalized: bool = False, init: Init | None = None) -> None:
        super().__init__(width, num_experts, init=init)
        self.input_norm = nn.LayerNorm(width) if normalized else None
        self.weight_norm = nn.LayerNorm(width) if normalized else None
        if self.weight_norm is not None:
            nn.init.constant_(self.weight_norm.weight, 0.01)

    def forward(self, mean_SD: Tensor) -> Tensor:
        """Logits of each span."""
        mean_SD = widened(mean_SD, self.weight.shape[1])
        with without_autocast(mean_SD.device):
            weight = self.weight.to(mean_SD.dtype)
            if self.input_norm is not None and self.weight_norm is not None:
                mean_SD, weight = _normal(mean_SD, self.input_norm), _normal(weight, self.weight_norm)
            return F.linear(mean_SD, weight)


def _normal(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Layer normalisation in the precision of its input, whatever that of the gain and shift."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
