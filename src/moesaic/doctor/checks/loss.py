"""Do the losses do their work? Attached to what is trained, felt by the routers, neither too strong nor too weak."""

from __future__ import annotations

import math

from moesaic.doctor.checks.words import limit, listed
from moesaic.doctor.finding import Finding, Unknown, unchecked
from moesaic.doctor.vitals import Gradients, LayerGradients, TermGradient


def balance_attached(gradients: Gradients | Unknown) -> Finding:
    """Does each balance loss reach the training loss and its router?

    Args:
        gradients: of a real backward pass.
    """
    name, source = "balance loss attached", "a backward pass; issues of Megatron-LM and NeMo AutoModel report it lost"
    if isinstance(gradients, Unknown):
        return unchecked(name, gradients.why, source)
    terms = [(one, term) for one in gradients.layers for term in one.terms]
    if not terms:
        if gradients.controllers:
            words = f"There is no balance loss; {', '.join(gradients.controllers)} balances without a gradient."
            return Finding(name=name, verdict="healthy", words=words, source=source)
        return unchecked(name, gradients.why_none, source)
    pulling = [(one, term) for one, term in terms if term.coefficient]
    if not pulling:
        names = sorted({term.name for _, term in terms})
        return unchecked(name, f"every coefficient is 0 ({', '.join(names)}): nothing pulls", source)
    evidence = {"terms": [_evidence(one, term) for one, term in terms], "training loss": gradients.loss}
    outside = [f"{term.name} of {one.layer}" for one, term in pulling if not term.in_loss]
    if outside:
        words = f"{len(outside)} of {len(pulling)} balance losses are not part of the training loss: {listed(outside)}."
        remedy = (
            "Train on output.loss, or add the total of moesaic.hf.balance(model) to your own loss; see that nothing "
            "detaches it."
        )
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    learning = [(one, term) for one, term in pulling if not one.is_frozen]
    cut = [f"{term.name} of {one.layer}" for one, term in learning if term.on_router is None]
    broken = [f"{term.name} of {one.layer}" for one, term in learning if not math.isfinite(term.on_router or 0.0)]
    if cut or broken:
        what = "reaches no weight of the router" if cut else "has a gradient that is not finite"
        words = f"The gradient of {listed(cut or broken)} {what}."
        remedy = "Compute it from the routing that the layer returned, and not from a detached copy or a second top-k."
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    still = [f"{term.name} of {one.layer}" for one, term in learning if term.on_router == 0]
    if still and len(still) == len(learning):
        words = f"The gradient of {listed(still)} on the router is 0 on this batch."
        remedy = "Examine it on more text; if it stays 0, the loss has one value whatever the router does."
        return Finding(name=name, verdict="warning", words=words, remedy=remedy, evidence=evidence, source=source)
    names = sorted({term.name for _, term in pulling})
    norms = [term.on_router for _, term in learning if term.on_router is not None]
    span = f"gradient norms {min(norms):.2g} to {max(norms):.2g}" if norms else "routers are frozen"
    words = f"All {len(pulling)} ({', '.join(names)}) are in the training loss and reach their routers ({span})."
    return Finding(name=name, verdict="healthy", words=words, evidence=evidence, source=source)


def router_learns(gradients: Gradients | Unknown) -> Finding:
    """Does the task itself teach the routers? A top-1 weight that is always 1 passes no gradient.

    Args:
        gradients: of a real backward pass.
    """
    name, source = "router learns from the task", "Switch Transformer, section 2.1; Shazeer et al. 2017, k > 1"
    if isinstance(gradients, Unknown):
        return unchecked(name, gradients.why, source)
    learning = [one for one in gradients.layers if one.task is not None]
    if not learning:
        return unchecked(name, "no router has weights: choices are fixed or every token meets every expert", source)
    frozen = [one.layer for one in learning if one.is_frozen]
    evidence = {
        one.layer: {"gradient": one.task, "of the layer's other weights": one.beside, "choices": one.choices}
        for one in learning
    }
    if frozen:
        words = f"{len(frozen)} of {len(learning)} routers are frozen: {listed(frozen)}."
        remedy = "If that was not meant, let them train: requires_grad_(True), or another --trainable."
        return Finding(name=name, verdict="warning", words=words, remedy=remedy, evidence=evidence, source=source)
    silent = [one for one in learning if not one.is_rewarded and _ratio(one) < limit("task gradient")]
    if silent:
        top_one = all(one.choices <= 1 for one in silent)
        why = (
            "each token has one expert, whose weight is 1 whatever the router says"
            if top_one
            else "the weights of the chosen experts do not depend on its logits, or it is cut off"
        )
        words = (
            f"The task's gradient on {len(silent)} of {len(learning)} routers is 0 "
            f"({listed([one.layer for one in silent])}): {why}. These routers learn nothing but balance."
        )
        remedy = (
            "Weigh the chosen expert by its score over all experts (normalize='scores' here, norm_topk_prob=False in "
            "transformers), or choose two."
        )
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    smallest = min(learning, key=_ratio)
    words = (
        f"The task's gradient reaches all {len(learning)} routers; the weakest, of {smallest.layer}, has norm "
        f"{smallest.task:.2g}, the rest of that layer {smallest.beside:.2g}."
    )
    return Finding(name=name, verdict="healthy", words=words, evidence=evidence, source=source)


def _ratio(one: LayerGradients) -> float:
    if one.is_rewarded or one.task is None:
        return math.inf
    return one.task / one.beside if one.beside else (math.inf if one.task else 0.0)


def _evidence(one: LayerGradients, term: TermGradient) -> dict[str, object]:
    return {
        "layer": one.layer,
        "name": term.name,
        "coefficient": term.coefficient,
        "in loss": term.in_loss,
        "gradient": term.on_router,
        "task gradient": one.task,
    }
