"""What a sparse model writes into its ``config.json``, and how its blocks are built from that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from torch import nn

from moesaic import recipes
from moesaic.balance import BalanceTerm, BiasRule, LossTerm, named
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.hf.block import SparseBlock

FORMAT_VERSION = 2
"""The newest form of the ``moesaic`` entry in ``config.json`` that this version writes and reads.

2 has ``balance``; a model that keeps its recipe's balance is written in form 1, which older versions read.
"""


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
        aux_coefficients: of the recipe's balance losses, by name; its own where one is left out.
        balance: what takes the place of the recipe's balance, as :func:`moesaic.balance.named` reads it; None keeps
            the recipe's.
    """

    recipe: str
    layers: Mapping[str, LayerSpec]
    aux_coefficients: Mapping[str, float]
    balance: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        terms = [term.name for term in recipes.get(self.recipe).losses]
        if self.balance is not None:
            named(self.balance)
            if self.aux_coefficients:
                raise ConfigError(
                    "aux_coefficients change the recipe's balance and balance replaces it, got both: "
                    f"{', '.join(self.aux_coefficients)} and {', '.join(self.balance) or 'nothing'}. "
                    "Give all coefficients in balance."
                )
        unknown = sorted(set(self.aux_coefficients) - set(terms))
        if unknown:
            raise ConfigError(
                f"aux_coefficients must name losses of recipe {self.recipe} ({', '.join(terms) or 'it has none'}), "
                f"got {', '.join(unknown)}. Leave out what the recipe does not have, or replace its balance "
                "with sparsify's balance."
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

    @property
    def terms(self) -> tuple[BalanceTerm, ...]:
        """The balance of every layer: the recipe's, with the coefficients asked for, or what replaces it."""
        if self.balance is not None:
            return named(self.balance)
        given = self.aux_coefficients
        return tuple(
            replace(term, coefficient=given.get(term.name, term.coefficient)) if isinstance(term, LossTerm) else term
            for term in recipes.get(self.recipe).balance
        )

    def block(self, path: str, **unsaved: Any) -> SparseBlock:
        """Build the block of ``path`` with freshly drawn weights; ``unsaved`` are options beside its own."""
        numbers = self.layers[path]
        layer = recipes.get(self.recipe).layer(numbers.width, hidden=numbers.hidden, **numbers.options, **unsaved)
        for term in self.terms:
            if isinstance(term, BiasRule):
                term.prepare(cast(nn.Module, layer))
        return SparseBlock(
            layer,
            terms=tuple(term for term in self.terms if isinstance(term, LossTerm)),
            rules=tuple(term for term in self.terms if not isinstance(term, LossTerm)),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = {
            "format_version": FORMAT_VERSION if self.balance is not None else 1,
            "recipe": self.recipe,
            "aux_coefficients": dict(self.aux_coefficients),
            "layers": {path: asdict(layer) for path, layer in self.layers.items()},
        }
        return values if self.balance is None else values | {"balance": dict(self.balance)}

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
                balance=values.get("balance"),
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
