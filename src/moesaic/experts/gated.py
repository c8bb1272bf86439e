"""Gated experts, SwiGLU and its kin: the kind that most language models use."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.core.init import Init, normal
from moesaic.core.plan import Plan
from moesaic.experts.grouped import may_be_native, run_grouped
from moesaic.kernels.activations import Activation, silu
from moesaic.kernels.grouped_ffn import Kernel, require_known
from moesaic.kernels.whole_layer import ExpertStacks


class GatedExperts(nn.Module):
    """E gated feed-forward networks in three stacked weights: ``(act(x gate_e) * (x up_e)) down_e``.

    With silu this is SwiGLU, with gelu GEGLU, with relu ReGLU (Shazeer 2020, "GLU Variants Improve Transformer").

    Args:
        num_experts: E.
        width: D.
        hidden: F, the hidden width of one expert.
        activation: applied to the gate.
        kernel: "auto", a kernel's name, or a :class:`~moesaic.kernels.grouped_ffn.Kernel`.
        weigh: multiply an expert's "output" by the row's weight, as nearly all designs do, or its "input" (Llama 4).
        init: draws the initial weights.
    Shape:
        ``(T, D)`` and a plan -> ``(T, D)``.
    Raises:
        ConfigError: if no kernel has the name, or ``weigh`` is neither.
    """

    # What transformers and PEFT call weights of (experts, inputs, outputs): an adapter's first matrix reads the input.
    is_transposed = True

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        activation: Activation = silu,
        kernel: Kernel | str = "auto",
        weigh: Literal["output", "input"] = "output",
        init: Init | None = None,
    ) -> None:
        super().__init__()
        if isinstance(kernel, str):
            require_known(kernel)
        if weigh not in ("output", "input"):
            raise ConfigError(f"weigh must be 'output' or 'input', got {weigh!r}. Only Llama 4 weighs the input.")
        self.activation = activation
        self.kernel = kernel
        self.weigh = weigh
        self.gate_EDF = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.up_EDF = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))
        draw = init or normal(0.02)
        draw(self.gate_EDF, width)
        draw(self.up_EDF, width)
        draw(self.down_EFD, hidden)

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.up_EDF.shape[0]

    def plain_stacks(self) -> ExpertStacks | None:
        """What C is told to work as these experts do; None if that is more than C can do."""
        if self.weigh != "output" or not may_be_native(self.kernel):
            return None
        return ExpertStacks(self.gate_EDF, self.up_EDF, self.down_EFD, self.activation)

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Run each expert over its rows; weigh and add what they return."""
        stacks = (self.gate_EDF, self.up_EDF, self.down_EFD)
        return run_grouped(x_TD, plan, *stacks, self.activation, self.kernel, self.weigh)
