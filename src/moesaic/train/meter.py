"""What the routers of a model did: loads, drops and entropies by layer, added up over forwards and ranks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from moesaic.hf import BalanceTerms, Seen
    from moesaic.telemetry.summary import RoutingSummary

_COUNTS = ("load_E", "num_tokens", "num_dropped", "entropy_sum")


class RoutingMeter:
    """Adds up the routing of a model's forwards while it is open.

    Args:
        model: the model; one without MoE layers has nothing to measure.
        training: look at forwards in training mode only, or in evaluation mode only.

    """

    def __init__(self, model: nn.Module, *, training: bool = True):
        self.model = model
        self.training = training
        self._summaries: dict[str, RoutingSummary] = {}
        self._balance: BalanceTerms | None = None
        self._aux: dict[str, float] = {}
        self._stack = ExitStack()

    def open(self) -> None:
        """Begin to look."""
        from moesaic.hf import balance, is_sparse, observe

        if is_sparse(self.model):
            self._stack.enter_context(observe(self.model, self._see))
            if self.training:
                self._balance = self._stack.enter_context(balance(self.model))

    def close(self) -> None:
        """Stop looking; what was seen can still be read."""
        self._stack.close()
        if self._balance is not None:
            self._aux = {name: _mean_over_ranks(value) for name, value in self._balance.means.items()}
            # It holds the step's graph.
            self._balance = None

    def __enter__(self) -> RoutingMeter:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self) -> dict[str, Any]:
        """Give the figures of ``history.jsonl``, by layer; empty without MoE layers."""
        summaries = {layer: _over_ranks(summary) for layer, summary in self._summaries.items()}
        if not summaries:
            return {}
        return {
            "aux": self._aux,
            "load_max_over_mean": {layer: summary.load_max_over_mean for layer, summary in summaries.items()},
            "load": {layer: _shares(summary.load_E) for layer, summary in summaries.items()},
            "drop_rate": {layer: summary.drop_rate for layer, summary in summaries.items()},
            "router_entropy": {layer: summary.entropy for layer, summary in summaries.items()},
        }

    def means(self) -> tuple[float | None, float | None]:
        """Give load max/mean and drop rate, each averaged over layers; None without MoE layers."""
        figures = self.read()
        if not figures:
            return None, None
        imbalance, dropped = figures["load_max_over_mean"].values(), figures["drop_rate"].values()
        return sum(imbalance) / len(imbalance), sum(dropped) / len(dropped)

    def _see(self, seen: Seen) -> None:
        from moesaic.telemetry.summary import RoutingSummary

        if seen.training != self.training:
            return
        new = RoutingSummary.of(seen.routing)
        old = self._summaries.get(seen.layer)
        self._summaries[seen.layer] = new if old is None else old + new


def _over_ranks(summary: RoutingSummary) -> RoutingSummary:
    if not dist.is_initialized():
        return summary
    totals = {name: getattr(summary, name).clone() for name in _COUNTS}
    for total in totals.values():
        dist.all_reduce(total)
    return replace(summary, **totals)


def _mean_over_ranks(value: Tensor) -> float:
    total = value.detach().double().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return float(total)


def _shares(load_E: Tensor) -> list[float]:
    share_E = load_E.double() / load_E.sum().clamp_min(1)
    return [round(share, 6) for share in share_E.tolist()]
