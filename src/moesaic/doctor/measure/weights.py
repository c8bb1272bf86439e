"""Weights that say something by themselves: not finite, equal to a sibling's, all zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moesaic.doctor.measure.layers import Home, homes
from moesaic.doctor.vitals import LayerExperts, Weights
from moesaic.hf.peft.blocks import ExpertBlock, find_blocks, modules_of, weights_of

# Coordinates of each expert that are compared: enough that a cosine by chance stays below 0.05 (five deviations).
_SAMPLE = 16384


def examine_weights(model: nn.Module) -> Weights:
    """Look at every weight of a model; nothing runs.

    Args:
        model: any; its experts are compared where they keep weights that can be told apart.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    bad = tuple(name for name, one in named if one.is_floating_point() and not bool(one.isfinite().all()))
    return Weights(
        not_finite=bad,
        num_weights=sum(one.numel() for _, one in named),
        experts=tuple(_experts(model)) if not bad else (),
    )


def _experts(model: nn.Module) -> list[LayerExperts]:
    modules = modules_of(model)
    found = homes(model)
    layers = []
    for block in find_blocks(model):
        flat_EM = _flat(block, modules)
        if len(flat_EM) < 2:
            continue
        home = next((one for one in found if f"{block.path}.".startswith(f"{one.layer}.")), None)
        unit_EM = torch.nn.functional.normalize(flat_EM, dim=-1)
        cosine_EE = (unit_EM @ unit_EM.T).fill_diagonal_(-1)
        first, second = divmod(int(cosine_EE.argmax()), len(flat_EM))
        layers.append(
            LayerExperts(
                layer=block.path if home is None else home.layer,
                size_E=flat_EM.square().mean(dim=-1).sqrt().double().numpy(),
                likeness=float(cosine_EE.max()),
                pair=(min(first, second), max(first, second)),
                identical=tuple(_identical(block, modules, cosine_EE)),
                zero_rows=() if home is None else _zero_rows(home),
                num_experts=len(flat_EM),
            )
        )
    return layers


def _of_expert(block: ExpertBlock, modules: dict[str, nn.Module], expert: int) -> list[Tensor]:
    if block.stacks:
        return [weights_of(modules[stack.path])[stack.name].detach()[expert].reshape(-1) for stack in block.stacks]
    return [
        weights_of(modules[path])["weight"].detach().reshape(-1)
        for (own, _), path in block.linears.items()
        if own == expert
    ]


@torch.no_grad()
def _flat(block: ExpertBlock, modules: dict[str, nn.Module]) -> Tensor:
    """The same sample of every expert's weights, float32 on the CPU."""
    rows = []
    for expert in range(block.num_experts):
        parts = _of_expert(block, modules, expert)
        each = max(1, _SAMPLE // len(parts))
        rows.append(torch.cat([part[:: max(1, len(part) // each)][:each].float().cpu() for part in parts]))
    return torch.stack(rows)


def _identical(block: ExpertBlock, modules: dict[str, nn.Module], cosine_EE: Tensor) -> list[tuple[int, int]]:
    pairs = [(int(a), int(b)) for a, b in (cosine_EE > 1 - 1e-5).nonzero().tolist() if a < b]
    return [
        (a, b)
        for a, b in pairs
        if all(
            torch.equal(one, other)
            for one, other in zip(_of_expert(block, modules, a), _of_expert(block, modules, b), strict=True)
        )
    ]


def _zero_rows(home: Home) -> tuple[int, ...]:
    """Experts whose row is all zeros in a matrix of the router that has a row for each."""
    weights: Sequence[Tensor] = [one.detach() for one in home.router_weights if one.ndim == 2]
    if not weights:
        return ()
    weight_ED = weights[0]
    return tuple(int(row) for row in (weight_ED == 0).all(dim=-1).nonzero()[:, 0])
