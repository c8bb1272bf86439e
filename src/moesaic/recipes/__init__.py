"""Published designs by name. Reading this folder in the order of the table is reading the history of the field."""

from __future__ import annotations

from moesaic.core.errors import ConfigError
from moesaic.recipes.deepseek_v3 import DEEPSEEK_V3
from moesaic.recipes.mixtral import MIXTRAL
from moesaic.recipes.recipe import Recipe
from moesaic.recipes.switch import SWITCH

__all__ = ["Recipe", "get", "names"]

_RECIPES = {recipe.name: recipe for recipe in (SWITCH, MIXTRAL, DEEPSEEK_V3)}


def names() -> list[str]:
    """The names of all recipes, oldest first."""
    return list(_RECIPES)


def get(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in _RECIPES:
        raise ConfigError(
            f"recipe must be one of {', '.join(_RECIPES)}, got {name!r}. List them with `moesaic recipes`."
        )
    return _RECIPES[name]
