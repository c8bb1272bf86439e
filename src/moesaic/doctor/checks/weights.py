"""What weights say by themselves: readable, finite, experts that differ, routers that look at every expert."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesaic.doctor.checks.words import limit, listed, plural
from moesaic.doctor.finding import Finding, Unknown, unchecked
from moesaic.doctor.history import History
from moesaic.doctor.vitals import LayerRouting, Weights


def weights_finite(weights: Weights | Unknown, history: History | Unknown, damaged: str) -> Finding:
    """Can the weights be read, and are they numbers? Were the losses?

    Args:
        weights: all of them.
        history: losses and gradients of training.
        damaged: what is wrong with a model that cannot be read.
    """
    name, source = "numbers finite", "traps 18 and 20: no tensor lost, none damaged"
    if damaged:
        remedy = "Go back to an earlier checkpoint, or convert the model again; moesaic convert writes a receipt."
        return Finding(name=name, verdict="sick", words=damaged, remedy=remedy, source=source)
    parts, evidence = [], {}
    if not isinstance(history, Unknown):
        for what, series in (("loss", history.loss), ("gradient norm", history.grad_norm)):
            # A line without the figure has NaN too; a run that never wrote it has nothing else.
            bad = np.flatnonzero(~np.isfinite(series))
            if len(bad) and len(bad) < len(series):
                parts.append(f"the {what} of step {history.step[bad[0]]:.0f} is {series[bad[0]]}")
                evidence[what] = history.step[bad].tolist()
    if not isinstance(weights, Unknown) and weights.not_finite:
        names = weights.not_finite
        parts.append(f"NaN or infinity stands in {plural(len(names), 'tensor')}: {listed(names)}")
        evidence["tensors"] = list(names)
    if parts:
        words = "; ".join(parts)
        remedy = "Go back to a checkpoint from before, with a lower --lr, a longer --warmup or a smaller --clip."
        return Finding(
            name=name,
            verdict="sick",
            words=f"{words[:1].upper()}{words[1:]}.",
            remedy=remedy,
            evidence=evidence,
            source=source,
        )
    if isinstance(weights, Unknown):
        if isinstance(history, Unknown):
            return unchecked(name, f"{weights.why}, and {history.why}", source)
        words = f"All {history.num_lines:,} logged losses are numbers; weights were not looked at, since {weights.why}."
        return Finding(name=name, verdict="healthy", words=words, source=source)
    words = f"All {weights.num_weights:,} weights are numbers"
    words += "." if isinstance(history, Unknown) else f", and so are {history.num_lines:,} logged losses."
    return Finding(name=name, verdict="healthy", words=words, source=source)


def experts_differ(weights: Weights | Unknown) -> Finding:
    """Is an expert a copy of another one, or lost?

    Args:
        weights: all of them.
    """
    name, source = "experts differ", "issues of Megatron-LM, TorchTitan and vLLM report experts lost on loading"
    if isinstance(weights, Unknown):
        return unchecked(name, weights.why, source)
    if weights.not_finite:
        return unchecked(name, "weights hold NaN or infinity", source)
    if not weights.experts:
        return unchecked(name, "the model keeps no weights of experts that can be told apart", source)
    evidence = {
        one.layer: {"largest cosine": one.likeness, "of": one.pair, "equal pairs": len(one.identical)}
        for one in weights.experts
    }
    empty = [f"{one.layer} expert {e}" for one in weights.experts for e in np.flatnonzero(one.size_E == 0)]
    equal = [f"{one.layer} experts {a} and {b}" for one in weights.experts for a, b in one.identical]
    odd = [
        f"{one.layer} expert {e} ({size / np.median(one.size_E):.3g} times the median)"
        for one in weights.experts
        for e, size in enumerate(one.size_E)
        if size and np.median(one.size_E) and not 1 / limit("size") <= size / np.median(one.size_E) <= limit("size")
    ]
    if empty:
        words = f"{plural(len(empty), 'expert')} hold nothing but zeros: {listed(empty)}."
        remedy = "Convert or load the model again, and see that every expert's tensors are found."
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    if equal:
        words = (
            f"{plural(len(equal), 'pair')} of experts are equal to the bit: {listed(equal)}. That is how upcycling "
            "starts; after training it means that they learned nothing, or were loaded twice."
        )
        remedy = "Train on, upcycle with noise or drop-upcycling (see docs/upcycling.md), or load again."
        return Finding(name=name, verdict="warning", words=words, remedy=remedy, evidence=evidence, source=source)
    if odd:
        words = f"The weights of {listed(odd)} are of another size than their siblings'."
        remedy = "See that these experts were loaded, and not left at their initial values."
        return Finding(name=name, verdict="warning", words=words, remedy=remedy, evidence=evidence, source=source)
    closest = max(weights.experts, key=lambda one: one.likeness)
    words = (
        f"All differ; the two most alike, {closest.pair[0]} and {closest.pair[1]} of {closest.layer}, have a cosine of "
        f"{closest.likeness:.3f}."
    )
    return Finding(name=name, verdict="healthy", words=words, evidence=evidence, source=source)


def router_rows(weights: Weights | Unknown, routed: Sequence[LayerRouting] | Unknown) -> Finding:
    """Does the router look at the token for every expert?

    Args:
        weights: of routers.
        routed: what the logits did over tokens.
    """
    name, source = (
        "router rows",
        "an expert whose logit is the same for every token is never chosen for what a token is",
    )
    if isinstance(routed, Unknown):
        return unchecked(name, routed.why, source)
    zero: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    if not isinstance(weights, Unknown):
        zero = {one.layer: one.zero_rows for one in weights.experts if one.zero_rows}
    flat: dict[str, tuple[int, ...]] = {}
    for one in (one for one in routed if not one.is_fixed):
        typical = float(np.median(one.spread_E))
        still = np.flatnonzero(one.spread_E <= limit("still logit") * typical)
        counts[one.layer] = one.num_experts
        if len(still):
            flat[one.layer] = tuple(int(expert) for expert in still)
    if not counts:
        return unchecked(name, "no router has weights", source)
    rows = {layer: tuple(sorted({*zero.get(layer, ()), *flat.get(layer, ())})) for layer in {**zero, **flat}}
    whole = [layer for layer, experts in rows.items() if len(experts) == counts.get(layer)]
    some = [f"{layer} expert {e}" for layer, experts in rows.items() if layer not in whole for e in experts]
    evidence = {"zero rows": zero, "still logits": flat}
    if some:
        words = f"The logit of {plural(len(some), 'expert')} is the same for every token: {listed(some)}."
        remedy = "See that the router's weight was loaded whole; start the row again, such as at its siblings' mean."
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    if whole:
        words = (
            f"{plural(len(whole), 'router')} give every token the same logits ({listed(whole)}): untrained, or fixed."
        )
        remedy = "Train it; if it has been trained, its gradient does not reach it, or it was not loaded."
        return Finding(name=name, verdict="warning", words=words, remedy=remedy, evidence=evidence, source=source)
    words = f"The logit of every expert of {plural(len(counts), 'layer')} depends on the token."
    return Finding(name=name, verdict="healthy", words=words, evidence=evidence, source=source)
