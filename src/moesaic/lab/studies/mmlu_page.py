"""The study of 57 subjects as a page: load of three layers, who stands out, and words with an expert of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.lab.classic.drawn import svg
from moesaic.lab.page import text
from moesaic.lab.studies.heat import Panel, paint
from moesaic.lens.measures import uniform_repetition

_ROW_INCHES = 0.115


def write(found: Mapping[str, Any], model: str, out: Path) -> list[Path]:
    """Write the page, and beside it the picture and the figures as JSON; give the three.

    Args:
        found: what :func:`moesaic.lab.studies.mmlu.study` gives.
        model: what was asked, in words.
        out: the page.
    Raises:
        BackendError: without matplotlib.
    """
    drawing, figures = out.with_suffix(".svg"), out.with_suffix(".json")
    height = 1.6 + _ROW_INCHES * len(found["domains"])
    panels = [
        Panel(title=_called(layer), rows=found["domains"], times=np.array(layer["times_chance"], dtype=np.float64))
        for layer in found["layers"]
    ]
    text(drawing, svg("mmlu", (7.2, height), partial(paint, panels=panels, columns=len(panels))))
    text(figures, json.dumps(found, indent=1) + "\n")
    text(out, "\n".join(_words(found, model, drawing.name)) + "\n")
    return [out, drawing, figures]


def _called(layer: Mapping[str, Any]) -> str:
    return str(layer["name"]).removesuffix(".mlp").removeprefix("model.").replace("layers.", "layer ")


def _words(found: Mapping[str, Any], model: str, drawing: str) -> Iterator[str]:
    yield from (
        "# Who takes which subject",
        "",
        "<!-- Written by `moesaic lab mmlu`: run it again to change it. -->",
        "",
        "People let Mixtral read the questions of MMLU, 57 school subjects, and look at the load of its first, middle",
        "and last layer: how far apart are the busiest and the idlest expert, which subjects single an expert out, and",
        "which words have a favourite? The same questions to a mixture that was made from real weights:",
        "",
        "```console",
        "$ moesaic lab mmlu --of-each 16 --model runs/pretrained/models/upcycled-two-copies-trained "
        "--data ../shared/data --out docs/studies/mmlu.md",
        "```",
        "",
        f"{model} {found['questions']:,} test questions with their choices, {found['tokens']:,} tokens, "
        f"{len(found['domains'])} subjects; questions are not in the text that the model was trained on.",
        "",
        "## Load",
        "",
        *_load(found["layers"]),
        f"![Share of each subject's choices that each expert took, over chance]({drawing})",
        "",
        "## Subjects that single out an expert",
        "",
        *_standouts(found["layers"]),
        "## Words or subjects?",
        "",
        *_information(found),
        "## Words with a favourite expert",
        "",
        *_tokens(found["layers"]),
        "## Staying with an expert",
        "",
        *_repetition(found),
    )


def _load(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    experts = range(len(layers[0]["load"]))
    yield "| | " + " | ".join(f"expert {e}" for e in experts) + " | busiest over idlest |"
    yield "|---|" + "---:|" * (len(experts) + 1)
    for layer in layers:
        shares = " | ".join(f"{share:.1%}" for share in layer["load"])
        low = min(layer["load"])
        ratio = f"{max(layer['load']) / low:.2f}" if low else "an expert got nothing"
        yield f"| {_called(layer)} | {shares} | {ratio} |"
    yield ""
    yield f"Chance is {1 / len(experts):.1%} for each."
    yield ""


def _standouts(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "An expert's share of a subject's choices above its share of the mean subject's. A subject stands out where "
        "that is more than the clearest of all subjects has in 95 % of 1,000 shuffles, in which whole questions "
        "exchange their subjects."
    )
    yield ""
    yield "| | subjects that stand out | the clearest: expert, share of the subject (of the mean subject), n | beyond |"
    yield "|---|---:|---|---:|"
    for layer in layers:
        told = "; ".join(
            f"{one['subject'].replace('_', ' ')}: {one['expert']}, {one['share']:.1%} ({one['average']:.1%}), "
            f"{one['count']:,}"
            for one in layer["standouts"][:4]
        )
        number_of = f"{len(layer['standouts'])} of {len(layer['times_chance'])}"
        yield f"| {_called(layer)} | {number_of} | {told or 'none'} | {layer['bound']:.1%} |"
    yield ""


def _information(found: Mapping[str, Any]) -> Iterator[str]:
    about_domain, about_token = found["about_domain"], found["about_token"]
    words = found["words_or_subjects"]["value"]
    both = [
        f"| {place} | {subject['bits']:.4f} ({subject['chance']:.4f}) | {token['bits']:.3f} ({token['chance']:.3f}) | "
        f"{words[0][place]:.1%} | {words[1][place]:.1%} | {words[2][place]:.1%} |"
        for place, (subject, token) in enumerate(zip(about_domain, about_token, strict=True))
    ]
    yield "Bits that the expert tells about the subject and about the token (by chance), and how often the first choice"
    yield "is guessed right in other questions from the token, from the subject, and from both."
    yield ""
    yield "| MoE layer | subject | token | from the token | from the subject | from both |"
    yield "|---:|---:|---:|---:|---:|---:|"
    yield from both
    token_wins = sum(words[0][place] > words[1][place] for place in range(len(both)))
    gain = float(np.mean(np.array(words[2]) - np.array(words[0])))
    yield ""
    yield (
        f"The token guesses better than the subject in {token_wins} of {len(both)} layers; to know the subject as well "
        f"changes the rate by {100 * gain:+.1f} points on average. "
        + (
            "The routers know words more than subjects, as the Mixtral paper found of its own."
            if token_wins > len(both) / 2
            else "Here subjects count for more than words."
        )
    )
    yield ""


def _tokens(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "Of tokens that occur 30 times or more, the share of their first choices that goes to their favourite"
    yield "(chance: the expert's share of all first choices), n. First those that are most faithful, by the lower end"
    yield "of a 95 % interval; then some that are always asked about."
    yield ""
    yield "| | most faithful | asked about |"
    yield "|---|---|---|"
    for layer in layers:
        cells = [", ".join(map(_token, layer["tokens"][kind])) or "too rare" for kind in ("faithful", "asked")]
        yield f"| {_called(layer)} | {cells[0]} | {cells[1]} |"
    yield ""


def _token(row: Mapping[str, Any]) -> str:
    # A table's own sign, and a tick that would end the code.
    shown = str(row["token"]).replace("|", "¦").replace("`", "'")
    return f"`{shown}` to {row['expert']}: {row['share']:.0%} ({row['chance']:.0%}), {row['n']:,}"


def _repetition(found: Mapping[str, Any]) -> Iterator[str]:
    first, either = found["repetition"], found["repetition_either"]
    experts, top_k = len(found["layers"][0]["load"]), found["top_k"]
    yield (
        "How often a token goes to an expert of the token before it. Chance is that of the layer's own loads; even "
        f"loads would give {uniform_repetition(experts, top_k, first_only=True):.1%} and "
        f"{uniform_repetition(experts, top_k, first_only=False):.1%}."
    )
    yield ""
    yield "| MoE layer | same first choice | by chance | a choice in common | by chance |"
    yield "|---:|---:|---:|---:|---:|"
    rows = zip(first["value"], first["chance"], either["value"], either["chance"], strict=True)
    for place, (same, by_chance, common, common_by_chance) in enumerate(rows):
        yield f"| {place} | {same:.1%} | {by_chance:.1%} | {common:.1%} | {common_by_chance:.1%} |"
    yield ""
    yield (
        "Mixtral's own table has 14 %, 24 to 28 % and 20 to 26 % for the first choice in its layers 0, 15 and 31, "
        "against 12.5 % by chance."
    )
