"""The grouped feed-forward for generation: few rows, and weights that have to come from memory for each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation

# Up to so many rows for each expert that has any, reading weights takes longer than multiplying by them.
FEW_ROWS = 4

# What torch.embedding_bag calls the sum of a bag.
_SUM = 0


def are_few(plan: Plan, *stacks: Tensor | None) -> bool:
    """Whether :func:`grouped_ffn_few_rows` is faster: few rows to an expert, and weights that lie row by row."""
    if any(stack is not None and not (stack.is_contiguous() and stack.device.type == "cpu") for stack in stacks):
        return False
    # Asked first since it costs nothing: no more experts can have rows than there are rows.
    if plan.token_N.shape[0] > FEW_ROWS * plan.num_experts:
        return False
    return int(plan.load_E.sum()) <= FEW_ROWS * int(plan.load_E.count_nonzero())


def grouped_ffn_few_rows(
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
) -> Tensor:
    """Run each row by itself, without a gradient.

    Takes and gives what :func:`~moesaic.kernels.grouped_ffn.reference.grouped_ffn_reference` does. A product of one row
    with a matrix is a weighted sum of the matrix's rows. PyTorch has that for tables of embeddings, and reads ahead
    there: 23 GB/s on two cores where products of a row with one expert after the other come to 8.
    """
    expert_N = torch.arange(plan.num_experts, device=x_TD.device).repeat_interleave(plan.load_E)
    token_N = plan.token_N[: expert_N.shape[0]]
    x_ND = x_TD[token_N]
    into = _places(x_ND, expert_N)
    up_NF = _times(x_ND, up_EDF, into)
    if gate_EDF is None:
        hidden_NF = activation.forward(up_NF)
    else:
        hidden_NF = activation.forward(_times(x_ND, gate_EDF, into)).mul_(up_NF)
    y_ND = _times(hidden_NF, down_EFD, _places(hidden_NF, expert_N))
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    weight_N1 = plan.weight_N[: expert_N.shape[0], None].to(wide)
    return torch.zeros_like(x_TD, dtype=wide).index_add_(0, token_N, y_ND.to(wide) * weight_N1).to(x_TD.dtype)


_Places = tuple[Tensor, Tensor]
"""Row of the table of weights for each entry of some rows, and where each row's begin."""


def _places(x_ND: Tensor, expert_N: Tensor) -> _Places:
    num_rows, width = x_ND.shape
    row_ND = torch.arange(width, device=x_ND.device) + width * expert_N[:, None]
    return row_ND.view(-1), torch.arange(0, num_rows * width, width, device=x_ND.device)


def _times(x_ND: Tensor, weight_EDF: Tensor, places: _Places) -> Tensor:
    """Each row times the matrix of its expert."""
    table = weight_EDF.view(-1, weight_EDF.shape[2])
    # Not by way of torch.nn.functional, whose checks take 10 us of a call; arguments are in the order of its own.
    y_NF: Tensor = torch.embedding_bag(table, *places, False, _SUM, False, x_ND.reshape(-1))[0]
    return y_NF
