"""``moesaic recipes``: the published designs that can be trained."""

from __future__ import annotations

import json
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
    for column in ("name", "year", "what it does"):
        drawn.add_column(column)
    for recipe in found:
        drawn.add_row(recipe.name, str(recipe.year), recipe.summary)
    Console().print(drawn)


@app.command(epilog="Example: moesaic recipes show deepseek-v3")
def show(
    name: Annotated[str, typer.Argument(help="Of the recipe.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show one recipe: its source, its options with their defaults, its balance terms."""
    from moesaic import recipes

    figures = _figures(recipes.get(name))
    if as_json:
        print(json.dumps(figures, indent=1))
        return
    print(f"{figures['name']} ({figures['year']}): {figures['summary']}\n{figures['citation']}")
    options = dict(figures["options"])
    print("\nSettings of moesaic train, with what was published:")
    for key in ("num_experts", "top_k"):
        print(f"  --{key.replace('_', '-')} {options.pop(key)}")
    print("\nOptions, with --option key=value (null: worked out from the others):")
    for key, default in options.items():
        print(f"  {key}={json.dumps(default)}")
    print("\nBalance:")
    for term in figures["balance"]:
        print(f"  {_in_words(term)}")


def _in_words(term: dict[str, Any]) -> str:
    if term["kind"] == "LossTerm":
        return f"{term['loss']}, times {term['coefficient']}; another coefficient with --aux {term['name']}=NUMBER"
    return f"selection bias, stepped once per optimizer step: rule {term['rule']}, rate {term['rate']}"


def _figures(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "year": recipe.year,
        "summary": recipe.summary,
        "citation": recipe.citation,
        "options": recipe.options,
        "balance": [_term(term) for term in recipe.balance],
    }


def _term(term: Any) -> dict[str, Any]:
    """Give a balance term's numbers and names; functions go by their names."""
    from dataclasses import fields

    values = {field.name: getattr(term, field.name) for field in fields(term)}
    plain = {name: value if isinstance(value, int | float | str) else value.__name__ for name, value in values.items()}
    return {"kind": type(term).__name__, **plain}
