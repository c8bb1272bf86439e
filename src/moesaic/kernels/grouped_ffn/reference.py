"""The grouped feed-forward in the plainest PyTorch: the truth that fast versions are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation


def grouped_ffn_reference(
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
) -> Tensor:
    """Run each expert over its rows and add the weighted outputs up, by autograd alone.

    Args:
        x_TD: tokens.
        plan: rows sorted by expert.
        gate_EDF: gate projections; None for plain experts.
        up_EDF: up projections.
        down_EFD: down projections.
        activation: applied to the gate, or to the up projection where there is no gate.
    Shape:
        ``(T, D)`` -> ``(T, D)``; a token without rows gets zeros.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=wide)
    start = 0
    for e, end in enumerate(plan.offset_E.tolist()):
        token_M = plan.token_N[start:end]
        x_MD = x_TD[token_M]
        up_MF = x_MD @ up_EDF[e]
        if gate_EDF is None:
            hidden_MF = activation.forward(up_MF)
        else:
            hidden_MF = activation.forward(x_MD @ gate_EDF[e]) * up_MF
        y_MD = (hidden_MF @ down_EFD[e]).to(wide) * plan.weight_N[start:end, None].to(wide)
        y_TD = y_TD.index_add(0, token_M, y_MD)
        start = end
    return y_TD.to(x_TD.dtype)
