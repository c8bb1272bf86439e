"""What a kernel does between its products, row by row: activations, their derivatives, and the sum for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.by_token import TokenRows, sum_by_token


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenGradients:
    """What the gradient of the hidden rows turns into.

    Attributes:
        weight_N: gradient of the rows' weights, in float32.
        weighed_NF: the hidden rows times their weights, which the gradient of the down projection is made of.
        gate_NF: gradient of the gate's pre-activations; None where there is no gate.
        up_NF: gradient of the up projection's.
    """

    weight_N: Tensor
    weighed_NF: Tensor
    gate_NF: Tensor | None
    up_NF: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RowWork:
    """One version of the work between the products.

    Attributes:
        hidden: (gate's pre-activations or None, up's, activation) to the hidden rows.
        gradients: (gradient of the unweighed hidden rows, weights, gate's pre-activations or None, up's, activation).
        total: (rows, whose they are, weights or None) to each token's sum, weighed and added up in float32.
    """

    hidden: Callable[[Tensor | None, Tensor, Activation], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor | None, Tensor, Activation], HiddenGradients]
    total: Callable[[Tensor, TokenRows, Tensor | None], Tensor]


def _hidden(gate_NF: Tensor | None, up_NF: Tensor, activation: Activation) -> Tensor:
    return activation.forward(up_NF) if gate_NF is None else activation.forward(gate_NF) * up_NF


def _gradients(
    grad_NF: Tensor, weight_N: Tensor, gate_NF: Tensor | None, up_NF: Tensor, activation: Activation
) -> HiddenGradients:
    dtype = grad_NF.dtype
    grad_NF, up_NF, weight_N1 = grad_NF.float(), up_NF.float(), weight_N.float()[:, None]
    before_NF = up_NF if gate_NF is None else gate_NF.float()
    activated_NF = activation.forward(before_NF)
    hidden_NF = activated_NF if gate_NF is None else activated_NF * up_NF
    # <dy, hidden @ down> = <dy @ down^T, hidden>: the experts' outputs are not needed.
    grad_weight_N = (grad_NF * hidden_NF).sum(dim=-1)
    grad_NF = grad_NF * weight_N1
    grad_gate_NF: Tensor | None = None
    if gate_NF is None:
        grad_up_NF = activation.backward(grad_NF, before_NF)
    else:
        grad_up_NF = grad_NF * activated_NF
        grad_gate_NF = activation.backward(grad_NF * up_NF, before_NF).to(dtype)
    return HiddenGradients(
        weight_N=grad_weight_N,
        weighed_NF=(hidden_NF * weight_N1).to(dtype),
        gate_NF=grad_gate_NF,
        up_NF=grad_up_NF.to(dtype),
    )


IN_PYTORCH = RowWork(hidden=_hidden, gradients=_gradients, total=sum_by_token)
