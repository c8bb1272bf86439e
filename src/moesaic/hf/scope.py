"""What a sparse block may know about the forward that it runs in, and where it reports what it did.

One frame belongs to one forward of one transformers model; a context variable holds it, so that threads and models
within models do not meet. A frame that is kept to recompute activations has no sink: it knows which tokens are padding,
as the first forward did, and counts nothing a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesaic.balance import LossTerm
from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.routing import Routing


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
        losses: the balance losses of this layer, unscaled and attached; empty unless wanted.
        terms: their names and coefficients.
        frame: the forward.
    """

    block: nn.Module
    routing: Routing
    losses: Mapping[str, Tensor]
    terms: tuple[LossTerm, ...]
    frame: Frame


class Listener(Protocol):
    """Hears what blocks report, once for each forward."""

    places: Mapping[nn.Module, Place]
    wants_balance: bool

    def hear(self, place: Place, report: Report) -> None:
        """Called as soon as the block is done."""


class Sink:
    """Gathers the reports of one forward, and is gone with it.

    Attributes:
        balance: the balance losses so far, each times its coefficient; None if there are none to train with.
        share: part of an optimizer step's labels that this forward predicts, if the model's loss is divided by it.
    """

    def __init__(self, listeners: tuple[Listener, ...]) -> None:
        self.listeners = listeners
        self.balance: Tensor | None = None
        self.share: Tensor | None = None

    def take(self, report: Report, *, for_training: bool) -> None:
        """Add the layer's balance losses to those before it, tell the listeners, and let go of the table."""
        if for_training:
            for term in report.terms:
                scaled = term.coefficient * report.losses[term.name]
                self.balance = scaled if self.balance is None else self.balance + scaled.to(self.balance.device)
        for listener in self.listeners:
            place = listener.places.get(report.block)
            if place is not None:
                listener.hear(place, report)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """One forward of one model.

    Attributes:
        model: whose forward it is; None outside of any.
        attention_mask: of the stack that runs now; (B, past + P), nonzero where a token is.
        input_ids: of the stack that runs now.
        balance_wanted: blocks whose balance losses a listener asked for.
        sink: where reports go; None while activations are recomputed.
    """

    model: nn.Module | None = None
    attention_mask: Any = None
    input_ids: Tensor | None = None
    balance_wanted: frozenset[nn.Module] = frozenset()
    sink: Sink | None = None

    def tokens(self, hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens of a batch are real, and the sequence that each belongs to, laid end to end.

        Only a mask of one number per token says which are padding; with any other (made for one kind of attention,
        with four dimensions or as a dictionary) all tokens count as real.

        Raises:
            ShapeError: if the mask belongs to another batch.
        """
        if hidden_states.ndim != 3:
            return None, None
        num_sequences, num_positions, _ = hidden_states.shape
        sequence_T = torch.arange(num_sequences, device=hidden_states.device).repeat_interleave(num_positions)
        mask = self.attention_mask
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return None, sequence_T
        if mask.shape[0] != num_sequences or mask.shape[1] < num_positions:
            raise ShapeError(
                f"attention_mask must have one entry for each token, ({num_sequences}, at least {num_positions}), "
                f"got {tuple(mask.shape)}. Pass the mask of the tokens that this stack reads."
            )
        # With a cache the mask covers past tokens too; those that run now are the last.
        valid_BP = mask[:, mask.shape[1] - num_positions :] != 0
        return valid_BP.reshape(-1).to(hidden_states.device), sequence_T

    def report(self, block: nn.Module, routing: Routing, terms: tuple[LossTerm, ...]) -> None:
        """Hand over what a block did.

        Losses are computed while activations are recomputed too, and thrown away: what the first forward saved for
        its backward has to be there again.
        """
        for_training = block.training and torch.is_grad_enabled() and self.model is not None
        wanted = for_training or block in self.balance_wanted
        losses = {term.name: term.loss(routing) for term in terms} if wanted else {}
        if self.sink is not None:
            report = Report(block=block, routing=routing, losses=losses, terms=terms, frame=self)
            self.sink.take(report, for_training=for_training)

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether ``model`` is a part of the model whose forward this is."""
        return self.model is not None and any(part is model for part in self.model.modules())


_NOWHERE = Frame()
_FRAME: ContextVar[Frame] = ContextVar("moesaic.hf.frame", default=_NOWHERE)
_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("moesaic.hf.listeners", default=())


def current_frame() -> Frame:
    """The forward that is running here; one that knows nothing if none is.

    Raises:
        ConfigError: if activations are being recomputed by a wrapper that did not keep the forward's frame.
    """
    frame = _FRAME.get()
    if frame is _NOWHERE and _in_backward():
        raise ConfigError(
            "A MoE layer is recomputed during backward by a checkpoint wrapper that Moesaic does not know, so it "
            "cannot tell padding from tokens and would route otherwise than in the forward. Remove the wrapper and "
            "call model.activation_checkpointing_enable() (gradient_checkpointing_enable() in older transformers)."
        )
    return frame


@contextmanager
def entered(model: nn.Module, attention_mask: Any, input_ids: Tensor | None) -> Iterator[Sink | None]:
    """Run a forward of ``model`` in a frame of its own.

    Yields the sink that gathers the reports, or None if ``model`` is part of the model whose forward is running: its
    blocks report there, but under the mask of their own stack.
    """
    outer = _FRAME.get()
    if outer.belongs_to(model):
        frame = replace(outer, attention_mask=attention_mask, input_ids=input_ids)
    else:
        # A whole forward that runs in backward is recomputed by somebody: it has been listened to.
        listeners = () if _in_backward() else _LISTENERS.get()
        frame = Frame(
            model=model,
            attention_mask=attention_mask,
            input_ids=input_ids,
            balance_wanted=frozenset(
                block for listener in listeners if listener.wants_balance for block in listener.places
            ),
            sink=Sink(listeners),
        )
    with _resumed(frame):
        yield None if outer.belongs_to(model) else frame.sink


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let ``listener`` hear every forward that starts within, in this thread."""
    _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        # Not reset to what was before: those who listen may leave in another order than they came.
        _LISTENERS.set(tuple(one for one in _LISTENERS.get() if one is not listener))


@contextmanager
def _resumed(frame: Frame) -> Iterator[None]:
    token = _FRAME.set(frame)
    try:
        yield
    finally:
        _FRAME.reset(token)


class KeepFrame:
    """A checkpoint function that recomputes in the frame of the first forward.

    Args:
        checkpoint: called with a function and its arguments, as ``torch.utils.checkpoint.checkpoint`` is.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``function``, and keep its frame for the backward."""
        # Without its sink: what holds the graph must not be held by it.
        kept = replace(_FRAME.get(), sink=None)
        has_run = False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_run
            if not has_run:
                has_run = True
                return function(*args, **kwargs)
            with _resumed(kept):
                return function(*args, **kwargs)

        return self.checkpoint(run, *args, **kwargs)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
