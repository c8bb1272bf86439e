"""Balance between devices: losses for experts that live on several, as in DeepSeek-V2.

They read where the experts live from what a router with groups stamps on its Routing, one group to a device:
``extras["device_E"]``, the device of each expert, and ``extras["devices_per_token"]``, how many one token may visit.
Both are taken of each sequence alone and averaged, as the expert-level loss beside them
(:func:`~moesaic.balance.sequence_loss`), and both are 1 at perfect balance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.balance.losses import Statistics, sequence_statistics
from moesaic.core.routing import Routing, missing_extra

_WHERE = "a router with groups, such as TopKRouter(groups=GroupLimit(...))"


def device_loss(routing: Routing) -> Tensor:
    """Even out the rows that each device works on: ``sum_i f'_i P'_i`` over devices.

    ``f'_i`` is the mean over the device's experts of ``E * share of rows`` (no gradient), ``P'_i`` the sum of their
    mean probabilities. 1 at perfect balance, at most the number of devices.

    Raises:
        ConfigError: if the router does not say where the experts live.

    Source: DeepSeekMoE eq. 15 to 17; DeepSeek-V2 eq. 26 to 28.
    """
    device_E = _extra(routing, "device_E", "device_loss")
    statistics = sequence_statistics(routing)
    num_experts = routing.num_experts
    # As many places as experts: no device beyond has any, and their number need not be known on the host.
    experts_G = torch.zeros(num_experts, dtype=statistics.share_SE.dtype, device=device_E.device)
    experts_G = experts_G.index_add_(0, device_E, torch.ones_like(experts_G))
    share_SG = torch.zeros_like(statistics.share_SE).index_add_(1, device_E, statistics.share_SE)
    busy_SG = num_experts * share_SG / experts_G.clamp_min(1)
    return statistics.mean((busy_SG * _probability_by_device(statistics, device_E)).sum(dim=-1))


def communication_loss(routing: Routing) -> Tensor:
    """Even out the tokens that each device receives: ``sum_i f''_i P''_i`` over devices.

    ``f''_i`` is the number of tokens sent to the device times ``D / (M * T)`` (no gradient), for D devices of which a
    token may visit M, and ``P''_i`` the sum of the mean probabilities of the device's experts. A token that chose
    several experts of a device is sent there once. 1 where every token visits M devices and all devices equally often;
    less where tokens visit fewer.

    Raises:
        ConfigError: if the router does not say where the experts live, or how many devices a token may visit.

    Source: DeepSeek-V2 eq. 29 to 31.
    """
    device_E = _extra(routing, "device_E", "communication_loss")
    devices_per_token = _extra(routing, "devices_per_token", "communication_loss")
    statistics = sequence_statistics(routing)
    with torch.no_grad():
        # Counted, since the valid rows cannot be picked without asking the device how many there are.
        visits = torch.zeros(routing.scores_TE.numel(), dtype=torch.int64, device=device_E.device)
        cell_N = routing.token_N * routing.num_experts + device_E[routing.expert_N]
        visits.index_add_(0, cell_N, routing.valid_N.to(torch.int64))
        visited_TG = visits.view(routing.scores_TE.shape) > 0
        sent_SG = torch.zeros_like(statistics.share_SE)
        sent_SG.index_add_(0, statistics.sequence_T, visited_TG.to(sent_SG.dtype))
        even_S = devices_per_token * statistics.tokens_S.clamp_min(1) / (device_E.max() + 1)
    received_SG = sent_SG / even_S[:, None]
    return statistics.mean((received_SG * _probability_by_device(statistics, device_E)).sum(dim=-1))


def _probability_by_device(statistics: Statistics, device_E: Tensor) -> Tensor:
    return torch.zeros_like(statistics.mean_SE).index_add(1, device_E, statistics.mean_SE)


def _extra(routing: Routing, name: str, who: str) -> Tensor:
    if name not in routing.extras:
        raise missing_extra(name, who, _WHERE)
    return routing.extras[name]
