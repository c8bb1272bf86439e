"""What may be done to the choices of one layer: an expert switched off, forced, or swapped with another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing
from moesaic.hf.uncompiled import uncompiled
from moesaic.kernels.sort_rows import sort_kept
from moesaic.layer import MoELayer
from moesaic.routers.token_choice import TokenChoiceRouter


@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchOff:
    """Keep one expert of a layer, or several, from working.

    Attributes:
        layer: index in depth order among the MoE layers, or the layer's module path.
        expert: its number, or several.
        reroute: True: a token that chose it takes the best of the experts that are left, and all of its weights come
            anew from the router's own rule; a token that did not choose it keeps its experts. False: the expert's rows
            are dropped as a full one's are, and the token's other weights stay as they were.
    """

    layer: int | str
    expert: int | tuple[int, ...]
    reroute: bool = True

    @property
    def experts(self) -> tuple[int, ...]:
        """Which are off."""
        return (self.expert,) if isinstance(self.expert, int) else self.expert


@dataclass(frozen=True, kw_only=True, slots=True)
class Force:
    """Send every token of a layer to one expert.

    Attributes:
        layer: index in depth order among the MoE layers, or the layer's module path.
        expert: takes the place of the last choice of each token that has not chosen it; weights come from the router's
            own rule.
    """

    layer: int | str
    expert: int

    @property
    def experts(self) -> tuple[int, ...]:
        """Who is named."""
        return (self.expert,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Swap:
    """Let two experts of a layer do each other's work, with the weights that the work had.

    Attributes:
        layer: index in depth order among the MoE layers, or the layer's module path.
        first: one.
        second: the other.
    """

    layer: int | str
    first: int
    second: int

    @property
    def experts(self) -> tuple[int, ...]:
        """Who is named."""
        return (self.first, self.second)


Intervention = SwitchOff | Force | Swap


@dataclass(frozen=True, kw_only=True, slots=True)
class Edits:
    """All that is done to the choices of one layer.

    First those who may not be chosen are replaced, then the forced take their places, then names are swapped in the
    order given, then rows are dropped.

    Attributes:
        closed: experts that may not be chosen.
        forced: experts that every token visits.
        swaps: pairs that do each other's work.
        dropped: experts whose rows are dropped.
    """

    closed: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    swaps: tuple[tuple[int, int], ...] = ()
    dropped: tuple[int, ...] = ()

    @classmethod
    def of(cls, interventions: tuple[Intervention, ...]) -> Edits:
        """Gather what was asked of one layer."""
        offs = [one for one in interventions if isinstance(one, SwitchOff)]
        return cls(
            closed=tuple(sorted({e for one in offs if one.reroute for e in one.experts})),
            forced=tuple(dict.fromkeys(one.expert for one in interventions if isinstance(one, Force))),
            swaps=tuple((one.first, one.second) for one in interventions if isinstance(one, Swap)),
            dropped=tuple(sorted({e for one in offs if not one.reroute for e in one.experts})),
        )

    @property
    def chooses(self) -> bool:
        """Whether tokens get other choices, weighed by the router."""
        return bool(self.closed or self.forced)

    def among(self, experts: tuple[int, ...], num_experts: int, device: torch.device) -> Tensor:
        """True for those experts, bool (E,)."""
        chosen_E = torch.zeros(num_experts, dtype=torch.bool, device=device)
        chosen_E[list(experts)] = True
        return chosen_E

    def choose(self, expert_TK: Tensor, num_experts: int, best: Callable[[Tensor], Tensor]) -> Tensor:
        """The choices once experts are closed and forced (T, K).

        Args:
            expert_TK: as the router made them.
            num_experts: E.
            best: the router's choice (T, K) where the marked experts (E,) are out.
        """
        if self.closed:
            closed_E = self.among(self.closed, num_experts, expert_TK.device)
            hit_T1 = closed_E[expert_TK].any(dim=-1, keepdim=True)
            if hit_T1.any():
                expert_TK = torch.where(hit_T1, best(closed_E), expert_TK)
        forced_E = self.among(self.forced, num_experts, expert_TK.device)
        last_K = torch.arange(expert_TK.shape[1], device=expert_TK.device)
        for expert in self.forced:
            missing_T1 = (expert_TK != expert).all(dim=-1, keepdim=True)
            # The last choice that nobody has forced.
            place_T1 = torch.where(forced_E[expert_TK], -1, last_K).argmax(dim=-1, keepdim=True)
            expert_TK = torch.where(missing_T1 & (last_K == place_T1), expert, expert_TK)
        return expert_TK

    def rename(self, expert: Tensor) -> Tensor:
        """Experts under the names of those who do their work."""
        for first, second in self.swaps:
            expert = torch.where(expert == first, second, torch.where(expert == second, first, expert))
        return expert

    def is_dropped(self, expert: Tensor, num_experts: int) -> Tensor:
        """Which rows are dropped, by their experts."""
        return self.among(self.dropped, num_experts, expert.device)[expert]

    @uncompiled
    def around(self, layer: MoELayer) -> MoELayer:
        """A layer of the same modules, whose router and dispatch do what is asked; the one given stays as it is."""
        twin = copy.copy(layer)
        twin.__dict__["_modules"] = {
            **layer._modules,
            "router": EditedRouter(layer.router, self),
            "dispatch": EditedDispatch(layer.dispatch, self),
        }
        return twin


class EditedRouter(nn.Module):
    """A router, and what is done to its choices.

    Args:
        router: chooses.
        edits: what is done.
    """

    def __init__(self, router: nn.Module, edits: Edits) -> None:
        super().__init__()
        self.router = router
        self.edits = edits

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table as the router does, then change it.

        Raises:
            ConfigError: if the router draws noise, so that asking it twice gives two answers.
        """
        edits, router = self.edits, self.router
        routing: Routing = router(x_TD, valid_T, context)
        if edits.chooses and isinstance(router, TokenChoiceRouter):
            if router.training and router.jitter > 0:
                raise ConfigError(
                    f"An intervention needs a router without noise, got one in training with jitter={router.jitter}. "
                    "Call model.eval() first."
                )
            own_TK = routing.expert_N.view(-1, router.top_k)

            def best(closed_E: Tensor) -> Tensor:
                masked = (one.masked_fill(closed_E, -torch.inf) for one in (routing.logits_TE, routing.scores_TE))
                return router.choose(*masked)

            expert_TK = edits.choose(own_TK, routing.num_experts, best)
            if not torch.equal(expert_TK, own_TK):
                routing = router(x_TD, valid_T, replace(context, choice_TK=expert_TK))
        return replace(routing, expert_N=edits.rename(routing.expert_N)) if edits.swaps else routing


class EditedDispatch(nn.Module):
    """A dispatch that leaves out the rows of experts that are switched off.

    Args:
        dispatch: sorts the table.
        edits: what is done.
    """

    def __init__(self, dispatch: nn.Module, edits: Edits) -> None:
        super().__init__()
        self.dispatch = dispatch
        self.edits = edits

    def forward(self, routing: Routing) -> Plan:
        """Sort the table."""
        plan: Plan = self.dispatch(routing)
        if not self.edits.dropped:
            return plan
        return sort_kept(routing, plan.kept_N & ~self.edits.is_dropped(routing.expert_N, routing.num_experts))
