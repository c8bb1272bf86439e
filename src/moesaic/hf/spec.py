"""What a sparse model writes into its ``config.json``, and how its blocks are built from that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from moesaic import recipes
from moesaic.balance import BiasRule, LossTerm
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.hf.block import SparseBlock

FORMAT_VERSION = 1
"""The newest form of the ``moesaic`` entry in ``config.json`` that this version writes and reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """The numbers of one MoE layer.

    Attributes:
        width: D.
        hidden: F of one expert.
        options: every option of the recipe as it was built, so that a default that changes later changes no folder.
    """

    width: int
    hidden: int
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseSpec:
    """Which recipe a model follows, and where.

    Attributes:
        recipe: its name.
        layers: numbers of each MoE layer by module path below the model's ``base_model``, so that a folder can be
            read with another head.
        aux_coefficients: of the balance losses, by name; the recipe's own where one is left out.
    """

    recipe: str
    layers: Mapping[str, LayerSpec]
    aux_coefficients: Mapping[str, float]

    def __post_init__(self) -> None:
        terms = [term.name for term in recipes.get(self.recipe).balance if isinstance(term, LossTerm)]
        unknown = sorted(set(self.aux_coefficients) - set(terms))
        if unknown:
            raise ConfigError(
                f"aux_coefficients must name losses of recipe {self.recipe} ({', '.join(terms) or 'it has none'}), "
                f"got {', '.join(unknown)}. Leave out what the recipe does not have."
            )
        for name, value in self.aux_coefficients.items():
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(
                    f"The coefficient of balance loss {name} must be a finite number of at least 0, got {value!r}. "
                    "0 turns the loss off."
                )
        for path, layer in self.layers.items():
            for name, value in layer.options.items():
                if not isinstance(value, str | int | float | None):
                    raise ConfigError(
                        f"Options must be numbers, strings, True, False or None, so that they can be saved with the "
                        f"model, got {name}={value!r} for {path}. Give the name or the number that stands for it."
                    )

    def block(self, path: str, **unsaved: Any) -> SparseBlock:
        """Build the block of ``path`` with freshly drawn weights; ``unsaved`` are options beside its own."""
        recipe, layer = recipes.get(self.recipe), self.layers[path]
        terms = [
            replace(term, coefficient=self.aux_coefficients.get(term.name, term.coefficient))
            for term in recipe.balance
            if isinstance(term, LossTerm)
        ]
        return SparseBlock(
            recipe.layer(layer.width, hidden=layer.hidden, **layer.options, **unsaved),
            terms=tuple(terms),
            rules=tuple(rule for rule in recipe.balance if isinstance(rule, BiasRule)),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe,
            "aux_coefficients": dict(self.aux_coefficients),
            "layers": {path: asdict(layer) for path, layer in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, values: Any) -> SparseSpec:
        """Read what ``to_dict`` wrote.

        Raises:
            CheckpointError: if it is damaged, or of a newer version.
        """
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"This model's config.json has moesaic format version {version}, and this Moesaic reads up to "
                f"{FORMAT_VERSION}. Update Moesaic."
            )
        try:
            return cls(
                recipe=values["recipe"],
                aux_coefficients=dict(values["aux_coefficients"]),
                layers={path: LayerSpec(**layer) for path, layer in values["layers"].items()},
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                "This model's config.json has no readable 'moesaic' entry, so its layers cannot be built "
                f"({type(error).__name__}: {error}). Copy the folder again from where it was saved."
            ) from error
        except ConfigError as error:
            raise CheckpointError(
                f"This model's config.json asks for what this Moesaic does not have. {error}"
            ) from error
