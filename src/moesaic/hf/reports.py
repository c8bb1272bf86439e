"""What blocks report of one forward, who hears it, and the balance losses that wait until the forward is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesaic.balance import LossTerm, global_batch_loss
from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing

if TYPE_CHECKING:
    from moesaic.hf.scope import Frame


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a block stands in the model that is listened to: module path, and index in depth order."""

    layer: str
    index: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Report:
    """What one block did in one forward.

    Attributes:
        block: who reports.
        routing: the table, attached to the graph.
        losses: the balance losses of this layer by name, unscaled and attached; empty unless wanted.
        scaled: the same, each times what scales it.
        frame: the forward.
    """

    block: nn.Module
    routing: Routing
    losses: Mapping[str, Tensor]
    scaled: Mapping[str, Tensor]
    frame: Frame


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Waiting:
    """What a layer reported, and its losses that are to be worked out when the forward is over."""

    report: Report
    terms: tuple[LossTerm, ...]
    for_training: bool


class Listener(Protocol):
    """Hears what blocks report, once for each forward.

    Attributes:
        places: the blocks that it hears.
        wants_balance: hear of balance losses too, a second time of those that wait for the end of the forward.
    """

    places: Mapping[nn.Module, Place]
    wants_balance: bool

    @property
    def batch_load_E(self) -> Callable[[nn.Module, Tensor], Tensor] | None:
        """Adds up loads over the forwards of an optimizer step; None for those who do not."""

    def hear(self, place: Place, report: Report) -> None:
        """Called as soon as the block is done."""


def waits(term: LossTerm) -> bool:
    """Whether a loss needs what is known only when the forward is over: its reward, or the load of all ranks."""
    return term.rewarded or needs_batch_load(term)


def needs_batch_load(term: LossTerm) -> bool:
    """Whether a loss reads the load of the whole batch of an optimizer step."""
    return term.loss is global_batch_loss


class Sink:
    """Gathers the reports of one forward, and is gone with it.

    Args:
        listeners: hear the reports.
        is_recomputed: whether this is a whole forward that runs again in backward.
    Attributes:
        balance: the balance losses so far, each times its coefficient; None if there are none to train with.
        share: part of an optimizer step's labels that this forward predicts, if the model's loss is divided by it.
    """

    def __init__(self, listeners: tuple[Listener, ...], *, is_recomputed: bool = False) -> None:
        self.listeners = listeners
        self.is_recomputed = is_recomputed
        self.balance: Tensor | None = None
        self.share: Tensor | None = None
        self._waiting: list[Waiting] = []

    def waiting(self, *, for_training: bool = False) -> list[LossTerm]:
        """The losses that wait for a reward; those alone that join the model's own loss, if asked."""
        waiting = [one for one in self._waiting if one.for_training or not for_training]
        return [term for one in waiting for term in one.terms if term.rewarded]

    def take(self, report: Report, waiting: tuple[LossTerm, ...], *, for_training: bool) -> None:
        """Add the layer's balance losses to those before it, tell the listeners, and let go of the table.

        Args:
            report: with the losses that could be worked out at once.
            waiting: losses to work out when the forward is over; the table is kept as long.
            for_training: whether the losses join the model's own.
        """
        if for_training:
            self._add(report)
        for listener, place in self._hearing(report):
            listener.hear(place, report)
        if waiting:
            self._waiting.append(Waiting(report=report, terms=waiting, for_training=for_training))

    def settle(self, reward_T: Tensor | None) -> None:
        """Work out the losses that have waited for the end of the forward.

        Args:
            reward_T: the reward of each token, NaN where one has none; None to leave out the losses that need it.
        """
        waiting, self._waiting = self._waiting, []
        loads = self._batch_loads(waiting)
        for one in waiting:
            losses, scaled = {}, {}
            for term in one.terms:
                if term.rewarded and reward_T is None:
                    continue
                routing = one.report.routing
                if needs_batch_load(term):
                    routing = replace(routing, extras={**routing.extras, "global_load_E": loads[one]})
                if term.rewarded and reward_T is not None:
                    routing = rewarded(routing, reward_T)
                losses[term.name] = term.loss(routing)
                scaled[term.name] = term.scale(routing) * losses[term.name]
            done = replace(one.report, losses=losses, scaled=scaled)
            if one.for_training:
                self._add(done)
            for listener, place in self._hearing(done):
                if listener.wants_balance:
                    listener.hear(place, done)

    def _batch_loads(self, waiting: list[Waiting]) -> dict[Waiting, Tensor]:
        """In training, of all ranks and of the optimizer step so far; otherwise of this forward alone."""
        loads = {one: one.report.routing.load_E for one in waiting if any(map(needs_batch_load, one.terms))}
        training = [one for one in loads if one.for_training]
        if training and self.is_recomputed:
            raise ConfigError(
                "A balance loss over the global batch cannot be worked out again in backward, when the batch has moved "
                "on, but a checkpoint wrapper recomputes the whole model. Remove the wrapper and call "
                "model.activation_checkpointing_enable() (gradient_checkpointing_enable() in older transformers)."
            )
        for one, load_E in zip(training, summed_over_ranks([loads[one] for one in training]), strict=True):
            loads[one] = load_E
            for listener, _ in self._hearing(one.report):
                if listener.batch_load_E is not None:
                    loads[one] = listener.batch_load_E(one.report.block, load_E)
        return loads

    def _add(self, report: Report) -> None:
        for scaled in report.scaled.values():
            self.balance = scaled if self.balance is None else self.balance + scaled.to(self.balance.device)

    def _hearing(self, report: Report) -> list[tuple[Listener, Place]]:
        return [(one, one.places[report.block]) for one in self.listeners if report.block in one.places]


def rewarded(routing: Routing, reward_T: Tensor) -> Routing:
    """The table with each token's reward, in which tokens without one count as padding does: not at all.

    Raises:
        ConfigError: if the model's predictions are not those of the layer's tokens.
    """
    if reward_T.shape != (routing.num_tokens,):
        raise ConfigError(
            f"A rewarded balance loss needs one prediction for each token that a layer reads, got {routing.num_tokens} "
            f"tokens and {reward_T.shape[0]} predictions. Use it in causal language models, or another recipe."
        )
    reward_T = reward_T.to(routing.logits_TE)
    known_T = ~reward_T.isnan()
    return replace(
        routing,
        valid_T=routing.valid_T & known_T,
        extras={**routing.extras, "reward_T": reward_T.masked_fill(~known_T, 0)},
    )


def summed_over_ranks(counts: Sequence[Tensor]) -> list[Tensor]:
    """Add up whole numbers over all processes that train together, in one message; all call it at the same point."""
    counts = list(counts)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or not counts:
        return counts
    sizes = [one.numel() for one in counts]
    total = torch.cat([one.reshape(-1).to(counts[0].device) for one in counts])
    dist.all_reduce(total)
    parts = zip(counts, torch.split(total, sizes), strict=True)
    return [part.view(one.shape).to(one.device) for one, part in parts]
