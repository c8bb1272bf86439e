"""What a recipe is: a published design as numbers in, layer and balance terms out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from moesaic.balance import BalanceTerm
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init, normal
from moesaic.layer import MoELayer


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A published Mixture-of-Experts design.

    Attributes:
        name: what commands and checkpoints call it.
        year: of publication.
        summary: one line on what is its own.
        citation: where it was published.
        build: makes the layer; its keyword arguments, with the published defaults, are the recipe's options.
        balance: losses and controllers that belong to the design.
    """

    name: str
    year: int
    summary: str
    citation: str
    build: Callable[..., MoELayer]
    balance: tuple[BalanceTerm, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Every option of :meth:`layer` with its published default."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def layer(
        self, width: int, *, hidden: int, num_experts: int | None = None, top_k: int | None = None, **options: Any
    ) -> MoELayer:
        """Build the layer for a model of any width.

        Args:
            width: D, the model's width.
            hidden: F, the hidden width of one expert.
            num_experts: routed experts; None for the published number.
            top_k: experts per token; None for the published number.
            **options: anything in :attr:`options`.
        Raises:
            ConfigError: if a number is out of range or no number, or an option is unknown.
        """
        if num_experts is not None:
            options["num_experts"] = num_experts
        if top_k is not None:
            options["top_k"] = top_k
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            raise ConfigError(
                f"recipe {self.name} has the options {', '.join(self.options)}, got {', '.join(unknown)}. "
                "Leave out what the recipe does not have."
            )
        sizes = {"width": width, "hidden": hidden} | {
            name: options[name] for name in ("num_experts", "top_k") if name in options
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{name} must be a whole number of at least 1, got {value!r}. Give a positive {name}."
                )
        self._check_numbers(options)
        return self.build(width, hidden=hidden, **options)

    def _check_numbers(self, options: dict[str, Any]) -> None:
        """Refuse what is no number where one is needed, as ``--option capacity_factor=high`` or a NaN."""
        hints = get_type_hints(self.build)
        for name, value in options.items():
            kinds = get_args(hints[name]) or (hints[name],)
            if not {int, float} & set(kinds) or (value is None and type(None) in kinds):
                continue
            needed = "a finite number" if float in kinds else "a whole number"
            fits = isinstance(value, (int, float) if float in kinds else int) and not isinstance(value, bool)
            if not fits or not math.isfinite(value):
                raise ConfigError(
                    f"option {name} of recipe {self.name} must be {needed}, got {value!r}. "
                    f"Leave it out for the published {self.options[name]}."
                )


def drawn(init_std: float | None, published: Init) -> Init:
    """How a recipe draws its weights: as published, or from a normal of the width that the user asked for."""
    return published if init_std is None else normal(init_std)
