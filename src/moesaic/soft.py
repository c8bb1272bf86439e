"""Soft MoE: experts work on slots, each a mixture of all tokens; nothing is chosen and nothing dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init, scaled_by_fan_in
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing, checked_mask
from moesaic.core.spans import Spans
from moesaic.experts.grouped import kernel_report
from moesaic.routers.linear import widened


class SoftMoE(nn.Module):
    """Mix each sequence's tokens into slots, let every expert work on its slots, mix the outputs back into tokens.

    ``L = unit(x) (scale * unit(phi))``; slots are ``softmax over tokens(L)^T x``; a token's output is its
    ``softmax over slots(L)`` of what the experts made of the slots. Each token's output depends on its whole sequence,
    so no causal language model can use it.

    Args:
        width: D.
        experts: any experts; they see slots as tokens, all of weight 1, and so run on any kernel.
        slots_per_expert: S, slots of one expert for each sequence, however long it is.
        noise_std: in training, standard deviation of normal noise on L: one draw of (T, E, S) numbers in x's wide
            dtype.
        init: draws phi; None for LeCun's normal. (Its columns are scaled to length 1 in use.)
    Shape:
        ``(T, D)`` -> ``(T, D)``, zeros for padding, and a Routing with one row for each (token, expert): weights are
        the token's mixture over slots, summed over the expert's; ``logits_TE`` is the log-sum-exp of L over the
        expert's slots, so that ``scores_TE`` is its softmax and, for valid tokens, the weights.
    Raises:
        ConfigError: if there is no slot, or ``noise_std`` is negative.

    Source: Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts", section 2; authors' code (vmoe).
    """

    def __init__(
        self,
        width: int,
        experts: nn.Module,
        *,
        slots_per_expert: int = 1,
        noise_std: float = 0.0,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        if slots_per_expert < 1:
            raise ConfigError(f"slots_per_expert must be at least 1, got {slots_per_expert}. Soft MoE uses 1.")
        if noise_std < 0:
            raise ConfigError(f"noise_std must be at least 0, got {noise_std}. Soft MoE uses 0.")
        self.experts = experts
        self.noise_std = noise_std
        self.slot_DES = nn.Parameter(torch.empty(width, cast(int, experts.num_experts), slots_per_expert))
        self.scale = nn.Parameter(torch.ones(()))
        (init or scaled_by_fan_in())(self.slot_DES, width)

    def forward(
        self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT
    ) -> tuple[Tensor, Routing]:
        """Mix, work, mix back.

        Args:
            x_TD: tokens.
            valid_T: False where a token is padding: it enters no slot and gets zeros.
            context: ``sequence_T`` says which tokens are mixed with each other.
        """
        num_tokens = x_TD.shape[0]
        context.check(num_tokens)
        valid_T = checked_mask(valid_T, num_tokens, x_TD.device)
        wide_TD = widened(x_TD, self.slot_DES.shape[0])
        spans = Spans.of(context.sequences(x_TD), valid_T)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TES = self._logits(wide_TD)
            combine_TN = logits_TES.flatten(1).softmax(dim=-1)
            dispatch_SPN = _softmax_over_places(spans, logits_TES.flatten(1))
            slots_SND = dispatch_SPN.transpose(1, 2) @ spans.stack(wide_TD)
        out_SND = self._work(slots_SND.to(x_TD.dtype)).to(wide_TD.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            y_TD = spans.unstack(spans.stack(combine_TN) @ out_SND, num_tokens)
        scores_TE = combine_TN.view_as(logits_TES).sum(dim=-1)
        routing = Routing.from_mixture(scores_TE, logits_TES.logsumexp(dim=-1), scores_TE, valid_T)
        return y_TD.to(x_TD.dtype), replace(routing, sequence_T=context.sequence_T)

    def _logits(self, x_TD: Tensor) -> Tensor:
        slot_DES = self.scale * _unit(self.slot_DES.to(x_TD.dtype), 0)
        logits_TES = torch.einsum("td,des->tes", _unit(x_TD, 1), slot_DES)
        if self.training and self.noise_std > 0:
            logits_TES = logits_TES + self.noise_std * torch.randn_like(logits_TES)
        return logits_TES

    def _work(self, slots_SND: Tensor) -> Tensor:
        """Give each expert its slots of every sequence."""
        num_spans, _, width = slots_SND.shape
        _, num_experts, num_slots = self.slot_DES.shape
        by_expert = slots_SND.view(num_spans, num_experts, num_slots, width).transpose(0, 1)
        rows_ND = by_expert.reshape(-1, width)
        place_N = torch.arange(rows_ND.shape[0], device=rows_ND.device)
        load_E = torch.full((num_experts,), num_spans * num_slots, device=rows_ND.device)
        plan = Plan(
            row_N=place_N,
            token_N=place_N,
            weight_N=torch.ones(len(place_N), device=rows_ND.device, dtype=self._wide(rows_ND)),
            load_E=load_E,
            offset_E=load_E.cumsum(0),
            kept_N=torch.ones_like(place_N, dtype=torch.bool),
        )
        out_ND: Tensor = self.experts(rows_ND, plan)
        return out_ND.view(num_experts, num_spans, num_slots, width).transpose(0, 1).reshape(slots_SND.shape)

    @staticmethod
    def _wide(x_TD: Tensor) -> torch.dtype:
        return torch.promote_types(x_TD.dtype, torch.float32)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.slot_DES.shape[1]

    @property
    def num_params(self) -> int:
        """Parameters of the layer."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active_params(self) -> int:
        """All of them: every token is in every slot. (Its cost is that of its slots, not of its experts.)"""
        return self.num_params

    def kernel_report(self) -> str:
        """Which kernel the experts run on, and why."""
        return kernel_report(self.experts)


def _unit(x: Tensor, dim: int) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim=dim, keepdim=True) + 1e-6)


def _softmax_over_places(spans: Spans, logits_TN: Tensor) -> Tensor:
    """Softmax over the tokens of each span; zeros where a span has no token."""
    logits_SPN = spans.stack(logits_TN)
    place_P = torch.arange(logits_SPN.shape[1], device=logits_SPN.device)
    empty_SP1 = (place_P >= spans.count_S[:, None]).unsqueeze(-1)
    # The lowest finite number and not -inf: a span without any token must not give NaN.
    logits_SPN = logits_SPN.masked_fill(empty_SP1, torch.finfo(logits_SPN.dtype).min)
    return logits_SPN.softmax(dim=1).masked_fill(empty_SP1, 0)
