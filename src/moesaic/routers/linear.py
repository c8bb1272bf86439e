"""What most routers share: one linear map from a token to a logit for each expert, in float32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.autocast import without_autocast
from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.exact import ExactBuffers
from moesaic.core.init import Init, normal


class LinearRouter(ExactBuffers):
    """Holds the map; a router that derives from it says what to do with the logits.

    Args:
        width: D, the width of a token.
        num_experts: E.
        jitter: in training the router's copy of each input is multiplied by uniform noise from
            ``1 - jitter`` to ``1 + jitter`` (Switch, section 2.4). Evaluation has none.
        logit_bias: add a learned number to each expert's logit (gpt-oss, Skywork-MoE). Starts at 0.
        init: draws the initial weights; None for a normal of standard deviation 0.02.
    Raises:
        ConfigError: if ``num_experts`` is below 1, or ``jitter`` not in ``[0, 1)``.
    """

    weight: nn.Parameter
    logit_bias_E: nn.Parameter | None

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        jitter: float = 0.0,
        logit_bias: bool = False,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError(f"num_experts must be at least 1, got {num_experts}. Give the router an expert.")
        if not 0 <= jitter < 1:
            raise ConfigError(f"jitter must be at least 0 and less than 1, got {jitter}. Switch uses 0.01.")
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.logit_bias_E = nn.Parameter(torch.zeros(num_experts)) if logit_bias else None
        (init or normal(0.02))(self.weight, width)

    @property
    def num_experts(self) -> int:
        """Experts to choose from."""
        return self.weight.shape[0]

    def logits(self, x_TD: Tensor) -> Tensor:
        """``x W^T`` (T, E), whatever autocast says: rounding logits to bfloat16 re-routes 2.2 % of tokens at E=64, K=8.

        Raises:
            ShapeError: if the tokens are not of the router's width.
        """
        weight_ED: Tensor = self.weight
        bias_E: Tensor | None = self.logit_bias_E
        x_TD = widened(x_TD, weight_ED.shape[1])
        with without_autocast(x_TD.device):
            if self.jitter > 0 and self.training:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            if weight_ED.dtype != x_TD.dtype:
                weight_ED = weight_ED.to(x_TD.dtype)
            if bias_E is not None:
                bias_E = bias_E.to(x_TD.dtype)
            return self.product(x_TD, weight_ED, bias_E)

    def product(self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        """The map itself, all of one precision; a router may know a faster way to its gradients."""
        return F.linear(x_TD, weight_ED, bias_E)


def widened(x_TD: Tensor, width: int) -> Tensor:
    """The tokens in the precision that routers work in: float32, or wider if they are.

    Raises:
        ShapeError: if they are not ``(T, width)``.
    """
    if x_TD.ndim != 2 or x_TD.shape[1] != width:
        raise ShapeError(
            f"x_TD must be (tokens, {width}), got {tuple(x_TD.shape)}. Flatten batch and position into one dimension."
        )
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return x_TD if x_TD.dtype == wide else x_TD.to(wide)
