"""Gated experts with a bias on every matrix and bounded activations (gpt-oss)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.init import Init, normal
from moesaic.core.plan import Plan


class BiasedExperts(nn.Module):
    """E gated feed-forward networks with biases: ``(g sigmoid(alpha g) * (u + 1)) down_e + c_e``.

    ``g = min(x gate_e + a_e, limit)`` and ``u = x up_e + b_e``, cut off at plus and minus ``limit``. The last bias is
    weighed with the expert's output. Runs as a loop over experts by autograd.

    Args:
        num_experts: E.
        width: D.
        hidden: F, the hidden width of one expert.
        alpha: steepness of the gate's sigmoid; 1.702 makes it close to GELU.
        limit: bound of both branches.
        init: draws the initial weights; biases start at 0, as in transformers.
    Shape:
        ``(T, D)`` and a plan -> ``(T, D)``.
    Raises:
        ConfigError: if ``alpha`` or ``limit`` is not positive.
        ShapeError: if the plan is for another number of experts.

    Source: openai/gpt-oss, ``gpt_oss/torch/model.py``.
    """

    # What transformers and PEFT call weights of (experts, inputs, outputs): an adapter's first matrix reads the input.
    is_transposed = True

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        alpha: float = 1.702,
        limit: float = 7.0,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        if alpha <= 0 or limit <= 0:
            raise ConfigError(f"alpha and limit must be positive, got {alpha} and {limit}. gpt-oss uses 1.702 and 7.")
        self.alpha = alpha
        self.limit = limit
        self.gate_EDF = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.up_EDF = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.gate_bias_EF = nn.Parameter(torch.zeros(num_experts, hidden))
        self.up_bias_EF = nn.Parameter(torch.zeros(num_experts, hidden))
        self.down_bias_ED = nn.Parameter(torch.zeros(num_experts, width))
        draw = init or normal(0.02)
        draw(self.gate_EDF, width)
        draw(self.up_EDF, width)
        draw(self.down_EFD, hidden)

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.up_EDF.shape[0]

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Run each expert over its rows; weigh and add what they return."""
        if plan.num_experts != self.num_experts:
            raise ShapeError(
                f"the plan must be for {self.num_experts} experts, got one for {plan.num_experts}. "
                "Build router and experts with the same num_experts."
            )
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        y_TD = torch.zeros_like(x_TD, dtype=wide)
        start = 0
        for e, end in enumerate(plan.offset_E.tolist()):
            # An expert without rows runs on none: its gradients are zeros and not None.
            token_M = plan.token_N[start:end]
            y_MD = self._run(x_TD[token_M], e).to(wide) * plan.weight_N[start:end, None].to(wide)
            y_TD = y_TD.index_add(0, token_M, y_MD)
            start = end
        return y_TD.to(x_TD.dtype)

    def _run(self, x_MD: Tensor, e: int) -> Tensor:
        gate_MF = (x_MD @ self.gate_EDF[e] + self.gate_bias_EF[e]).clamp(max=self.limit)
        up_MF = (x_MD @ self.up_EDF[e] + self.up_bias_EF[e]).clamp(-self.limit, self.limit)
        hidden_MF = gate_MF * torch.sigmoid(self.alpha * gate_MF) * (up_MF + 1)
        return hidden_MF @ self.down_EFD[e] + self.down_bias_ED[e]

    def kernel_report(self) -> str:
        """Which kernel runs, and why."""
        return "BiasedExperts: PyTorch, a loop over experts by autograd; no kernel has biases"
