"""A balance loss whose coefficient follows the rows that each layer drops (Skywork-MoE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from moesaic.balance.controllers import Controller
from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing


def even_gate_loss(routing: Routing) -> Tensor:
    """Pull each expert's mean probability to the same: ``sum_e (1/E - P_e)^2``.

    ``P_e`` is the mean probability over tokens. 0 at perfect balance, at most ``1 - 1/E``; of which experts were chosen
    it knows nothing.

    Source: Skywork-MoE, section 4.2.
    """
    probability_TE = routing.probability_TE.masked_fill(~routing.valid_T[:, None], 0)
    num_tokens = routing.valid_T.sum()
    mean_E = probability_TE.sum(dim=0) / num_tokens.clamp_min(1)
    # Without a token nothing is out of balance.
    return (1 / routing.num_experts - mean_E).square().sum() * (num_tokens > 0)


class Coefficient(Protocol):
    """A layer that holds the coefficient of a balance loss."""

    coefficient: Tensor | None


class AdaptiveCoefficient:
    """Raise a layer's balance coefficient while it drops rows, let it fall while it drops none.

    After each optimizer step ``alpha <- beta * alpha + (1 - beta) * min(xi * d, alpha_max)``, where d is the share of
    the step's rows that capacity dropped. Alpha is the layer's float32 buffer ``coefficient``, saved and restored with
    the model.

    Args:
        layer: a :class:`~moesaic.MoELayer` built with ``coefficient=``.
        xi: coefficient per dropped share.
        alpha_max: most that the coefficient may become.
        beta: how much of the old coefficient stays.
    Raises:
        ConfigError: if the layer has no coefficient, or a number is out of its range.

    Source: Skywork-MoE, section 4.2.
    """

    def __init__(self, layer: Coefficient, *, xi: float = 0.2, alpha_max: float = 0.01, beta: float = 0.99) -> None:
        if getattr(layer, "coefficient", None) is None:
            raise ConfigError(
                f"AdaptiveCoefficient needs a layer with a coefficient, got {type(layer).__name__} without one. "
                "Build the layer with coefficient=0.01."
            )
        if xi < 0 or alpha_max < 0:
            raise ConfigError(
                f"xi and alpha_max must be at least 0, got {xi} and {alpha_max}. Skywork-MoE uses 0.2 and 0.01."
            )
        if not 0 <= beta < 1:
            raise ConfigError(f"beta must be at least 0 and less than 1, got {beta}. Skywork-MoE uses 0.99.")
        self.layer = layer
        self.xi = xi
        self.alpha_max = alpha_max
        self.beta = beta

    @torch.no_grad()
    def step(self, load_E: Tensor, *, kept_E: Tensor | None = None, num_tokens: int | None = None) -> None:
        """Move the coefficient once.

        Args:
            load_E: rows that the router gave each expert, summed over the step.
            kept_E: those of them that dispatch kept; None says all.
            num_tokens: not read.
        """
        coefficient = self.layer.coefficient
        assert coefficient is not None  # checked when built
        num_rows = int(load_E.sum())
        if num_rows == 0:
            return
        dropped = 0.0 if kept_E is None else 1 - int(kept_E.sum()) / num_rows
        goal = min(self.xi * dropped, self.alpha_max)
        coefficient.copy_(self.beta * coefficient.double() + (1 - self.beta) * goal)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveRule:
    """Coefficients that follow dropped rows, with the numbers for :class:`~moesaic.balance.AdaptiveCoefficient`."""

    xi: float = 0.2
    alpha_max: float = 0.01
    beta: float = 0.99

    def build(self, layers: Sequence[nn.Module]) -> list[Controller]:
        """A controller for each layer."""
        return [
            AdaptiveCoefficient(cast(Coefficient, layer), xi=self.xi, alpha_max=self.alpha_max, beta=self.beta)
            for layer in layers
        ]
