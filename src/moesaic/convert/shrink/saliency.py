"""What each expert of a layer was worth on some text: sums over the rows that it served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moesaic.core.errors import ConfigError

By = Literal["reap", "frequency", "ean", "weight"]
"""How experts are ranked; :meth:`ExpertStats.saliency` says what each means."""

_SUPER_QUANTILE = 0.995
_SUPER_SHARE = 0.1
_SUPER_DEPTH = 0.75


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertStats:
    """What one layer's experts did on some text; padding and dropped rows left out. Sums are float64.

    Attributes:
        num_tokens: tokens that the layer saw.
        count_E: rows that each expert served, int64.
        weight_E: sum of their weights, as the layer applied them: normalised and scaled.
        norm_E: sum over those rows of the output's length, ``||f_e(x)||``, not weighed.
        contribution_E: the same of what was added to the layer's output, ``|w| ||f_e(x)||``.
        largest_E: the largest number in any output, by magnitude.
        output_ED: sum of the outputs, not weighed.
        shared_gate: mean of what the shared expert's output is multiplied by; 1 where nothing is.
        every_ED: mean output of each expert over all tokens, whoever served them; None unless asked for.
        product_EE: mean inner product of two experts' outputs for the same token, over all tokens; None likewise.
    """

    num_tokens: int
    count_E: Tensor
    weight_E: Tensor
    norm_E: Tensor
    contribution_E: Tensor
    largest_E: Tensor
    output_ED: Tensor
    shared_gate: float = 1.0
    every_ED: Tensor | None = None
    product_EE: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.count_E.shape[0]

    @property
    def mean_ED(self) -> Tensor:
        """Mean output of each expert on the tokens that it served; zeros where it served none."""
        return self.output_ED / self.count_E.clamp_min(1)[:, None]

    def saliency(self, by: By) -> Tensor:
        """How much each expert matters, float64 (E,); an expert that served no token has 0.

        Args:
            by: "reap": mean over the tokens that an expert served of weight times output length (Lasby et al. 2025,
                "REAP the Experts", eq. 9; arXiv:2510.13999). "frequency": how many it served. "ean": sum of its
                output lengths (Jaiswal et al. 2025). "weight": sum of its weights.
        Raises:
            ConfigError: if ``by`` is none of these.
        """
        if by == "reap":
            return self.contribution_E / self.count_E.clamp_min(1)
        sums = {"frequency": self.count_E.double(), "ean": self.norm_E, "weight": self.weight_E}
        if by not in sums:
            raise ConfigError(f"by must be one of {', '.join(get_args(By))}, got {by!r}. 'reap' is the published best.")
        return sums[by]


class StatsSum:
    """Adds up what a layer's experts do, batch by batch, in memory that does not grow with the text.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        zeros_E = torch.zeros(num_experts, dtype=torch.float64)
        self.num_experts = num_experts
        self.num_tokens = 0
        self.count_E = torch.zeros(num_experts, dtype=torch.int64)
        self.weight_E, self.norm_E, self.contribution_E = zeros_E.clone(), zeros_E.clone(), zeros_E.clone()
        self.largest_E = zeros_E.clone()
        self.output_ED: Tensor | None = None
        self.shared_gate = 0.0
        self._gated_tokens = 0
        self._every_tokens = 0
        self._every_ED: Tensor | None = None
        self._product_EE: Tensor | None = None

    def add_rows(self, expert_N: Tensor, weight_N: Tensor, output_ND: Tensor, added_ND: Tensor | None = None) -> None:
        """Take in rows that experts served.

        Args:
            expert_N: the expert of each row.
            weight_N: what its output was multiplied by.
            output_ND: its output, not weighed.
            added_ND: what it added to the layer's output, where that is not weight times output (Llama 4 weighs the
                input).
        """
        output_ND = output_ND.to(torch.promote_types(output_ND.dtype, torch.float32))
        norm_N, weight_N = output_ND.norm(dim=-1).double(), weight_N.double()
        added_N = weight_N.abs() * norm_N if added_ND is None else added_ND.double().norm(dim=-1)
        for total_E, value_N in ((self.weight_E, weight_N), (self.norm_E, norm_N), (self.contribution_E, added_N)):
            total_E += self._by_expert(expert_N, value_N)
        self.count_E += torch.bincount(expert_N, minlength=self.num_experts).cpu()
        largest_N = output_ND.abs().amax(dim=-1).double().cpu()
        self.largest_E.scatter_reduce_(0, expert_N.cpu(), largest_N, "amax")
        sum_ED = self._by_expert(expert_N, output_ND.double())
        self.output_ED = sum_ED if self.output_ED is None else self.output_ED + sum_ED

    def _by_expert(self, expert_N: Tensor, value: Tensor) -> Tensor:
        """Sums over the rows of each expert, taken where the rows are, handed to the CPU."""
        return value.new_zeros(self.num_experts, *value.shape[1:]).index_add_(0, expert_N, value).cpu()

    def add_every(self, output_ETD: Tensor) -> None:
        """Take in what every expert makes of the same tokens."""
        output_ETD = output_ETD.double()
        flat = output_ETD.flatten(1)
        sum_ED, sum_EE = output_ETD.sum(dim=1).cpu(), (flat @ flat.T).cpu()
        self._every_ED = sum_ED if self._every_ED is None else self._every_ED + sum_ED
        self._product_EE = sum_EE if self._product_EE is None else self._product_EE + sum_EE
        self._every_tokens += output_ETD.shape[1]

    def add_gate(self, gate_T: Tensor) -> None:
        """Take in what the shared expert's output was multiplied by at each token."""
        self.shared_gate += float(gate_T.double().sum())
        self._gated_tokens += gate_T.numel()

    def result(self) -> ExpertStats:
        """The sums so far."""
        output_ED = torch.zeros(self.num_experts, 1, dtype=torch.float64) if self.output_ED is None else self.output_ED
        every = max(self._every_tokens, 1)
        return ExpertStats(
            num_tokens=self.num_tokens,
            count_E=self.count_E.clone(),
            weight_E=self.weight_E.clone(),
            norm_E=self.norm_E.clone(),
            contribution_E=self.contribution_E.clone(),
            largest_E=self.largest_E.clone(),
            output_ED=output_ED.clone(),
            shared_gate=self.shared_gate / self._gated_tokens if self._gated_tokens else 1.0,
            every_ED=None if self._every_ED is None else self._every_ED / every,
            product_EE=None if self._product_EE is None else self._product_EE / every,
        )


def super_experts(stats: Mapping[str, ExpertStats]) -> dict[str, Tensor]:
    """The few experts whose outputs have outliers that a model depends on, as a mask (E,) for each layer.

    Their largest output is above the 99.5th percentile of all experts of all layers and above a tenth of the largest,
    in the first three quarters of the layers.

    Args:
        stats: by layer, in depth order.

    Source: Su et al. 2025, "Unveiling Super Experts in Mixture-of-Experts LLMs", arXiv:2507.23279; the depth as in
    the code of REAP (Lasby et al. 2025).
    """
    largest = torch.cat([one.largest_E for one in stats.values()])
    threshold = max(float(torch.quantile(largest, _SUPER_QUANTILE)), _SUPER_SHARE * float(largest.max()))
    early = int(len(stats) * _SUPER_DEPTH)
    return {layer: (one.largest_E > threshold) & (index < early) for index, (layer, one) in enumerate(stats.items())}
