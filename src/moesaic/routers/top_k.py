"""Token choice: each token takes the K experts that score best for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.init import Init, normal
from moesaic.core.routing import Routing
from moesaic.routers.groups import GroupLimit
from moesaic.routers.scores import Score, softmax
from moesaic.routers.select import select_top_k


class TopKRouter(nn.Module):
    """Score every expert with one linear map, keep the K best per token.

    Covers Switch (K=1), Mixtral, OLMoE, Qwen-MoE, DeepSeekMoE to V3 and their kin: they differ in the numbers below.

    Args:
        width: D, the width of a token.
        num_experts: E.
        top_k: K.
        score: softmax or sigmoid, applied to the logits of all experts.
        normalize: what is normalised, and when. "scores": a token's weights are its scores over all experts as they
            are (Switch, OLMoE, DeepSeekMoE). "chosen": the K chosen scores divided by their sum (Mixtral, Qwen3,
            DeepSeek-V3). "logits": selection comes first, then the scoring function over the K chosen logits alone
            (Shazeer 2017, gpt-oss); for softmax the same numbers as "chosen".
        scale: every weight is multiplied by this, ``routed_scaling_factor`` elsewhere.
        jitter: in training the router's copy of each input is multiplied by uniform noise from
            ``1 - jitter`` to ``1 + jitter`` (Switch, section 2.4). Evaluation has none.
        groups: restricts each token to its best groups of experts.
        selection_bias: keep a float32 ``bias_E`` that is added to the scores for selection only, never to the weights
            (DeepSeek-V3 eq. 16). A :class:`~moesaic.balance.BiasController` moves it; gradients do not.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of ``N = T * K`` rows; row ``t * K + k`` is token ``t``'s ``k``-th choice, best first.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``, ``normalize`` is none of these, or K=1 is combined with
            one that makes its weight a constant.
    """

    bias_E: Tensor | None

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int,
        score: Score = softmax,
        normalize: Literal["scores", "chosen", "logits"] = "chosen",
        scale: float = 1.0,
        jitter: float = 0.0,
        groups: GroupLimit | None = None,
        selection_bias: bool = False,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(
                f"top_k must be between 1 and num_experts={num_experts}, got {top_k}. Lower top_k, or add experts."
            )
        if normalize not in ("scores", "chosen", "logits"):
            raise ConfigError(
                f"normalize must be 'scores', 'chosen' or 'logits', got {normalize!r}. "
                "Mixtral and DeepSeek-V3 use 'chosen'."
            )
        constant_weight = normalize == "chosen" or (normalize == "logits" and score is softmax)
        if top_k == 1 and num_experts > 1 and constant_weight:
            raise ConfigError(
                f"top_k=1 needs weights that depend on the router, got normalize={normalize!r}, which makes the one "
                "weight 1 and cuts the router's gradient. Use normalize='scores', or top_k=2."
            )
        if not 0 <= jitter < 1:
            raise ConfigError(f"jitter must be at least 0 and less than 1, got {jitter}. Switch uses 0.01.")
        if scale == 0:
            raise ConfigError(
                f"scale must not be 0, got {scale}: every weight and gradient would be 0. DeepSeek-V3 uses 2.5."
            )
        if groups is not None:
            groups.check(num_experts, top_k)
        self.top_k = top_k
        self.score = score
        self.normalize = normalize
        self.scale = scale
        self.jitter = jitter
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        bias_E = torch.zeros(num_experts, dtype=torch.float32) if selection_bias else None
        self.register_buffer("bias_E", bias_E)
        (init or normal(0.02))(self.weight, width)

    @property
    def num_experts(self) -> int:
        """Experts to choose from."""
        return self.weight.shape[0]

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Routing:
        """Write the table for one batch of tokens."""
        if x_TD.ndim != 2 or x_TD.shape[1] != self.weight.shape[1]:
            raise ShapeError(
                f"x_TD must be (tokens, {self.weight.shape[1]}), got {tuple(x_TD.shape)}. "
                "Flatten batch and position into one dimension."
            )
        logits_TE = self._logits(x_TD)
        scores_TE = self.score.of(logits_TE)
        expert_TK = self._select(logits_TE, scores_TE)
        weight_TK = self._weigh(logits_TE, scores_TE, expert_TK)
        return Routing.from_choices(expert_TK, weight_TK, logits_TE, scores_TE, valid_T)

    def _logits(self, x_TD: Tensor) -> Tensor:
        # At least float32: rounding logits to bfloat16 re-routes 2.2 % of tokens at E=64, K=8.
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(wide)
            if self.training and self.jitter > 0:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            return F.linear(x_TD, self.weight.to(wide))

    def _select(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        # Logits order experts as softmax and sigmoid do, and stay apart where a score has underflowed or saturated.
        by_TE = (logits_TE if self.bias_E is None and self.groups is None else scores_TE).detach()
        if self.bias_E is not None:
            by_TE = by_TE + self.bias_E.to(by_TE.dtype)
        if self.groups is not None:
            by_TE = self.groups.mask(by_TE)
        return select_top_k(by_TE, self.top_k)

    def _weigh(self, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
        if self.normalize == "scores":
            weight_TK = scores_TE.gather(1, expert_TK)
        elif self.normalize == "logits":
            weight_TK = self.score.of(logits_TE.gather(1, expert_TK))
        else:
            # softmax(log s) is s / sum(s), and stays right where every chosen s has underflowed.
            weight_TK = self.score.log_of(logits_TE).gather(1, expert_TK).softmax(dim=-1)
        return weight_TK * self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast of the model must not touch the bias: steps of 0.001 vanish in bfloat16.
        exact_E = self.bias_E
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if exact_E is not None and self.bias_E is not None and self.bias_E.dtype != exact_E.dtype:
            self.bias_E = exact_E.to(self.bias_E.device)
        return self
