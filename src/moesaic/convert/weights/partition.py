"""Ways to cut a network's neurons into experts of equal size, and to tell which neurons every token needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.convert.weights.cluster import balanced_kmeans, cheapest_balanced, check_divides
from moesaic.convert.weights.stack import DenseFFN
from moesaic.core.errors import ConfigError


def by_chance(num_neurons: int, num_experts: int, seed: int) -> Tensor:
    """Deal the neurons out at random (E, F): LLaMA-MoE's best, and what its released models have.

    Raises:
        ConfigError: if they cannot be dealt out evenly.
    """
    check_divides(num_neurons, num_experts, "neurons")
    order = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))
    return order.view(num_experts, -1).sort(dim=1).values


def by_weights(ffn: DenseFFN, num_experts: int, seed: int, *, rows: str = "up", cosine: bool = False) -> Tensor:
    """Put neurons together that read alike (E, F): balanced k-means of their rows, each of length 1.

    Args:
        ffn: the network.
        num_experts: E.
        seed: draws the first means.
        rows: "up" or "gate", whose rows are compared.
        cosine: measure by the cosine to the mean instead of the distance.
    Raises:
        ConfigError: if there is no such matrix, or neurons cannot be cut evenly.

    Source: LLaMA-MoE, "clustering" (both matrices, both distances); MoEfication, "parameter clustering".
    """
    if rows not in ("up", "gate") or (rows == "gate" and ffn.gate_DF is None):
        has = "'up'" if ffn.gate_DF is None else "'up' or 'gate'"
        raise ConfigError(f"rows must be {has} for this network, got {rows!r}. LLaMA-MoE compares both.")
    weight_DF = ffn.gate_DF if rows == "gate" and ffn.gate_DF is not None else ffn.up_DF
    return grouped(balanced_kmeans(F.normalize(weight_DF.float().T, dim=1), num_experts, seed=seed, cosine=cosine))


def by_company(hidden_TF: Tensor, num_experts: int, seed: int, *, share: float = 0.1) -> Tensor:
    """Put neurons together that are active on the same tokens (E, F): a balanced cut of the co-activation graph.

    A neuron counts as active on a token where its activation is among the token's largest ``share`` of magnitudes.
    (With ReLU, and as many as are above 0, that is MoEfication's graph; other non-linearities are never 0.) The edge
    between two neurons is the number of tokens on which both are active. k-means of the neurons' patterns over tokens
    cuts this graph; see :func:`~moesaic.convert.weights.cluster.balanced_kmeans`.

    Args:
        hidden_TF: the neurons' activations.
        num_experts: E.
        seed: draws the first means.
        share: which part of the neurons counts as active on a token.
    Raises:
        ConfigError: if the share is not between 0 and 1, or neurons cannot be cut evenly.

    Source: Zhang et al. 2022, "MoEfication", section 3.2; LLaMA-MoE's graph split.
    """
    if not 0 < share < 1:
        raise ConfigError(
            f"share must be above 0 and below 1, got {share}. 0.1 counts a tenth of the neurons as active."
        )
    size_TF = hidden_TF.abs()
    count = max(1, round(share * hidden_TF.shape[1]))
    best = size_TF.topk(count, dim=1)
    active_TF = torch.zeros_like(size_TF).scatter_(1, best.indices, (best.values > 0).to(size_TF.dtype))
    return grouped(balanced_kmeans(active_TF.T, num_experts, seed=seed))


def by_importance(importance_EF: Tensor, *, hidden: int | None = None, overlap: bool = False) -> Tensor:
    """Give each expert the neurons that matter most for its tokens (E, F).

    Without overlap each neuron goes to one expert, so that the sum of the importances is greatest. (LLaMA-MoE takes the
    greatest first, greedily.) With overlap each expert takes its best, whoever else has them, and neurons that matter
    to nobody are in no expert.

    Args:
        importance_EF: of each neuron for the tokens of each expert.
        hidden: neurons of one expert, where they may overlap; None for as many as there are over E.
        overlap: whether experts may share neurons.
    Raises:
        ConfigError: if neurons cannot be cut evenly, or ``hidden`` is given without overlap or is too large.

    Source: LLaMA-MoE, "gradient" split with and without ``share_neurons``; here without gradients.
    """
    num_experts, num_neurons = importance_EF.shape
    if not overlap:
        if hidden is not None:
            raise ConfigError(
                "hidden is for experts that may overlap: without, each has F / E neurons. Set overlap=True."
            )
        return grouped(cheapest_balanced(-importance_EF.T))
    hidden = num_neurons // num_experts if hidden is None else hidden
    if not 1 <= hidden <= num_neurons:
        raise ConfigError(f"hidden must be from 1 to the network's {num_neurons} neurons, got {hidden}. Lower it.")
    return importance_EF.topk(hidden, dim=1).indices.sort(dim=1).values


def importance(ffn: DenseFFN, hidden_TF: Tensor, token_group_T: Tensor | None = None, num_groups: int = 1) -> Tensor:
    """How much each neuron moves the network's output, the mean over the tokens of each group (E, F).

    ``|h| * |down|``: the length of what would be missing without the neuron. LLaMA-MoE's ``feature_change`` has the
    gradient of the loss in the place of the length of the neuron's row of the down projection.

    Args:
        ffn: the network.
        hidden_TF: its neurons' activations.
        token_group_T: the group of each token; None for one group.
        num_groups: E.
    """
    if token_group_T is None:
        token_group_T = torch.zeros(len(hidden_TF), dtype=torch.int64)
    length_F: Tensor = ffn.down_FD.float().norm(dim=1)
    sum_EF = torch.zeros(num_groups, hidden_TF.shape[1]).index_add_(0, token_group_T, hidden_TF.abs().float())
    count_E = torch.bincount(token_group_T, minlength=num_groups).clamp_min(1)
    mean_EF: Tensor = sum_EF / count_E[:, None] * length_F
    return mean_EF


def weight_importance(ffn: DenseFFN) -> Tensor:
    """How much each neuron may move the output by its weights alone (F,): the product of the lengths of its rows."""
    size_F: Tensor = ffn.up_DF.float().norm(dim=0) * ffn.down_FD.float().norm(dim=1)
    return size_F if ffn.gate_DF is None else size_F * ffn.gate_DF.float().norm(dim=0)


def token_groups(x_TD: Tensor, num_groups: int, seed: int) -> Tensor:
    """Cut tokens into groups of alike ones (T,), all equally large but for the last few tokens, which join the nearest.

    Raises:
        ConfigError: if there are fewer tokens than groups.
    """
    even = len(x_TD) // num_groups * num_groups
    if even == 0:
        raise ConfigError(f"{len(x_TD)} tokens cannot be cut into {num_groups} groups. Give more text.")
    group_T = balanced_kmeans(x_TD[:even], num_groups, seed=seed)
    if even == len(x_TD):
        return group_T
    means = torch.stack([x_TD[:even][group_T == index].mean(dim=0) for index in range(num_groups)])
    return torch.cat([group_T, torch.cdist(x_TD[even:], means).argmin(dim=1)])


def grouped(group_F: Tensor) -> Tensor:
    """From the group of each neuron to the neurons of each group, in rising order; groups are equally large (E, F)."""
    num_groups = int(group_F.max()) + 1
    return torch.argsort(group_F, stable=True).view(num_groups, -1)
