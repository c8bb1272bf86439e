"""``moesaic recipes``: the published designs that can be trained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moesaic.recipes import Recipe

app = typer.Typer(
    help="List the recipes: published designs of Mixture-of-Experts layers.",
    epilog="Example: moesaic recipes show mixtral",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_SETTINGS = ("num_experts", "top_k")
_CAUSALITY = {
    "causal": "no",
    "in evaluation": "in training only; evaluation and generation use the causal form of its paper",
    "never": "always, so nothing can be generated from a causal language model of it",
}


@app.callback()
def list_recipes(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the recipes: published designs of Mixture-of-Experts layers."""
    if context.invoked_subcommand is not None:
        return
    from moesaic import recipes

    found = [recipes.get(name) for name in recipes.names()]
    if as_json:
        print(json.dumps([_figures(recipe) for recipe in found], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title="moesaic train --recipe NAME")
    for column in ("name", "year", "how tokens find experts", "balance", "published"):
        # Names are typed: they must not be broken.
        drawn.add_column(column, no_wrap=column in ("name", "year"))
    for recipe in found:
        balance = ", ".join(_short(term) for term in _figures(recipe)["balance"]) or "none"
        drawn.add_row(recipe.name, str(recipe.year), recipe.router, balance, _where(recipe.citation))
    Console().print(drawn)


def _where(citation: str) -> str:
    """First author and arXiv number of a citation, or the authors alone; ``show`` has all of it."""
    authors, _, _ = citation.partition(". ")
    number = re.search(r"arXiv:\S+\d", citation)
    first = authors.split(",")[0].removesuffix(" et al")
    return f"{first} {number[0]}" if number else authors


@app.command(epilog="Example: moesaic recipes show deepseek-v3")
def show(
    name: Annotated[str, typer.Argument(help="Of the recipe.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show one recipe: formula, options with their defaults and sources, balance, and where implementations differ."""
    from moesaic import recipes

    recipe = recipes.get(name)
    if as_json:
        print(json.dumps(_figures(recipe), indent=1))
        return
    print("\n".join(_page(recipe)))


def _page(recipe: Recipe) -> Iterator[str]:
    yield f"{recipe.name} ({recipe.year}): {recipe.summary}"
    yield recipe.citation
    yield ""
    yield from recipe.formula.splitlines()
    yield ""
    yield f"Looks at later tokens: {_CAUSALITY[recipe.causality]}"
    options = dict(recipe.options)
    sizes = [(f"--{key.replace('_', '-')} {options.pop(key)}", key) for key in _SETTINGS if key in options]
    yield "\nSettings of moesaic train, with what was published:"
    yield from _lines(recipe, sizes)
    yield "\nOptions, with --option key=value (null: worked out from the others):"
    yield from _lines(recipe, [(f"{key}={json.dumps(default)}", key) for key, default in options.items()])
    yield "\nBalance:"
    yield from [f"  {_in_words(term)}" for term in _figures(recipe)["balance"]] or ["  none"]
    if recipe.differences:
        yield "\nWhere implementations differ:"
        yield from fill(recipe.differences, 100, initial_indent="  ", subsequent_indent="  ").splitlines()


def _lines(recipe: Recipe, options: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Each option as it is typed, and where its default comes from."""
    width = max((len(typed) for typed, _ in options), default=0)
    for typed, key in options:
        yield f"  {typed:<{width}}  {recipe.sources.get(key, '')}".rstrip()


def _in_words(term: dict[str, Any]) -> str:
    if term["kind"] == "LossTerm":
        factor = f"times {term['coefficient']}" + (", times a coefficient that follows the load" * term["adaptive"])
        return f"{term['loss']}, {factor}; another coefficient with --aux {term['name']}=NUMBER"
    numbers = ", ".join(f"{key} {value}" for key, value in term.items() if key != "kind")
    return f"{_short(term)}, stepped once per optimizer step" + (f": {numbers}" if numbers else "")


def _short(term: dict[str, Any]) -> str:
    """A term in a word: the loss's name, or the rule's without its suffix."""
    return (
        str(term["name"]) if term["kind"] == "LossTerm" else f"{term['kind'].removesuffix('Rule').lower()} controller"
    )


def _figures(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "year": recipe.year,
        "summary": recipe.summary,
        "citation": recipe.citation,
        "router": recipe.router,
        "formula": recipe.formula,
        "causality": recipe.causality,
        "options": recipe.options,
        "sources": dict(recipe.sources),
        "differences": recipe.differences,
        "balance": [_term(term) for term in recipe.balance],
    }


def _term(term: Any) -> dict[str, Any]:
    """Give a balance term's numbers and names; functions go by their names."""
    values = {field.name: getattr(term, field.name) for field in fields(term)}
    return {"kind": type(term).__name__, **{name: _plain(value) for name, value in values.items()}}


def _plain(value: Any) -> Any:
    while isinstance(value, partial):
        value = value.func
    return value if isinstance(value, int | float | str | None) else getattr(value, "__name__", repr(value))
