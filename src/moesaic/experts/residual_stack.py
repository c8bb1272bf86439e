"""An expert made of residual sublayers, as in BASE layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.core.init import Init, zeros
from moesaic.kernels.activations import Activation, relu


class ResidualStack(nn.Module):
    """Sublayers ``h <- h + W2 act(W1 LN(h) + b1) + b2`` one after the other; returns what they added to the input.

    The input itself is left out, since the block around the layer adds it: ``block(x) = x + weight * stack(x)``.

    Args:
        width: D.
        hidden: F, of each sublayer.
        sublayers: how many.
        activation: of the sublayers.
        init: draws W1 and the biases; None as published, uniform as ``nn.Linear`` draws them.
        out_init: draws W2; 0 unless given, so that a fresh expert adds only its bias.
    Shape:
        ``(M, D)`` -> ``(M, D)``.
    Raises:
        ConfigError: if there is no sublayer.

    Source: Lewis et al. 2021, "BASE Layers", and their code (fairseq ``BaseSublayer``).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        sublayers: int = 1,
        activation: Activation = relu,
        init: Init | None = None,
        out_init: Init = zeros,
    ) -> None:
        super().__init__()
        if sublayers < 1:
            raise ConfigError(f"sublayers must be at least 1, got {sublayers}. BASE's largest models use 10.")
        self.sublayers = nn.ModuleList(_Sublayer(width, hidden, activation, init, out_init) for _ in range(sublayers))

    def forward(self, x_MD: Tensor) -> Tensor:
        """The sum of the sublayers' updates."""
        added_MD = torch.zeros_like(x_MD)
        for sublayer in self.sublayers:
            update_MD = sublayer(x_MD)
            x_MD, added_MD = x_MD + update_MD, added_MD + update_MD
        return added_MD


class _Sublayer(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Activation, init: Init | None, out_init: Init) -> None:
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        out_init(self.down.weight, hidden)
        if init is not None:
            for part, fan_in in ((self.up.weight, width), (self.up.bias, width), (self.down.bias, hidden)):
                init(part, fan_in)

    def forward(self, x_MD: Tensor) -> Tensor:
        update_MD: Tensor = self.down(self.activation.forward(self.up(self.norm(x_MD))))
        return update_MD
