"""What a layer of ours computes in evaluation, as facts that a family of transformers can be compared with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from torch import nn

from moesaic.dispatch import Capacity, DeviceCapacity, Sort
from moesaic.experts import BiasedExperts, GatedExperts, MLPExperts, SharedExpert
from moesaic.layer import MoELayer
from moesaic.routers import GroupLimit, TopKRouter


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFacts:
    """One MoE layer, as far as a native family may have a place for it.

    Attributes:
        num_experts: routed experts.
        top_k: experts of a token.
        hidden: F of one of them.
        experts: gated, plain, or with biases and bounds.
        activation: of the experts.
        score: from logits to scores.
        normalized: whether the weights of a token's experts are divided by their sum.
        scale: what weights are multiplied by.
        groups: only experts of the best groups may be chosen; None for all.
        selection_bias: a bias that steers the choice alone.
        logit_bias: a bias that is part of the logits.
        shared_hidden: F of the expert that every token visits; 0 if there is none.
        shared_gate: whether that one is multiplied by a gate of the token.
        capacity: why rows may be dropped in evaluation; None if none are.
        jitter: of the router's input in training.
    """

    num_experts: int
    top_k: int
    hidden: int
    experts: Literal["gated", "plain", "biased"]
    activation: str
    score: str
    normalized: bool
    scale: float
    groups: GroupLimit | None
    selection_bias: bool
    logit_bias: bool
    shared_hidden: int
    shared_gate: bool
    capacity: str | None
    jitter: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Homeless:
    """Parts of a layer for which no family of transformers has a place."""

    parts: tuple[str, ...]


def facts_of(layer: nn.Module) -> LayerFacts | Homeless:
    """Describe a layer, or name what no family could hold.

    Args:
        layer: of a recipe.
    """
    if type(layer) is not MoELayer:
        return Homeless(parts=(f"a layer that is no table of tokens and experts ({type(layer).__name__})",))
    parts = _homeless(layer)
    if parts:
        return Homeless(parts=tuple(parts))
    router, experts = cast(TopKRouter, layer.router), cast(Any, layer.experts)
    shared = cast(SharedExpert | None, layer.shared)
    biased = isinstance(experts, BiasedExperts)
    return LayerFacts(
        num_experts=router.num_experts,
        top_k=router.top_k,
        hidden=experts.up_EDF.shape[2],
        experts="biased" if biased else "gated" if isinstance(experts, GatedExperts) else "plain",
        activation="swiglu-limit" if biased else experts.activation.name,
        score=router.score.name,
        # Softmax over the chosen logits is softmax over all, divided by the sum of the chosen.
        normalized=router.normalize == "chosen" or (router.normalize == "logits" and router.score.name == "softmax"),
        scale=router.scale,
        groups=router.groups,
        selection_bias=router.bias_E is not None,
        logit_bias=router.logit_bias_E is not None,
        shared_hidden=0 if shared is None else shared.up_DF.shape[1],
        shared_gate=getattr(shared, "token_gate_D", None) is not None,
        capacity=_capacity(layer.dispatch, router),
        jitter=router.jitter,
    )


def _homeless(layer: MoELayer) -> list[str]:
    parts = []
    if type(layer.router) is not TopKRouter:
        parts.append(f"its router ({type(layer.router).__name__})")
    if type(layer.experts) not in (GatedExperts, MLPExperts, BiasedExperts):
        parts.append(f"its experts ({type(layer.experts).__name__})")
    elif getattr(layer.experts, "weigh", "output") != "output":
        parts.append("weights that multiply what goes into an expert")
    if type(layer.dispatch) not in (Sort, Capacity, DeviceCapacity):
        parts.append(f"its dispatch ({type(layer.dispatch).__name__})")
    if layer.shared is not None and (not isinstance(layer.shared, SharedExpert) or layer.shared.gate_DF is None):
        parts.append(f"a shared expert that is not gated ({type(layer.shared).__name__})")
    if layer.mix is not None:
        parts.append(f"the way in which routed and shared outputs are joined ({type(layer.mix).__name__})")
    if layer.after is not None:
        parts.append(f"what runs after the experts ({type(layer.after).__name__})")
    return parts


def _capacity(dispatch: nn.Module, router: TopKRouter) -> str | None:
    """Why rows can be dropped in evaluation: a capacity that the busiest expert could exceed."""
    if not isinstance(dispatch, Capacity):
        return None  # DeviceCapacity drops in training only
    # One expert may be chosen by every token: that is E / K times its even share of rows.
    needed = router.num_experts / (router.top_k if dispatch.per == "row" else 1)
    if dispatch.eval_factor >= needed:
        return None
    return f"capacity dropping (eval_capacity_factor={dispatch.eval_factor:g}; {needed:g} would drop nothing)"


def differing(layers: list[LayerFacts]) -> list[str]:
    """Names of facts in which the layers of a model differ."""
    return [field.name for field in fields(LayerFacts) if len({repr(getattr(one, field.name)) for one in layers}) > 1]
