"""The study of three domains as a page: what was asked, the picture, the figures, and what holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.lab.classic.drawn import svg
from moesaic.lab.page import text
from moesaic.lab.studies.heat import Panel, paint
from moesaic.lens.measures import WORDS_OR_SUBJECTS


def write(found: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the page, and beside it the picture and the figures as JSON; give the three.

    Raises:
        BackendError: without matplotlib.
    """
    drawing, figures = out.with_suffix(".svg"), out.with_suffix(".json")
    text(drawing, svg("three-domains", (7.6, 4.6), partial(paint, panels=_panels(found), columns=_columns(found))))
    text(figures, json.dumps(found, indent=1) + "\n")
    text(out, "\n".join(_words(found, drawing.name)) + "\n")
    return [out, drawing, figures]


def _columns(found: Mapping[str, Any]) -> int:
    return min(4, int(found["plan"]["layers"]))


def _panels(found: Mapping[str, Any]) -> list[Panel]:
    panels = []
    for name, run in found["runs"].items():
        times_LQE = np.array(run["times_chance"], dtype=np.float64)
        for layer in np.linspace(0, len(times_LQE) - 1, _columns(found)).round().astype(int):
            panels.append(Panel(title=f"{name}, layer {layer}", rows=run["domains"], times=times_LQE[layer]))
    return panels


def _words(found: Mapping[str, Any], drawing: str) -> Iterator[str]:
    plan, runs = found["plan"], found["runs"]
    strengths = "; ".join(f"{name}: {_terms(run['balance'])}" for name, run in runs.items())
    tokens = ", ".join(f"{run['tokens']:,}" for run in runs.values())
    yield from (
        "# Three domains, two kinds of balance",
        "",
        "<!-- Written by `moesaic lab three-domains`: run it again to change it. -->",
        "",
        "DeepSeek-V3's report shows that experts of a model balanced without a loss take sides by domain more than",
        "those of a model balanced by an auxiliary loss (section 4.5 and figure 9: Wikipedia, code and mathematics).",
        "Does it show in a model that trains in minutes?",
        "",
        "```console",
        "$ moesaic lab three-domains --data ../shared/data --work runs/three --out docs/studies/three-domains.md",
        "```",
        "",
        f"Two models of DeepSeek-V3's design: {plan['layers']} layers of width {plan['width']}, {plan['num_experts']} "
        f"routed experts of hidden width {plan['hidden']}, {plan['top_k']} for each token beside a shared one; "
        f"{plan['steps']:,} steps of 2,048 tokens. One seed, the same text in the same order, and one difference: "
        f"what balances them ({strengths}).",
        "",
        f"![Share of each domain's choices that each expert took, over chance]({drawing})",
        "",
        "Colour says how much of a domain's choices an expert took, over the even share. Orange: more. Read from "
        f"{tokens} held-out tokens.",
        "",
        *_table(runs),
        *_verdict(runs),
        "## What it does not say",
        "",
        "One seed, models of a few million parameters and a few million tokens: figures of the paper are of 16 billion "
        "parameters and a trillion tokens. The strength of each balance was set by hand, once, and how far experts can "
        "take sides depends on it.",
    )


def _terms(terms: Mapping[str, float]) -> str:
    return ", ".join(f"`{name}={value:g}`" for name, value in terms.items())


def _table(runs: Mapping[str, Any]) -> Iterator[str]:
    yield "| | " + " | ".join(runs) + " |"
    yield "|---|" + "---:|" * len(runs)
    rows: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("held-out bits per byte, mean over domains", lambda run: f"{run['bits_per_byte']['mean']:.4f}"),
        ("busiest expert over mean, all text, mean over layers", lambda run: f"{np.mean(run['max_over_mean']):.2f}"),
        (
            "the same within one domain, mean over domains and layers",
            lambda run: f"{np.mean(list(run['max_over_mean_by_domain'].values())):.2f}",
        ),
        ("the expert tells of the domain, bits, mean over layers", lambda run: f"{_mean(run, 'bits'):.4f}"),
        ("by chance (domains of whole texts shuffled)", lambda run: f"{_mean(run, 'chance'):.4f}"),
        ("domains with an expert at twice chance or more, of all domains and layers", _sides),
    ]
    rows += [
        (f"first choice guessed from {name}, mean over layers", partial(_guessed, place=place))
        for place, name in enumerate(WORDS_OR_SUBJECTS)
    ]
    for what, value in rows:
        yield f"| {what} | " + " | ".join(value(run) for run in runs.values()) + " |"
    yield ""


def _mean(run: Mapping[str, Any], name: str) -> float:
    return float(np.mean([one[name] for one in run["about_domain"]]))


def _sides(run: Mapping[str, Any]) -> str:
    busiest_LQ = np.array(run["times_chance"], dtype=np.float64).max(axis=2)
    return f"{int((busiest_LQ >= 2).sum())} of {busiest_LQ.size}"


def _guessed(run: Mapping[str, Any], *, place: int) -> str:
    measured = run["words_or_subjects"]
    return f"{np.mean(measured['value'][place]):.1%} (chance {np.mean(measured['chance'][place]):.1%})"


def _verdict(runs: Mapping[str, Any]) -> Iterator[str]:
    (one, first), (two, second) = runs.items()
    told = {name: _mean(run, "bits") for name, run in runs.items()}
    more = one if told[one] > told[two] else two
    less = two if more == one else one
    layers = [a["bits"] < b["bits"] for a, b in zip(first["about_domain"], second["about_domain"], strict=True)]
    agree = sum(layers) if more == two else len(layers) - sum(layers)
    better = one if first["bits_per_byte"]["mean"] < second["bits_per_byte"]["mean"] else two
    gap = abs(first["bits_per_byte"]["mean"] - second["bits_per_byte"]["mean"])
    yield from (
        "## What holds",
        "",
        f"Experts tell more of the domain with **{more}**: {told[more]:.3f} bits beside {told[less]:.3f} with {less}, "
        f"and so in {agree} of {len(layers)} layers. {_claim(more)} The model with {better} predicts held-out text "
        f"better, by {gap:.4f} bits per byte; with one seed that is no finding.",
        "",
    )


def _claim(more: str) -> str:
    if more == "loss-free":
        return "That is the direction that the report claims."
    return "That is not the direction that the report claims."
