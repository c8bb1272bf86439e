"""Two levels of noisy gates: first groups of experts, then experts within the groups (Shazeer 2017, appendix B)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.autocast import without_autocast
from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init, zeros
from moesaic.core.routing import Routing, checked_mask
from moesaic.routers.linear import LinearRouter, widened
from moesaic.routers.noisy import check_noisy, kept_probability, noise, spread
from moesaic.routers.select import select_top_k
from moesaic.routers.token_choice import check_top_k


class HierarchicalRouter(LinearRouter):
    """A noisy gate over groups, and in each group a noisy gate over its experts; weights multiply.

    The table is flat: expert ``g * per_group + e`` is member ``e`` of group ``g``. In training the router draws one
    standard normal number for each token and group, in one call of shape (T, G), then one for each token and expert, in
    one call of shape (T, E); in evaluation none.

    Args:
        width: D, the width of a token.
        num_groups: G, the branching factor of the first level.
        per_group: experts in each group; E is their product.
        groups_per_token: groups that a token visits.
        members_per_token: experts that it visits in each of them.
        noise_epsilon: see :class:`~moesaic.routers.NoisyTopKRouter`.
        init: draws both gates; 0 unless given.
        noise_init: draws both maps to the noise's width; 0 unless given.
    Shape:
        ``(T, D)`` -> Routing of ``groups_per_token * members_per_token`` rows for each token, the largest weight first.
        ``logits_TE`` is the group's logit plus the logarithm of the member's probability in its group, without noise:
        its softmax is the product of both. ``scores_TE`` is that product with noise. ``extras["smooth_load_E"]`` is
        ``Load_H``, the group's smooth load times the share of it that its gate gives the member.
    Raises:
        ConfigError: if a token is to visit more groups or members than there are, or only one expert of several.
    """

    def __init__(
        self,
        width: int,
        num_groups: int,
        per_group: int,
        *,
        groups_per_token: int = 2,
        members_per_token: int = 2,
        noise_epsilon: float = 0.0,
        init: Init = zeros,
        noise_init: Init = zeros,
    ) -> None:
        for name, value, most in (
            ("groups_per_token", groups_per_token, num_groups),
            ("members_per_token", members_per_token, per_group),
        ):
            if not 1 <= value <= most:
                raise ConfigError(
                    f"{name} must be between 1 and {most}, got {value}. Lower {name}, or cut the experts otherwise."
                )
        num_experts = num_groups * per_group
        check_top_k(groups_per_token * members_per_token, num_experts)
        check_noisy(groups_per_token * members_per_token, num_experts, noise_epsilon)
        super().__init__(width, num_experts, init=init)
        self.num_groups = num_groups
        self.groups_per_token = groups_per_token
        self.members_per_token = members_per_token
        self.noise_epsilon = noise_epsilon
        self.noise_ED = nn.Parameter(torch.empty(num_experts, width))
        self.group_GD = nn.Parameter(torch.empty(num_groups, width))
        self.group_noise_GD = nn.Parameter(torch.empty(num_groups, width))
        init(self.group_GD, width)
        noise_init(self.noise_ED, width)
        noise_init(self.group_noise_GD, width)

    @property
    def experts_per_token(self) -> float:
        """Groups times members."""
        return float(self.groups_per_token * self.members_per_token)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        num_tokens, per_group = x_TD.shape[0], self.num_experts // self.num_groups
        group_logits_TG, member_logits_TE = self._group_logits(x_TD), self.logits(x_TD)
        group_spread_TG = spread(x_TD, self.group_noise_GD, self.noise_epsilon)
        spread_TE = spread(x_TD, self.noise_ED, self.noise_epsilon)
        group_noisy_TG = group_logits_TG + noise(group_spread_TG, self.training)
        noisy_TE = member_logits_TE + noise(spread_TE, self.training)

        # Every group's gate answers for every token; those of groups that were not chosen are then not asked. A gate
        # and its token make one line of per_group members.
        lines, by_group = (num_tokens * self.num_groups, per_group), (num_tokens, self.num_groups, per_group)
        groups = _keep(group_logits_TG, group_noisy_TG, group_spread_TG, self.groups_per_token, self.training)
        members = _keep(
            member_logits_TE.reshape(lines),
            noisy_TE.reshape(lines),
            spread_TE.reshape(lines),
            self.members_per_token,
            self.training,
        )
        group_in_TG, group_weight_TG, group_kept_TG = groups
        member_in_TGE, member_weight_TGE, member_kept_TGE = (part.view(by_group) for part in members)

        valid_T = checked_mask(valid_T, num_tokens, x_TD.device)
        load_E = _load(group_kept_TG, member_kept_TGE, group_in_TG, valid_T)
        logits_TGE = group_logits_TG[:, :, None] + member_logits_TE.view(by_group).log_softmax(dim=-1)
        scores_TGE = group_noisy_TG.softmax(dim=-1)[:, :, None] * noisy_TE.view(by_group).softmax(dim=-1)
        flat = (num_tokens, self.num_experts)
        return Routing.from_mask(
            (group_in_TG[:, :, None] & member_in_TGE).view(flat),
            (group_weight_TG[:, :, None] * member_weight_TGE).view(flat),
            logits_TGE.view(flat),
            scores_TGE.view(flat),
            valid_T,
            # Attached where it is a count, so that a loss of it has a gradient, of zeros.
            extras={"smooth_load_E": load_E + noisy_TE[:0].sum()},
        )

    def _group_logits(self, x_TD: Tensor) -> Tensor:
        x_TD = widened(x_TD, self.group_GD.shape[1])
        with without_autocast(x_TD.device):
            return F.linear(x_TD, self.group_GD.to(x_TD.dtype))


def _keep(
    clean_TE: Tensor, noisy_TE: Tensor, spread_TE: Tensor, top_k: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Who is among the K best; a softmax over those, 0 elsewhere; how likely each was to be, a count in evaluation."""
    best_TK = select_top_k(noisy_TE.detach(), top_k)
    is_in_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter_(1, best_TK, True)
    weight_TK = noisy_TE.gather(1, best_TK).softmax(dim=-1)
    weight_TE = torch.zeros_like(noisy_TE).scatter(1, best_TK, weight_TK)
    if training and top_k < clean_TE.shape[1]:
        return is_in_TE, weight_TE, kept_probability(clean_TE, noisy_TE, spread_TE, top_k)
    return is_in_TE, weight_TE, is_in_TE.to(clean_TE.dtype)


def _load(group_kept_TG: Tensor, member_kept_TGE: Tensor, group_in_TG: Tensor, valid_T: Tensor) -> Tensor:
    """``Load_H[g, e] = Load_primary[g] * Load_g[e] / |X_g|``, where ``X_g`` are the valid tokens that visit group g.

    The product, and not ``Load_g`` alone, so that the gate over groups gets a gradient (Shazeer 2017, appendix B).
    """
    visits_TG = group_in_TG & valid_T[:, None]
    group_load_G = group_kept_TG.masked_fill(~valid_T[:, None], 0).sum(dim=0)
    member_load_GE = member_kept_TGE.masked_fill(~visits_TG[:, :, None], 0).sum(dim=0)
    return (group_load_G[:, None] * member_load_GE / visits_TG.sum(dim=0).clamp_min(1)[:, None]).flatten()
