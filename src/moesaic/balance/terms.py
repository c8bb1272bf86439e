"""What a recipe says about balance: losses with their coefficients, and rules that build a controller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from moesaic.balance.controllers import BiasController, Controller
from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing, missing_extra


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerm:
    """A balance loss and how strongly it pulls.

    Attributes:
        name: what logs and settings call it.
        loss: a pure function of one layer's Routing.
        coefficient: what the loss is multiplied by before it joins the training loss.
        adaptive: multiply by the layer's own coefficient too, ``routing.extras["coefficient"]``, which a controller
            moves.
        rewarded: the loss reads ``routing.extras["reward_T"]``, minus the model's own loss at each token, so it waits
            for the model's output. Tokens without one are not among the valid ones of the routing that it gets.
    """

    name: str
    loss: Callable[[Routing], Tensor]
    coefficient: float
    adaptive: bool = False
    rewarded: bool = False

    def scale(self, routing: Routing) -> float | Tensor:
        """What this layer's loss is multiplied by.

        Raises:
            ConfigError: if the term is adaptive and the layer was built without a coefficient.
        """
        if not self.adaptive:
            return self.coefficient
        if "coefficient" not in routing.extras:
            raise missing_extra("coefficient", f"adaptive loss {self.name}", "a layer built with coefficient=")
        return self.coefficient * routing.extras["coefficient"]

    def __call__(self, routing: Routing) -> Tensor:
        """The loss times its coefficient."""
        return self.scale(routing) * self.loss(routing)


class Rule(Protocol):
    """Builds the controllers of a model: balance that works without a gradient."""

    def build(self, layers: Sequence[nn.Module]) -> list[Controller]:
        """One controller for each layer, in their order; or one for all of them together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasRule:
    """Loss-free balancing, with the numbers for :class:`~moesaic.balance.BiasController`."""

    rate: float = 1e-3
    rule: Literal["sign", "proportional"] = "sign"

    def prepare(self, layer: nn.Module) -> None:
        """Give the layer's router the bias that the controller moves, unless it has one; before weights are loaded.

        Raises:
            ConfigError: if the router does not choose by scores that a bias could be added to.
        """
        router = getattr(layer, "router", layer)
        if getattr(router, "bias_E", None) is not None:
            return
        add_selection_bias = getattr(router, "add_selection_bias", None)
        if add_selection_bias is None:
            raise ConfigError(
                "Loss-free balancing adds a bias to the scores by which each token chooses its K best experts, as "
                f"TopKRouter does, got {type(router).__name__}, which has no place for one. Use a balance loss, or a "
                "recipe with that router."
            )
        add_selection_bias()

    def build(self, layers: Sequence[nn.Module]) -> list[Controller]:
        """A controller for each layer's router."""
        return [BiasController(layer.router, rate=self.rate, rule=self.rule) for layer in layers]  # type: ignore[arg-type]


BalanceTerm = LossTerm | Rule
