"""What an optimizer's step would do to the weights of each expert, whichever way they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesaic.hf.peft.limits import pair
from moesaic.hf.peft.only import OnlyChosen


class Change(Protocol):
    """Trainable parameters, and the part of each expert's weights that they make up."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """What the optimizer steps."""

    def part(self, values: Sequence[Tensor], expert: int) -> Tensor:
        """The expert's part, as its matrix lies in the stack, if the parameters had these values."""

    def slope(self, values: Sequence[Tensor], slopes: Sequence[Tensor], expert: int) -> Tensor:
        """How that part moves, to first order, if the parameters move so."""


class LowRankChange:
    """A pair of matrices for each expert, as PEFT lays them out.

    Args:
        layer: PEFT's, around a stack or around one expert's linear map.
        adapter: its name there.
    """

    def __init__(self, layer: Any, adapter: str) -> None:
        self.parameters = pair(layer, adapter)
        self._num_experts = getattr(layer, "num_experts", 1)
        self._transposed = self._num_experts > 1 and bool(getattr(layer.get_base_layer(), "is_transposed", False))
        self._scale = float(layer.scaling[adapter])

    def part(self, values: Sequence[Tensor], expert: int) -> Tensor:
        """``scale * B A`` of one expert."""
        into, out = self._of(values, expert)
        return self._laid(self._scale * (out @ into))

    def slope(self, values: Sequence[Tensor], slopes: Sequence[Tensor], expert: int) -> Tensor:
        """``scale * (dB A + B dA)``."""
        (into, out), (into_slope, out_slope) = self._of(values, expert), self._of(slopes, expert)
        return self._laid(self._scale * (out_slope @ into + out @ into_slope))

    def is_at_rest(self, values: Sequence[Tensor], expert: int) -> bool:
        """Whether no batch at all could move an expert: both of its matrices are 0, and so is every gradient."""
        return not any(bool(one.any()) for one in self._of(values, expert))

    def _of(self, values: Sequence[Tensor], expert: int) -> tuple[Tensor, Tensor]:
        into, out = values
        if self._num_experts == 1:
            return into, out
        into_ERD = into.view(self._num_experts, -1, into.shape[1])
        return into_ERD[expert], out.view(out.shape[0], -1, self._num_experts)[:, :, expert]

    def _laid(self, change: Tensor) -> Tensor:
        return change.T if self._transposed else change


class ChosenChange:
    """The weights of chosen experts, taken out of their stack."""

    def __init__(self, chosen: OnlyChosen) -> None:
        self.parameters = (chosen.chosen,)
        self._chosen = chosen

    def part(self, values: Sequence[Tensor], expert: int) -> Tensor:
        """The expert's weights that train, 0 in the place of the others."""
        return self._chosen.placed(values[0], expert)

    def slope(self, _values: Sequence[Tensor], slopes: Sequence[Tensor], expert: int) -> Tensor:
        """How they move."""
        return self._chosen.placed(slopes[0], expert)


class WholeChange:
    """A stack that trains as it is, or the linear map of one expert."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.parameters = (weight,)

    def part(self, values: Sequence[Tensor], expert: int) -> Tensor:
        """The expert's weights."""
        return values[0][expert] if values[0].ndim == 3 else values[0]

    def slope(self, _values: Sequence[Tensor], slopes: Sequence[Tensor], expert: int) -> Tensor:
        """How they move."""
        return self.part(slopes, expert)


def stepped(values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The values after one step of AdamW with weight decay."""
    moved = [nn.Parameter(value.clone()) for value in values]
    for parameter, gradient in zip(moved, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.optim.AdamW(moved, lr=1e-3, weight_decay=0.1).step()
    return [parameter.detach() for parameter in moved]
