"""Write the catalogue of recipes, docs/catalogue.md, from what the recipes say about themselves.

    python tools/catalogue.py docs/catalogue.md

A test compares the page with what this would write.
"""

import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moesaic import recipes
from moesaic.recipes import Recipe

HEAD = """\
# Catalogue of recipes

<!-- Written by `make pages` from src/moesaic/recipes: change it there. -->

All designs by year, as `moesaic recipes show NAME` tells them: what each computes, where its numbers come from, and
where implementations differ. [Recipes](recipes.md) says how to use one; [Recipes and laws](laws.md) what each has been
held to; [Gallery](gallery.md) how each trains.

T are the tokens, E the experts, K the choices of a token; x is a token, W the router's matrix, FFN a network of two
matrices and SwiGLU one of three; f<sub>e</sub> is the share of rows that expert e got and P<sub>e</sub> its mean
probability.
"""
CAUSALITY = {
    "causal": "A token's experts never depend on later tokens.",
    "in evaluation": (
        "In training a token's experts depend on later tokens too; evaluation and generation use the causal form that "
        "its paper gives."
    ),
    "never": (
        "A token's experts depend on later tokens, always: it is made for encoders, and Moesaic refuses to generate "
        "from a causal language model of it."
    ),
}
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5}|[a-z-]+/\d{7})")


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_overview(), *(line for name in recipes.names() for line in _entry(recipes.get(name)))])


def _overview() -> Iterator[str]:
    yield "| recipe | year | how tokens find experts | balance |"
    yield "|---|---|---|---|"
    for name in recipes.names():
        recipe = recipes.get(name)
        balance = ", ".join(_short(term) for term in recipe.balance) or "none"
        yield f"| [`{name}`](#{_anchor(name)}) | {recipe.year} | {_cell(recipe.router)} | {balance} |"
    yield ""


def _entry(recipe: Recipe) -> Iterator[str]:
    yield f"## {recipe.name}"
    yield ""
    yield f"**{recipe.year}**: {recipe.summary}."
    yield ""
    yield ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", recipe.citation.rstrip(".")) + "."
    yield ""
    yield "```text"
    yield recipe.formula
    yield "```"
    yield ""
    yield "| option | default | source |"
    yield "|---|---|---|"
    for option, default in recipe.options.items():
        if option != "kernel":
            shown = "worked out" if default is None else f"`{json.dumps(default)}`"
            yield f"| `{option}` | {shown} | {_cell(recipe.sources.get(option, ''))} |"
    for term in recipe.balance:
        yield f"| balance | {_long(term)} | |"
    yield ""
    yield f"{CAUSALITY[recipe.causality]}"
    yield ""
    if recipe.differences:
        yield f"*Where implementations differ.* {recipe.differences}"
        yield ""


def _anchor(name: str) -> str:
    """What GitHub and mkdocs make of the heading."""
    return re.sub(r"[^\w-]", "", name)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _short(term: Any) -> str:
    return str(term.name) if hasattr(term, "name") else type(term).__name__


def _long(term: Any) -> str:
    if not hasattr(term, "name"):
        return f"`{term}`"
    loss = term.loss.func if isinstance(term.loss, partial) else term.loss
    moved = ", times a coefficient that a controller moves" if term.adaptive else ""
    return f"`{getattr(loss, '__name__', loss)}` × {term.coefficient:g}{moved}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
