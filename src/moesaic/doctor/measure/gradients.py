"""Who pulls the routers? Real backward passes: of the task alone, and of each balance loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import MoesaicError
from moesaic.doctor.finding import Unknown
from moesaic.doctor.measure.layers import Batch, Heard, Home, homes, norm, run, undisturbed
from moesaic.doctor.vitals import Gradients, LayerGradients, TermGradient
from moesaic.hf.layers import blocks, controllers
from moesaic.hf.reports import Report
from moesaic.hf.scope import listening

LossFunction = Callable[[nn.Module, Batch], Tensor]
"""A training loss: called with the model in training mode and one batch."""

OWN = "transformers' own"
"""What the balance loss that a model of transformers adds by itself is called."""


def examine_gradients(model: nn.Module, batch: Batch, *, loss: LossFunction | None = None) -> Gradients | Unknown:
    """Work out the gradients of one batch on every router; no parameter gets one, nothing is stepped.

    Args:
        model: with MoE layers of ours, or adopted ones.
        batch: what it is called with, labels included.
        loss: what is trained on, if it is not the model's own ``output.loss``.
    Returns:
        The gradients; or why there are none, where the model gives no loss for the batch.
    """
    found = homes(model)
    try:
        with torch.enable_grad():
            task, by_task = _task(model, batch, found)
            total, own, by_terms = _training(model, batch, found, loss)
    except _NoLossError as error:
        return Unknown(str(error))
    layers = tuple(
        LayerGradients(
            layer=home.layer,
            is_frozen=bool(home.router_weights) and not any(one.requires_grad for one in home.router_weights),
            task=by_task[home.layer][0],
            beside=by_task[home.layer][1],
            choices=by_task[home.layer][2],
            terms=by_terms[home.layer],
            is_rewarded=any(term.rewarded for term in blocks(model)[home.layer].terms),
        )
        for home in found
    )
    steered = sorted({type(one.controller).__name__ for one in controllers(model)})
    return Gradients(
        layers=layers,
        loss=total,
        task=task,
        controllers=tuple(steered),
        own_balance=own,
        why_none=_why_none(model),
    )


def _task(
    model: nn.Module, batch: Batch, found: Sequence[Home]
) -> tuple[float, dict[str, tuple[float | None, float, float]]]:
    """The loss in evaluation mode, which has no balance in it, and its gradient on routers and the rest of layers."""
    config: Any = model.config
    asks = getattr(config, "output_router_logits", None)
    heard = Heard(model, balance=False)
    with undisturbed(model, training=False), listening(heard):
        try:
            if asks:
                config.output_router_logits = False
            loss = _loss_of(run(model, batch), model, batch)
        finally:
            if asks:
                config.output_router_logits = asks
        gradients = {}
        for home in found:
            router, others = _trainable(home.router_weights), _trainable(home.other_weights)
            given = torch.autograd.grad(loss, [*router, *others], retain_graph=True, allow_unused=True)
            on_router = norm(given[: len(router)]) if home.router_weights else None
            gradients[home.layer] = (on_router, norm(given[len(router) :]), _choices(heard.reports[home.layer]))
    return float(loss.detach()), gradients


def _training(
    model: nn.Module, batch: Batch, found: Sequence[Home], loss: LossFunction | None
) -> tuple[float, bool, dict[str, tuple[TermGradient, ...]]]:
    """The loss that is trained on, and what of it are balance losses that reach a router."""
    heard = Heard(model, balance=True)
    with undisturbed(model, training=True), listening(heard):
        output = run(model, batch) if loss is None else None
        total = loss(model, batch) if loss is not None else _loss_of(output, model, batch)
        own = output.get("aux_loss") if output is not None and not _has_terms(model) else None
        own = own if isinstance(own, Tensor) and own.requires_grad else None
        terms = {
            home.layer: tuple(
                _term(name, _coefficient(one, name), scaled, total, home)
                for one in heard.reports[home.layer]
                for name, scaled in one.scaled.items()
            )
            + (
                ()
                if own is None
                else (_term(OWN, float(getattr(model.config, "router_aux_loss_coef", 1)), own, total, home),)
            )
            for home in found
        }
    return float(total.detach()), own is not None, terms


def _term(name: str, coefficient: float, scaled: Tensor, total: Tensor, home: Home) -> TermGradient:
    weights = _trainable(home.router_weights)
    in_loss = on_router = None
    if scaled.requires_grad:
        if total.requires_grad:
            (by,) = torch.autograd.grad(total, [scaled], retain_graph=True, allow_unused=True)
            in_loss = None if by is None else float(by.sum())
        given = torch.autograd.grad(scaled, weights, retain_graph=True, allow_unused=True) if weights else ()
        on_router = norm(given) if any(one is not None for one in given) else None
    return TermGradient(name=name, coefficient=coefficient, in_loss=in_loss, on_router=on_router)


def _coefficient(report: Report, name: str) -> float:
    term = next(term for term in blocks_terms(report) if term.name == name)
    return float(term.scale(report.routing))


def blocks_terms(report: Report) -> Sequence[Any]:
    """The balance terms of the block that reported."""
    terms: Sequence[Any] = report.block.terms  # type: ignore[assignment]
    return terms


def _has_terms(model: nn.Module) -> bool:
    return any(block.terms for block in blocks(model).values())


def _choices(reports: Sequence[Report]) -> float:
    rows = sum(int(report.routing.valid_N.sum()) for report in reports)
    tokens = sum(int(report.routing.valid_T.sum()) for report in reports)
    return rows / tokens if tokens else 0.0


def _trainable(weights: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return [weight for weight in weights if weight.requires_grad]


def _loss_of(output: Any, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise _NoLossError(f"{type(model).__name__} gives no loss for {', '.join(batch)}")
    return loss


class _NoLossError(MoesaicError):
    """A model that was run for its loss gave none."""


def _why_none(model: nn.Module) -> str:
    """Why a model without terms and controllers has none, as far as its configuration tells."""
    config: Any = model.config
    spec = getattr(config, "moesaic", None)
    if spec:
        return f"recipe {spec['recipe']} has, as it was built here, no balance loss and no controller"
    if getattr(config, "router_aux_loss_coef", 0) and not getattr(config, "output_router_logits", False):
        return (
            f"the configuration has router_aux_loss_coef={config.router_aux_loss_coef} and output_router_logits=False, "
            "and transformers adds its balance loss only with True: whoever trains this model as it is trains without"
        )
    return "the model has no balance loss of its own and no terms of Moesaic"
