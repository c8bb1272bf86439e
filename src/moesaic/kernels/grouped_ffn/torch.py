"""The grouped feed-forward with a hand-written backward: plain PyTorch, on any device.

Autograd over a loop of experts would keep each expert's gathered inputs and outputs, and add a full-size weight
gradient per expert. Here one graph node serves the layer: it saves only the pre-activations, gathers inputs again in
the backward, and writes each expert's weight gradient in its place. The router's gradient needs no expert outputs:
``<dy, hidden @ down> = <dy @ down^T, hidden>``.

On a CPU, experts run side by side, each on one core with its rows in that core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.few_rows import are_few, grouped_ffn_few_rows
from moesaic.kernels.grouped_ffn.layout import gradients_like
from moesaic.kernels.grouped_ffn.rows import Rows
from moesaic.kernels.memory import large_empty
from moesaic.kernels.side_by_side import share_out, side_by_side

# Multiplications and additions of a layer below which handing work to threads costs more than it gains.
SMALL_LAYER = 2**25


class _Scratch:
    """Hidden states of one worker, by name, that each expert writes over: less than a megabyte stays in the cache."""

    def __init__(self, up_EDF: Tensor, sizes: Sequence[int], most: int) -> None:
        self._shape, self._like, self._sizes = (most, up_EDF.shape[-1]), up_EDF, sizes
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, i: int) -> Tensor:
        """Memory for the hidden states of the ``i``-th expert, with anything in it."""
        held = self._held.get(name)
        if held is None:
            held = self._held[name] = torch.empty(self._shape, dtype=self._like.dtype, device=self._like.device)
        return held[: self._sizes[i]]


Pieces = Sequence[Tensor]
Work = Callable[[_Scratch, int, int], None]
"""(scratch memory, expert, its place among the experts with rows)."""


def grouped_ffn_torch(
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
) -> Tensor:
    """Run each expert over its rows and add the weighted outputs up.

    Takes and gives what :func:`~moesaic.kernels.grouped_ffn.reference.grouped_ffn_reference` does; not twice
    differentiable.
    """
    inputs = (x_TD, plan.weight_N, gate_EDF, up_EDF, down_EFD)
    has_graph = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)
    if not has_graph and are_few(plan, gate_EDF, up_EDF, down_EFD):
        return grouped_ffn_few_rows(x_TD, plan, gate_EDF, up_EDF, down_EFD, activation)
    rows = Rows.of(plan, x_TD.shape[0], x_TD.dtype)
    if has_graph:
        y_TD: Tensor = _GroupedFFN.apply(*inputs, rows, activation)  # type: ignore[no-untyped-call]
        return y_TD
    return _forward(x_TD, rows, gate_EDF, up_EDF, down_EFD, activation, None, None)


def _forward(
    x_TD: Tensor,
    rows: Rows,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
    gate_NF: Tensor | None,
    up_NF: Tensor | None,
) -> Tensor:
    """Outputs; pre-activations are written to ``gate_NF`` and ``up_NF`` where these are given."""
    x_ND = rows.gather(x_TD)
    x, up, down = rows.split(x_ND), up_EDF.unbind(0), down_EFD.unbind(0)
    gate = None if gate_EDF is None else gate_EDF.unbind(0)
    saved_gate, saved_up = (None if one is None else rows.split(one) for one in (gate_NF, up_NF))

    def work(scratch: _Scratch, e: int, i: int) -> None:
        hidden_MF = scratch("hidden", i)
        up_MF = scratch("up", i) if saved_up is None else saved_up[i]
        torch.mm(x[i], up[e], out=up_MF)
        if gate is None:
            activation.forward(up_MF, out=hidden_MF)
        else:
            gate_MF = hidden_MF if saved_gate is None else saved_gate[i]
            torch.mm(x[i], gate[e], out=gate_MF)
            activation.forward(gate_MF, out=hidden_MF).mul_(up_MF)
        # An expert's inputs make room for its outputs.
        torch.mm(hidden_MF, down[e], out=x[i])

    _each_expert(work, rows, up_EDF)
    return rows.sum(x_ND, rows.weight_N)


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        gate_EDF: Tensor | None,
        up_EDF: Tensor,
        down_EFD: Tensor,
        rows: Rows,
        activation: Activation,
    ) -> Tensor:
        shape = (rows.num_rows, up_EDF.shape[-1])
        up_NF = large_empty(shape, x_TD.dtype, x_TD.device)
        gate_NF = None if gate_EDF is None else large_empty(shape, x_TD.dtype, x_TD.device)
        ctx.save_for_backward(x_TD, weight_N, gate_EDF, up_EDF, down_EFD, gate_NF, up_NF)
        ctx.rows, ctx.activation = rows, activation
        return _forward(x_TD, rows, gate_EDF, up_EDF, down_EFD, activation, gate_NF, up_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, gate_EDF, up_EDF, down_EFD, gate_NF, up_NF = ctx.saved_tensors
        needs_x, _, needs_gate, needs_up, needs_down, _, _ = ctx.needs_input_grad
        rows, activation = ctx.rows, ctx.activation
        needed = zip((gate_EDF, up_EDF, down_EFD), (needs_gate, needs_up, needs_down), strict=True)
        gradients = gradients_like([one if needs else None for one, needs in needed])
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        grad_row_N = torch.empty(rows.num_rows, dtype=wide, device=x_TD.device)
        grad_y_ND = rows.gather(grad_y_TD)
        work = _Backward(
            activation=activation,
            x=rows.split(rows.gather(x_TD)),
            weight=rows.split(rows.weight_N.to(x_TD.dtype)[:, None]),
            gate_pre=None if gate_NF is None else rows.split(gate_NF),
            up_pre=rows.split(up_NF),
            grad_y=rows.split(grad_y_ND),
            grad_row=rows.split(grad_row_N),
            needs_x=needs_x,
            gate=None if gate_EDF is None else gate_EDF.unbind(0),
            up=up_EDF.unbind(0),
            down=down_EFD.unbind(0),
            grad_gate=gradients[0],
            grad_up=gradients[1],
            grad_down=gradients[2],
        )
        without_rows = sorted(set(range(up_EDF.shape[0])) - set(rows.experts))
        for one in gradients:
            if one is not None and without_rows:
                one[without_rows] = 0
        _each_expert(work, rows, up_EDF)
        grad_weight_N = torch.zeros_like(weight_N)
        grad_weight_N[: rows.place_N.shape[0]] = grad_row_N[rows.place_N].to(weight_N.dtype)
        return rows.sum(grad_y_ND) if needs_x else None, grad_weight_N, *gradients, None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Backward:
    """What the backward of one expert reads and writes, by place among the experts with rows, or by expert."""

    activation: Activation
    x: Pieces
    weight: Pieces
    gate_pre: Pieces | None
    up_pre: Pieces
    grad_y: Pieces
    grad_row: Pieces
    needs_x: bool
    gate: Pieces | None
    up: Pieces
    down: Pieces
    grad_gate: Tensor | None
    grad_up: Tensor | None
    grad_down: Tensor | None

    def __call__(self, scratch: _Scratch, e: int, i: int) -> None:
        act, up_MF = self.activation, self.up_pre[i]
        gate_MF = None if self.gate_pre is None else self.gate_pre[i]
        a_MF, b_MF, c_MF, d_MF = (scratch(name, i) for name in "abcd")
        grad_hidden_MF = torch.mm(self.grad_y[i], self.down[e].t(), out=a_MF)
        if gate_MF is None:
            hidden_MF = act.forward(up_MF, out=c_MF)
        else:
            hidden_MF = torch.mul(act.forward(gate_MF, out=b_MF), up_MF, out=c_MF)
        grad_row = self.grad_row[i]
        torch.sum(torch.mul(grad_hidden_MF, hidden_MF, out=d_MF), dim=-1, dtype=grad_row.dtype, out=grad_row)
        if self.grad_down is not None:
            _transposed_product(hidden_MF.mul_(self.weight[i]), self.grad_y[i], out=self.grad_down[e])
        grad_hidden_MF.mul_(self.weight[i])
        grad_gate_MF: Tensor | None = None
        if gate_MF is None:
            grad_up_MF = act.backward(grad_hidden_MF, up_MF, out=b_MF)
        else:
            grad_up_MF = b_MF.mul_(grad_hidden_MF)
            grad_gate_MF = act.backward(grad_hidden_MF.mul_(up_MF), gate_MF, out=a_MF)
        if self.grad_up is not None:
            _transposed_product(self.x[i], grad_up_MF, out=self.grad_up[e])
        if self.grad_gate is not None and grad_gate_MF is not None:
            _transposed_product(self.x[i], grad_gate_MF, out=self.grad_gate[e])
        if self.needs_x:
            # What the outputs' gradients took makes room for that of the inputs.
            torch.mm(grad_up_MF, self.up[e].t(), out=self.grad_y[i])
            if self.gate is not None and grad_gate_MF is not None:
                self.grad_y[i].addmm_(grad_gate_MF, self.gate[e].t())


def _each_expert(work: Work, rows: Rows, up_EDF: Tensor) -> None:
    """Experts side by side, each on one core; before them, on all cores, those that cannot be shared out evenly."""
    is_shared = up_EDF.device.type == "cpu" and rows.num_rows * up_EDF[0].numel() >= SMALL_LAYER
    together, apart = share_out(rows.sizes, torch.get_num_threads() if is_shared else 0)

    def begin(places: Sequence[int]) -> Callable[[int], None]:
        scratch = _Scratch(up_EDF, rows.sizes, max(rows.sizes[i] for i in places))
        return lambda i: work(scratch, rows.experts[i], i)

    if together:
        one_after_the_other = begin(together)
        for i in together:
            one_after_the_other(i)
    if apart:
        side_by_side(lambda: begin(apart), apart)


def _transposed_product(x_MD: Tensor, y_MF: Tensor, *, out: Tensor) -> None:
    """Write ``x_MD.t() @ y_MF``, whichever of its dimensions lies side by side in memory."""
    if out.stride(-1) == 1:
        torch.mm(x_MD.t(), y_MF, out=out)
    else:
        torch.mm(y_MF.t(), x_MD, out=out.t())
