"""What the routers of a model did: loads, drops and entropies by layer, added up over forwards and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from moesaic.train import ranks

if TYPE_CHECKING:
    from moesaic.core.routing import Routing
    from moesaic.hf import BalanceTerms, Seen
    from moesaic.telemetry.summary import RoutingSummary

_COUNTS = ("load_E", "kept_E", "num_tokens", "entropy_sum")
Counts: TypeAlias = dict[str, dict[str, Tensor]]


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
        self._largest: dict[str, Tensor] = {}
        self._balance: BalanceTerms | None = None
        self._aux: dict[str, Tensor] = {}
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
            self._aux = dict(self._balance.means)
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
        """Give the figures of ``history.jsonl``, by layer, over all ranks; empty without MoE layers.

        All ranks call it at the same point, those too that saw nothing.
        """
        aux, largest = ({name: float(one) for name, one in given.items()} for given in (self._aux, self._largest))
        everyone = ranks.gathered((_counts(self._summaries), aux, largest))
        summaries = _added_up([counts for counts, _, _ in everyone])
        if not summaries:
            return {}
        return {
            "aux": _means([aux for _, aux, _ in everyone]),
            "load_max_over_mean": {layer: summary.load_max_over_mean for layer, summary in summaries.items()},
            "load": {layer: _shares(summary.load_E) for layer, summary in summaries.items()},
            "drop_rate": {layer: summary.drop_rate for layer, summary in summaries.items()},
            "router_entropy": {layer: summary.entropy for layer, summary in summaries.items()},
            "router_logit": {layer: max(one.get(layer, 0.0) for _, _, one in everyone) for layer in summaries},
            **self._biases(),
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
        largest = _largest_logit(seen.routing)
        before = self._largest.get(seen.layer)
        self._largest[seen.layer] = largest if before is None else torch.maximum(before, largest)

    def _biases(self) -> dict[str, dict[str, list[float]]]:
        """The selection bias of each router that has one; the same on all ranks."""
        from moesaic.hf import moe_layers

        routers = {layer: getattr(moe, "router", None) for layer, moe in moe_layers(self.model).items()}
        biases = {layer: getattr(router, "bias_E", None) for layer, router in routers.items()}
        kept = {layer: _rounded(bias_E) for layer, bias_E in biases.items() if bias_E is not None}
        return {"bias": kept} if kept else {}


def _counts(summaries: Mapping[str, RoutingSummary]) -> Counts:
    return {layer: {name: getattr(summary, name).cpu() for name in _COUNTS} for layer, summary in summaries.items()}


def _added_up(everyone: Sequence[Counts]) -> dict[str, RoutingSummary]:
    from moesaic.telemetry.summary import RoutingSummary

    totals: dict[str, RoutingSummary] = {}
    for counts in everyone:
        for layer, values in counts.items():
            summary = RoutingSummary(**values)
            totals[layer] = totals[layer] + summary if layer in totals else summary
    return totals


def _means(everyone: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for values in everyone for name in values)
    return {name: fmean(values[name] for values in everyone if name in values) for name in names}


def _shares(load_E: Tensor) -> list[float]:
    return _rounded(load_E.double() / load_E.sum().clamp_min(1))


def _largest_logit(routing: Routing) -> Tensor:
    """The largest size of a logit of a token; minus infinity masks and is no logit."""
    logits_TE = routing.logits_TE
    left_out_TE = ~(logits_TE.isfinite() & routing.valid_T[:, None])
    return logits_TE.masked_fill(left_out_TE, 0).abs().amax() if logits_TE.numel() else logits_TE.new_zeros(())


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.detach().double().tolist()]
