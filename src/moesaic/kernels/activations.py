"""The non-linearities of experts, each with the derivative that a hand-written backward needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.core.errors import ConfigError

# Overloads are named: to find one by its arguments takes Python longer than the operation takes.
_aten = torch.ops.aten


class Forward(Protocol):
    """Pre-activations to activations."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Written to ``out`` where it is given, which may not be differentiated through."""


class Backward(Protocol):
    """Gradient of the activations, and pre-activations, to the gradient of the pre-activations."""

    def __call__(self, grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Written to ``out`` where it is given; that may be ``grad``."""


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function and its derivative.

    Attributes:
        name: what settings and checkpoints call it.
        forward: the function.
        backward: its derivative, times the gradient of what follows.
    """

    name: str
    forward: Forward
    backward: Backward

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return activation, (self.name,)

    def __deepcopy__(self, _memo: object) -> Activation:
        return self


def _silu(x: Tensor, out: Tensor | None = None) -> Tensor:
    result: Tensor = F.silu(x) if out is None else _aten.silu.out(x, out=out)
    return result


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    result: Tensor = (
        _aten.silu_backward(grad, x) if out is None else _aten.silu_backward.grad_input(grad, x, grad_input=out)
    )
    return result


def _gelu(approximate: str) -> tuple[Forward, Backward]:
    def forward(x: Tensor, out: Tensor | None = None) -> Tensor:
        result: Tensor = F.gelu(x, approximate=approximate) if out is None else _aten.gelu.out(x, **how, out=out)
        return result

    def backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            result: Tensor = _aten.gelu_backward(grad, x, **how)
        else:
            result = _aten.gelu_backward.grad_input(grad, x, **how, grad_input=out)
        return result

    how = {"approximate": approximate}
    return forward, backward


def _relu(x: Tensor, out: Tensor | None = None) -> Tensor:
    return F.relu(x) if out is None else torch.clamp_min(x, 0, out=out)


def _relu_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        result: Tensor = _aten.threshold_backward(grad, x, 0)
    else:
        result = _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
    return result


def _relu_squared(x: Tensor, out: Tensor | None = None) -> Tensor:
    return _relu(x).square() if out is None else _relu(x, out).square_()


def _relu_squared_backward(grad: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(grad, 2 * _relu(x), out=out)


silu = Activation("silu", _silu, _silu_backward)
gelu = Activation("gelu", *_gelu("none"))
gelu_tanh = Activation("gelu_tanh", *_gelu("tanh"))
relu = Activation("relu", _relu, _relu_backward)
relu_squared = Activation("relu_squared", _relu_squared, _relu_squared_backward)

_ACTIVATIONS = {value.name: value for value in (silu, gelu, gelu_tanh, relu, relu_squared)}


def activation(name: str) -> Activation:
    """Return the activation that a setting names.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in _ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}. Pick one of these.")
    return _ACTIVATIONS[name]
