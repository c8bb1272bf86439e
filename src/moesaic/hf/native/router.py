"""A router of transformers that reports what it chose, and routes otherwise where it is asked to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from moesaic.balance import LossTerm, Rule
from moesaic.core.routing import Routing
from moesaic.hf.config import made_once
from moesaic.hf.interventions import Edits
from moesaic.hf.native.router_spec import RouterSpec, wide
from moesaic.hf.native.table import Row
from moesaic.hf.scope import NOT_GIVEN, Frame, current_frame
from moesaic.hf.uncompiled import uncompiled
from moesaic.routers.select import select_top_k


@dataclass(frozen=True, kw_only=True, slots=True)
class Adoption:
    """What is kept with an adopted router.

    Attributes:
        spec: what it computes.
        row: how it is read.
        float32: compute logits and scores in float32, whatever the model's precision.
        terms: balance losses that belong to it.
        rules: build the controllers that belong to it.
    """

    spec: RouterSpec
    row: Row
    float32: bool = False
    terms: tuple[LossTerm, ...] = ()
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Decision:
    """What a router decided for the tokens that it read.

    Attributes:
        logits_TE: over all classes.
        weight_TK: of the chosen.
        expert_TK: the chosen.
        shared_TS: weights of shared experts, where the router has gates for them.
        kept_TK: False where an intervention drops a choice; None for all kept.
    """

    logits_TE: Tensor
    weight_TK: Tensor
    expert_TK: Tensor
    shared_TS: Tensor | None = None
    kept_TK: Tensor | None = None


class Adopted(nn.Module):
    """A module of transformers whose class is one of ours too, made by :func:`adopted_class`; its weights stay its."""

    native_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        kind = next(base for base in type(self).__mro__ if base.__module__.startswith("moesaic."))
        return _new_module, (type(self).native_class, kind), self.__dict__


class Reporter(Adopted):
    """An adopted module that reports its routings.

    Attributes:
        takes_choices: whether its choices can be given to it, as a replay does.
    """

    takes_choices: ClassVar[bool] = True

    @property
    def adoption(self) -> Adoption:
        """What is kept with the router."""
        return cast(Adoption, self.__dict__["_moesaic"])

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """Balance losses that belong to it."""
        return self.adoption.terms

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Build the controllers that belong to it."""
        return self.adoption.rules

    def decide(
        self,
        router: nn.Module,
        hidden_states: Tensor,
        bias_E: Tensor | None,
        native: Callable[[], Decision],
    ) -> Decision:
        """Let the model's own router decide, or compute anew what its spec says where float32 or a replay is asked for.

        Args:
            router: the module with the weights.
            hidden_states: what it reads.
            bias_E: its selection bias.
            native: runs the model's own code.
        """
        decision, edits = self._decided(router, hidden_states, bias_E, native), current_frame().edits.get(self)
        if edits is None:
            return decision
        return edited(
            decision, edits, self.adoption, router, hidden_states.reshape(-1, hidden_states.shape[-1]), bias_E
        )

    def _decided(
        self, router: nn.Module, hidden_states: Tensor, bias_E: Tensor | None, native: Callable[[], Decision]
    ) -> Decision:
        mine, frame = self.adoption, current_frame()
        chosen_TK = None if frame.replay is None else frame.replay.choices(self, frame, hidden_states)
        if chosen_TK is None and not mine.float32:
            return native()
        spec, row = mine.spec, mine.row
        if mine.float32:
            spec = replace(spec, precision="float32")
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = native().logits_TE if row.logits is None else row.logits(row, router, x_TD, spec)
        scores_TE = spec.scores(logits_TE)
        own_TK = spec.choose(logits_TE, scores_TE, bias_E) if spec.is_learned else native().expert_TK
        chosen_TK = own_TK if chosen_TK is None else torch.where(chosen_TK == NOT_GIVEN, own_TK, chosen_TK)
        weight_TK, shared_TS = spec.weights(logits_TE, scores_TE, chosen_TK, row.scale_of(router))
        return Decision(logits_TE=spec.routed(logits_TE), weight_TK=weight_TK, expert_TK=chosen_TK, shared_TS=shared_TS)

    def tell(self, hidden_states: Tensor, decision: Decision, kept_TK: Tensor | None = None) -> None:
        """Report a decision, if anybody wants it.

        Args:
            hidden_states: what the router read; its shape tells sequences.
            decision: what was decided.
            kept_TK: False where capacity dropped a choice; None for all kept.
        """
        mine, frame = self.adoption, current_frame()
        kept_TK = decision.kept_TK if kept_TK is None else kept_TK
        wanted, _ = frame.wanted(self, mine.terms)
        if not wanted and not frame.is_heard(self):
            return
        # What only listeners see must leave nothing in the graph: recomputed activations would miss it there.
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(wanted)):
            frame.report(self, _routing(frame, self, mine.spec, hidden_states, decision, kept_TK), mine.terms)


def edited(
    decision: Decision, edits: Edits, mine: Adoption, router: nn.Module, x_TD: Tensor, bias_E: Tensor | None
) -> Decision:
    """A decision with what an intervention does to it; tokens that it does not touch keep their very numbers.

    Args:
        decision: the router's.
        edits: what is done.
        mine: what is kept with the router.
        router: the module with the weights.
        x_TD: what it read.
        bias_E: its selection bias.
    """
    spec = replace(mine.spec, precision="float32") if mine.float32 else mine.spec
    expert_TK, weight_TK, shared_TS = decision.expert_TK.to(torch.int64), decision.weight_TK, decision.shared_TS
    if edits.chooses:
        logits_TE = decision.logits_TE if mine.row.logits is None else mine.row.logits(mine.row, router, x_TD, spec)
        logits_TE = wide(logits_TE)
        closed_E = edits.among(edits.closed, spec.num_experts, x_TD.device)
        by_TE, scores_TE = spec.routed(logits_TE).masked_fill(closed_E, -torch.inf), spec.scores(logits_TE)

        def best(closed_E: Tensor) -> Tensor:
            select_TE = spec.selection(by_TE, scores_TE.masked_fill(closed_E, -torch.inf), bias_E)
            # Once more: some families put 0 in the place of what is out.
            return select_top_k(select_TE.masked_fill(closed_E, -torch.inf), spec.top_k)

        own_TK, expert_TK = expert_TK, edits.choose(expert_TK, spec.num_experts, best)
        # Sparsemixer weighs a pick against those that come near it: one that is out must not.
        against_TE = by_TE if spec.policy == "sparsemixer" else logits_TE
        weights_TK, gates_TS = spec.weights(against_TE, scores_TE, expert_TK, mine.row.scale_of(router))
        other_T1 = (expert_TK != own_TK).any(dim=-1, keepdim=True)
        weight_TK = torch.where(other_T1, weights_TK.to(weight_TK.dtype), weight_TK)
        if shared_TS is not None and gates_TS is not None:
            shared_TS = torch.where(other_T1, gates_TS.to(shared_TS.dtype), shared_TS)
    expert_TK, kept_TK = edits.rename(expert_TK), None
    if edits.dropped:
        kept_TK = ~edits.is_dropped(expert_TK, spec.num_experts)
        weight_TK = weight_TK.masked_fill(~kept_TK, 0)
    return replace(decision, weight_TK=weight_TK, expert_TK=expert_TK, shared_TS=shared_TS, kept_TK=kept_TK)


class AdoptedRouter(Reporter):
    """A router whose forward gives logits, weights and experts, as those of most families do."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Route as the model's own class does, and report."""
        given, spec, row = (*args, *kwargs.values()), self.adoption.spec, self.adoption.row
        ran: list[tuple[tuple[Any, ...], Decision]] = []

        def native() -> Decision:
            if not ran:
                output = super(AdoptedRouter, self).forward(hidden_states, *args, **kwargs)
                ran.append((output, unpacked(output, self, hidden_states, spec, row)))
            return ran[0][1]

        # What is passed beside the tokens is the bias that the block keeps, if the row says so.
        passed = row.selection_bias is not None and row.selection_bias.startswith("block.")
        bias_E = given[0] if passed and given else (None if passed else row.bias_of(self, self))
        decision = self.decide(self, hidden_states, None if bias_E is None else bias_E.reshape(-1), native)
        self.tell(hidden_states, decision)
        if ran and decision is ran[0][1]:
            return ran[0][0]
        return packed(decision, spec, ran[0][0] if ran else None, row)


def unpacked(output: tuple[Any, ...], router: nn.Module, hidden_states: Tensor, spec: RouterSpec, row: Row) -> Decision:
    """What a router's forward returned, in one form for all families."""
    logits_TE, weight_TK, expert_TK = output[:3]
    if not row.returns_logits and row.logits is not None:
        logits_TE = row.logits(row, router, hidden_states.reshape(-1, hidden_states.shape[-1]), spec)
    if spec.null == "skip" and spec.null_experts:
        # ZAYA hides a skip behind expert 0 with weight 0, which no softmax gives otherwise.
        expert_TK = expert_TK.masked_fill(weight_TK == 0, spec.num_experts - 1)
    return Decision(logits_TE=logits_TE, weight_TK=weight_TK, expert_TK=expert_TK)


def packed(decision: Decision, spec: RouterSpec, native: tuple[Any, ...] | None, row: Row) -> tuple[Any, ...]:
    """The form in which the family's block expects a decision."""
    expert_TK = decision.expert_TK
    if spec.null == "skip" and spec.null_experts:
        expert_TK = expert_TK.masked_fill(expert_TK >= spec.num_experts - spec.null_experts, 0)
    logits = decision.logits_TE if row.returns_logits else decision.logits_TE.softmax(dim=-1)
    more = (decision.shared_TS,) if decision.shared_TS is not None else (() if native is None else native[3:])
    return (logits, decision.weight_TK, expert_TK, *more)


@made_once
def adopted_class(native: type[nn.Module], kind: type[Adopted]) -> type[Any]:
    """A subclass of a class of transformers that also is of ours; it goes by the name of the first."""
    namespace = {
        "forward": uncompiled(kind.forward),
        "__module__": native.__module__,
        "__qualname__": native.__qualname__,
        "__doc__": native.__doc__,
        "native_class": native,
    }
    return type(native.__name__, (kind, native), namespace)


def _routing(
    frame: Frame,
    reporter: Reporter,
    spec: RouterSpec,
    hidden_states: Tensor,
    decision: Decision,
    kept_TK: Tensor | None,
) -> Routing:
    logits_TE = wide(decision.logits_TE)
    scores_TE = spec.scores(logits_TE)
    part_T = frame.parts.get(reporter)
    expert_TK, weight_TK = decision.expert_TK, wide(decision.weight_TK)
    if part_T is None:
        valid_T, context = frame.tokens(hidden_states)
        routing = Routing.from_choices(expert_TK, weight_TK, logits_TE, scores_TE, valid_T)
    else:
        # The router read some tokens of the batch: the others count as padding for it.
        valid_T, context = frame.tokens(part_T[:, None])
        routing = Routing.from_choices(
            _spread(part_T, expert_TK),
            _spread(part_T, weight_TK),
            _spread(part_T, logits_TE),
            _spread(part_T, scores_TE),
            part_T if valid_T is None else valid_T & part_T,
        )
    kept_N = routing.kept_N if kept_TK is None else routing.kept_N & kept_TK.reshape(-1)
    extras = spec.extras(logits_TE.device)
    return replace(routing, sequence_T=context.sequence_T, kept_N=kept_N, extras=extras)


def _spread(part_T: Tensor, rows: Tensor) -> Tensor:
    """Rows of some tokens at their places among all, zeros elsewhere."""
    return rows.new_zeros(part_T.shape[0], rows.shape[1]).index_put((part_T.nonzero(as_tuple=True)[0],), rows)


def _new_module(native: type[nn.Module], kind: type[Adopted]) -> nn.Module:
    made: type[nn.Module] = adopted_class(native, kind)
    return made.__new__(made)
