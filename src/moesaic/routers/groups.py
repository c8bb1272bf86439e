"""Group-limited selection: a token may only use experts of its best few groups, so that it visits few devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.core.errors import ConfigError
from moesaic.routers.select import select_top_k


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupLimit:
    """Keep the best few of equal, neighbouring groups of experts.

    Each group is thought to live on a device of its own: :meth:`devices` tells losses and dispatch which.

    Attributes:
        num_groups: groups that the experts are cut into.
        groups_kept: groups that one token may use.
        best_per_group: a group's score is the sum of this many of its best expert scores: 1 is DeepSeek-V2's
            device-limited routing (section 2.2.2), 2 is DeepSeek-V3's node-limited routing (section 2.1.2).
    """

    num_groups: int
    groups_kept: int
    best_per_group: Literal[1, 2] = 2

    def check(self, num_experts: int, top_k: int) -> None:
        """Refuse a limit that the experts cannot be cut by.

        Raises:
            ConfigError: if groups are unequal, or the kept ones hold too few experts.
        """
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ConfigError(
                f"num_groups must divide num_experts={num_experts}, got {self.num_groups}. "
                "Change one so that every group holds as many experts."
            )
        if not 1 <= self.groups_kept <= self.num_groups:
            raise ConfigError(
                f"groups_kept must be between 1 and num_groups={self.num_groups}, got {self.groups_kept}. "
                "Keep fewer groups, or cut the experts into more."
            )
        if self.best_per_group not in (1, 2):
            raise ConfigError(
                f"best_per_group must be 1 or 2, got {self.best_per_group}. DeepSeek-V2 uses 1, DeepSeek-V3 uses 2."
            )
        per_group = num_experts // self.num_groups
        if per_group < self.best_per_group:
            raise ConfigError(
                f"each group must hold at least best_per_group={self.best_per_group} experts, got {per_group}. "
                "Use fewer groups, or add experts."
            )
        if self.groups_kept * per_group < top_k:
            raise ConfigError(
                f"the groups kept must hold at least top_k={top_k} experts, got {self.groups_kept} groups of "
                f"{per_group}. Keep more groups, or lower top_k."
            )

    def devices(self, num_experts: int, top_k: int, device: torch.device) -> dict[str, Tensor]:
        """What a router stamps on its Routing: ``device_E``, the group of each expert, and ``devices_per_token``.

        The latter is the most groups that one token can visit: as many as are kept, but no more than its choices.
        """
        device_E = torch.arange(num_experts, device=device) // (num_experts // self.num_groups)
        return {"device_E": device_E, "devices_per_token": torch.full((), min(self.groups_kept, top_k), device=device)}

    def mask(self, score_TE: Tensor) -> Tensor:
        """Return the scores with every expert outside a token's best groups at minus infinity.

        Minus infinity and not 0: a masked 0 would beat an allowed expert whose biased score is negative.
        """
        num_tokens, num_experts = score_TE.shape
        score_TGE = score_TE.view(num_tokens, self.num_groups, num_experts // self.num_groups)
        group_score_TG = score_TGE.topk(self.best_per_group, dim=-1).values.sum(dim=-1)
        kept_TG = torch.zeros_like(group_score_TG, dtype=torch.bool)
        kept_TG.scatter_(1, select_top_k(group_score_TG, self.groups_kept), True)
        return score_TGE.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).view(num_tokens, num_experts)
