"""The work between products that are not ours, in Triton: one pass over memory each, one node of a compiled graph."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.by_token import TokenRows
from moesaic.kernels.grouped_ffn.row_work import HiddenGradients, RowWork
from moesaic.kernels.grouped_ffn.triton import IS_INTERPRETED
from moesaic.kernels.grouped_ffn.triton.launch import on_device_of
from moesaic.kernels.grouped_ffn.triton.row_work import activated_kernel, gradients_kernel
from moesaic.kernels.grouped_ffn.triton.steps import totals

_ROWS = 4
_MOST_COLUMNS = 32 if IS_INTERPRETED else 512


@torch.library.custom_op("moesaic::hidden_rows", mutates_args=())
def hidden_rows(gate_NF: Tensor | None, up_NF: Tensor, activation: str) -> Tensor:
    """The hidden rows of pre-activations."""
    gate_NF, up_NF = None if gate_NF is None else gate_NF.contiguous(), up_NF.contiguous()
    out_NF = torch.empty_like(up_NF)
    num_rows, columns = up_NF.shape
    block = min(_MOST_COLUMNS, triton.next_power_of_2(columns))
    if num_rows:
        with on_device_of(up_NF):
            activated_kernel[(triton.cdiv(num_rows, _ROWS), triton.cdiv(columns, block))](
                *(up_NF if gate_NF is None else gate_NF, up_NF, out_NF, num_rows, columns),
                NAME=activation,
                GATED=gate_NF is not None,
                BLOCK_M=_ROWS,
                BLOCK_N=block,
            )
    return out_NF


@hidden_rows.register_fake
def _room_for_hidden(gate_NF: Tensor | None, up_NF: Tensor, activation: str) -> Tensor:
    return up_NF.new_empty(up_NF.shape)


@torch.library.custom_op("moesaic::hidden_gradients", mutates_args=())
def hidden_gradients(
    grad_NF: Tensor, weight_N: Tensor, gate_NF: Tensor | None, up_NF: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weights, the hidden rows times their weights, and gradients of up and gate; empty without a gate."""
    grad_NF, up_NF = grad_NF.contiguous(), up_NF.contiguous()
    gate_NF = None if gate_NF is None else gate_NF.contiguous()
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _room_for_gradients(grad_NF, weight_N, gate_NF, up_NF, activation)
    grad_weight_N, weighed_NF, grad_up_NF, grad_gate_NF = found
    num_rows, columns = up_NF.shape
    if num_rows:
        with on_device_of(up_NF):
            gradients_kernel[(triton.cdiv(num_rows, _ROWS),)](
                *(grad_NF, up_NF if gate_NF is None else gate_NF, up_NF, weight_N, grad_gate_NF, grad_up_NF),
                *(weighed_NF, grad_weight_N, num_rows, columns),
                NAME=activation,
                GATED=gate_NF is not None,
                BLOCK_M=_ROWS,
                BLOCK_N=min(_MOST_COLUMNS, triton.next_power_of_2(columns)),
            )
    return found


@hidden_gradients.register_fake
def _room_for_gradients(
    grad_NF: Tensor, weight_N: Tensor, gate_NF: Tensor | None, up_NF: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = up_NF.shape
    grad_gate_NF = up_NF.new_empty(0) if gate_NF is None else up_NF.new_empty(shape)
    grad_weight_N = up_NF.new_empty(shape[0], dtype=torch.float32)
    return grad_weight_N, up_NF.new_empty(shape), up_NF.new_empty(shape), grad_gate_NF


@torch.library.custom_op("moesaic::sum_by_token", mutates_args=())
def sum_by_token(rows_ND: Tensor, place_N: Tensor, bounds: Tensor, weight_N: Tensor | None) -> Tensor:
    """Each token's sum of its rows, weighed and taken in float32."""
    return totals(rows_ND.contiguous(), place_N, bounds, weight_N, _room_for_totals(rows_ND, place_N, bounds, weight_N))


@sum_by_token.register_fake
def _room_for_totals(rows_ND: Tensor, place_N: Tensor, bounds: Tensor, weight_N: Tensor | None) -> Tensor:
    return rows_ND.new_empty(bounds.shape[0] - 1, rows_ND.shape[1], dtype=torch.float32)


def _hidden(gate_NF: Tensor | None, up_NF: Tensor, activation: Activation) -> Tensor:
    hidden_NF: Tensor = hidden_rows(gate_NF, up_NF, activation.name)
    return hidden_NF


def _gradients(
    grad_NF: Tensor, weight_N: Tensor, gate_NF: Tensor | None, up_NF: Tensor, activation: Activation
) -> HiddenGradients:
    found_N, weighed_NF, grad_up_NF, grad_gate_NF = hidden_gradients(grad_NF, weight_N, gate_NF, up_NF, activation.name)
    return HiddenGradients(
        weight_N=found_N,
        weighed_NF=weighed_NF,
        gate_NF=None if gate_NF is None else grad_gate_NF,
        up_NF=grad_up_NF,
    )


def _total(rows_ND: Tensor, token_rows: TokenRows, weight_N: Tensor | None) -> Tensor:
    total_TD: Tensor = sum_by_token(rows_ND, token_rows.place_N, token_rows.bounds, weight_N)
    return total_TD


IN_TRITON = RowWork(hidden=_hidden, gradients=_gradients, total=_total)
