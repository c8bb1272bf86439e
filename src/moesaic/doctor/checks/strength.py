"""Is the balance too strong, so that routers stay undecided, or too weak, so that load runs away?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moesaic.doctor.checks.words import limit, listed, percent
from moesaic.doctor.finding import Finding, Unknown, Verdict, unchecked
from moesaic.doctor.history import History
from moesaic.doctor.vitals import Gradients, LayerRouting

Routed = Sequence[LayerRouting] | Unknown


def not_too_strong(gradients: Gradients | Unknown, routed: Routed, history: History | Unknown) -> Finding:
    """Does balance drown the task? Then routers are uniform, and the task's loss stays up.

    Args:
        gradients: how hard balance and task pull the routers.
        routed: how decided the routers are.
        history: how decided they were during training.
    """
    name, source = "balance not too strong", "Wang et al. 2024, arXiv:2408.15664, section 2.2; Switch, section 2.2"
    pulls = {} if isinstance(gradients, Unknown) else _pulls(gradients)
    undecided = _undecided(routed, history)
    if not pulls and not undecided:
        why = gradients.why if isinstance(gradients, Unknown) else "no balance loss pulls a router that learns"
        return unchecked(name, why, source)
    strong = [layer for layer, pull in pulls.items() if pull >= limit("pull")]
    uniform = [layer for layer, (share, _) in undecided.items() if share >= limit("undecided")]
    stuck = [layer for layer in uniform if undecided[layer][1]]
    evidence = {"balance over task": pulls, "entropy": {layer: share for layer, (share, _) in undecided.items()}}
    remedy = (
        "Lower the coefficient of the balance loss (--aux or --balance), or balance by a bias (--balance bias=1e-3)."
    )
    pulled = max(pulls, key=lambda one: pulls[one], default="")
    drowned = [layer for layer in strong if layer in uniform]
    if drowned:
        words = (
            f"Balance drowns the task: it pulls the router of {pulled} {pulls[pulled]:.2g} times as hard, and the "
            f"entropy of {listed(drowned)} is {percent(min(undecided[one][0] for one in drowned))} of that of chance."
        )
        words += _part(gradients)
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    if strong:
        words = f"Balance pulls the router of {pulled} {pulls[pulled]:.2g} times as hard as the task does."
        words += _part(gradients)
        return Finding(name=name, verdict="warning", words=words, remedy=remedy, evidence=evidence, source=source)
    if stuck:
        words = f"The routers of {listed(stuck)} are as undecided as chance, and no less than when training began."
        remedy = "See the check of what the router learns; if a balance loss is strong, lower its coefficient."
        return Finding(name=name, verdict="warning", words=words, remedy=remedy, evidence=evidence, source=source)
    if not pulls:
        return unchecked(name, "no balance loss pulls a router that learns", source)
    words = f"Balance pulls routers at most {pulls[pulled]:.2g} times as hard as the task does ({pulled})."
    return Finding(name=name, verdict="healthy", words=words, evidence=evidence, source=source)


def not_too_weak(gradients: Gradients | Unknown, routed: Routed, history: History | Unknown) -> Finding:
    """Does the load run away, and does anything hold it?

    Args:
        gradients: which balance there is.
        routed: loads on held-out text.
        history: loads during training.
    """
    name, source = "balance not too weak", "Shazeer et al. 2017, section 4: uneven load reinforces itself"
    ways = _ways(routed, history)
    if not ways:
        why = routed.why if isinstance(routed, Unknown) else "no layer has a choice that is learned, and enough rows"
        return unchecked(name, why, source)
    layer = max(ways, key=lambda one: ways[one][1])
    ratio, way, where = ways[layer]
    trend = _trend(history, layer)
    evidence = {"max over mean": {one: value[0] for one, value in ways.items()}, "way to all": way, "trend": trend}
    idle = _idle_terms(gradients)
    held = f"its coefficient is 0 ({', '.join(idle)}), and there is no controller" if idle else ""
    uneven = way >= limit("uneven") or ratio >= limit("overfull")
    grows = trend is not None and trend[1] - 1 >= limit("load grows") * (trend[0] - 1) and way >= limit("uneven") / 2
    verdict: Verdict = "healthy"
    if uneven or grows or idle:
        verdict = "sick" if uneven and (idle or (trend is not None and trend[1] >= trend[0])) else "warning"
    words = f"The busiest expert of {layer} has {ratio:.2f} times a fair share of {where}"
    if trend is not None:
        words += f"; half way through training it was {trend[0]:.2f}, at the end {trend[1]:.2f}"
    words += "."
    if idle:
        words = f"Nothing keeps the load even: {held}. {words}"
    remedy = (
        "Give the balance loss a coefficient (Switch has 0.01), raise it, or add a selection bias "
        "(--balance bias=1e-3)."
    )
    return Finding(
        name=name,
        verdict=verdict,
        words=words,
        remedy="" if verdict == "healthy" else remedy,
        evidence=evidence,
        source=source,
    )


def _pulls(gradients: Gradients) -> dict[str, float]:
    """How much harder the balance losses pull each router than the task does."""
    found = {}
    for one in gradients.layers:
        balance = math.hypot(*(term.on_router or 0.0 for term in one.terms))
        # A router that the task does not teach at all is another check's business.
        taught = one.task is not None and one.task >= limit("task gradient") * one.beside
        if one.task and balance and taught and not one.is_rewarded:
            found[one.layer] = balance / one.task
    return found


def _part(gradients: Gradients | Unknown) -> str:
    """What part of the training loss is not the task's."""
    if isinstance(gradients, Unknown) or gradients.loss <= 0 or gradients.loss <= gradients.task:
        return ""
    return f" {percent(1 - gradients.task / gradients.loss)} of the training loss is balance."


def _undecided(routed: Routed, history: History | Unknown) -> dict[str, tuple[float, bool]]:
    """Entropy over that of chance, by layer, and whether a training of some length did not lower it."""
    if isinstance(routed, Unknown):
        return {}
    found = {}
    for one in routed:
        if one.is_fixed or one.is_soft or one.num_experts < 2:
            continue
        stuck = False
        if not isinstance(history, Unknown) and one.layer in history.entropy:
            series = history.entropy[one.layer]
            first, last = (float(np.nanmean(series[part])) for part in (history.first, history.last))
            stuck = history.step[-1] >= limit("long enough") and last >= first
        found[one.layer] = (one.entropy / math.log(one.num_experts), stuck)
    return found


def _ways(routed: Routed, history: History | Unknown) -> dict[str, tuple[float, float, str]]:
    """Busiest over mean of each layer, the way from even to all, and where from: the worse of text and training."""
    found: dict[str, tuple[float, float, str]] = {}
    choices: dict[str, float] = {}
    fixed: set[str] = set()
    if not isinstance(routed, Unknown):
        for one in routed:
            if not one.chooses:
                fixed.add(one.layer)
                continue
            choices[one.layer] = float(one.load_E.sum()) / one.num_tokens
            if one.load_E.mean() < limit("rows expected"):
                continue
            ratio = float(one.load_E.max() / one.load_E.mean())
            found[one.layer] = (ratio, _way(ratio, one.num_experts, choices[one.layer]), "held-out text")
    if not isinstance(history, Unknown):
        for layer, series in history.max_over_mean.items():
            last = series[history.last]
            if layer in fixed or not np.isfinite(last).any() or layer not in history.load:
                continue
            ratio = float(np.nanmean(last))
            way = _way(ratio, history.load[layer].shape[1], choices.get(layer, 1.0))
            if way > found.get(layer, (0.0, -1.0, ""))[1]:
                found[layer] = (ratio, way, "the last training steps")
    return found


def _way(ratio: float, num_experts: int, choices: float) -> float:
    worst = num_experts / max(1.0, choices)
    return (ratio - 1) / (worst - 1) if worst > 1 else 0.0


def _trend(history: History | Unknown, layer: str) -> tuple[float, float] | None:
    """Busiest over mean half way through training and at its end; None where that is not known, or too short."""
    if isinstance(history, Unknown) or layer not in history.max_over_mean or history.step[-1] < limit("long enough"):
        return None
    series = history.max_over_mean[layer]
    width, half = len(series[history.last]), len(series) // 2
    middle, last = series[half - width // 2 : half - width // 2 + width], series[history.last]
    if not (np.isfinite(middle).any() and np.isfinite(last).any()):
        return None
    return float(np.nanmean(middle)), float(np.nanmean(last))


def _idle_terms(gradients: Gradients | Unknown) -> list[str]:
    """Names of balance losses that are there and pull nothing, where nothing else balances."""
    if isinstance(gradients, Unknown) or gradients.controllers:
        return []
    terms = [term for one in gradients.layers for term in one.terms]
    return sorted({term.name for term in terms}) if terms and not any(term.coefficient for term in terms) else []
