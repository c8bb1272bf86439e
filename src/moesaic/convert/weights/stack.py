"""The weights that conversions work on, free of any model's names: one dense network, or a layer's stacked experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.core.errors import ShapeError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DenseFFN:
    """A feed-forward network: ``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate.

    Attributes:
        gate_DF: gate projection; None if there is no gate.
        up_DF: up projection.
        down_FD: down projection.
        gate_F: bias of the gate; None if there is none, and likewise below.
        up_F: bias of the up projection.
        down_D: bias of the down projection.
    Raises:
        ShapeError: if the maps do not fit each other.
    """

    gate_DF: Tensor | None
    up_DF: Tensor
    down_FD: Tensor
    gate_F: Tensor | None = None
    up_F: Tensor | None = None
    down_D: Tensor | None = None

    def __post_init__(self) -> None:
        width, hidden = self.up_DF.shape
        shapes = {"gate_DF": (width, hidden), "down_FD": (hidden, width)}
        _check(self, shapes | {"gate_F": (hidden,), "up_F": (hidden,), "down_D": (width,)})

    @property
    def width(self) -> int:
        """D."""
        return self.up_DF.shape[0]

    @property
    def hidden(self) -> int:
        """F."""
        return self.up_DF.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertStack:
    """All experts of one layer, each a :class:`DenseFFN`, stacked along the first dimension.

    Attributes:
        gate_EDF: gate projections; None if experts have no gate.
        up_EDF: up projections.
        down_EFD: down projections.
        gate_EF: biases of the gates; None if there are none, and likewise below.
        up_EF: biases of the up projections.
        down_ED: biases of the down projections.
    Raises:
        ShapeError: if the maps do not fit each other.
    """

    gate_EDF: Tensor | None
    up_EDF: Tensor
    down_EFD: Tensor
    gate_EF: Tensor | None = None
    up_EF: Tensor | None = None
    down_ED: Tensor | None = None

    def __post_init__(self) -> None:
        count, width, hidden = self.up_EDF.shape
        shapes: dict[str, tuple[int, ...]] = {"gate_EDF": (count, width, hidden), "down_EFD": (count, hidden, width)}
        _check(self, shapes | {"gate_EF": (count, hidden), "up_EF": (count, hidden), "down_ED": (count, width)})

    @classmethod
    def of(cls, experts: list[DenseFFN]) -> ExpertStack:
        """Stack experts of one shape, in their order."""
        names = {"gate_EDF": "gate_DF", "up_EDF": "up_DF", "down_EFD": "down_FD"}
        names |= {"gate_EF": "gate_F", "up_EF": "up_F", "down_ED": "down_D"}
        stacked = {}
        for name, single in names.items():
            parts = [getattr(expert, single) for expert in experts]
            stacked[name] = None if any(part is None for part in parts) else torch.stack(parts)
        return cls(**stacked)  # type: ignore[arg-type]

    def expert(self, index: int) -> DenseFFN:
        """One expert; its weights are views."""
        return DenseFFN(
            gate_DF=_at(self.gate_EDF, index),
            up_DF=self.up_EDF[index],
            down_FD=self.down_EFD[index],
            gate_F=_at(self.gate_EF, index),
            up_F=_at(self.up_EF, index),
            down_D=_at(self.down_ED, index),
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up_EDF.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.up_EDF.shape[1]

    @property
    def hidden(self) -> int:
        """F of one expert."""
        return self.up_EDF.shape[2]


def _at(stack: Tensor | None, index: int) -> Tensor | None:
    return None if stack is None else stack[index]


def _check(weights: DenseFFN | ExpertStack, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, wanted in shapes.items():
        tensor = getattr(weights, name)
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ShapeError(
                f"{type(weights).__name__}.{name} must be {wanted} to fit its up projection, got "
                f"{tuple(tensor.shape)}. Linear maps of torch are stored (out, in): transpose them first."
            )
