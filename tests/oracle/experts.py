"""What experts mean: one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.oracle.router import Table

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda z: z / (1 + (-z).exp()),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))) / 2,
    "relu": lambda z: z * (z > 0),
    "relu_squared": lambda z: z * z * (z > 0),
}


def feed_forward(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """One token through one expert: ``(act(x gate) * (x up)) down``, or ``act(x up) down`` without a gate."""
    act = ACTIVATIONS[activation]
    up_x = (x[:, None] * up).sum(dim=0)
    hidden = act(up_x) if gate is None else act((x[:, None] * gate).sum(dim=0)) * up_x
    return (hidden[:, None] * down).sum(dim=0)


def combine(
    x: Tensor,
    table: Table,
    kept: list[bool],
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
) -> Tensor:
    """Each token's output: the sum of what its experts return, each times its weight."""
    outputs = [torch.zeros_like(x[t]) for t in range(x.shape[0])]
    for row, keep in zip(table.rows, kept, strict=True):
        if keep:
            e = row.expert
            y = feed_forward(x[row.token], None if gate is None else gate[e], up[e], down[e], activation)
            outputs[row.token] = outputs[row.token] + row.weight * y
    return torch.stack(outputs) if outputs else x * 1


def shared(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, token_gate: Tensor | None, activation: str) -> Tensor:
    """The expert that every token visits, times the sigmoid of one number per token if it has a token gate."""
    outputs = []
    for t in range(x.shape[0]):
        y = feed_forward(x[t], gate, up, down, activation)
        if token_gate is not None:
            y = y / (1 + (-(x[t] * token_gate).sum()).exp())
        outputs.append(y)
    return torch.stack(outputs) if outputs else x * 1
