"""The models that the experiment starts from: a dense one, and mixtures made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.lab.pretrained.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moesaic.convert.run import Converted

DENSE = "dense"
ALONE = "upcycled, one copy"
PAIRED = "upcycled, two copies"
SPLIT = "split"

Calibration = list[dict[str, Any]]
"""Batches of training text."""

FASTER = ", twice the rate"
"""After the name of a model that is trained with twice the learning rate."""

_CLUSTERED_TOKENS = 2048


def alone(model: PreTrainedModel, text: Calibration, plan: Plan) -> Converted:
    """E copies of each network, one for each kind of token: what a token meets is as large as before.

    In halves that are chosen together (virtual groups), since the one weight of one expert would be 1 for every router.
    """
    from moesaic.convert.grow.upcycle import upcycle

    kinds = {"num_experts": 2 * plan.num_experts, "top_k": 2, "granularity": 2}
    made = upcycle(model, "mixtral", layers=list(plan.layers), **kinds)  # type: ignore[arg-type]
    return _routed_by_kind(made, model, text, plan)


def paired(model: PreTrainedModel, text: Calibration, plan: Plan) -> Converted:
    """E copies of each network, two for each token: it meets one network more than before."""
    from moesaic.convert.grow.upcycle import upcycle

    made = upcycle(model, "mixtral", num_experts=plan.num_experts, top_k=2, layers=list(plan.layers))
    return _routed_by_kind(made, model, text, plan)


def split(model: PreTrainedModel, text: Calibration, plan: Plan) -> Converted:
    """E slices of each network by their importance to kinds of tokens, K of them for each token."""
    from moesaic.convert.grow.split import split

    return split(
        model,
        "mixtral",
        num_experts=plan.num_experts,
        top_k=plan.split_top_k,
        method="importance",
        text=text,
        layers=list(plan.layers),
    )


MIXTURES: Mapping[str, Callable[[PreTrainedModel, Calibration, Plan], Converted]] = {
    ALONE: alone,
    PAIRED: paired,
    SPLIT: split,
}
"""What makes a mixture of the dense model, by name."""


@torch.no_grad()
def _routed_by_kind(made: Converted, dense: PreTrainedModel, text: Calibration, plan: Plan) -> Converted:
    """Give routers a row for each kind of token; copies are alike, so that it does not change what the model says."""
    from moesaic.convert.grow.tokens import run_networks
    from moesaic.convert.layout.dense import networks

    assert made.model is not None
    found = networks(dense, list(plan.layers))
    for path, x_TD in run_networks(dense, found, text).items():
        rows_ED = kinds_of_token(x_TD, plan.num_experts, seed=plan.seed)
        block: Any = made.model.base_model.get_submodule(path)
        weight_ED = block.moe.router.weight
        weight_ED.copy_(rows_ED.repeat_interleave(len(weight_ED) // plan.num_experts, dim=0))
    # Measured again, and on text: what the receipt has is from before.
    models: tuple[Any, Any] = (made.model, dense)
    mine, theirs = (model.eval()(**text[0]).logits for model in models)
    receipt = replace(
        made.receipt,
        largest_logit_difference=float((mine - theirs).abs().max()),
        largest_logit=float(theirs.abs().max()),
        probe_tokens=int(text[0]["attention_mask"].sum()),
    )
    return replace(made, receipt=receipt)


def kinds_of_token(x_TD: Tensor, num_kinds: int, *, seed: int = 0) -> Tensor:
    """A router's rows for kinds of tokens: the directions in which equally large clusters lie from the mean.

    The mean's own direction is taken out, so that no row has an advantage that all tokens share.

    Args:
        x_TD: what the layer reads on some text.
        num_kinds: E.
        seed: of the first means, and of the tokens that are looked at.
    Shape:
        ``(T, D)`` -> ``(E, D)``, each row of length 1.

    Source: clusters of text that experts are trained on, Gururangan et al. 2023, arXiv:2303.14177, taken here layer by
    layer of what the network reads.
    """
    from moesaic.convert.weights.cluster import balanced_kmeans

    mean_D = F.normalize(x_TD.mean(dim=0), dim=0)
    from_mean_TD = x_TD - x_TD.mean(dim=0)
    from_mean_TD = F.normalize(from_mean_TD - (from_mean_TD @ mean_D)[:, None] * mean_D, dim=1)
    count = min(_CLUSTERED_TOKENS, len(x_TD)) // num_kinds * num_kinds
    chosen = torch.randperm(len(x_TD), generator=torch.Generator().manual_seed(seed))[:count]
    points_TD = from_mean_TD[chosen]
    kind_T = balanced_kmeans(points_TD, num_kinds, seed=seed, cosine=True)
    rows = [F.normalize(points_TD[kind_T == kind].mean(dim=0), dim=0) for kind in range(num_kinds)]
    return torch.stack(rows).to(x_TD.dtype)


def whole_upcycled(model: PreTrainedModel, plan: Plan) -> Converted:
    """E copies of the network of every layer, two for each token."""
    from moesaic.convert.grow.upcycle import upcycle

    return upcycle(model, "mixtral", num_experts=plan.num_experts, top_k=2)


def whole_split(model: PreTrainedModel, plan: Plan) -> Converted:
    """The network of every layer cut into E, and all of them used, so that nothing is lost."""
    from moesaic.convert.grow.split import split

    count = plan.num_experts
    return split(model, "mixtral", num_experts=count, top_k=count, gate="zero", scale="slices")


WHOLE: Mapping[str, Callable[[PreTrainedModel, Plan], Converted]] = {
    "every layer upcycled": whole_upcycled,
    "every layer split": whole_split,
}
"""What is tried on every layer of the dense model, to see that it computes the same."""
