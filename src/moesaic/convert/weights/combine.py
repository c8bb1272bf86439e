"""Several experts into one or few: choose, line up their neurons, average, or lay side by side. Pure maths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moesaic.convert.weights.stack import DenseFFN, ExpertStack
from moesaic.core.errors import ConfigError, ShapeError


def take(stack: ExpertStack, index_E: Tensor) -> ExpertStack:
    """The experts of these indices, in this order."""
    return _mapped(stack, lambda _name, tensor: tensor[index_E.to(tensor.device)])


def permuted(stack: ExpertStack, order_EF: Tensor) -> ExpertStack:
    """The same experts with their hidden neurons in another order, which changes nothing that they compute.

    Args:
        stack: the experts.
        order_EF: for each expert, which neuron comes first, second, and so on.
    """

    def reorder(name: str, tensor: Tensor) -> Tensor:
        order = order_EF.to(tensor.device)
        if name in ("gate_EDF", "up_EDF"):
            return tensor.gather(2, order[:, None, :].expand_as(tensor))
        if name == "down_EFD":
            return tensor.gather(1, order[:, :, None].expand_as(tensor))
        return tensor.gather(1, order) if name in ("gate_EF", "up_EF") else tensor

    return _mapped(stack, reorder)


def neuron_order(stack: ExpertStack, reference: int, expert: int) -> Tensor:
    """The order of an expert's hidden neurons in which they lie closest to those of the reference, int64 (F,).

    Neurons may stand in any order without changing an expert, so that two experts that do the same may share no
    coordinate. Closest is by squared distance of all that belongs to a neuron: its column of gate and up projection,
    its row of the down projection, its biases. A linear assignment problem, cubic in F.

    Source: Ainsworth et al. 2022, "Git Re-Basin", section 3.2, for one hidden layer; as used for experts by Li et al.
    2023, "Merge, Then Compress", arXiv:2310.01334.
    """
    similarity_FF = _neurons(stack, reference) @ _neurons(stack, expert).T
    _, order = linear_sum_assignment(similarity_FF.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(torch.int64)


def average(stack: ExpertStack, weight_E: Tensor) -> DenseFFN:
    """The weighted average of all experts of a stack, neuron by neuron: line them up first.

    Args:
        stack: the experts.
        weight_E: what each counts; divided by their sum here.
    Raises:
        ConfigError: if the weights are negative or add up to nothing.
    """
    share_E = shares(weight_E)

    def mean(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        mixed: Tensor = torch.tensordot(share_E.to(wide), wide, dims=1)
        return mixed.to(tensor.dtype)

    parts = {_SINGLE[field.name]: mean(getattr(stack, field.name)) for field in fields(stack)}
    return DenseFFN(**parts)  # type: ignore[arg-type]


def concatenate(stack: ExpertStack, scale_E: Tensor) -> DenseFFN:
    """All experts side by side in one network, which gives the sum of their outputs, each times its scale. Exact.

    Args:
        stack: the experts.
        scale_E: what each expert's output is multiplied by; it goes into the down projection.
    """

    def wide(tensor: Tensor | None) -> Tensor | None:
        # (E, D, F) -> (D, E F), and (E, F) -> (E F).
        return None if tensor is None else tensor.transpose(0, 1).flatten(1) if tensor.ndim == 3 else tensor.flatten()

    scale_E = scale_E.to(stack.down_EFD.device)
    down_EFD = _scaled(stack.down_EFD, scale_E[:, None, None])
    down_D = None if stack.down_ED is None else _scaled(stack.down_ED, scale_E[:, None]).sum(dim=0)
    return DenseFFN(
        gate_DF=wide(stack.gate_EDF),
        up_DF=given(wide(stack.up_EDF)),
        down_FD=down_EFD.flatten(0, 1),
        gate_F=wide(stack.gate_EF),
        up_F=wide(stack.up_EF),
        down_D=down_D,
    )


def scaled(ffn: DenseFFN, scale: float) -> DenseFFN:
    """The network whose output is that of ``ffn`` times a number."""
    if scale == 1.0:
        return ffn
    down_D = None if ffn.down_D is None else ffn.down_D * scale
    return replace(ffn, down_FD=ffn.down_FD * scale, down_D=down_D)


def side_by_side(first: DenseFFN, second: DenseFFN) -> DenseFFN:
    """One network that gives the sum of what two give. Exact.

    Raises:
        ShapeError: if one has a gate and the other has none.
    """
    if (first.gate_DF is None) != (second.gate_DF is None):
        raise ShapeError(
            "Networks side by side must both have a gate or both have none, got one of each. "
            "Leave the shared expert out, or give it the experts' form."
        )

    def joined(name: str, dim: int) -> Tensor | None:
        one, other = getattr(first, name), getattr(second, name)
        if one is None and other is None:
            return None
        if one is None or other is None:
            # A bias that one of them lacks is a bias of 0.
            like = first.up_DF if one is None else second.up_DF
            zeros = like.new_zeros(like.shape[1])
            one, other = (zeros, other) if one is None else (one, zeros)
        return torch.cat([one, other.to(one)], dim=dim)

    biases = [bias for bias in (first.down_D, second.down_D) if bias is not None]
    return DenseFFN(
        gate_DF=joined("gate_DF", 1),
        up_DF=given(joined("up_DF", 1)),
        down_FD=given(joined("down_FD", 0)),
        gate_F=joined("gate_F", 0),
        up_F=joined("up_F", 0),
        down_D=sum(biases[1:], start=biases[0]) if biases else None,
    )


def padded(ffn: DenseFFN, hidden: int) -> DenseFFN:
    """The same function in a network of more hidden neurons: those added are zeros. Exact.

    Raises:
        ShapeError: if the network has more neurons already.
    """
    more = hidden - ffn.hidden
    if more < 0:
        raise ShapeError(
            f"A network of {ffn.hidden} neurons cannot be padded to {hidden}. Give at least as many as it has."
        )
    pad = torch.nn.functional.pad
    return DenseFFN(
        gate_DF=None if ffn.gate_DF is None else pad(ffn.gate_DF, (0, more)),
        up_DF=pad(ffn.up_DF, (0, more)),
        down_FD=pad(ffn.down_FD, (0, 0, 0, more)),
        gate_F=None if ffn.gate_F is None else pad(ffn.gate_F, (0, more)),
        up_F=None if ffn.up_F is None else pad(ffn.up_F, (0, more)),
        down_D=ffn.down_D,
    )


def shares(weight_E: Tensor) -> Tensor:
    """Weights divided by their sum, float64; even ones where all are 0, as of experts that served nobody.

    Raises:
        ConfigError: if one is negative or no number.
    """
    weight_E = weight_E.double()
    if not bool((weight_E >= 0).all()):
        raise ConfigError(
            f"Weights of an average must be at least 0, got {float(weight_E.min())}. Use frequencies, or 'uniform'."
        )
    total = float(weight_E.sum())
    return weight_E / total if total > 0 else torch.full_like(weight_E, 1 / len(weight_E))


def aligned_orders(stack: ExpertStack, groups: Sequence[Sequence[int]], weight_E: Tensor) -> Tensor:
    """For each expert the order of its neurons that fits the heaviest expert of its group, int64 (E, F).

    Args:
        stack: the experts.
        groups: which experts belong together.
        weight_E: who is heaviest; the lowest index among equals.
    """
    order_EF = torch.arange(stack.hidden).repeat(stack.num_experts, 1)
    for group in groups:
        reference = max(group, key=lambda expert: (float(weight_E[expert]), -expert))
        for expert in group:
            if expert != reference:
                order_EF[expert] = neuron_order(stack, reference, expert)
    return order_EF


def given(tensor: Tensor | None) -> Tensor:
    """A tensor that is there, for the type checker."""
    assert tensor is not None
    return tensor


_SINGLE = {
    "gate_EDF": "gate_DF",
    "up_EDF": "up_DF",
    "down_EFD": "down_FD",
    "gate_EF": "gate_F",
    "up_EF": "up_F",
    "down_ED": "down_D",
}


def _mapped(stack: ExpertStack, change: Callable[[str, Tensor], Tensor]) -> ExpertStack:
    held = {field.name: getattr(stack, field.name) for field in fields(stack)}
    made = {name: None if tensor is None else change(name, tensor) for name, tensor in held.items()}
    return ExpertStack(**made)  # type: ignore[arg-type]


def _neurons(stack: ExpertStack, index: int) -> Tensor:
    """All that belongs to each neuron of an expert, a row for each, float32 or wider."""
    expert = stack.expert(index)
    parts = [expert.up_DF.T, expert.down_FD]
    parts += [] if expert.gate_DF is None else [expert.gate_DF.T]
    parts += [bias[:, None] for bias in (expert.gate_F, expert.up_F) if bias is not None]
    rows = torch.cat(parts, dim=1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) * scale.to(wide)).to(tensor.dtype)
