"""Merged experts: mix the parameters of all experts into one network, and send a whole sequence or segment through."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing, checked_mask
from moesaic.core.spans import Spans
from moesaic.experts import GatedExperts, MLPExperts, SharedExpert
from moesaic.experts.grouped import kernel_report, run_grouped
from moesaic.routers.linear import widened
from moesaic.routers.pooled import PooledRouter


class MergedMoE(nn.Module):
    """Average the experts' weights by the router's, once for each sequence or segment, and run that one network.

    Without ``segment`` each sequence is routed by the mean of its own tokens (SMEAR). With it, each segment is routed
    by the mean of the segment before it in its sequence, the first one by its own, whose weights then pass no gradient
    to the router (Lory). Neither is strictly causal: a sequence's or first segment's tokens see the mean of
    later ones. For generation use :meth:`for_prompt`, the form in which Lory's authors generate.

    Args:
        router: pooled vectors to logits.
        experts: the stacks that are averaged.
        segment: tokens of a segment; None for whole sequences.
        expert_dropout: in training, the chance that an expert is left out of a merge, the rest renormalised; where
            all are left out, all count the same. One draw of (S, E) uniform numbers in x's wide dtype, spans in the
            order of :class:`~moesaic.core.spans.Spans`.
    Shape:
        ``(T, D)`` -> ``(T, D)``, zeros for padding, and a Routing with one row for each (token, expert): the weight
        that the expert has in the network that the token meets, 0 for padding. ``logits_TE`` are those of the token's
        span, 0 for padding; ``scores_TE`` their softmax, before expert dropout.
    Raises:
        ConfigError: if router and experts differ in number of experts, or a number is out of range.

    Source: Muqeeth et al. 2023, "Soft Merging of Experts with Adaptive Routing"; Zhong et al. 2024, "Lory",
    section 3 and algorithm 1.
    """

    def __init__(
        self,
        router: PooledRouter,
        experts: GatedExperts | MLPExperts,
        *,
        segment: int | None = None,
        expert_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ConfigError(
                f"router and experts must agree on num_experts, got {router.num_experts} and {experts.num_experts}. "
                "Build both with the same number."
            )
        if segment is not None and segment < 1:
            raise ConfigError(f"segment must be at least 1 token, got {segment}. Lory uses 256.")
        if not 0 <= expert_dropout < 1:
            raise ConfigError(f"expert_dropout must be at least 0 and below 1, got {expert_dropout}. SMEAR uses 0.1.")
        self.router = router
        self.experts = experts
        self.segment = segment
        self.expert_dropout = expert_dropout

    def forward(
        self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT
    ) -> tuple[Tensor, Routing]:
        """Pool, merge, work.

        Args:
            x_TD: tokens.
            valid_T: False where a token is padding: it enters no mean, counts for no segment's length and gets zeros.
            context: ``sequence_T`` says which tokens belong together.
        """
        num_tokens = x_TD.shape[0]
        context.check(num_tokens)
        valid_T = checked_mask(valid_T, num_tokens, x_TD.device)
        spans = Spans.of(context.sequences(x_TD), valid_T, self.segment)
        logits_SE = self._logits(x_TD, spans)
        weight_SE = self._weights(logits_SE, spans)
        plan = spans.plan(torch.ones(len(spans.token_N), device=x_TD.device, dtype=weight_SE.dtype))
        gate, up, down = self._merge(weight_SE)
        y_TD = run_grouped(x_TD, plan, gate, up, down, self.experts.activation, self.experts.kernel)
        logits_TE = spans.spread(logits_SE, num_tokens)
        weight_TE = spans.spread(weight_SE, num_tokens)
        routing = Routing.from_mixture(weight_TE, logits_TE, logits_TE.softmax(dim=-1), valid_T)
        return y_TD, replace(routing, sequence_T=context.sequence_T)

    @torch.no_grad()
    def for_prompt(self, x_TD: Tensor, valid_T: Tensor | None = None) -> SharedExpert:
        """Route a prompt once, and return the merged network as a plain one, to generate with.

        It is causal: what it makes of a token depends on that token and the prompt. So Lory's authors evaluate.

        Args:
            x_TD: the prompt's tokens, of one sequence, as they enter this layer.
            valid_T: False where a token is padding.
        """
        valid_T = checked_mask(valid_T, x_TD.shape[0], x_TD.device)
        wide_TD = widened(x_TD, self.router.weight.shape[1])
        spans = Spans.of(torch.zeros_like(valid_T, dtype=torch.int64), valid_T)
        gate, up, down = self._merge(self.router(spans.mean(wide_TD)).softmax(dim=-1))
        _, width, hidden = up.shape
        network = SharedExpert(width, hidden, activation=self.experts.activation, gated=gate is not None).to(up)
        if network.gate_DF is not None and gate is not None:
            network.gate_DF.copy_(gate[0])
        network.up_DF.copy_(up[0])
        network.down_FD.copy_(down[0])
        return network

    def _logits(self, x_TD: Tensor, spans: Spans) -> Tensor:
        logits_SE: Tensor = self.router(spans.mean(widened(x_TD, self.router.weight.shape[1])))
        if self.segment is None:
            return logits_SE
        span_S = torch.arange(spans.num_spans, device=x_TD.device)
        return logits_SE[torch.where(spans.first_S | (span_S == 0), span_S, span_S - 1)]

    def _weights(self, logits_SE: Tensor, spans: Spans) -> Tensor:
        weight_SE = logits_SE.softmax(dim=-1)
        if self.segment is not None:
            weight_SE = torch.where(spans.first_S[:, None], weight_SE.detach(), weight_SE)
        if self.training and self.expert_dropout > 0:
            weight_SE = weight_SE.masked_fill(torch.rand_like(weight_SE) < self.expert_dropout, 0)
            total_S1 = weight_SE.sum(dim=-1, keepdim=True)
            even_SE = torch.full_like(weight_SE, 1 / self.num_experts)
            weight_SE = torch.where(total_S1 > 0, weight_SE / total_S1.clamp_min(1e-30), even_SE)
        return weight_SE

    def _merge(self, weight_SE: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """One gate, up and down projection for each span."""

        def merged(stack: Tensor) -> Tensor:
            # In the router's float32: a sum of many experts rounded on the way would be none of theirs.
            with torch.autocast(stack.device.type, enabled=False):
                flat = weight_SE @ stack.flatten(1).to(weight_SE.dtype)
            return flat.view(-1, *stack.shape[1:]).to(stack.dtype)

        gate = merged(self.experts.gate_EDF) if isinstance(self.experts, GatedExperts) else None
        return gate, merged(self.experts.up_EDF), merged(self.experts.down_EFD)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router.num_experts

    @property
    def num_params(self) -> int:
        """Parameters of the layer."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active_params(self) -> int:
        """The router's, and those of one merged network."""
        in_experts = sum(parameter.numel() for parameter in self.experts.parameters())
        return self.num_params - in_experts + in_experts // self.num_experts

    def kernel_report(self) -> str:
        """Which kernel the merged networks run on, and why."""
        return kernel_report(self.experts)
