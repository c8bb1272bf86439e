"""Does a balance term do anything with a layer? Tried on a few random tokens, before a model is built with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.balance.terms import BalanceTerm, LossTerm
from moesaic.core.context import Context
from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing

_TOKENS = 6


def check(terms: Sequence[BalanceTerm], layer: nn.Module, width: int) -> None:
    """See that each loss gives every router a gradient, and that each rule finds what it steers.

    Routes a few random tokens in training mode, so that a loss that needs what the router does not tell, or that
    reaches no weight, is refused here and not silently useless. The global random generator is left as it was.

    Args:
        terms: losses and rules.
        layer: on the CPU; its gradients are left alone, its random draws are undone.
        width: D.
    Raises:
        ConfigError: naming the term and the reason.
    """
    for term in terms:
        if isinstance(term, LossTerm):
            _check_loss(term, layer, width)
        elif getattr(layer, "router", None) is None:
            raise ConfigError(
                f"{type(term).__name__} steers a router, got a {type(layer).__name__} without one. Leave it out."
            )
        else:
            term.build([layer])


def _check_loss(term: LossTerm, layer: nn.Module, width: int) -> None:
    weights = [weight for weight in getattr(layer, "router", layer).parameters() if weight.requires_grad]
    if not weights:
        raise ConfigError(
            f"Balance loss {term.name} moves a router's weights, got a {type(layer).__name__} whose router has none: "
            "its loads are fixed. Leave the loss out."
        )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        routing = _probe(layer, width)
        loss = term.scale(routing) * term.loss(routing)
    found: tuple[Tensor | None, ...] = (None,)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, weights, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise ConfigError(
            f"Balance loss {term.name} reaches no weight of the router that it is to balance, "
            f"{type(getattr(layer, 'router', layer)).__name__}, whose routing cuts it off. Use another loss."
        )
    if not all(gradient.isfinite().all() for gradient in found if gradient is not None):
        raise ConfigError(
            f"Balance loss {term.name} gives {type(getattr(layer, 'router', layer)).__name__} a gradient that is not "
            "finite. Use another loss."
        )


def _probe(layer: Any, width: int) -> Routing:
    """A routing of random tokens in training, with all that a forward of a model would add to it."""
    sequence_T = torch.arange(_TOKENS) // 3
    context = Context(
        sequence_T=sequence_T,
        id_T=torch.arange(_TOKENS) % 2,
        domain_T=torch.zeros_like(sequence_T),
        below_TE=torch.randn(_TOKENS, layer.num_experts),
    )
    was_training = layer.training
    try:
        routing: Routing = layer.train()(torch.randn(_TOKENS, width), None, context)[1]
    finally:
        layer.train(was_training)
    routing = replace(routing, sequence_T=sequence_T)
    known = {"global_load_E": routing.load_E, "reward_T": torch.linspace(-2, -1, _TOKENS)}
    return replace(routing, extras={**known, **routing.extras})
