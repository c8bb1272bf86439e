"""Token choice: each token takes the K experts that score best for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.core.routing import Routing
from moesaic.kernels.whole_layer import TopKChoice
from moesaic.routers import sparse_gradient
from moesaic.routers.groups import GroupLimit
from moesaic.routers.scores import Score, sigmoid, softmax
from moesaic.routers.select import select_top_k
from moesaic.routers.token_choice import TokenChoiceRouter, check_top_k


class TopKRouter(TokenChoiceRouter):
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
        jitter: see :class:`~moesaic.routers.LinearRouter`.
        groups: restricts each token to its best groups of experts, and says which device each lives on.
        selection_bias: keep a float32 ``bias_E`` that is added to the scores for selection only, never to the weights
            (DeepSeek-V3 eq. 16). A :class:`~moesaic.balance.BiasController` moves it; gradients do not. A router built
            without one can be given it later: :meth:`add_selection_bias`.
        logit_bias: see :class:`~moesaic.routers.LinearRouter`.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of ``N = T * K`` rows; row ``t * K + k`` is token ``t``'s ``k``-th choice, best first.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``, ``normalize`` is none of these, or K=1 is combined with
            one that makes its weight a constant.
    """

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
        logit_bias: bool = False,
        init: Init | None = None,
    ) -> None:
        check_top_k(top_k, num_experts)
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
        if scale == 0:
            raise ConfigError(
                f"scale must not be 0, got {scale}: every weight and gradient would be 0. DeepSeek-V3 uses 2.5."
            )
        if groups is not None:
            groups.check(num_experts, top_k)
        super().__init__(width, num_experts, top_k=top_k, jitter=jitter, logit_bias=logit_bias, init=init)
        self.score = score
        self.normalize = normalize
        self.scale = scale
        self.groups = groups
        if selection_bias:
            self.add_selection_bias()

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        scores_TE = self.score.of(logits_TE)
        expert_TK = self.chosen(logits_TE, scores_TE, context)
        weight_TK = self._weigh(logits_TE, scores_TE, expert_TK)
        routing = Routing.from_choices(expert_TK, weight_TK, logits_TE, scores_TE, valid_T)
        if self.groups is None:
            return routing
        return replace(routing, extras=self.groups.devices(self.num_experts, self.top_k, x_TD.device))

    def product(self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        """The linear map, whose gradient may be sparse: most logits have none where weights are of chosen ones."""
        if not self._weighs_chosen_logits:
            return super().product(x_TD, weight_ED, bias_E)
        return sparse_gradient.linear(x_TD, weight_ED, bias_E, self.top_k)

    def choose(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """The K chosen experts of each token, best first (T, K), within its best groups."""
        if self.groups is None:
            return super().choose(logits_TE, scores_TE)
        # Groups are ordered by their best logit as by their best score. Sums with a bias or each other need scores.
        by_order = self.bias_E is None and self.groups.best_per_group == 1
        by_TE = (logits_TE if by_order else scores_TE).detach()
        if self.bias_E is not None:
            by_TE = by_TE + self.bias_E.to(by_TE.dtype)
        return select_top_k(self.groups.mask(by_TE), self.top_k)

    def plain_choice(self) -> TopKChoice | None:
        """What C is told to choose as this router does; None if that is more than C can do."""
        if self.groups is not None or self.score not in (softmax, sigmoid) or (self.jitter > 0 and self.training):
            return None
        return TopKChoice(
            self.weight,
            self.logit_bias_E,
            self.bias_E,
            "softmax" if self.score == softmax else "sigmoid",
            self.normalize,
            self.top_k,
            self.scale,
        )

    @property
    def _weighs_chosen_logits(self) -> bool:
        # For softmax "chosen" says the same as "logits": what all scores are divided by cancels.
        return self.normalize == "logits" or (self.normalize == "chosen" and self.score == softmax)

    def _weigh(self, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
        if self.normalize == "scores":
            weight_TK = scores_TE.gather(1, expert_TK)
        elif self._weighs_chosen_logits:
            weight_TK = self.score.of(sparse_gradient.gather(logits_TE, expert_TK))
        else:
            # softmax(log s) is s / sum(s), and stays right where every chosen s has underflowed.
            weight_TK = self.score.log_of(logits_TE).gather(1, expert_TK).softmax(dim=-1)
        return weight_TK if self.scale == 1 else weight_TK * self.scale
