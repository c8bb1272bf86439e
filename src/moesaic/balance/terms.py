"""What a recipe says about balance: losses with their coefficients, and rules that build a controller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moesaic.balance.controllers import BiasController, Biased
from moesaic.core.routing import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerm:
    """A balance loss and how strongly it pulls.

    Attributes:
        name: what logs and settings call it.
        loss: a pure function of one layer's Routing.
        coefficient: what the loss is multiplied by before it joins the training loss.
    """

    name: str
    loss: Callable[[Routing], Tensor]
    coefficient: float

    def __call__(self, routing: Routing) -> Tensor:
        """The loss times its coefficient."""
        return self.coefficient * self.loss(routing)


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasRule:
    """Loss-free balancing, with the numbers for :class:`~moesaic.balance.BiasController`."""

    rate: float = 1e-3
    rule: Literal["sign", "proportional"] = "sign"

    def build(self, router: Biased) -> BiasController:
        """The controller of one layer's router."""
        return BiasController(router, rate=self.rate, rule=self.rule)


BalanceTerm = LossTerm | BiasRule
