"""Experts made of a dense network's neurons: copies, shards, parts, some of them drawn anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from moesaic.convert.weights.stack import DenseFFN, ExpertStack
from moesaic.core.errors import ConfigError

ScaleIn = Literal["down", "published"]
"""Where a factor goes: see :func:`scaled`."""


def take(ffn: DenseFFN, neuron_EF: Tensor, *, parts: int = 1) -> ExpertStack:
    """Make experts of a network's neurons.

    Args:
        ffn: the network.
        neuron_EF: which neurons each expert has.
        parts: how many experts make up the network together: each gets that part of the bias of the down projection.
    """
    count = len(neuron_EF)
    down_D = ffn.down_D
    return ExpertStack(
        gate_EDF=None if ffn.gate_DF is None else ffn.gate_DF[:, neuron_EF].transpose(0, 1),
        up_EDF=ffn.up_DF[:, neuron_EF].transpose(0, 1),
        down_EFD=ffn.down_FD[neuron_EF],
        gate_EF=None if ffn.gate_F is None else ffn.gate_F[neuron_EF],
        up_EF=None if ffn.up_F is None else ffn.up_F[neuron_EF],
        down_ED=None if down_D is None else (down_D / parts if parts > 1 else down_D).expand(count, -1),
    )


def take_one(ffn: DenseFFN, neuron_F: Tensor) -> DenseFFN:
    """A smaller network of some of a network's neurons, without the bias of the down projection."""
    return DenseFFN(
        gate_DF=None if ffn.gate_DF is None else ffn.gate_DF[:, neuron_F],
        up_DF=ffn.up_DF[:, neuron_F],
        down_FD=ffn.down_FD[neuron_F],
        gate_F=None if ffn.gate_F is None else ffn.gate_F[neuron_F],
        up_F=None if ffn.up_F is None else ffn.up_F[neuron_F],
    )


def copies(ffn: DenseFFN, num_experts: int, granularity: int = 1) -> ExpertStack:
    """Copy a network into every expert, or one of its G shards into each.

    With shards, expert e has shard ``e % G``: experts ``gG`` to ``gG + G - 1`` make up the network together, a virtual
    group.

    Args:
        ffn: the network.
        num_experts: E, a multiple of ``granularity``.
        granularity: G, which divides the network's hidden width.
    Raises:
        ConfigError: if the numbers do not divide each other.

    Source: Komatsuzaki et al. 2022, "Sparse Upcycling", section 3; He et al. 2024, "Upcycling Large Language Models
    into Mixture of Experts", section 3.2.
    """
    if granularity < 1 or ffn.hidden % granularity or num_experts % granularity:
        raise ConfigError(
            f"granularity must divide the dense network's hidden width {ffn.hidden} and num_experts={num_experts}, got "
            f"{granularity}. Each expert holds one shard of the network, and all shards are there equally often."
        )
    neuron_GF = torch.arange(ffn.hidden, device=ffn.up_DF.device).view(granularity, -1)
    return take(ffn, neuron_GF.repeat(num_experts // granularity, 1), parts=granularity)


def scaled(stack: ExpertStack, factor: float, where: ScaleIn = "down", *, is_squared: bool = False) -> ExpertStack:
    """Multiply what experts give by a number.

    Gated networks are linear in the up and in the down projection and not in the gate, whose non-linearity is not
    homogeneous: ``silu(a z) != a silu(z)``. "down" multiplies the down projection, which is exact for every network.
    "published" shares the factor out, as Megatron-LM does: its cube root on all three matrices of a gated network, its
    square root on both of a plain one (cube root for squared ReLU), which evens out the sizes of weights but gives the
    number only where the non-linearity is homogeneous: for ReLU and squared ReLU.

    Args:
        stack: the experts.
        factor: what their outputs are multiplied by.
        where: "down" or "published".
        is_squared: whether the non-linearity is the squared ReLU.
    Raises:
        ConfigError: if ``where`` is neither, or "published" is asked for with biases, for which it says nothing.

    Source: He et al. 2024, section 3.3, and Megatron-LM, ``upcycling_utils.py``.
    """
    if where not in ("down", "published"):
        raise ConfigError(f"scale_in must be 'down' or 'published', got {where!r}. 'down' keeps the function.")
    if factor == 1:
        return stack
    if where == "down":
        down_ED = None if stack.down_ED is None else times(stack.down_ED, factor)
        return replace(stack, down_EFD=times(stack.down_EFD, factor), down_ED=down_ED)
    if stack.up_EF is not None or stack.down_ED is not None:
        raise ConfigError("scale_in='published' is for networks without biases, got some. Use scale_in='down'.")
    root = factor ** (1 / 3 if stack.gate_EDF is not None or is_squared else 1 / 2)
    return replace(
        stack,
        gate_EDF=None if stack.gate_EDF is None else times(stack.gate_EDF, root),
        up_EDF=times(stack.up_EDF, root),
        down_EFD=times(stack.down_EFD, root),
    )


def partly_drawn(stack: ExpertStack, ratio: float, generator: torch.Generator) -> tuple[ExpertStack, Tensor]:
    """Draw some neurons of each expert anew, from normal distributions with the mean and spread of what they replace.

    Each expert loses other neurons, the same in all its matrices, so that experts differ from the start and each keeps
    ``1 - ratio`` of what the dense network knew.

    Args:
        stack: the experts.
        ratio: which part of the neurons, from 0 to 1.
        generator: draws them.
    Returns:
        The experts, and which neurons are new, bool (E, F).
    Raises:
        ConfigError: if the ratio is not in 0..1.

    Source: Nakamura et al. 2025, "Drop-Upcycling", section 3. (Their code draws other neurons in each matrix; the
    paper, as here, the same.)
    """
    if not 0 <= ratio <= 1:
        raise ConfigError(f"drop_ratio must be from 0 to 1, got {ratio}. Drop-Upcycling found 0.5 the best.")
    order_EF = torch.stack([torch.randperm(stack.hidden, generator=generator) for _ in range(stack.num_experts)])
    is_new_EF = torch.zeros_like(order_EF, dtype=torch.bool).scatter_(1, order_EF[:, : int(ratio * stack.hidden)], True)

    def drawn(weight: Tensor | None, neurons_last: bool) -> Tensor | None:
        if weight is None or not is_new_EF.any():
            return weight
        made = weight.float().clone()
        for e in range(stack.num_experts):
            mine = made[e] if neurons_last else made[e].T
            old = mine[:, is_new_EF[e]]
            mine[:, is_new_EF[e]] = torch.randn(old.shape, generator=generator).to(old) * old.std() + old.mean()
        return made.to(weight.dtype)

    up_EDF, down_EFD = drawn(stack.up_EDF, True), drawn(stack.down_EFD, False)
    made = replace(
        stack, gate_EDF=drawn(stack.gate_EDF, True), up_EDF=cast(Tensor, up_EDF), down_EFD=cast(Tensor, down_EFD)
    )
    return made, is_new_EF


def silenced(stack: ExpertStack) -> ExpertStack:
    """Experts that give nothing yet: their down projections are 0, and learn first."""
    down_ED = None if stack.down_ED is None else torch.zeros_like(stack.down_ED)
    return replace(stack, down_EFD=torch.zeros_like(stack.down_EFD), down_ED=down_ED)


def emptied(stack: ExpertStack, is_new_EF: Tensor) -> ExpertStack:
    """Set to 0 what belongs to some neurons: the moments of neurons that were drawn anew."""
    is_new_EF = is_new_EF.to(stack.up_EDF.device)
    return replace(
        stack,
        gate_EDF=None if stack.gate_EDF is None else stack.gate_EDF.masked_fill(is_new_EF[:, None], 0),
        up_EDF=stack.up_EDF.masked_fill(is_new_EF[:, None], 0),
        down_EFD=stack.down_EFD.masked_fill(is_new_EF[:, :, None], 0),
    )


def noised(stack: ExpertStack, noise: float, generator: torch.Generator) -> ExpertStack:
    """Add normal noise to every matrix of every expert.

    Args:
        stack: the experts.
        noise: its standard deviation, as a part of that of the expert's matrix: 0.01 is one per cent.
        generator: draws it.
    Raises:
        ConfigError: if it is negative.
    """
    if noise < 0:
        raise ConfigError(f"noise must be at least 0, got {noise}. 0.01 is one per cent of the weights' spread.")
    if noise == 0:
        return stack

    def with_noise(weight: Tensor) -> Tensor:
        wide = weight.float()
        spread_E11 = wide.flatten(1).std(dim=1)[:, None, None]
        drawn = torch.randn(wide.shape, generator=generator).to(wide)
        return (wide + drawn * (noise * spread_E11)).to(weight.dtype)

    return replace(
        stack,
        gate_EDF=None if stack.gate_EDF is None else with_noise(stack.gate_EDF),
        up_EDF=with_noise(stack.up_EDF),
        down_EFD=with_noise(stack.down_EFD),
    )


def times(weight: Tensor, factor: float) -> Tensor:
    """A multiple of a weight in its own type, rounded once."""
    if factor == 1:
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) * factor).to(weight.dtype)
