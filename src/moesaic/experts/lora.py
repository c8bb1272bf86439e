"""Low-rank experts: one frozen network that all share, and a small change to its weights for each expert."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.init import Init
from moesaic.core.plan import Plan
from moesaic.experts.shared import SharedExpert
from moesaic.kernels.activations import Activation, silu


class LowRank(nn.Module):
    """E low-rank maps: ``x -> alpha / rank * dropout(x) into_e out_e`` (LoRA, Hu et al. 2021).

    Args:
        num_experts: E.
        width: numbers in; D here, whatever the map is used for.
        out: numbers out; F here.
        rank: R.
        alpha: the maps are scaled by ``alpha / rank``.
        dropout: of the input in training, drawn for each expert and token.
        init: draws ``into_EDR``; None for uniform up to ``1 / sqrt(width)``, Kaiming's as LoRA calls it. ``out_ERF``
            starts at 0, so that a fresh map changes nothing.
    """

    def __init__(
        self, num_experts: int, width: int, out: int, *, rank: int, alpha: float, dropout: float, init: Init | None
    ) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.dropout = dropout
        self.into_EDR = nn.Parameter(torch.empty(num_experts, width, rank))
        self.out_ERF = nn.Parameter(torch.zeros(num_experts, rank, out))
        if init is None:
            nn.init.uniform_(self.into_EDR, -1 / math.sqrt(width), 1 / math.sqrt(width))
        else:
            init(self.into_EDR, width)

    def drawn(self, num_rows: int, like_TD: Tensor) -> Tensor | None:
        """What to multiply each row's input by, (N, D), for dropout in training; None where nothing is dropped."""
        if not (self.training and self.dropout > 0):
            return None
        ones_ND = like_TD.new_ones(num_rows, self.into_EDR.shape[1])
        return F.dropout(ones_ND, self.dropout, training=True)

    def one(self, x_MD: Tensor, expert: int) -> Tensor:
        """One expert's map of some rows, (M, F), nothing dropped."""
        return (x_MD @ self.into_EDR[expert]) @ self.out_ERF[expert] * self.scale

    def mixed(self, x_TD: Tensor, weight_TE: Tensor) -> Tensor:
        """The sum of all experts' maps, each token's weighed by its own numbers, (T, F)."""
        weight_TE = weight_TE.to(x_TD.dtype) * self.scale
        return torch.einsum("ter,erf->tf", self._small(x_TD) * weight_TE[:, :, None], self.out_ERF)

    def every(self, x_TD: Tensor) -> Tensor:
        """Each expert's map of each token, (T, E, F)."""
        return torch.einsum("ter,erf->tef", self._small(x_TD), self.out_ERF) * self.scale

    def each(self, x_TEF: Tensor) -> Tensor:
        """Each expert's map of an input of its own, (T, E, F)."""
        x_TEF = F.dropout(x_TEF, self.dropout, self.training)
        small_TER = torch.einsum("tef,efr->ter", x_TEF, self.into_EDR)
        return torch.einsum("ter,erd->ted", small_TER, self.out_ERF) * self.scale

    def _small(self, x_TD: Tensor) -> Tensor:
        if not (self.training and self.dropout > 0):
            return torch.einsum("td,edr->ter", x_TD, self.into_EDR)
        x_TED = F.dropout(x_TD[:, None, :].expand(-1, self.into_EDR.shape[0], -1), self.dropout, self.training)
        return torch.einsum("ted,edr->ter", x_TED, self.into_EDR)

    @torch.no_grad()
    def load(self, expert: int, into_DR: Tensor, out_RF: Tensor) -> None:
        """Take one expert's trained maps.

        Raises:
            ShapeError: if they are of another shape.
        """
        for mine, given in ((self.into_EDR[expert], into_DR), (self.out_ERF[expert], out_RF)):
            _copy(mine, given, "a low-rank map")


class LoRAExperts(nn.Module):
    """E experts that are one gated feed-forward network, frozen, each with low-rank changes to its three matrices.

    The network is computed once per token up to its non-linearity, the changes for each row: ``gate_e = x gate +
    low_rank_e(x)``, ``up_e`` alike, and so ``down_e`` of ``act(gate_e) * up_e``.

    Args:
        num_experts: E.
        width: D.
        hidden: F.
        rank: R.
        alpha: changes are scaled by ``alpha / rank``.
        dropout: of what enters the changes, in training. Drawn by ``F.dropout`` in three calls, for gate, up and down,
            over all rows in the table's order, so that no token's draw depends on where others go.
        activation: applied to the gate.
        train_base: let the network train too; LoRA freezes it.
        init: draws the network and the first factor of each change; None for a normal of 0.02 and LoRA's uniform.
    Shape:
        ``(T, D)`` and a plan -> ``(T, D)``.
    Raises:
        ConfigError: if ``rank`` is below 1, ``alpha`` is not positive or ``dropout`` not in ``[0, 1)``.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        activation: Activation = silu,
        train_base: bool = False,
        init: Init | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"rank must be at least 1, got {rank}. MixLoRA uses 16.")
        if alpha <= 0:
            raise ConfigError(f"alpha must be positive, got {alpha}. MixLoRA uses 32 for rank 16.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, got {dropout}. LoRA uses 0.05.")
        self.activation = activation
        self.base = SharedExpert(width, hidden, activation=activation, init=init).requires_grad_(train_base)

        def low_rank(inputs: int, outputs: int) -> LowRank:
            return LowRank(num_experts, inputs, outputs, rank=rank, alpha=alpha, dropout=dropout, init=init)

        self.gate, self.up, self.down = low_rank(width, hidden), low_rank(width, hidden), low_rank(hidden, width)

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.gate.into_EDR.shape[0]

    @property
    def num_common_params(self) -> int:
        """Parameters that every token meets, whichever experts it chose: those of the network."""
        return sum(parameter.numel() for parameter in self.base.parameters())

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Run each expert over its rows; weigh and add what they return.

        Raises:
            ShapeError: if the plan is for another number of experts.
        """
        if plan.num_experts != self.num_experts:
            raise ShapeError(
                f"the plan must be for {self.num_experts} experts, got one for {plan.num_experts}. "
                "Build router and experts with the same num_experts."
            )
        assert self.base.gate_DF is not None  # the base is built gated
        gate_TF, up_TF = x_TD @ self.base.gate_DF, x_TD @ self.base.up_DF
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        y_TD = torch.zeros_like(x_TD, dtype=wide)
        drops = [low_rank.drawn(len(plan.row_N), x_TD) for low_rank in (self.gate, self.up, self.down)]
        ends = plan.offset_E.tolist()
        # An expert without rows runs over none, so that its weights get zeros for a gradient and not None.
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            token_M, row_M = plan.token_N[start:end], plan.row_N[start:end]
            gate_drop, up_drop, down_drop = (1 if drop is None else drop[row_M] for drop in drops)
            x_MD = x_TD[token_M]
            gate_MF = gate_TF[token_M] + self.gate.one(x_MD * gate_drop, e)
            hidden_MF = self.activation.forward(gate_MF) * (up_TF[token_M] + self.up.one(x_MD * up_drop, e))
            y_MD = hidden_MF @ self.base.down_FD + self.down.one(hidden_MF * down_drop, e)
            y_TD = y_TD.index_add(0, token_M, y_MD.to(wide) * plan.weight_N[start:end, None].to(wide))
        return y_TD.to(x_TD.dtype)

    def alone(self, x_TD: Tensor) -> Tensor:
        """What each expert's low-rank matrices make of each token as a network of their own, (T, E, D)."""
        hidden_TEF = self.activation.forward(self.gate.every(x_TD)) * self.up.every(x_TD)
        return self.down.each(hidden_TEF)

    @torch.no_grad()
    def load_base(self, gate_DF: Tensor, up_DF: Tensor, down_FD: Tensor) -> None:
        """Take the network of a dense model. While the changes are fresh, the layer then is that network.

        Raises:
            ShapeError: if a matrix is of another shape.
        """
        assert self.base.gate_DF is not None
        for name, mine, given in (
            ("gate_DF", self.base.gate_DF, gate_DF),
            ("up_DF", self.base.up_DF, up_DF),
            ("down_FD", self.base.down_FD, down_FD),
        ):
            _copy(mine, given, name)


def _copy(mine: Tensor, given: Tensor, what: str) -> None:
    if mine.shape != given.shape:
        raise ShapeError(
            f"{what} must be {tuple(mine.shape)}, got {tuple(given.shape)}. Weights here are (inputs, outputs): "
            "transpose those of torch.nn.Linear, or build the layer with the model's hidden size."
        )
    mine.copy_(given)
