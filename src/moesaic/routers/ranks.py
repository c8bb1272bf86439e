"""Ranking tokens for each expert, where experts choose tokens and not the other way round."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_for_experts(score_TE: Tensor, group_T: Tensor, valid_T: Tensor) -> Tensor:
    """How many valid tokens of the same group each expert likes better; among equal ones the earliest comes first.

    Args:
        score_TE: how much each expert wants each token.
        group_T: tokens are ranked among those of their own group; whole numbers from 0.
        valid_T: False where a token is padding: it ranks behind all others.
    Shape:
        ``(T, E)`` -> ``(T, E)``, int64.
    """
    num_tokens, num_experts = score_TE.shape
    if num_tokens == 0:
        return torch.zeros(num_tokens, num_experts, dtype=torch.int64, device=score_TE.device)
    # Stable sorts, least important key first: by score, then by group; padding forms a last group of its own.
    group_T = torch.where(valid_T, group_T, group_T.max() + 1)
    order_TE = torch.argsort(score_TE.detach(), dim=0, descending=True, stable=True)
    order_TE = order_TE.gather(0, torch.argsort(group_T[order_TE], dim=0, stable=True))
    size_S = torch.bincount(group_T)
    start_T = (size_S.cumsum(0) - size_S)[group_T]
    place_TE = torch.arange(num_tokens, device=score_TE.device)[:, None].expand(-1, num_experts)
    return torch.zeros_like(order_TE).scatter(0, order_TE, place_TE) - start_T[:, None]


def share_of_groups(group_T: Tensor, valid_T: Tensor, share: float) -> Tensor:
    """For each token, how many tokens an expert may take of its group: ``floor(share * size)``, at least 1.

    Args:
        group_T: whole numbers from 0.
        valid_T: False where a token is padding, which does not count in the size.
        share: of the group's tokens; never more than all of them.
    Shape:
        ``(T,)`` -> ``(T,)``, int64; 0 for tokens of groups without a valid token.
    """
    if group_T.numel() == 0:
        return torch.zeros_like(group_T)
    size_S = torch.zeros_like(torch.bincount(group_T)).index_add_(0, group_T, valid_T.to(torch.int64))
    # 98 * (1 / 49) is 1.9999999999999998: the last bit must not cost a place.
    take_S = torch.floor(size_S.double() * share + 1e-6).to(torch.int64).clamp_min(1)
    return torch.minimum(take_S, size_S)[group_T]
