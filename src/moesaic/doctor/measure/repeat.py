"""Does evaluation give the same twice, and does it leave the model alone?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moesaic.doctor.measure.layers import Batch, Heard, chosen_TE, run, undisturbed
from moesaic.doctor.vitals import Repeat
from moesaic.hf.scope import listening


def examine_repeat(model: nn.Module, batch: Batch) -> Repeat:
    """Run one batch twice in evaluation mode, from different states of the random generators."""
    with undisturbed(model, training=False), torch.no_grad():
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        torch.manual_seed(1)
        first, first_TE = _routed(model, batch)
        torch.manual_seed(2)
        second, second_TE = _routed(model, batch)
        moved = tuple(name for name, value in model.state_dict().items() if not _same(before[name], value))
    rerouted, num_tokens = {}, 0
    for layer, one in first_TE.items():
        other = second_TE[layer]
        num_tokens = max(num_tokens, len(one))
        differ_T = (one != other).any(dim=-1) if one.shape == other.shape else torch.ones(1)
        rerouted[layer] = float(differ_T.double().mean())
    size = float(first.double().abs().max())
    difference = float((first.double() - second.double()).abs().nan_to_num(0.0).max())
    return Repeat(
        rerouted=rerouted,
        largest_difference=difference / size if size else difference,
        moved=moved,
        num_tokens=num_tokens,
    )


def _routed(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    heard = Heard(model, balance=False)
    with listening(heard):
        output = run(model, batch)
    masks = {}
    for layer, reports in heard.reports.items():
        rows = [report.routing for report in reports]
        if rows:
            masks[layer] = torch.cat(
                [chosen_TE(one.expert_N, one.token_N, one.num_tokens, one.num_experts)[one.valid_T] for one in rows]
            )
    # Language models give logits first, others what they have.
    first = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return output.get("logits", first), masks


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(
        one.nan_to_num() if one.is_floating_point() else one, other.nan_to_num() if other.is_floating_point() else other
    )
