"""The non-linearities of experts, each with the derivative that a hand-written backward needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.core.errors import ConfigError

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function and its derivative.

    Attributes:
        name: what settings and checkpoints call it.
        forward: pre-activations to activations.
        backward: (gradient of the activations, pre-activations) to the gradient of the pre-activations.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]

    def __reduce__(self) -> tuple[Callable[[str], Activation], tuple[str]]:
        return activation, (self.name,)

    def __deepcopy__(self, _memo: object) -> Activation:
        return self


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


silu = Activation("silu", F.silu, _aten.silu_backward)
gelu = Activation("gelu", F.gelu, _aten.gelu_backward)
gelu_tanh = Activation("gelu_tanh", _gelu_tanh, lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"))
relu = Activation("relu", F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0))
relu_squared = Activation("relu_squared", _relu_squared, lambda grad, x: 2 * grad * F.relu(x))

_ACTIVATIONS = {value.name: value for value in (silu, gelu, gelu_tanh, relu, relu_squared)}


def activation(name: str) -> Activation:
    """Return the activation that a setting names.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in _ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}. Pick one of these.")
    return _ACTIVATIONS[name]
