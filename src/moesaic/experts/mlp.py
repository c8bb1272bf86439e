"""Plain experts: two matrices and a non-linearity, as in Switch and GShard."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.init import Init, normal
from moesaic.core.plan import Plan
from moesaic.experts.grouped import may_be_native, run_grouped
from moesaic.kernels.activations import Activation, relu
from moesaic.kernels.grouped_ffn import Kernel, require_known
from moesaic.kernels.whole_layer import ExpertStacks


class MLPExperts(nn.Module):
    """E feed-forward networks in two stacked weights: ``act(x up_e) down_e``.

    Args:
        num_experts: E.
        width: D.
        hidden: F, the hidden width of one expert.
        activation: ReLU in Switch and GShard, GELU in GPT-2.
        kernel: "auto", a kernel's name, or a :class:`~moesaic.kernels.grouped_ffn.Kernel`.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` and a plan -> ``(T, D)``.
    Raises:
        ConfigError: if no kernel has the name.
    """

    # What transformers and PEFT call weights of (experts, inputs, outputs): an adapter's first matrix reads the input.
    is_transposed = True

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        activation: Activation = relu,
        kernel: Kernel | str = "auto",
        init: Init | None = None,
    ) -> None:
        super().__init__()
        if isinstance(kernel, str):
            require_known(kernel)
        self.activation = activation
        self.kernel = kernel
        self.up_EDF = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))
        draw = init or normal(0.02)
        draw(self.up_EDF, width)
        draw(self.down_EFD, hidden)

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.up_EDF.shape[0]

    def plain_stacks(self) -> ExpertStacks | None:
        """What C is told to work as these experts do; None if they are to run otherwise."""
        if not may_be_native(self.kernel):
            return None
        return ExpertStacks(None, self.up_EDF, self.down_EFD, self.activation)

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Run each expert over its rows; weigh and add what they return."""
        return run_grouped(x_TD, plan, None, self.up_EDF, self.down_EFD, self.activation, self.kernel)
