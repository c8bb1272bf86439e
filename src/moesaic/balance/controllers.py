"""Controllers: what steers load without a gradient. Stepped once per optimizer step on the global batch's load."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from moesaic.core.errors import ConfigError, ShapeError


class Controller(Protocol):
    """Steers load without a gradient: stepped once per optimizer step, never in evaluation."""

    def step(self, load_E: Tensor, *, kept_E: Tensor | None = None, num_tokens: int | None = None) -> None:
        """Move the state once.

        Args:
            load_E: rows that the router gave each expert, summed over everything that the optimizer step saw:
                micro-batches and ranks. A controller of several layers gets their loads one after the other.
            kept_E: those of them that dispatch kept; None says all.
            num_tokens: tokens that the step saw, padding left out, summed over the controller's layers.
        """


class Biased(Protocol):
    """A router that adds a bias to its scores when it selects, and never to its weights."""

    bias_E: Tensor | None


class BiasController:
    """Loss-free balancing: raise the selection bias of underloaded experts, lower that of overloaded ones.

    After each optimizer step ``bias += rate * sign(mean(load) - load)``, shifted so that the step adds up to 0: a bias
    common to all experts selects nothing and would only drift. (So one expert's step may reach twice the rate, where
    nearly all others need the opposite.) The bias is a float32 buffer of the router, so it is
    saved and restored with the model. Evaluation must not step it.

    Args:
        router: holds ``bias_E``.
        rate: size of a step, in units of the score (0.001 in DeepSeek-V3 for its first 14.3T tokens).
        rule: "sign" as published; "proportional" multiplies by ``(mean - load) / mean`` in place of its sign.
    Raises:
        ConfigError: if the router has no selection bias, or ``rate`` is negative.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", algorithm 1; DeepSeek-V3 section 2.1.2.
    """

    def __init__(self, router: Biased, *, rate: float = 1e-3, rule: Literal["sign", "proportional"] = "sign") -> None:
        if getattr(router, "bias_E", None) is None:
            raise ConfigError(
                f"BiasController needs a router with a selection bias, got {type(router).__name__} without one. "
                "Build a TopKRouter with selection_bias=True, or call its add_selection_bias()."
            )
        if rate < 0:
            raise ConfigError(f"rate must be at least 0, got {rate}. DeepSeek-V3 uses 0.001.")
        if rule not in ("sign", "proportional"):
            raise ConfigError(f"rule must be 'sign' or 'proportional', got {rule!r}. DeepSeek-V3 uses 'sign'.")
        self.router = router
        self.rate = rate
        self.rule = rule

    @torch.no_grad()
    def step(self, load_E: Tensor, *, kept_E: Tensor | None = None, num_tokens: int | None = None) -> None:
        """Move the bias once.

        Args:
            load_E: rows per expert, summed over everything that the optimizer step saw: micro-batches and ranks.
            kept_E: not read.
            num_tokens: not read.
        Raises:
            ShapeError: if there is not one load for each expert.
        """
        bias_E = self.router.bias_E
        assert bias_E is not None  # checked when built; a router does not lose its bias
        if load_E.shape != bias_E.shape:
            raise ShapeError(
                f"load_E must have one entry for each of {bias_E.shape[0]} experts, got shape {tuple(load_E.shape)}. "
                "Pass Routing.load_E, summed over the step."
            )
        # Counts are exact in float64; a sum of float32 is not, above 2^24 rows.
        load_E = load_E.to(bias_E.device, torch.float64)
        if load_E.sum() == 0:
            return
        gap_E = load_E.mean() - load_E
        gap_E = gap_E.sign() if self.rule == "sign" else gap_E / load_E.mean()
        bias_E += (self.rate * (gap_E - gap_E.mean())).to(bias_E.dtype)
