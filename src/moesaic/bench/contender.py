"""Who is measured: a way to compute the same layer, with a door to its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contender:
    """One implementation over one :class:`~moesaic.bench.draw.Draw`.

    Attributes:
        name: what tables call it.
        forward: tokens to outputs, with the draw's routing and weights.
        leaves: tensors that a backward leaves a gradient on, the tokens among them.
        gradients: the gradients of the last backward by the draw's names and in its layout, to compare with the truth;
            None for what computes another function: the limit.
        is_default: whether it is what a user gets who asks for nothing, which goals are about.
    """

    name: str
    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    gradients: Callable[[], Mapping[str, Tensor | None]] | None
    is_default: bool = False

    def clear(self) -> None:
        """Drop all gradients, as ``optimizer.zero_grad()`` does."""
        for leaf in self.leaves:
            leaf.grad = None

    def step(self, grad_y_TD: Tensor) -> None:
        """Forward and backward."""
        torch.autograd.backward(self.forward(), grad_y_TD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Absent:
    """An implementation that is not measured.

    Attributes:
        name: what tables call it.
        why: in one line.
    """

    name: str
    why: str


Entrant = Contender | Absent
