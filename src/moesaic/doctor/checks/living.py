"""What a model does when it runs: logits, precision, repeats, padding, selection bias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesaic.doctor.checks.words import limit, listed, percent
from moesaic.doctor.finding import Finding, Unknown, Verdict, unchecked
from moesaic.doctor.history import History
from moesaic.doctor.vitals import LayerBias, LayerPrecision, LayerRouting, Padding, Repeat

_NARROW = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def router_logits(routed: Sequence[LayerRouting] | Unknown, history: History | Unknown) -> Finding:
    """How large are the logits, and do they grow?

    Args:
        routed: what the routers did with held-out text.
        history: what they did in training.
    """
    name, source = "router logits", "ST-MoE, arXiv:2202.08906, sections 3.3 and 3.4 (router z-loss)"
    now = {} if isinstance(routed, Unknown) else {one.layer: one.largest_logit for one in routed if not one.is_fixed}
    growth: dict[str, tuple[float, float]] = {}
    if not isinstance(history, Unknown):
        for layer, series in history.router_logit.items():
            first, last = (series[part][np.isfinite(series[part])] for part in (history.first, history.last))
            if len(first) and len(last):
                growth[layer] = (float(first.mean()), float(last.mean()))
                now.setdefault(layer, growth[layer][1])
    if not now:
        past = history.why if isinstance(history, Unknown) else "the history does not have router_logit"
        model = routed.why if isinstance(routed, Unknown) else "no router has weights"
        return unchecked(name, f"{model}, and {past}", source)
    layer = max(now, key=lambda one: now[one])
    size = now[layer]
    words = f"The largest logit, in {layer}, is {size:.3g} in size"
    verdict: Verdict = "healthy"
    if size >= limit("logit"):
        verdict = "sick" if size >= limit("logit, sick") else "warning"
    grown = {one: (a, b) for one, (a, b) in growth.items() if b >= limit("logit grew") * max(a, 1.0)}
    if grown:
        worst = max(grown, key=lambda one: grown[one][1])
        before, after = grown[worst]
        words += f"; in {worst} the largest grew from {before:.3g} to {after:.3g} during training"
        verdict = "sick" if verdict == "sick" else "warning"
    elif growth:
        before, after = growth.get(layer, next(iter(growth.values())))
        words += f"; during training it went from {before:.3g} to {after:.3g}"
    else:
        words += "; how it got there is not known, as there is no history of it"
    return Finding(
        name=name,
        verdict=verdict,
        words=f"{words}.",
        remedy="" if verdict == "healthy" else "Add a z-loss (--balance z=1e-3, or --aux z=1e-3), or lower --lr.",
        evidence={"largest": now, "first and last": growth},
        source=source,
    )


def router_precision(precision: Sequence[LayerPrecision] | Unknown) -> Finding:
    """Do routers work in half precision, and does it change who goes where?

    Args:
        precision: of each router.
    """
    name, source = "router precision", "Switch Transformer, section 2.4 (selective precision); ST-MoE, section 3"
    if isinstance(precision, Unknown):
        return unchecked(name, precision.why, source)
    learned = [one for one in precision if one.stored]
    if not learned:
        return unchecked(name, "no router has weights", source)
    evidence = {
        one.layer: {"stored": one.stored, "rerouted": one.rerouted, "bias": one.bias_stored, "tokens": one.num_tokens}
        for one in learned
    }
    narrow = [one for one in learned if one.stored in _NARROW]
    narrow_bias = [one for one in learned if one.bias_stored in _NARROW]
    told = [one for one in learned if one.rerouted is not None]
    worst = max(told, key=lambda one: one.rerouted or 0.0, default=None)
    moved = 0.0 if worst is None or worst.rerouted is None else worst.rerouted
    verdict: Verdict = "healthy"
    parts = []
    if worst is not None and moved >= limit("rerouted"):
        verdict = "sick" if moved >= limit("rerouted, sick") else "warning"
        parts.append(
            f"The router of {worst.layer} computes in low precision: in full precision {percent(moved)} of "
            f"{worst.num_tokens:,} tokens would go to other experts"
        )
    if narrow:
        verdict = "sick" if verdict == "sick" else "warning"
        parts.append(
            f"the weights of {len(narrow)} of {len(learned)} routers are stored in {narrow[0].stored}, in which steps "
            "below 1/256 of a weight are lost in training"
        )
    if narrow_bias:
        verdict = "sick"
        parts.append(f"{len(narrow_bias)} selection biases are stored in {narrow_bias[0].bias_stored}")
    if not parts:
        how = f"; full precision would send {percent(moved)} of the tokens elsewhere" if told else ""
        parts.append(f"All {len(learned)} routers are stored in {learned[0].stored}{how}")
    words = "; ".join(parts)
    return Finding(
        name=name,
        verdict=verdict,
        words=f"{words[:1].upper()}{words[1:]}.",
        remedy=""
        if verdict == "healthy"
        else "Keep router weights, logits and bias in float32: moesaic.adopt(model, float32_router=True) for a model "
        "of transformers, router.float() and autocast for ours.",
        evidence=evidence,
        source=source,
    )


def evaluation_repeats(repeat: Repeat | Unknown) -> Finding:
    """Is evaluation the same twice? Noise, jitter and dropout must be off in it, and it must move nothing.

    Args:
        repeat: two evaluations of the same text.
    """
    name, source = "evaluation repeats", "GShard and Switch add noise in training only; laws 3 and 13 of docs/laws.md"
    if isinstance(repeat, Unknown):
        return unchecked(name, repeat.why, source)
    evidence = {"rerouted": repeat.rerouted, "outputs": repeat.largest_difference, "moved": repeat.moved}
    noisy = {layer: share for layer, share in repeat.rerouted.items() if share > limit("rerouted again")}
    if noisy:
        layer = max(noisy, key=lambda one: noisy[one])
        words = (
            f"{percent(noisy[layer])} of {repeat.num_tokens:,} tokens went to other experts of {layer} the second "
            "time: noise, jitter or a random choice is alive in evaluation."
        )
        remedy = "Draw noise only where self.training is True, and call model.eval() before evaluating."
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    if repeat.moved:
        words = f"An evaluation changed {len(repeat.moved)} tensors of the model: {listed(repeat.moved)}."
        remedy = "Step counters, biases and temperatures once per optimizer step, never in a forward."
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    if repeat.largest_difference > limit("output differs"):
        words = f"The same text gave outputs that differ by {repeat.largest_difference:.2g} of their size."
        remedy = "Something outside the routers is random in evaluation, such as dropout: call model.eval()."
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    words = f"Two evaluations of {repeat.num_tokens:,} tokens chose the same experts, and moved nothing."
    return Finding(name=name, verdict="healthy", words=words, evidence=evidence, source=source)


def padding_ignored(padding: Padding | Unknown) -> Finding:
    """Does padding take experts, capacity or a part in the balance losses?

    Args:
        padding: the same sequences filled up in two ways.
    """
    name, source = "padding ignored", "issues of transformers and Megatron-LM report it counted; law 2 of docs/laws.md"
    if isinstance(padding, Unknown):
        return unchecked(name, padding.why, source)
    evidence = {"counted": padding.counted, "rerouted": padding.rerouted, "losses": padding.losses}
    remedy = "Pass the attention mask on to routers, capacity and losses (valid_T of a layer)."
    what = f"of {padding.num_padding:,} padding tokens beside {padding.num_tokens:,} real ones"
    if padding.counted:
        layer = max(padding.counted, key=lambda one: padding.counted[one])
        words = f"{layer} counts {padding.counted[layer]:,} {what} in its load."
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    if padding.before > limit("rerouted again"):
        words = (
            f"With other tokens as padding, {percent(padding.before)} of the real tokens come to the first router "
            f"changed ({what}): the attention lets padding through, or counts it in what it shares out."
        )
        remedy = "Look at the attention and its mask first; what routers do cannot be told from that."
        return Finding(name=name, verdict="warning", words=words, remedy=remedy, evidence=evidence, source=source)
    changed = {layer: share for layer, share in padding.rerouted.items() if share > limit("rerouted again")}
    if changed:
        layer = max(changed, key=lambda one: changed[one])
        words = (
            f"With other tokens as padding, {percent(changed[layer])} of the real tokens have other experts or weights "
            f"in {layer} ({what})."
        )
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    moved = {loss: change for loss, change in padding.losses.items() if change > limit("loss differs")}
    if moved:
        loss = max(moved, key=lambda one: moved[one])
        words = f"With other tokens as padding, the balance loss {loss} changes by {percent(moved[loss])} ({what})."
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    same = "loads, weights and balance losses are" if padding.losses else "loads and weights are"
    words = f"None {what} is counted: {same} the same whatever it is."
    return Finding(name=name, verdict="healthy", words=words, evidence=evidence, source=source)


def selection_bias(biases: Sequence[LayerBias] | Unknown, history: History | Unknown) -> Finding:
    """Does the selection bias do its work, and stay where it can?

    Args:
        biases: of each router that has one.
        history: its values during training, where they were written.
    """
    name, source = "selection bias", "DeepSeek-V3, section 2.1.2; Wang et al. 2024, arXiv:2408.15664"
    if isinstance(biases, Unknown):
        return unchecked(name, biases.why, source)
    if not biases:
        return unchecked(name, "no router has a selection bias", source)
    evidence = _bias_evidence(biases)
    steps = 0 if isinstance(history, Unknown) else int(history.step[-1])
    remedy = ""
    verdict: Verdict = "healthy"
    largest = max(biases, key=lambda one: float(np.abs(one.bias_E).max()))
    told = [one for one in biases if one.decided is not None]
    size = float(np.abs(largest.bias_E).max())
    drifted = max(biases, key=lambda one: abs(float(one.bias_E.mean())))
    runaway = _runaway(history)
    if size == 0:
        if steps < limit("bias steps"):
            return unchecked(name, "every bias is 0: no controller has stepped it yet", source)
        verdict = "sick"
        words = f"Every bias is still 0 after {steps:,} steps: its controller was never stepped."
        remedy = "Add moesaic.train.BalanceCallback, or step moesaic.hf.controllers(model) after each optimizer step."
    elif abs(float(drifted.bias_E.mean())) >= limit("bias mean"):
        verdict = "warning"
        words = (
            f"The bias of {drifted.layer} has drifted: its mean is {drifted.bias_E.mean():.3g}, more than any score. A "
            "part common to all experts selects nothing and costs precision."
        )
        remedy = "Subtract the mean from each step of the bias, as BiasController does."
    elif runaway:
        verdict = "warning"
        layer, experts, before, after = runaway
        words = (
            f"The bias of {layer} runs away: {experts} experts were pushed one way all through the second half of "
            f"training, and its spread went from {before:.3g} to {after:.3g}, more than the scores can differ by."
        )
        remedy = "The router outruns its bias. Lower --lr, add a small balance loss, or raise the bias's rate."
    else:
        words = f"The largest bias, in {largest.layer}, is {size:.3g} in size, and the means are 0"
        if told:
            most = max(told, key=lambda one: one.decided or 0.0)
            words += f"; it decides for {percent(most.decided or 0.0)} of the tokens of {most.layer}"
        words += "."
    coarse = _coarse(biases)
    if coarse and verdict == "healthy":
        verdict, words = "warning", f"{words} {coarse}"
        remedy = "Score by a sigmoid, as DeepSeek-V3 does, or lower the bias's rate."
    return Finding(name=name, verdict=verdict, words=words, remedy=remedy, evidence=evidence, source=source)


def _bias_evidence(biases: Sequence[LayerBias]) -> dict[str, dict[str, float | None]]:
    return {
        one.layer: {
            "largest": float(np.abs(one.bias_E).max()),
            "mean": float(one.bias_E.mean()),
            "decided": one.decided,
            "spread of scores": one.spread,
        }
        for one in biases
    }


def _coarse(biases: Sequence[LayerBias]) -> str:
    """What is wrong with a bias beside scores so small that one of its steps is a large part of one; else empty."""
    step = limit("bias step")
    for one in biases:
        num_experts = len(one.bias_E)
        if one.on_softmax and step * num_experts >= limit("coarse step"):
            return (
                f"It is added to a softmax over {num_experts} experts, whose mean score is {1 / num_experts:.2g}: one "
                f"step of {step:g} is a large part of it."
            )
    return ""


def _runaway(history: History | Unknown) -> tuple[str, int, float, float] | None:
    """The layer whose bias is pushed one way without end; its experts, and the spread half way and at the end."""
    if isinstance(history, Unknown):
        return None
    for layer, bias in history.bias.items():
        half = bias[history.num_lines // 2 :]
        half = half[np.isfinite(half).all(axis=1)]
        if len(half) < 5:
            continue
        net_E, way_E = np.abs(half[-1] - half[0]), np.abs(np.diff(half, axis=0)).sum(axis=0)
        straight = int(((net_E > 0) & (net_E >= limit("one way") * way_E)).sum())
        before, after = float(np.ptp(half[0])), float(np.ptp(half[-1]))
        if straight and after >= limit("bias spread") and after > before:
            return layer, straight, before, after
    return None
