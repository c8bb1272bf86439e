"""The options of verbs that turn a dense model into a mixture: which recipe, where, and with which numbers."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

Recipe = Annotated[str, typer.Option(help="See `moesaic recipes`.")]
NumExperts = Annotated[
    int | None, typer.Option(help="Experts of a layer; the recipe's number if left out.", show_default=False)
]
TopK = Annotated[
    int | None, typer.Option(help="Experts that a token meets; the recipe's number if left out.", show_default=False)
]
Layers = Annotated[str, typer.Option(help="Networks that become layers: all, every-2, or indices 1,3.")]
Seed = Annotated[int, typer.Option(help="Of routers, and of what else is drawn.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="An option of the recipe, key=value; repeatable.", show_default=False),
]


def layers_of(text: str) -> str | list[int]:
    """The layers as :func:`moesaic.sparsify` takes them."""
    return [int(one) for one in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else text


def options_of(texts: list[str] | None) -> dict[str, Any]:
    """Options of a recipe: numbers, true, false and null as JSON has them, anything else as text.

    Raises:
        ConfigError: if one is not key=value.
    """
    from moesaic.core.errors import ConfigError

    found: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option must be key=value, got {text!r}. Write for example --option jitter=0.01.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
