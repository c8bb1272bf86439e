"""Balance within groups of experts that should each serve one kind of task (LoRAMoE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalizedLoss:
    """The localized balancing constraint: how unevenly ``Z = I * Q`` spreads over experts and sequences.

    ``Q[e, s]`` is the weight that expert e has in sequence s, summed over its tokens. ``I`` is ``1 + delta`` where the
    kinds of expert and token match, else ``1 - delta``: tokens of an odd domain match the first half of the experts,
    of an even one the second half. Without ``extras["domain_T"]`` no kind is known and I is 1. The loss is summed over
    the routers of ``extras["linear_GTE"]`` where there are several.

    0 where Z is even; with delta 0 that is even balance within every sequence, if sequences are of one length. Note
    that Z is even where experts of the matching kind have *less* weight, ``1 / (1 + delta)``: the published
    constraint, taken at its word, pushes against the specialisation that the text describes.

    Attributes:
        delta: how far the two kinds stand apart.
        measure: "cv2" is variance over squared mean, which the authors' code has and which they call the right one;
            "dispersion" is the paper's variance over mean, which grows with the number of tokens. The variance is the
            unbiased one of torch in both.

    Raises:
        ConfigError: if ``delta`` is not in ``[0, 1)``, or ``measure`` none of these.

    Source: Dou et al. 2023, "LoRAMoE", section 3.3; authors' code, ``cv_squared`` in ``peft/tuners/lora.py``.
    """

    delta: float = 0.1
    measure: Literal["cv2", "dispersion"] = "cv2"

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 1:
            raise ConfigError(f"delta must be at least 0 and below 1, got {self.delta}. LoRAMoE uses 0.1.")
        if self.measure not in ("cv2", "dispersion"):
            raise ConfigError(f"measure must be 'cv2' or 'dispersion', got {self.measure!r}. The code has 'cv2'.")

    def __call__(self, routing: Routing) -> Tensor:
        """The unscaled loss of one layer; 0 where fewer than two numbers could differ."""
        weight_GTE = routing.extras.get("linear_GTE", routing.probability_TE.unsqueeze(0))
        weight_GTE = weight_GTE.masked_fill(~routing.valid_T[:, None], 0) * self._match(routing)
        names, sequence_N = self._sequences(routing)
        z_GSE = weight_GTE.new_zeros(weight_GTE.shape[0], max(len(names), 1), routing.num_experts)
        z_GSE = z_GSE.index_add(1, sequence_N, weight_GTE[:, routing.valid_T])
        z_GN = z_GSE.flatten(1)
        if z_GN.shape[1] < 2:
            return z_GN.sum() * 0
        mean_G = z_GN.mean(dim=1)
        below_G = mean_G if self.measure == "dispersion" else mean_G.square()
        return (z_GN.var(dim=1) / below_G.clamp_min(torch.finfo(z_GN.dtype).tiny)).sum()

    def _match(self, routing: Routing) -> Tensor:
        """``I`` of each token and expert."""
        if "domain_T" not in routing.extras:
            return torch.ones_like(routing.scores_TE)
        expert_E = torch.arange(routing.num_experts, device=routing.scores_TE.device)
        first_E = expert_E < routing.num_experts // 2
        odd_T = routing.extras["domain_T"] % 2 == 1
        return 1 + self.delta * torch.where(odd_T[:, None] == first_E, 1, -1).to(routing.scores_TE.dtype)

    @staticmethod
    def _sequences(routing: Routing) -> tuple[Tensor, Tensor]:
        """Sequences that hold a token, and which of them each valid token belongs to."""
        sequence_T = routing.sequence_T
        if sequence_T is None:
            sequence_T = torch.zeros_like(routing.valid_T, dtype=torch.int64)
        names, sequence_N = torch.unique(sequence_T[routing.valid_T], return_inverse=True)
        return names, sequence_N
