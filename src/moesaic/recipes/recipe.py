"""What a recipe is: a published design as numbers in, layer and balance terms out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, get_type_hints

from torch import Tensor

from moesaic.balance import BalanceTerm, LossTerm, Rule
from moesaic.core.context import Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init, normal
from moesaic.core.routing import Routing


class Layer(Protocol):
    """What every recipe builds: a :class:`~moesaic.MoELayer`, or one of the layers whose routing is not a table."""

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""

    @property
    def num_params(self) -> int:
        """Parameters of the layer."""

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets."""

    def __call__(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = ...) -> tuple[Tensor, Routing]:
        """Tokens to outputs, and who went where."""

    def kernel_report(self) -> str:
        """Which kernel the experts run on, and why."""


Causality = Literal["causal", "in evaluation", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A published Mixture-of-Experts design.

    Attributes:
        name: what commands and checkpoints call it.
        year: of publication.
        summary: one line on what is its own.
        citation: where it was published.
        router: how tokens find experts, in a few words.
        formula: the layer and its losses in plain text, a line for each step.
        sources: where each default comes from, by option: section, equation, table, or whose code.
        differences: what differs between the paper and well-known code, and which of them this follows.
        build: makes the layer; its keyword arguments, with the published defaults, are the recipe's options.
        balance: losses and controllers that belong to the design.
        causality: whether a token's experts and weights may depend on later tokens of its sequence. "causal": never
            do. "in evaluation": only in training, as the paper's own causal form for inference is used otherwise.
            "never": always, so that a causal language model cannot be generated from. (A capacity that drops rows
            makes any design depend on the rest of its batch; that is not meant here.)
        by_depth: for designs that differ by layer: options, index of the layer and number of MoE layers to options.
    """

    name: str
    year: int
    summary: str
    citation: str
    router: str
    formula: str
    build: Callable[..., Layer]
    balance: tuple[BalanceTerm, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    differences: str = ""
    causality: Causality = "causal"
    by_depth: Callable[[dict[str, Any], int, int], dict[str, Any]] | None = None

    @property
    def losses(self) -> tuple[LossTerm, ...]:
        """The balance losses of the design."""
        return tuple(term for term in self.balance if isinstance(term, LossTerm))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What builds the controllers of the design."""
        return tuple(term for term in self.balance if not isinstance(term, LossTerm))

    @property
    def options(self) -> dict[str, Any]:
        """Every option of :meth:`layer` with its published default."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def layer(
        self, width: int, *, hidden: int, num_experts: int | None = None, top_k: int | None = None, **options: Any
    ) -> Layer:
        """Build the layer for a model of any width.

        Args:
            width: D, the model's width.
            hidden: F, the hidden width of one expert.
            num_experts: routed experts; None for the published number.
            top_k: experts per token; None for the published number.
            **options: anything in :attr:`options`.
        Raises:
            ConfigError: if a number is out of range, or an option is unknown or not of its kind.
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
        self._check_kinds(options)
        return self.build(width, hidden=hidden, **options)

    def _check_kinds(self, options: dict[str, Any]) -> None:
        """Refuse what is not of the kind that is needed, as ``--option capacity_factor=high`` or a NaN."""
        hints = get_type_hints(self.build)
        for name, value in options.items():
            kinds = get_args(hints[name]) or (hints[name],)
            if value is None and type(None) in kinds:
                continue
            kind = next(kind for kind in (bool, float, int, str) if kind in kinds)
            fits = isinstance(value, (int, float) if kind is float else kind)
            if kind in (int, float):
                fits = fits and not isinstance(value, bool) and math.isfinite(value)
            if not fits:
                raise ConfigError(
                    f"option {name} of recipe {self.name} must be {_NEEDED[kind]}, got {value!r}. "
                    f"Leave it out for the published {self.options[name]}."
                )


_NEEDED = {bool: "True or False", float: "a finite number", int: "a whole number", str: "text"}


def drawn(init_std: float | None, published: Init) -> Init:
    """How a recipe draws its weights: as published, or from a normal of the width that the user asked for."""
    return published if init_std is None else normal(init_std)


def gate_drawn(gate_init_std: float | None, published: Init) -> Init:
    """How a recipe whose router has a start of its own draws it: as published, or from a normal of this width.

    Raises:
        ConfigError: if the width is negative.
    """
    if gate_init_std is not None and gate_init_std < 0:
        raise ConfigError(
            f"gate_init_std must be at least 0, got {gate_init_std}. Leave it out for the published start."
        )
    return drawn(gate_init_std, published)


def one_choice(name: str, top_k: int) -> None:
    """Refuse more than one expert per token where the design has one.

    Raises:
        ConfigError: if ``top_k`` is not 1.
    """
    if top_k != 1:
        raise ConfigError(f"recipe {name} sends each token to one expert, got top_k={top_k}. Leave out top_k.")
