"""Layers of low-rank experts whose routers need more than the token: each linear's own input, or the experts' outputs.

A sparse mixture of low-rank experts is an ordinary :class:`~moesaic.MoELayer`; recipe ``mixlora`` builds one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.init import Init
from moesaic.core.routing import Routing, checked_mask
from moesaic.experts.lora import LoRAExperts
from moesaic.routers.linear import LinearRouter, widened


class _EveryLoRA(nn.Module):
    """What layers have in common in which every low-rank expert works on every token."""

    experts: LoRAExperts

    @property
    def num_experts(self) -> int:
        """E."""
        return self.experts.num_experts

    @property
    def num_params(self) -> int:
        """Parameters of the layer, frozen ones counted."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active_params(self) -> int:
        """All of them: every expert works on every token."""
        return self.num_params

    def kernel_report(self) -> str:
        """That no kernel serves low-rank experts."""
        return "LoRAExperts: no kernel, the low-rank products of all experts at once"


class LoRAMoE(_EveryLoRA):
    """All low-rank experts on every token, mixed anew in each of the network's three linear maps (LoRAMoE).

    Each map has a router of its own: those of gate and up read the token, that of down reads the hidden vector. ``y =
    x W + alpha / rank * sum_e softmax(V x)_e B_e A_e x``, for each of the three.

    Args:
        width: D.
        hidden: F.
        experts: the frozen network and its low-rank changes.
        init: draws the routers; None for Kaiming's uniform up to ``1 / sqrt(inputs)``, as the authors' code does.
    Shape:
        ``(T, D)`` -> ``(T, D)``, zeros for padding, and a Routing with one row for each (token, expert): the mean of
        its weights in the three maps, 0 for padding. ``scores_TE`` are those means, ``logits_TE`` their logarithm.
        ``extras["linear_GTE"]`` has the weights of each map: gate, up, down; ``extras["domain_T"]`` the tokens'
        domains, if the context has them. :class:`~moesaic.balance.LocalizedLoss` reads both.

    Source: Dou et al. 2023, "LoRAMoE", section 3.2; authors' code.
    """

    def __init__(self, width: int, hidden: int, experts: LoRAExperts, *, init: Init | None = None) -> None:
        super().__init__()
        init = init or _kaiming
        self.experts = experts
        self.router = nn.ModuleDict(
            {
                "gate": LinearRouter(width, experts.num_experts, init=init),
                "up": LinearRouter(width, experts.num_experts, init=init),
                "down": LinearRouter(hidden, experts.num_experts, init=init),
            }
        )

    def forward(
        self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT
    ) -> tuple[Tensor, Routing]:
        """Run every token through the network, changed by what the routers mix."""
        context.check(x_TD.shape[0])
        valid_T = checked_mask(valid_T, x_TD.shape[0], x_TD.device)
        experts, base = self.experts, self.experts.base
        assert base.gate_DF is not None  # LoRAExperts are built gated
        gate_TE, up_TE = self._logits("gate", x_TD), self._logits("up", x_TD)
        gate_TF = x_TD @ base.gate_DF + experts.gate.mixed(x_TD, gate_TE.softmax(dim=-1))
        up_TF = x_TD @ base.up_DF + experts.up.mixed(x_TD, up_TE.softmax(dim=-1))
        hidden_TF = experts.activation.forward(gate_TF) * up_TF
        down_TE = self._logits("down", hidden_TF)
        y_TD = hidden_TF @ base.down_FD + experts.down.mixed(hidden_TF, down_TE.softmax(dim=-1))
        routing = _three_in_one(torch.stack([gate_TE, up_TE, down_TE]), valid_T, context)
        return y_TD.masked_fill(~valid_T[:, None], 0).to(x_TD.dtype), routing

    def _logits(self, name: str, x_TD: Tensor) -> Tensor:
        router = self.router[name]
        assert isinstance(router, LinearRouter)
        return router.logits(x_TD)


class MoLE(_EveryLoRA):
    """Trained low-rank networks composed by a gate that looks at what each makes of the token (MoLE).

    ``y = F(x) + sum_e G_e E_e(x)``: F is the frozen network, ``E_e`` the network of the e-th LoRA's matrices alone,
    and ``G = softmax(V normal(E_1(x), ..., E_N(x)) / tau)`` with a learned temperature. Only V and tau train.

    Args:
        width: D.
        experts: the frozen network and the LoRAs: load each with ``experts.gate.load(e, A, B)``, and so for up, down.
        train_experts: let the LoRAs train too; the paper freezes them.
        init: draws V; None for a normal of standard deviation 0.02.
    Shape:
        ``(T, D)`` -> ``(T, D)``, zeros for padding, and a Routing with one row for each (token, expert), of weight
        ``G_e``, 0 for padding. ``logits_TE`` are those over tau.

    Source: Wu et al. 2024, "Mixture of LoRA Experts", section 3.2.
    """

    def __init__(
        self, width: int, experts: LoRAExperts, *, train_experts: bool = False, init: Init | None = None
    ) -> None:
        super().__init__()
        self.experts = experts
        for low_rank in (experts.gate, experts.up, experts.down):
            low_rank.requires_grad_(train_experts)
        self.router = LinearRouter(experts.num_experts * width, experts.num_experts, init=init)
        # The logarithm, so that no step can make the temperature negative.
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(
        self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT
    ) -> tuple[Tensor, Routing]:
        """Run every token through every LoRA, gate, add to the network's output."""
        context.check(x_TD.shape[0])
        valid_T = checked_mask(valid_T, x_TD.shape[0], x_TD.device)
        out_TED = self.experts.alone(x_TD)
        flat_TD = out_TED.flatten(1)
        flat_TD = widened(flat_TD, flat_TD.shape[1])
        normal_TD = F.layer_norm(flat_TD, flat_TD.shape[1:])
        logits_TE = self.router.logits(normal_TD) / self.log_temperature.exp()
        scores_TE = logits_TE.softmax(dim=-1)
        mixed_TD = torch.einsum("te,ted->td", scores_TE, out_TED.to(scores_TE.dtype))
        y_TD = (self.experts.base(x_TD) + mixed_TD).masked_fill(~valid_T[:, None], 0)
        routing = Routing.from_mixture(scores_TE, logits_TE, scores_TE, valid_T)
        return y_TD.to(x_TD.dtype), replace(routing, sequence_T=context.sequence_T)


def _kaiming(weight: Tensor, fan_in: int) -> None:
    nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def _three_in_one(logits_GTE: Tensor, valid_T: Tensor, context: Context) -> Routing:
    """The table of three routers for one: each expert's mean weight."""
    scores_TE = logits_GTE.softmax(dim=-1).mean(dim=0)
    # The logarithm of the mean, by logarithms all the way: finite where every probability has underflowed.
    logits_TE = logits_GTE.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits_GTE))
    extras: Mapping[str, Tensor] = {"linear_GTE": logits_GTE.softmax(dim=-1)}
    if context.domain_T is not None:
        extras = {**extras, "domain_T": context.domain_T}
    routing = Routing.from_mixture(scores_TE, logits_TE, scores_TE, valid_T, extras=extras)
    return replace(routing, sequence_T=context.sequence_T)
