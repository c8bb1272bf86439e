"""The steps of a forward and a backward, one launch each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from moesaic.kernels.grouped_ffn.by_token import live
from moesaic.kernels.grouped_ffn.triton import launch
from moesaic.kernels.grouped_ffn.triton.forward import total_kernel

_Steps = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What the operation works on.

    Attributes:
        x_TD: tokens.
        weight_N: weight of each row, in the order of the plan.
        token_N: its token.
        offset_E: where each expert's rows end.
        place_N: places in the order of tokens.
        bounds: where each token's begin in ``place_N``, and the end.
        up_EDF: up projections.
        down_EFD: down projections.
        gate_EDF: gate projections; None for plain experts.
    """

    x_TD: Tensor
    weight_N: Tensor
    token_N: Tensor
    offset_E: Tensor
    place_N: Tensor
    bounds: Tensor
    up_EDF: Tensor
    down_EFD: Tensor
    gate_EDF: Tensor | None = None


class Steps:
    """The grouped feed-forward of one batch.

    Args:
        batch: what it works on.
        activation: its name.
    """

    def __init__(self, batch: Batch, activation: str) -> None:
        self.batch, self.activation = batch, activation
        self.num_rows = batch.token_N.shape[0]
        self.tiles = launch.Tiles.of(batch.offset_E, self.num_rows)

    def hidden(self, gate_NF: Tensor, up_NF: Tensor, *, saved: bool) -> Tensor:
        """The hidden rows; pre-activations are written too if ``saved``, the gate's where there is one."""
        batch, up_EDF = self.batch, self.batch.up_EDF
        _, width, hidden = up_EDF.shape
        x_TD = batch.x_TD.contiguous()
        hidden_NF = x_TD.new_empty(self.num_rows, hidden)
        gate_EDF = up_EDF if batch.gate_EDF is None else batch.gate_EDF
        launch.hidden_rows.start(
            self.tiles.grid(hidden),
            *(x_TD, batch.token_N, gate_EDF, up_EDF, gate_NF, up_NF, hidden_NF, self.tiles.list_ptr, self.tiles.most),
            *(width, hidden, *gate_EDF.stride(), *up_EDF.stride()),
            **self._how(width),
            **self._formula,
            SAVED=saved,
        )
        return hidden_NF

    def outputs(self, hidden_NF: Tensor) -> Tensor:
        """What the down projection makes of the hidden rows."""
        down_EFD = self.batch.down_EFD
        y_ND = hidden_NF.new_empty(self.num_rows, down_EFD.shape[2])
        self._product(y_ND, (hidden_NF, down_EFD, down_EFD.stride()), None)
        return y_ND

    def hidden_gradients(
        self, grad_y_TD: Tensor, gate_NF: Tensor, up_NF: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of weights, gate's and up's pre-activations, and the hidden rows times their weights."""
        batch, down_EFD, hidden = self.batch, self.batch.down_EFD, up_NF.shape[1]
        width = grad_y_TD.shape[1]
        weighed_NF, grad_up_NF = torch.empty_like(up_NF), torch.empty_like(up_NF)
        grad_gate_NF = grad_up_NF if batch.gate_EDF is None else torch.empty_like(up_NF)
        num_parts = triton.cdiv(hidden, launch.PART)
        parts = up_NF.new_empty(self.num_rows, num_parts, dtype=torch.float32)
        launch.hidden_gradients.start(
            self.tiles.grid(hidden),
            *(grad_y_TD, batch.token_N, down_EFD, batch.weight_N, gate_NF, up_NF, grad_gate_NF, grad_up_NF),
            *(weighed_NF, parts, self.tiles.list_ptr, self.tiles.most, width, hidden, num_parts, *_turned(down_EFD)),
            **self._how(width),
            **self._formula,
            PART=launch.PART,
        )
        grad_weight_N = torch.where(live(batch.offset_E, self.num_rows), parts.sum(dim=1), 0)
        return grad_weight_N.to(batch.weight_N.dtype), grad_gate_NF, grad_up_NF, weighed_NF

    def input_gradients(self, grad_gate_NF: Tensor, grad_up_NF: Tensor) -> Tensor:
        """The gradient of each row's input."""
        up_EDF, gate_EDF = self.batch.up_EDF, self.batch.gate_EDF
        grad_x_ND = grad_up_NF.new_empty(self.num_rows, up_EDF.shape[1])
        gate = None if gate_EDF is None else (grad_gate_NF, gate_EDF, _turned(gate_EDF))
        self._product(grad_x_ND, (grad_up_NF, up_EDF, _turned(up_EDF)), gate)
        return grad_x_ND

    def matrix_gradients(
        self, inputs: Tensor, grads: tuple[Tensor, ...], outs: tuple[Tensor, ...], *, by_token: bool
    ) -> None:
        """Write one or two gradients of matrices that have the same inputs.

        Args:
            inputs: tokens if ``by_token``, else rows.
            grads: of each product's result; rows if ``by_token``, else tokens.
            outs: (E, width, columns), where they go.
        """
        num_experts, width, columns = outs[0].shape

        def grid(meta: dict[str, Any]) -> tuple[int]:
            blocks = triton.cdiv(width, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"])
            return (num_experts * blocks,)

        launch.weight_gradients.start(
            grid,
            *(inputs, grads[0], grads[-1], self.batch.token_N, self.batch.offset_E, outs[0], outs[-1], width, columns),
            *(*outs[0].stride(), *outs[-1].stride()),
            IN_BY_TOKEN=by_token,
            SECOND=len(outs) == 2,
            PRECISION=launch.precision(inputs.dtype),
        )

    def _product(
        self, out: Tensor, first: tuple[Tensor, Tensor, _Steps], second: tuple[Tensor, Tensor, _Steps] | None
    ) -> None:
        a, b, strides = first
        more_a, more_b, more_strides = second or first
        launch.expert_rows.start(
            self.tiles.grid(out.shape[1]),
            *(a, b, more_a, more_b, out, self.tiles.list_ptr, self.tiles.most),
            *(a.shape[1], out.shape[1], *strides, *more_strides),
            **self._how(a.shape[1]),
            SECOND=second is not None,
        )

    @property
    def _formula(self) -> dict[str, Any]:
        return {"NAME": self.activation, "GATED": self.batch.gate_EDF is not None}

    def _how(self, inner: int) -> dict[str, Any]:
        return {
            "PRECISION": launch.precision(self.batch.up_EDF.dtype),
            "EVEN_K": launch.is_even(inner),
            "BLOCK_M": self.tiles.block,
            "GROUP": launch.GROUP,
        }


def totals(rows_ND: Tensor, place_N: Tensor, bounds: Tensor, weight_N: Tensor | None, out_TD: Tensor) -> Tensor:
    """Write each token's sum of its rows, weighed and taken in float32.

    Args:
        rows_ND: a row for each place.
        place_N: places in the order of tokens.
        bounds: where each token's begin, and the end.
        weight_N: weight of each row; None for 1.
        out_TD: where they go, row after row; given back.
    """
    num_tokens, width = out_TD.shape
    if num_tokens:
        block = min(1024, triton.next_power_of_2(width))
        with launch.on_device_of(rows_ND):
            total_kernel[(num_tokens, triton.cdiv(width, block))](
                *(rows_ND, place_N, bounds, rows_ND if weight_N is None else weight_N, out_TD, width),
                WEIGHED=weight_N is not None,
                BLOCK=block,
            )
    return out_TD


def _turned(weight: Tensor) -> _Steps:
    """The steps of a stack of matrices, each transposed."""
    of_expert, of_row, of_column = weight.stride()
    return of_expert, of_column, of_row
