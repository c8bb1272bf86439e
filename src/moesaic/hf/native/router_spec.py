"""One declarative spec for the routers of all published families, and the arithmetic that it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.core.errors import ConfigError
from moesaic.routers.groups import GroupLimit
from moesaic.routers.select import select_top_k

ScoreName = Literal["softmax", "sigmoid", "sqrt_softplus"]
Policy = Literal["top_k", "sparsemixer", "table", "given"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """How a router gets from logits to choices and weights; every field is a fact that families differ in.

    The weight of a chosen expert is its score, normalised, times ``scale``. Weights taken as softmax over the chosen
    logits alone are the same numbers as softmax over all, normalised by the sum of the chosen.

    Attributes:
        num_experts: classes that the router chooses among, those that are no experts included.
        top_k: K.
        score: from logits to scores, over all classes.
        select: what the best K are taken of: scores, or logits. Without a selection bias both are the same choice,
            unless scores round together.
        selection_bias: whether a bias is added to that, which steers the choice and never the weight.
        groups: only experts of a token's best groups may be chosen; None for all.
        masked: what stands in the place of an expert of another group while the best are taken: minus infinity, or 0,
            which beats an allowed expert whose biased score is negative.
        normalize: "sum": divided by the sum of the K chosen scores; "clamp": by that sum, but at least ``eps``;
            "norm": by their p-norm of order ``norm_order``; None: scores as they are.
        eps: added to the sum, or its least value.
        norm_order: p.
        scale: every weight is multiplied by it.
        expert_scale: whether each expert has a learned factor of its own that its weights are multiplied by.
        global_scale: whether all weights, those of shared gates too, are multiplied by one learned factor.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 for none.
        multiplier: what logits are multiplied by.
        precision: of the logits: "model", the tokens' own; "weight", the weight's; or "float32".
        null_experts: the last so many classes are no experts with weights: what they do is ``null``.
        null: "identity" gives the token back (LongCat-Flash), "skip" gives zero (ZAYA).
        shared_gates: so many more logits, after those of the experts, weigh shared experts and join the normalisation
            of the chosen (Inkling).
        policy: "top_k"; "sparsemixer" takes the best, then the best of the rest, each weighed against those that come
            near it (Phi-3.5-MoE); "table" looks the choice up by token id (DeepSeek-V4's first layers); "given" is
            told from outside (ViTPose's data set).
        jitter: half width of "sparsemixer"'s mask of what comes near.
        capacity: whether experts drop what exceeds a capacity.
        weigh: multiply what comes out of an expert by the row's weight, or what goes in (Llama 4).
    Raises:
        ConfigError: if numbers contradict each other.
    """

    num_experts: int
    top_k: int
    score: ScoreName = "softmax"
    select: Literal["score", "logit"] = "score"
    selection_bias: bool = False
    groups: GroupLimit | None = None
    masked: float = -math.inf
    normalize: Literal["sum", "clamp", "norm"] | None = None
    eps: float = 0.0
    norm_order: float = 1.0
    scale: float = 1.0
    expert_scale: bool = False
    global_scale: bool = False
    softcap: float = 0.0
    multiplier: float = 1.0
    precision: Literal["model", "weight", "float32"] = "model"
    null_experts: int = 0
    null: Literal["identity", "skip"] = "identity"
    shared_gates: int = 0
    policy: Policy = "top_k"
    jitter: float = 0.0
    capacity: bool = False
    weigh: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k must be between 1 and num_experts={self.num_experts}, got {self.top_k}. "
                "Correct the numbers in the model's configuration."
            )
        if self.groups is not None:
            self.groups.check(self.num_experts, self.top_k)

    @property
    def is_learned(self) -> bool:
        """Whether the choice depends on the router's weights: a balance loss or bias can move it."""
        return self.policy in ("top_k", "sparsemixer")

    def finish(self, raw_TE: Tensor) -> Tensor:
        """Logits of one linear map, capped and multiplied as the family does."""
        logits_TE = wide(raw_TE)
        if self.softcap > 0:
            logits_TE = torch.tanh(logits_TE / self.softcap) * self.softcap
        return logits_TE if self.multiplier == 1 else logits_TE * self.multiplier

    def routed(self, logits_TE: Tensor) -> Tensor:
        """The logits of the classes that are chosen among."""
        return logits_TE[:, : self.num_experts]

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Scores over all classes, in float32 or wider."""
        logits_TE = self.routed(wide(logits_TE))
        if self.score == "softmax":
            return logits_TE.softmax(dim=-1)
        if self.score == "sigmoid":
            return logits_TE.sigmoid()
        return F.softplus(logits_TE).sqrt()

    def choose(self, logits_TE: Tensor, scores_TE: Tensor, bias_E: Tensor | None = None) -> Tensor:
        """The K best of each token, best first (T, K); among equals the lowest index.

        Raises:
            ConfigError: if the choice is not the router's: it is looked up, or told from outside.
        """
        if not self.is_learned:
            raise ConfigError(
                f"A router of policy {self.policy!r} does not choose by its logits. Give its choices to weights()."
            )
        return select_top_k(self.selection(logits_TE, scores_TE, bias_E), self.top_k)

    def selection(self, logits_TE: Tensor, scores_TE: Tensor, bias_E: Tensor | None = None) -> Tensor:
        """What the best K are taken of (T, E): biased, and masked where groups are limited; without a gradient."""
        by_TE = (self.routed(wide(logits_TE)) if self.select == "logit" else scores_TE).detach()
        if self.selection_bias and bias_E is not None:
            by_TE = by_TE + bias_E.to(by_TE.dtype)
        if self.groups is None:
            return by_TE
        grouped_TE = self.groups.mask(by_TE)
        return grouped_TE if self.masked == -math.inf else grouped_TE.masked_fill(grouped_TE.isneginf(), 0)

    def extras(self, device: torch.device) -> dict[str, Tensor]:
        """What a routing tells beside its rows: the group of each expert, where groups are limited."""
        return {} if self.groups is None else self.groups.devices(self.num_experts, self.top_k, device)

    def weights(
        self, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor, scale_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the outputs of the chosen experts are multiplied by (T, K); differentiable.

        Args:
            logits_TE: those of shared gates included.
            scores_TE: of :meth:`scores`.
            expert_TK: the choice, this router's or any other.
            scale_E: the learned factor of each expert, or the one of all (1,), where there is one.
        """
        logits_TE = wide(logits_TE)
        if self.policy == "sparsemixer":
            weight_TK = _sparsemixer(self.routed(logits_TE), expert_TK, self.jitter)
        elif self.shared_gates:
            taken_TE = torch.cat([logits_TE.gather(1, expert_TK), logits_TE[:, self.num_experts :]], dim=-1)
            gates_TE = F.logsigmoid(taken_TE).softmax(dim=-1) * self.scale
            if scale_E is not None and self.global_scale:
                gates_TE = gates_TE * scale_E.to(gates_TE.dtype)
            return gates_TE[:, : expert_TK.shape[1]], gates_TE[:, expert_TK.shape[1] :]
        else:
            weight_TK = self._normalized(scores_TE.gather(1, expert_TK))
        weight_TK = weight_TK * self.scale
        if scale_E is not None:
            weight_TK = weight_TK * scale_E.to(weight_TK.dtype).expand(self.num_experts)[expert_TK]
        if self.null == "skip" and self.null_experts:
            weight_TK = weight_TK.masked_fill(expert_TK >= self.num_experts - self.null_experts, 0)
        return weight_TK, None

    def _normalized(self, weight_TK: Tensor) -> Tensor:
        if self.normalize == "sum":
            return weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + self.eps)
        if self.normalize == "clamp":
            return weight_TK / weight_TK.sum(dim=-1, keepdim=True).clamp_min(self.eps)
        if self.normalize == "norm":
            norm_T1: Tensor = torch.linalg.vector_norm(weight_TK, ord=self.norm_order, dim=-1, keepdim=True)
            return weight_TK / norm_T1
        return weight_TK


def wide(x: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sparsemixer(logits_TE: Tensor, expert_TK: Tensor, jitter: float) -> Tensor:
    """Each pick's softmax among the logits that come within the jitter of the best, earlier picks left out.

    Source: Liu et al. 2024, "GRIN: GRadient-INformed MoE", arXiv:2409.12136, evaluation mode.
    """
    left_TE, weights = logits_TE, []
    for k in range(expert_TK.shape[1]):
        pick_T1 = expert_TK[:, k : k + 1]
        best_T1 = left_TE.max(dim=-1, keepdim=True).values.detach()
        # The distance is relative to the larger of the best logit and the logit's own size.
        apart_TE = (best_T1 - logits_TE.detach()) / torch.maximum(logits_TE.detach().abs(), best_T1)
        # A pick that was given, and would not have been made, has a weight too.
        far_TE = (apart_TE > 2 * jitter).scatter(1, pick_T1, False)
        near_TE = left_TE.masked_fill(far_TE, -math.inf)
        weights.append(near_TE.softmax(dim=-1).gather(1, pick_T1))
        left_TE = left_TE.scatter(1, pick_T1, -math.inf)
    return torch.cat(weights, dim=-1)
