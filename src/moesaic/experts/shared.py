"""The expert that every token visits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.init import Init, normal
from moesaic.kernels.activations import Activation, silu


class SharedExpert(nn.Module):
    """A feed-forward network that is always on, beside the routed experts (DeepSeekMoE, section 3.2).

    Several shared experts of width F are the same function as one of their summed width: pass that.

    Args:
        width: D.
        hidden: F, summed over the shared experts.
        activation: applied to the gate; to the up projection where there is no gate.
        gated: ``(act(x gate) * (x up)) down``; False for the plain ``act(x up) down``, which has no ``gate_DF``.
        token_gate: multiply the output by ``sigmoid(x w)``, one number per token (Qwen1.5-MoE).
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> ``(T, D)``.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = silu,
        gated: bool = True,
        token_gate: bool = False,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_DF = nn.Parameter(torch.empty(width, hidden)) if gated else None
        self.up_DF = nn.Parameter(torch.empty(width, hidden))
        self.down_FD = nn.Parameter(torch.empty(hidden, width))
        self.token_gate_D = nn.Parameter(torch.empty(width)) if token_gate else None
        draw = init or normal(0.02)
        if self.gate_DF is not None:
            draw(self.gate_DF, width)
        draw(self.up_DF, width)
        draw(self.down_FD, hidden)
        if self.token_gate_D is not None:
            draw(self.token_gate_D.unsqueeze(0), width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Run every token through the network."""
        up_TF = x_TD @ self.up_DF
        if self.gate_DF is None:
            hidden_TF = self.activation.forward(up_TF)
        else:
            hidden_TF = self.activation.forward(x_TD @ self.gate_DF) * up_TF
        y_TD = hidden_TF @ self.down_FD
        if self.token_gate_D is not None:
            y_TD = y_TD * F.linear(x_TD, self.token_gate_D.unsqueeze(0)).sigmoid()
        return y_TD.to(x_TD.dtype)
