"""What an oracle is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tests.oracle.router import Table

Weights = Mapping[str, Tensor]


@dataclass
class Case:
    """One batch for a layer; random numbers are drawn from torch's global generator, seeded as for the layer.

    Attributes:
        x: tokens, (T, D), float64.
        valid: False where a token is padding.
        sequences: which sequence each token belongs to.
        ids: its id in the vocabulary.
        domains: which domain it belongs to.
        below: router logits of the layer below, (T, E).
        training: whether the layer trains or is evaluated.
        rewards: of each token, for a loss that waits for the model's output.
    """

    x: Tensor
    valid: list[bool]
    sequences: list[int]
    ids: list[int]
    domains: list[int]
    below: Tensor
    training: bool
    rewards: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """The tokens that are no padding."""
        return [t for t, is_valid in enumerate(self.valid) if is_valid]


@dataclass
class Answer:
    """What a layer should return, and its recipe's losses by name, unscaled."""

    y: Tensor
    table: Table
    kept: list[bool]
    losses: dict[str, Tensor]


Oracle = Callable[[Case, Weights, dict[str, Any]], Answer]
