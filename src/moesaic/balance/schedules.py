"""Controllers that make a router sparse: one finds the pressure that a number of experts takes, one cools a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from moesaic.balance.controllers import Controller
from moesaic.core.errors import ConfigError, ShapeError


class Targeted(Protocol):
    """A router trained for an average number of experts per token."""

    @property
    def num_experts(self) -> int:
        """Experts to choose from."""

    @property
    def experts_per_token(self) -> float:
        """The target."""


class Pressed(Protocol):
    """A layer whose coefficient says how hard a loss shrinks its router's weights."""

    router: Targeted
    coefficient: Tensor | None


class SparsityController:
    """Find the one coefficient, for all layers, at which tokens have as many active experts as wished.

    After each optimizer step ``coefficient <- coefficient * factor^sign(target - sparsity)``. The sparsity is the share
    of (token, expert) pairs without a row, over all layers; its target is the share that the routers'
    ``experts_per_token`` leave over. All layers' float32 buffers ``coefficient`` are set to the first one's new value
    and are saved with the model.

    It needs tokens with a part in common, which a network learns: where they lie evenly about the origin, half of all
    logits are positive whatever the weights, and the coefficient rises for as long as that lasts.

    Args:
        layers: built with ``coefficient=``, the same for all.
        factor: of one step, above 1.
    Raises:
        ConfigError: if there is no layer, one has no coefficient, or the factor is not above 1.

    Source: Wang et al. 2024, ReMoE, "adaptive L1 regularization", and the authors' code.
    """

    def __init__(self, layers: Sequence[Pressed], *, factor: float = 1.2) -> None:
        if not layers:
            raise ConfigError("SparsityController needs at least one layer, got none. Pass a model's MoE layers.")
        for layer in layers:
            if getattr(layer, "coefficient", None) is None:
                raise ConfigError(
                    f"SparsityController needs layers with a coefficient, got {type(layer).__name__} without one. "
                    "Build the layer with coefficient=1e-8."
                )
        if factor <= 1:
            raise ConfigError(f"factor must be above 1, got {factor}. ReMoE uses 1.2.")
        self.layers = tuple(layers)
        self.factor = factor

    @torch.no_grad()
    def step(self, load_E: Tensor, *, kept_E: Tensor | None = None, num_tokens: int | None = None) -> None:
        """Move the coefficient of all layers once.

        Args:
            load_E: rows per expert, those of all layers one after the other, summed over the optimizer step.
            kept_E: not read.
            num_tokens: tokens that the step saw, padding left out, summed over layers; each layer saw the same.
        Raises:
            ShapeError: if there is not one load for each expert of each layer.
            ConfigError: if nobody says how many tokens there were.
        """
        experts = [layer.router.num_experts for layer in self.layers]
        if load_E.shape != (sum(experts),):
            raise ShapeError(
                f"load_E must have one entry for each of {sum(experts)} experts of {len(experts)} layers, got shape "
                f"{tuple(load_E.shape)}. Lay the loads of all layers end to end."
            )
        if num_tokens is None:
            raise ConfigError(
                "SparsityController needs num_tokens to know what share of experts is active, got None. "
                "Pass the tokens of the step, summed over layers."
            )
        if num_tokens == 0:
            return
        wanted = sum(layer.router.experts_per_token for layer in self.layers) / len(self.layers)
        active = int(load_E.sum()) / num_tokens
        first = cast(Tensor, self.layers[0].coefficient)
        # Sparser than wished is fewer active experts than wished.
        power = (active > wanted) - (active < wanted)
        # A coefficient of 0 would never rise again, and one of infinity makes a NaN of a loss of 0.
        limits = torch.finfo(first.dtype)
        moved = (first.double() * self.factor**power).clamp(limits.tiny, limits.max)
        for layer in self.layers:
            cast(Tensor, layer.coefficient).copy_(moved)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsityRule:
    """One coefficient for all layers that follows sparsity: :class:`~moesaic.balance.SparsityController`."""

    factor: float = 1.2

    def build(self, layers: Sequence[nn.Module]) -> list[Controller]:
        """One controller for all layers together; none where there is no layer."""
        return [SparsityController(cast(Sequence[Pressed], layers), factor=self.factor)] if layers else []


class Cooled(Protocol):
    """A router whose temperature falls as training goes on."""

    def cool(self) -> None:
        """Move the temperature on by one optimizer step."""


class AnnealingController:
    """Cool a router once per optimizer step, by the schedule that the router was built with.

    Args:
        router: holds temperature and schedule, and saves how far it has come.
    Raises:
        ConfigError: if the router has no temperature to cool.

    Source: Nie et al. 2021, EvoMoE, dense-to-sparse gate.
    """

    def __init__(self, router: Cooled) -> None:
        if getattr(router, "cool", None) is None:
            raise ConfigError(
                f"AnnealingController needs a router that can cool, got {type(router).__name__}. Use AnnealedRouter."
            )
        self.router = router

    def step(self, load_E: Tensor, *, kept_E: Tensor | None = None, num_tokens: int | None = None) -> None:
        """Cool once.

        Args:
            load_E: not read.
            kept_E: not read.
            num_tokens: not read.
        """
        self.router.cool()


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnealingRule:
    """A temperature that falls with every optimizer step: :class:`~moesaic.balance.AnnealingController`."""

    def build(self, layers: Sequence[nn.Module]) -> list[Controller]:
        """A controller for each layer's router."""
        return [AnnealingController(cast(Cooled, layer.router)) for layer in layers]
