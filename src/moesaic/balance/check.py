"""Does a balance term do anything with a layer? Tried on a few random tokens, before a model is built with it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.balance.adaptive import AdaptiveRule
from moesaic.balance.schedules import SparsityRule
from moesaic.balance.terms import BalanceTerm, BiasRule, LossTerm, Rule
from moesaic.core.context import Context
from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing

# Of float64 rounding, losses that are constant have gradients below 1e-14, all others had above 1e-5.
_NOTHING = 1e-10


def check(terms: Sequence[BalanceTerm], layer: nn.Module, width: int) -> None:
    """See that each loss gives every router a gradient, and that each rule finds what it steers.

    Routes a few random tokens in training mode, so that a loss that needs what the router does not tell, that reaches
    no weight, or that is constant whatever the router does (the Switch loss of experts that all take every token), is
    refused here and not silently useless. The global random generator is left as it was.

    Args:
        terms: losses and rules.
        layer: on the CPU; it is left alone, as a copy with other weights is tried.
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
            trial = copy.deepcopy(layer)
            if isinstance(term, BiasRule):
                term.prepare(trial)
            term.build([trial])
            _check_moved_is_read(term, terms)


def _check_moved_is_read(term: Rule, terms: Sequence[BalanceTerm]) -> None:
    moves_coefficient = isinstance(term, AdaptiveRule | SparsityRule)
    if moves_coefficient and not any(isinstance(one, LossTerm) and one.adaptive for one in terms):
        raise ConfigError(
            f"{type(term).__name__} moves the coefficient of an adaptive loss, and this balance has none. Add "
            "adaptive-even-gate or adaptive-l1, or leave the rule out."
        )


def _check_loss(term: LossTerm, layer: nn.Module, width: int) -> None:
    name = type(getattr(layer, "router", layer)).__name__
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        layer = _moved(layer)
        weights = [weight for weight in getattr(layer, "router", layer).parameters() if weight.requires_grad]
        if not weights:
            raise ConfigError(
                f"Balance loss {term.name} moves a router's weights, got a {type(layer).__name__} whose router has "
                "none: its loads are fixed. Leave the loss out."
            )
        # Tokens that are clear cases too: where all experts are active, some losses push nothing yet.
        found = [_gradients(term, _probe(layer, width, spread), weights) for spread in (1.0, 10.0)]
    if not any(found):
        raise ConfigError(
            f"Balance loss {term.name} reaches no weight of the router that it is to balance, {name}, whose routing "
            "cuts it off. Use another loss."
        )
    steepest = max(float(gradient.abs().max()) for gradients in found for gradient in gradients)
    if not all(gradient.isfinite().all() for gradients in found for gradient in gradients):
        raise ConfigError(f"Balance loss {term.name} gives {name} a gradient that is not finite. Use another loss.")
    if steepest < _NOTHING:
        raise ConfigError(
            f"Balance loss {term.name} pushes {name} nowhere: with its routing the loss has one value, whatever the "
            "weights. Use another loss."
        )


def _moved(layer: nn.Module) -> nn.Module:
    """A copy in float64 with weights away from where they start: zeros there, as in routers of Grok-1, may hide all."""
    layer = copy.deepcopy(layer).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.5)
    return layer


def _gradients(term: LossTerm, routing: Routing, weights: Sequence[Tensor]) -> list[Tensor]:
    """Of the loss without its coefficient, which may be 0 or tiny, to the weights that it reaches."""
    term.scale(routing)  # refuses a missing coefficient
    loss = term.loss(routing)
    if not loss.requires_grad:
        return []
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def _probe(layer: Any, width: int, spread: float) -> Routing:
    """A routing of random tokens in training, with all that a forward of a model would add to it."""
    # Two segments, as a first one teaches nothing; a multiple of the experts, so that balanced assignment is even,
    # unless they are so many that an attention over experts would fill the memory.
    length, even = 2 * (getattr(layer, "segment", None) or 2), layer.num_experts if layer.num_experts <= 64 else 1
    length = even * -(-length // even)
    num_tokens = 2 * length
    sequence_T = torch.arange(num_tokens) // length
    context = Context(
        sequence_T=sequence_T,
        id_T=torch.arange(num_tokens) % 2,
        domain_T=torch.zeros_like(sequence_T),
        below_TE=torch.randn(num_tokens, layer.num_experts, dtype=torch.float64),
    )
    x_TD = spread * torch.randn(num_tokens, width, dtype=torch.float64)
    routing: Routing = layer.train()(x_TD, None, context)[1]
    known = {"global_load_E": routing.load_E, "reward_T": torch.linspace(-2, -1, num_tokens, dtype=torch.float64)}
    return replace(routing, extras={**known, **routing.extras})
