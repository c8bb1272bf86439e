"""Blocks of families whose router does not return its choice, or whose experts no interface reaches, in our words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from moesaic.core.plan import Plan
from moesaic.hf.native.experts import Form, run
from moesaic.hf.native.router import Adopted, Decision, Reporter
from moesaic.hf.native.work import alone, is_looked_at, show
from moesaic.hf.scope import current_frame, resumed
from moesaic.hf.wrapped import is_wrapped
from moesaic.kernels.sort_rows import sort_rows


class DbrxBlock(Reporter):
    """DBRX: the router gives logits, the block chooses."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Route, run the experts."""
        me: Any = self

        def native() -> Decision:
            logits_TE = me.router(hidden_states)
            weight_TK, expert_TK = me.route_tokens_to_experts(logits_TE)
            return Decision(logits_TE=logits_TE, weight_TK=weight_TK, expert_TK=expert_TK)

        decision = self.decide(me.router, hidden_states, None, native)
        self.tell(hidden_states, decision)
        return cast(Tensor, me.experts(hidden_states, decision.expert_TK, decision.weight_TK))


class Llama4Block(Reporter):
    """Llama 4: each expert's input is multiplied by the weight; transformers runs all experts on all tokens."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Route, run the chosen experts alone, add the shared one."""
        me: Any = self
        x_TD = hidden_states.reshape(-1, me.hidden_dim)

        def native() -> Decision:
            scores_TE, logits_TE = me.router(x_TD)
            # The router gives its choice as the scores that are not 0.
            weight_TK, expert_TK = scores_TE.topk(me.top_k, dim=-1)
            return Decision(logits_TE=logits_TE, weight_TK=weight_TK, expert_TK=expert_TK)

        decision = self.decide(me.router, x_TD, None, native)
        self.tell(hidden_states, decision)
        y_TD = me.shared_expert(x_TD)
        form = me.experts.__dict__.get("_moesaic")
        if form is None:
            scores_TE = torch.zeros_like(decision.logits_TE).scatter(
                1, decision.expert_TK, decision.weight_TK.to(decision.logits_TE.dtype)
            )
            in_ETD = (x_TD[None] * scores_TE.t()[:, :, None].to(x_TD.dtype)).reshape(-1, me.hidden_dim)
            routed_TD = me.experts(in_ETD).reshape(me.num_experts, -1, me.hidden_dim).sum(dim=0)
        else:
            routed_TD = run(form, me.experts, x_TD, decision.expert_TK, decision.weight_TK, weigh="input")
        return y_TD + routed_TD, decision.logits_TE


class SwitchBlock(Reporter):
    """Switch: one expert, up to a capacity for each sequence; a dropped token gets nothing."""

    takes_choices = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Route, drop, run the experts."""
        me: Any = self
        mask_BPE, weight_BP1, logits_BPE = me.router(hidden_states)
        num_experts = mask_BPE.shape[-1]
        mask_TE, logits_TE = mask_BPE.reshape(-1, num_experts), logits_BPE.reshape(-1, num_experts)
        kept_TK = mask_TE.bool().any(dim=-1, keepdim=True)
        # What was dropped has no mark any more; it was the best expert.
        best_TK = logits_TE.argmax(dim=-1, keepdim=True)
        expert_TK = torch.where(kept_TK, mask_TE.argmax(dim=-1, keepdim=True), best_TK)
        decision = Decision(logits_TE=logits_TE, weight_TK=weight_BP1.reshape(-1, 1), expert_TK=expert_TK)
        self.tell(hidden_states, decision, kept_TK)
        experts = [me.experts[f"expert_{index}"] for index in range(num_experts)]
        return _run_modules(me.experts, experts, hidden_states, decision.expert_TK, decision.weight_TK, kept_TK)


class NllbBlock(Reporter):
    """NLLB-MoE, as transformers runs it: the block takes the mask of first choices for expert numbers.

    So each token visits expert 1 with the weight of its first choice and expert 0 with that of its second, whichever
    they were. What is reported is what runs.
    """

    takes_choices = False

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Route, run experts 0 and 1."""
        me: Any = self
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        first_TE, weight_TE, logits_TE = me.router(x_TD, padding_mask)
        is_first_TE = first_TE.bool()
        weights = [weight_TE.masked_fill(is_first_TE, 0), weight_TE.masked_fill(~is_first_TE, 0)]
        weight_TK = torch.stack([one.sum(dim=-1) for one in weights], dim=-1)
        expert_TK = torch.tensor([0, 1], device=x_TD.device).expand(x_TD.shape[0], 2)
        kept_TK = torch.stack([(one != 0).any(dim=-1) for one in weights], dim=-1)
        decision = Decision(logits_TE=logits_TE, weight_TK=weight_TK, expert_TK=expert_TK)
        self.tell(hidden_states, decision, kept_TK)
        experts = [me.experts[f"expert_{index}"] for index in range(first_TE.shape[1])]
        after = _token_dropout(me.experts)
        return _run_modules(me.experts, experts, hidden_states, expert_TK, weight_TK, kept_TK, after)


class JetMoeGate(Reporter):
    """JetMoE: the gate returns its rows sorted by expert; of the feed-forward block, and of attention's."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int], Tensor]:
        """Route."""
        me: Any = self
        ran: list[tuple[Any, Decision]] = []

        def native() -> Decision:
            order_N, _, weight_N, load, logits_TE = output = super(JetMoeGate, self).forward(hidden_states)
            expert_N = torch.arange(len(load), device=order_N.device).repeat_interleave(
                torch.tensor(load, device=order_N.device)
            )
            decision = Decision(
                logits_TE=logits_TE,
                weight_TK=_unsorted(weight_N, order_N).view(-1, me.top_k),
                expert_TK=_unsorted(expert_N, order_N).view(-1, me.top_k),
            )
            ran.append((output, decision))
            return decision

        decision = self.decide(self, hidden_states, None, native)
        self.tell(hidden_states, decision)
        if ran and decision is ran[0][1]:
            return cast(tuple[Tensor, Tensor, Tensor, list[int], Tensor], ran[0][0])
        expert_N = decision.expert_TK.reshape(-1)
        order_N = expert_N.argsort(stable=True)
        load = torch.bincount(expert_N, minlength=me.num_experts).tolist()
        weight_N = decision.weight_TK.reshape(-1)[order_N].to(hidden_states.dtype)
        return order_N, order_N // decision.expert_TK.shape[1], weight_N, load, decision.logits_TE


class JetMoeExperts(Adopted):
    """JetMoE: the feed-forward block, its two stacks of linear maps as one operation."""

    def forward(self, layer_input: Tensor) -> Tensor:
        """Route, run the experts, add the bias."""
        me: Any = self
        if is_wrapped(me.input_linear) or is_wrapped(me.output_linear):
            # Adapters change what the two compute, not the weights that they show.
            return cast(Tensor, super().forward(layer_input))
        x_TD = layer_input.reshape(-1, layer_input.shape[-1])
        order_N, _, weight_N, load, _ = me.router(x_TD)
        expert_N = torch.arange(len(load), device=x_TD.device).repeat_interleave(torch.tensor(load, device=x_TD.device))
        shape = (x_TD.shape[0], -1)
        y_TD = run(
            cast(Form, self.__dict__["_moesaic"]),
            self,
            x_TD,
            _unsorted(expert_N, order_N).view(shape),
            _unsorted(weight_N, order_N).view(shape),
        )
        return cast(Tensor, (y_TD + me.bias).view(layer_input.shape))


class DogeBlock(Reporter):
    """Doge: experts of one neuron each, found by two halves of a key, beside a dense network."""

    def forward(self, hidden_states: Tensor, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Route, look the experts up, add the dense network."""
        me: Any = self
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        # transformers cuts the logits of all tokens in two halves, not those of each token; so does this.
        half_GTE = me.router_gate(hidden_states).view(2, x_TD.shape[0], -1)
        sum_TE = (half_GTE[0][:, :, None] + half_GTE[1][:, None, :]).flatten(1)

        def native() -> Decision:
            weight_TK, expert_TK = sum_TE.topk(me.top_k, dim=-1)
            weight_TK = weight_TK.softmax(dim=-1)
            return Decision(logits_TE=sum_TE, weight_TK=weight_TK, expert_TK=expert_TK)

        decision = self.decide(self, sum_TE, None, native)
        self.tell(hidden_states, decision)
        if is_looked_at():
            self._show(x_TD, decision)
        routed_TD = self._looked_up(x_TD, decision.expert_TK, decision.weight_TK)
        dense = me.down_proj(me.act_fn(me.gate_proj(hidden_states)) * me.up_proj(hidden_states))
        return dense + routed_TD.view(hidden_states.shape), half_GTE

    def _show(self, x_TD: Tensor, decision: Decision) -> None:
        def each(rows_ND: Tensor, expert_N: Tensor, weight_N: Tensor) -> Tensor:
            return self._looked_up(rows_ND, expert_N[:, None], weight_N[:, None])

        kept_TK = torch.ones_like(decision.expert_TK, dtype=torch.bool)
        plan = _plan(decision.expert_TK, decision.weight_TK, kept_TK, decision.logits_TE.shape[1])
        show(self, x_TD, plan, each)

    def _looked_up(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        me: Any = self
        inner_TK = torch.einsum("td,tkd->tk", x_TD, me.down_embed(expert_TK))
        inner_TK = me.act_fn(inner_TK) * weight_TK.to(x_TD.dtype)
        return torch.einsum("tk,tkd->td", inner_TK, me.up_embed(expert_TK))


class VitPoseBlock(Reporter):
    """ViTPose: a data set's number says which expert makes the last features of all its tokens."""

    takes_choices = False

    def forward(self, hidden_state: Tensor, indices: Tensor) -> Tensor:
        """Run each image's own expert alone."""
        me: Any = self
        expert_TK = indices.reshape(-1).repeat_interleave(hidden_state.shape[1])[:, None].long()
        weight_TK = torch.ones_like(expert_TK, dtype=torch.float32)
        logits_TE = hidden_state.new_zeros(expert_TK.shape[0], me.num_experts)
        decision = Decision(logits_TE=logits_TE, weight_TK=weight_TK, expert_TK=expert_TK)
        self.tell(hidden_state, decision)
        inner_BPF = me.act(me.fc1(hidden_state))
        kept_TK = torch.ones_like(expert_TK, dtype=torch.bool)
        part = _run_modules(me.experts, list(me.experts), inner_BPF, expert_TK, weight_TK, kept_TK)
        return torch.cat([me.fc2(inner_BPF), part], dim=-1)


class ErnieVlBlock(Adopted):
    """ERNIE 4.5 VL: text and vision tokens have routers and experts of their own; tells each which tokens are its."""

    def forward(self, hidden_states: Tensor, moe_mm_token_type_ids: Tensor | None = None) -> Any:
        """Run the model's own block, in which each router knows the places of its tokens."""
        me: Any = self
        parts: dict[nn.Module, Tensor] = {}
        if moe_mm_token_type_ids is not None and moe_mm_token_type_ids.any():
            is_vision_T = moe_mm_token_type_ids.bool().reshape(-1)
            parts = {me.text_moe.gate: ~is_vision_T, me.vision_moe.gate: is_vision_T}
        with resumed(replace(current_frame(), parts=parts)):
            return super().forward(hidden_states, moe_mm_token_type_ids)


def _unsorted(sorted_N: Tensor, order_N: Tensor) -> Tensor:
    """Values that stand in the order of ``order_N``, back at their places."""
    return torch.zeros_like(sorted_N).index_copy(0, order_N, sorted_N)


def _plan(expert_TK: Tensor, weight_TK: Tensor, kept_TK: Tensor, num_experts: int) -> Plan:
    token_N = torch.arange(expert_TK.shape[0], device=expert_TK.device).repeat_interleave(expert_TK.shape[1])
    return sort_rows(expert_TK.reshape(-1), token_N, weight_TK.reshape(-1), num_experts, kept_TK.reshape(-1))


def _run_modules(
    home: nn.Module,
    experts: list[nn.Module],
    hidden_states: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    kept_TK: Tensor,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Experts that are modules of their own, each once over all its rows; ``home`` holds them."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    plan = _plan(expert_TK, weight_TK, kept_TK, len(experts))

    def each(rows_ND: Tensor, expert_N: Tensor, weight_N: Tensor) -> Tensor:
        return _summed(experts, rows_ND, alone(expert_N, weight_N, len(experts)), after)

    show(home, x_TD, plan, each)
    return _summed(experts, x_TD, plan, after).view(*hidden_states.shape[:-1], -1)


def _summed(
    experts: list[nn.Module], x_TD: Tensor, plan: Plan, after: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    y_TD: Tensor | None = None
    for rows, expert in _called(plan, experts):
        y_MD = expert(x_TD[plan.token_N[rows]]) * plan.weight_N[rows, None]
        y_MD = (y_MD if after is None else after(y_MD)).to(x_TD.dtype)
        if y_TD is None:
            y_TD = x_TD.new_zeros(x_TD.shape[0], y_MD.shape[1])
        y_TD = y_TD.index_add(0, plan.token_N[rows], y_MD)
    return torch.zeros_like(x_TD) if y_TD is None else y_TD


def _called(plan: Plan, experts: list[nn.Module]) -> Iterable[tuple[slice, nn.Module]]:
    """The experts that are to run, each with its rows."""
    start = 0
    for end, expert in zip(plan.offset_E.tolist(), experts, strict=True):
        # One without rows gets gradients of 0: with none, other ranks would wait for them.
        if end > start or torch.is_grad_enabled():
            yield slice(start, end), expert
        start = end


def _token_dropout(experts: Any) -> Callable[[Tensor], Tensor]:
    """NLLB drops features of expert outputs in training and shrinks them in evaluation."""
    share: float = experts.moe_token_dropout

    def after(y_MD: Tensor) -> Tensor:
        if not share:
            return y_MD
        return cast(Tensor, experts.token_dropout(y_MD)) if experts.training else y_MD * (1 - share)

    return after
