"""Noisy top-k gates: learned noise decides who is tried, and a smooth load says who nearly was (Shazeer 2017)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.autocast import without_autocast
from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init, zeros
from moesaic.core.routing import Routing
from moesaic.routers.linear import LinearRouter, widened
from moesaic.routers.select import select_top_k
from moesaic.routers.token_choice import check_top_k


class NoisyTopKRouter(LinearRouter):
    """Add learned Gaussian noise to every logit in training, keep the K best, weigh by a softmax over those.

    ``H(x)_e = (x W_g)_e + noise * (softplus((x W_noise)_e) + epsilon)``. In training the router draws one standard
    normal number for each token and expert, in one call of shape (T, E); in evaluation none. Both matrices start at 0:
    no preference, noise of ``ln 2``, and so a load that is balanced at random. (Evaluated like that, every token goes
    to the lowest experts: all logits are equal.)

    Args:
        width: D, the width of a token.
        num_experts: E.
        top_k: K.
        noise_epsilon: least standard deviation of the noise: 0 in the paper, 0.01 in tensor2tensor and LLaMA-MoE.
        gate: "linear", one matrix; "mlp", as LLaMA-MoE's: ``tanh(x W) V`` with V of (E, E), no biases.
        scale: every weight is multiplied by this: a token's weights add up to it.
        init: draws ``W_g`` and ``V``; 0 unless given.
        noise_init: draws ``W_noise``; 0 unless given.
    Shape:
        ``(T, D)`` -> Routing of ``N = T * K`` rows; row ``t * K + k`` is token ``t``'s ``k``-th choice, best first.
        ``logits_TE`` is without noise, ``scores_TE`` the softmax with it. ``extras["smooth_load_E"]`` is the sum over
        valid tokens of the probability that the expert would be kept if its own noise were drawn anew; a hard count
        without a gradient in evaluation and where K = E.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts`` or 1, ``gate`` is none of these, ``scale`` is 0 or
            ``noise_epsilon`` negative.

    Source: Shazeer et al. 2017, section 2.1 and appendix A.
    """

    mix_EE: nn.Parameter | None

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int,
        noise_epsilon: float = 0.0,
        gate: Literal["linear", "mlp"] = "linear",
        scale: float = 1.0,
        init: Init = zeros,
        noise_init: Init = zeros,
    ) -> None:
        check_top_k(top_k, num_experts)
        check_noisy(top_k, num_experts, noise_epsilon)
        if gate not in ("linear", "mlp"):
            raise ConfigError(f"gate must be 'linear' or 'mlp', got {gate!r}. Shazeer 2017 uses 'linear'.")
        if scale == 0:
            raise ConfigError(
                f"scale must not be 0, got {scale}: every weight and gradient would be 0. LLaMA-MoE uses E / K."
            )
        super().__init__(width, num_experts, init=init)
        self.top_k = top_k
        self.noise_epsilon = noise_epsilon
        self.scale = scale
        self.noise_ED = nn.Parameter(torch.empty(num_experts, width))
        noise_init(self.noise_ED, width)
        self.mix_EE = nn.Parameter(torch.empty(num_experts, num_experts)) if gate == "mlp" else None
        if self.mix_EE is not None:
            init(self.mix_EE, num_experts)

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def logits(self, x_TD: Tensor) -> Tensor:
        """The gate network's output, in float32 or wider, without noise."""
        logits_TE = super().logits(x_TD)
        if self.mix_EE is None:
            return logits_TE
        with without_autocast(x_TD.device):
            return F.linear(logits_TE.tanh(), self.mix_EE.to(logits_TE.dtype))

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        spread_TE = spread(x_TD, self.noise_ED, self.noise_epsilon)
        noisy_TE = logits_TE + noise(spread_TE, self.training)
        expert_TK = select_top_k(noisy_TE.detach(), self.top_k)
        weight_TK = noisy_TE.gather(1, expert_TK).softmax(dim=-1) * self.scale
        routing = Routing.from_choices(expert_TK, weight_TK, logits_TE, noisy_TE.softmax(dim=-1), valid_T)
        if self.training and self.top_k < self.num_experts:
            kept_TE = kept_probability(logits_TE, noisy_TE, spread_TE, self.top_k)
            load_E = kept_TE.masked_fill(~routing.valid_T[:, None], 0).sum(dim=0)
        else:  # attached, so that a loss of it has a gradient, of zeros
            load_E = routing.load_E.to(logits_TE.dtype) + logits_TE[:0].sum()
        return replace(routing, extras={"smooth_load_E": load_E})


def spread(x_TD: Tensor, noise_ED: Tensor, epsilon: float) -> Tensor:
    """The noise's standard deviation for each token and expert, ``softplus(x W_noise) + epsilon``, float32 or wider."""
    x_TD = widened(x_TD, noise_ED.shape[1])
    with without_autocast(x_TD.device):
        return F.softplus(F.linear(x_TD, noise_ED.to(x_TD.dtype))) + epsilon


def noise(spread_TE: Tensor, training: bool) -> Tensor:
    """Noise to add to logits: drawn in training, and in evaluation a 0 that gives ``W_noise`` gradients of 0."""
    if training:
        return torch.randn_like(spread_TE) * spread_TE
    return spread_TE[:0].sum()


def kept_probability(clean_TE: Tensor, noisy_TE: Tensor, spread_TE: Tensor, top_k: int) -> Tensor:
    """``P(x, e)``: how likely expert e is among the K best if its own noise alone is drawn anew; K below E.

    Gradients flow through the logits, the spread and the threshold, as in tensor2tensor.

    Source: Shazeer 2017, eq. 8 and 9.
    """
    # Who else must be beaten: the (K+1)-th best for those that are in, the K-th best for those that are out.
    best_TK = select_top_k(noisy_TE.detach(), top_k + 1)
    value_TK = noisy_TE.gather(1, best_TK)
    is_in_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter_(1, best_TK[:, :top_k], True)
    threshold_TE = torch.where(is_in_TE, value_TK[:, top_k:], value_TK[:, top_k - 1 : top_k])
    # Infinite logits leave margins without a number, and a spread that underflowed would divide by 0.
    margin_TE = torch.nan_to_num(clean_TE - threshold_TE, nan=0.0, posinf=1e6, neginf=-1e6)
    kept_TE: Tensor = torch.special.ndtr(margin_TE / spread_TE.clamp_min(1e-6))
    return kept_TE


def check_noisy(top_k: int, num_experts: int, noise_epsilon: float) -> None:
    """Refuse one choice, whose weight would be a constant, and noise of negative width.

    Raises:
        ConfigError: if either is asked for.
    """
    if top_k == 1 and num_experts > 1:
        raise ConfigError(
            f"top_k=1 needs weights that depend on the router, got a softmax over 1 of {num_experts} experts, which is "
            "always 1. Use top_k=2."
        )
    if noise_epsilon < 0:
        raise ConfigError(f"noise_epsilon must be at least 0, got {noise_epsilon}. tensor2tensor uses 0.01.")
