"""A number for each part of a model."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """How many of something (weights, FLOPs) each part of a model has.

    Args:
        embeddings: tables of tokens and of positions; the only copy where input and output share theirs.
        attention: what mixes positions, state spaces and recurrences too, with the norms inside it.
        dense: feed-forward networks that every token passes, those beside experts included.
        experts: that routers choose among.
        shared: experts that every token passes, with their gates.
        routers: what chooses.
        norms: over the model's width.
        head: the map to the vocabulary where it has weights of its own.
        other: what is none of these.
    """

    embeddings: int = 0
    attention: int = 0
    dense: int = 0
    experts: int = 0
    shared: int = 0
    routers: int = 0
    norms: int = 0
    head: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """Each part's name and number, in the order of the model."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __add__(self, other: Parts) -> Parts:
        mine, its = self.as_dict(), other.as_dict()
        return Parts(**{name: mine[name] + its[name] for name in mine})

    def __mul__(self, factor: int) -> Parts:
        return Parts(**{name: number * factor for name, number in self.as_dict().items()})
