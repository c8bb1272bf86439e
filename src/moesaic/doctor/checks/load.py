"""Who works: dead and overfull experts, and rows that capacity drops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moesaic.doctor.checks.words import limit, listed, percent, plural
from moesaic.doctor.finding import Finding, Unknown, Verdict, unchecked
from moesaic.doctor.history import History
from moesaic.doctor.vitals import FloatArray, LayerRouting

Routed = Sequence[LayerRouting] | Unknown


def dead_experts(routed: Routed, history: History | Unknown) -> Finding:
    """Is there an expert that gets nothing, or next to nothing?

    Args:
        routed: what the routers did with held-out text.
        history: what they did in training.
    """
    name, source = "dead experts", "Shazeer et al. 2017, section 4; Switch Transformer, section 2.2"
    shares, rows, where = _shares(routed, history)
    if not shares:
        return unchecked(name, where, source)
    dead: list[str] = []
    starved: list[str] = []
    unclear = 0
    for layer, share_E in shares.items():
        expected = rows[layer] / len(share_E)
        trained_E = _last_load(history, layer)
        for expert, share in enumerate(share_E):
            if expected < limit("rows expected"):
                unclear += 1
            elif share == 0 and (trained_E is None or expert >= len(trained_E) or trained_E[expert] == 0):
                dead.append(f"{layer} expert {expert}")
            elif share * len(share_E) < limit("starved share"):
                starved.append(f"{layer} expert {expert} ({percent(float(share))})")
    total = sum(len(share_E) for share_E in shares.values())
    if unclear == total:
        return unchecked(name, _too_little(where), source)
    evidence = {"experts": total, "dead": dead, "starved": starved, "not told": unclear}
    remedy = (
        "Raise the coefficient of the balance loss or give the router a selection bias (--balance bias=1e-3); an "
        "expert that has died seldom comes back by itself: start it again from a busy one, or prune it."
    )
    if dead:
        words = f"{plural(len(dead), 'expert')} of {total} got no row of {where}: {listed(dead)}."
        return Finding(name=name, verdict="sick", words=words, remedy=remedy, evidence=evidence, source=source)
    if starved:
        words = (
            f"{plural(len(starved), 'expert')} of {total} got less than a tenth of a fair share of {where}: "
            f"{listed(starved)}."
        )
        return Finding(name=name, verdict="warning", words=words, remedy=remedy, evidence=evidence, source=source)
    least_of = {layer: float(share_E.min()) * len(share_E) for layer, share_E in shares.items()}
    layer = min(least_of, key=lambda one: least_of[one])
    words = f"All {total} experts work; the idlest, in {layer}, has {least_of[layer]:.2f} of a fair share of {where}."
    return Finding(name=name, verdict="healthy", words=words, evidence=evidence, source=source)


def overfull_experts(routed: Routed, history: History | Unknown) -> Finding:
    """Does one expert take far more than its share?

    Args:
        routed: what the routers did with held-out text.
        history: what they did in training.
    """
    name, source = "overfull experts", "MaxVio + 1 of Wang et al. 2024, arXiv:2408.15664, section 4.1"
    shares, rows, where = _shares(routed, history)
    if not shares:
        return unchecked(name, where, source)
    shares = {
        layer: share_E for layer, share_E in shares.items() if rows[layer] >= limit("rows expected") * len(share_E)
    }
    if not shares:
        return unchecked(name, _too_little(where), source)
    choices = {} if isinstance(routed, Unknown) else {one.layer: one.load_E.sum() / one.num_tokens for one in routed}
    found = {}
    for layer, share_E in shares.items():
        even = 1 / len(share_E)
        worst = len(share_E) / max(1.0, float(choices.get(layer, 1.0)))
        ratio = float(share_E.max()) / even
        # 0 where all get the same, 1 where every token goes to the busiest.
        found[layer] = (ratio, (ratio - 1) / (worst - 1) if worst > 1 else 0.0, int(share_E.argmax()))
    layer = max(found, key=lambda one: _severity(*found[one][:2]))
    ratio, way, expert = found[layer]
    verdict = _overfull(ratio, way)
    words = (
        f"The busiest expert of {where} is expert {expert} of {layer}, with {ratio:.2f} times a fair share "
        f"(1 is even, {len(shares[layer]) / max(1.0, float(choices.get(layer, 1.0))):.3g} is every token)."
    )
    evidence = {"max over mean": {one: values[0] for one, values in found.items()}, "way to all": way}
    remedy = (
        "Raise the coefficient of the balance loss, or let a selection bias balance (--balance bias=1e-3); with a "
        "capacity, the rows beyond it are lost."
    )
    return Finding(
        name=name,
        verdict=verdict,
        words=words,
        remedy="" if verdict == "healthy" else remedy,
        evidence=evidence,
        source=source,
    )


def dropped_rows(routed: Routed, history: History | Unknown) -> Finding:
    """How much does capacity drop?

    Args:
        routed: what the routers did with held-out text.
        history: what they did in training.
    """
    name, source = "dropped rows", "ST-MoE, arXiv:2202.08906, section 4.3; Switch Transformer, table 1"
    rates: dict[str, tuple[float, str]] = {}
    unserved = 0.0
    if not isinstance(routed, Unknown):
        for one in routed:
            rows = int(one.load_E.sum())
            rates[one.layer] = (1 - int(one.kept_E.sum()) / rows if rows else 0.0, "held-out text")
            unserved = max(unserved, one.unserved / one.num_tokens)
    if not isinstance(history, Unknown):
        for layer, series in history.drop_rate.items():
            rate = float(np.nanmean(series[history.last])) if np.isfinite(series[history.last]).any() else math.nan
            if rate > rates.get(layer, (-1.0, ""))[0]:
                rates[layer] = (rate, "the last training steps")
    if not rates:
        return unchecked(name, _no_loads(routed, history), source)
    layer = max(rates, key=lambda one: rates[one][0])
    rate, where = rates[layer]
    verdict: Verdict = "healthy"
    if rate >= limit("dropped"):
        verdict = "sick" if rate >= limit("dropped, sick") else "warning"
    words = "No row is dropped." if rate == 0 else f"Capacity drops {percent(rate)} of the rows of {layer} on {where}."
    if unserved:
        words += f" {percent(unserved)} of the tokens of a layer reach no expert."
    return Finding(
        name=name,
        verdict=verdict,
        words=words,
        remedy="" if verdict == "healthy" else "Raise capacity_factor, balance more, or use a dropless dispatch.",
        evidence={"drop rate": {one: value[0] for one, value in rates.items()}, "unserved tokens": unserved},
        source=source,
    )


def _shares(routed: Routed, history: History | Unknown) -> tuple[dict[str, FloatArray], dict[str, float], str]:
    """Share of each expert and rows, by layer, and where from; or why not."""
    if not isinstance(routed, Unknown):
        hard = [one for one in routed if one.chooses]
        if not hard:
            return {}, {}, "no router chooses: choices are fixed, or every token meets every expert, or it is untrained"
        shares = {one.layer: one.load_E / one.load_E.sum() for one in hard}
        return shares, {one.layer: float(one.load_E.sum()) for one in hard}, "held-out text"
    if not isinstance(history, Unknown) and history.load:
        per_step = float(np.nanmedian(history.tokens / np.maximum(history.step, 1)))
        lines = min(history.num_lines, history.last.stop or -history.last.start)
        shares = {layer: _mean_rows(load[history.last]) for layer, load in history.load.items()}
        return shares, dict.fromkeys(shares, per_step * lines), "the last training steps"
    return {}, {}, _no_loads(routed, history)


def _too_little(where: str) -> str:
    return f"{where} gave fewer than {limit('rows expected'):.0f} rows to an expert on average; read more"


def _no_loads(routed: Routed, history: History | Unknown) -> str:
    model = routed.why if isinstance(routed, Unknown) else "no layer ran"
    past = history.why if isinstance(history, Unknown) else "the history has no loads"
    return f"{model}, and {past}"


def _mean_rows(load: FloatArray) -> FloatArray:
    known = load[np.isfinite(load).all(axis=1)]
    mean_E: FloatArray = known.mean(axis=0) if len(known) else np.zeros(load.shape[1])
    return mean_E


def _last_load(history: History | Unknown, layer: str) -> FloatArray | None:
    if isinstance(history, Unknown) or layer not in history.load:
        return None
    return _mean_rows(history.load[layer][history.last])


def _severity(ratio: float, way: float) -> float:
    return max(ratio / limit("overfull"), way / limit("collapse"))


def _overfull(ratio: float, way: float) -> Verdict:
    if ratio >= limit("overfull, sick") or way >= limit("collapse, sick"):
        return "sick"
    return "warning" if ratio >= limit("overfull") or way >= limit("collapse") else "healthy"
