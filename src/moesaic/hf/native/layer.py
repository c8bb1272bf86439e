"""What an adopted MoE layer shows of itself to those who count, steer and record."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from moesaic.balance import Controller
from moesaic.core.errors import ConfigError
from moesaic.hf.native.router import Reporter


class NativeRouter:
    """The part of an adopted router that controllers know: its selection bias.

    Args:
        reporter: the adopted module.
        block: the module around it.
    """

    def __init__(self, reporter: Reporter, block: nn.Module) -> None:
        self._reporter = reporter
        self._block = block

    @property
    def bias_E(self) -> Tensor | None:
        """The selection bias, a view of what the model keeps; None where there is none."""
        row = self._reporter.adoption.row
        return row.bias_of(self._reporter, self._block) if self._reporter.adoption.spec.selection_bias else None

    @bias_E.setter
    def bias_E(self, value: Tensor) -> None:
        # An in-place step assigns what it has stepped already.
        if value.data_ptr() != cast(Tensor, self.bias_E).data_ptr():
            raise ConfigError("A selection bias is moved in place, got another tensor. Use copy_.")


class PinnedController:
    """Steps another controller's selection bias in a family that sets one of its entries whenever it loads weights.

    After each step all entries are shifted by as much as that one has moved: it stays, and the choice is the same.

    Args:
        inner: moves the bias.
        router: has it.
        entry: which stays.
    """

    def __init__(self, inner: Controller, router: NativeRouter, entry: int) -> None:
        self.inner = inner
        self.router = router
        self.entry = entry

    @torch.no_grad()
    def step(self, load_E: Tensor, *, kept_E: Tensor | None = None, num_tokens: int | None = None) -> None:
        """Move the bias once."""
        bias_E = cast(Tensor, self.router.bias_E)
        pinned = bias_E[self.entry].clone()
        self.inner.step(load_E, kept_E=kept_E, num_tokens=num_tokens)
        bias_E -= bias_E[self.entry] - pinned
        bias_E[self.entry] = pinned


class NativeLayer:
    """An adopted MoE layer: numbers of experts and parameters, and what controllers steer.

    Args:
        reporter: the adopted module.
        block: the module around it, or itself where a block reports.
    """

    def __init__(self, reporter: Reporter, block: nn.Module) -> None:
        self.reporter = reporter
        self.block = block
        self.router = NativeRouter(reporter, block)

    @property
    def spec(self) -> Any:
        """The :class:`~moesaic.hf.native.router_spec.RouterSpec` of its router."""
        return self.reporter.adoption.spec

    def pinned(self, controller: Controller) -> Controller:
        """A controller of its bias, as what the family does to the bias wants it."""
        entry = self.reporter.adoption.row.pinned_bias
        return controller if entry is None else PinnedController(controller, self.router, entry)

    @property
    def num_experts(self) -> int:
        """Classes that the router chooses among, those that are no experts included."""
        return self.reporter.adoption.spec.num_experts

    @property
    def num_params(self) -> int:
        """Parameters of the block."""
        return sum(parameter.numel() for parameter in self.block.parameters())

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets: all but the experts that it does not choose."""
        spec = self.reporter.adoption.spec
        in_experts = sum(parameter.numel() for parameter in _experts(self.block))
        real = max(spec.num_experts - spec.null_experts, 1)
        return self.num_params - in_experts + round(in_experts * min(spec.top_k, real) / real)


def _experts(block: nn.Module) -> list[nn.Parameter]:
    """The weights of routed experts, by the names that transformers gives them."""
    names = ("experts.", "input_linear.", "output_linear.", "down_embed.", "up_embed.")
    return [
        weight for name, weight in block.named_parameters() if name.startswith(names) and ".gate.weight" not in name
    ]
