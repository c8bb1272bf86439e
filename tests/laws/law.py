"""The laws by number, and which recipe each is tried on. The table in docs/laws.md is written from a run of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moesaic import MoELayer, recipes
from moesaic.dispatch import Sort
from moesaic.recipes import Recipe
from moesaic.routers import TokenChoiceRouter
from tests.laws.settings import Setting, plain

LAWS = {
    1: "The rows that a loss counts are the rows that dispatch gets",
    2: "Padding takes no capacity, load, controller step or loss",
    3: "Evaluation is deterministic",
    4: "A selection bias moves choices, never weights",
    5: "Ties break the same way every time",
    6: "One choice trains the router, or is refused",
    7: "Scaling all scores down lowers no balance loss",
    8: "A recomputed forward routes as the first did",
    9: "Every loss reaches the router's weights",
    10: "The gradient does not depend on how the batch is cut",
    11: "A layer's loss knows that layer alone",
    12: "Each loss has the value at balance that it states",
    13: "Controllers step once, in float32, and are saved",
    14: "Dropped rows are known one by one, and reported",
    15: "An idle expert has zero gradients, not none",
    16: "Indices are 64 bits wide",
    17: "Sums are deterministic, and taken in float32",
    18: "A checkpoint is used up exactly, or refused",
    20: "Training resumes bit by bit",
    21: "Statistics come from the router's own rows",
    22: "Dead experts count in every mean",
    23: "No layer knows of another, nor changes the package",
}
# Laws 19 (receipts of conversions) and 24 (tests use what they are given) are about other things than recipes.

NOT_FOR: dict[int, dict[str, str]] = {
    6: dict.fromkeys(("hash", "thor", "pangu-sigma"), "it has no router to train")
    | {"lory": "a sequence of one segment trains no router; its own tests have several"},
    10: {"expert-choice": "its experts choose among the whole batch"},
}


def _table(recipe: Recipe) -> bool:
    return isinstance(plain(recipe.name).layer(), MoELayer)


def _takes_a_bias(recipe: Recipe) -> bool:
    return isinstance(getattr(plain(recipe.name).layer(), "router", None), TokenChoiceRouter)


def _drops(recipe: Recipe) -> bool:
    layer = plain(recipe.name).layer()
    return isinstance(layer, MoELayer) and not isinstance(layer.dispatch, Sort)


def why_not(law: int, recipe: Recipe) -> str:
    """Why a law has nothing to say about a recipe; empty where it has."""
    no_table = "its routing is not a table: there is nothing to dispatch"
    no_loss = "it has no balance loss"
    reasons: dict[int, Callable[[], str]] = {
        1: lambda: "" if _table(recipe) else no_table,
        4: lambda: "" if _takes_a_bias(recipe) else "no bias can steer its choice",
        7: lambda: "" if recipe.losses else no_loss,
        9: lambda: "" if recipe.losses else no_loss,
        10: lambda: "its capacity is a rule about one batch" if _drops(recipe) else "",
        11: lambda: "" if recipe.losses else no_loss,
        12: lambda: "" if recipe.losses else no_loss,
        13: lambda: "" if recipe.rules else "it has no controller",
        14: lambda: "" if _drops(recipe) else "it drops nothing",
    }
    return NOT_FOR.get(law, {}).get(recipe.name, "") or reasons.get(law, lambda: "")()


def every_recipe(law: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Try one law on each recipe that it can be tried on."""
    settings: list[Setting] = [plain(name) for name in recipes.names() if not why_not(law, recipes.get(name))]

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        tried = pytest.mark.parametrize("setting", settings, ids=lambda setting: setting.recipe_name)
        return pytest.mark.law(law)(tried(test))

    return mark
