"""What a sparse block may know about the forward that it runs in, and where it reports what it did.

One frame belongs to one forward of one transformers model; a context variable holds it, so that threads and models
within models do not meet. A frame that is kept to recompute activations has no sink: it knows which tokens are padding,
as the first forward did, and counts nothing a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache

from moesaic.balance import LossTerm
from moesaic.core.context import Context
from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.routing import Routing
from moesaic.hf.interventions import Edits, Intervention
from moesaic.hf.reports import Listener, Report, Sink, waits
from moesaic.hf.uncompiled import uncompiled


class Below:
    """The router logits of the MoE layer that ran last in a stack, for the next one."""

    def __init__(self, logits_TE: Tensor | None = None) -> None:
        self.logits_TE = logits_TE

    def copy(self) -> Below:
        """The same numbers, without their graph: what is kept to recompute a block must not hold those before it."""
        if self.logits_TE is None:
            return Below()
        # Whether it wants a gradient decides what is saved for backward, and recomputing must save the same.
        return Below(self.logits_TE.detach().requires_grad_(self.logits_TE.requires_grad))


NOT_GIVEN = -1
"""The expert of a token in a replay that tells nothing of it."""


class Replay(Protocol):
    """Gives routers the choices that they made before."""

    def choices(self, block: nn.Module, frame: Frame, hidden_states: Tensor) -> Tensor | None:
        """The experts of each token of a batch (T, K), ``NOT_GIVEN`` for one that the router shall choose them for.

        None where it shall for all.
        """


class Replayed(Protocol):
    """A trace that forwards take their choices from."""

    def forward(self) -> Replay:
        """What the next forward takes."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """One forward of one model.

    Attributes:
        model: whose forward it is; None outside of any.
        attention_mask: of the stack that runs now; (B, past + P), nonzero where a token is.
        input_ids: of the stack that runs now.
        shape_BP: sequences and positions of the stack that runs now; None where its input does not tell.
        past: tokens that a cache holds of each sequence, padding counted, of the stack that runs now.
        domains: which domain each sequence of the batch belongs to, or all of them.
        below: logits of the MoE layer before, in the stack that runs now; None outside of any.
        balance_wanted: blocks whose balance losses a listener asked for.
        parts: which tokens of the batch a router reads that does not read all, bool (T,).
        replay: gives routers their choices, instead of their own; None unless a trace is replayed.
        edits: what is done to the choices of blocks, by :func:`moesaic.hf.intervene`.
        sink: where reports go; None while activations are recomputed.
    """

    model: nn.Module | None = None
    attention_mask: Any = None
    input_ids: Tensor | None = None
    shape_BP: tuple[int, int] | None = None
    past: int = 0
    domains: int | Tensor | None = None
    below: Below | None = None
    balance_wanted: frozenset[nn.Module] = frozenset()
    parts: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    replay: Replay | None = None
    edits: Mapping[nn.Module, Edits] = field(default_factory=dict)
    sink: Sink | None = None

    def tokens(self, hidden_states: Tensor) -> tuple[Tensor | None, Context]:
        """Which tokens of a batch are real, and what is known about them, laid end to end.

        Hidden states that come without their sequences have those of the stack's input, if they are as many. Tokens
        have ids where the stack read as many as there are hidden states; below a pooling layer they do not.

        Only a mask of one number per token says which are padding; with any other (made for one kind of attention,
        with four dimensions or as a dictionary) all tokens count as real.

        Raises:
            ShapeError: if the mask belongs to another batch.
            ConfigError: if domains were given for another number of sequences.
        """
        below_TE = None if self.below is None else self.below.logits_TE
        shape_BP = self._shape_of(hidden_states)
        if shape_BP is None:
            return None, Context(below_TE=below_TE)
        num_sequences, num_positions = shape_BP
        sequence_T = torch.arange(num_sequences, device=hidden_states.device).repeat_interleave(num_positions)
        ids_BP, domain_B = self.input_ids, None if self.domains is None else domain_of_each(self.domains, num_sequences)
        has_ids = isinstance(ids_BP, Tensor) and ids_BP.shape == shape_BP
        context = Context(
            sequence_T=sequence_T,
            id_T=ids_BP.reshape(-1).to(sequence_T) if ids_BP is not None and has_ids else None,
            domain_T=None if domain_B is None else domain_B.to(sequence_T)[sequence_T],
            below_TE=below_TE,
        )
        return self.valid(num_sequences, num_positions, hidden_states.device), context

    def _shape_of(self, hidden_states: Tensor) -> tuple[int, int] | None:
        if hidden_states.ndim == 3:
            return hidden_states.shape[0], hidden_states.shape[1]
        if self.shape_BP is None or math.prod(self.shape_BP) != hidden_states.shape[0]:
            return None
        return self.shape_BP

    def valid(self, num_sequences: int, num_positions: int, device: torch.device) -> Tensor | None:
        """False where a token is padding (T,); None where no mask tells.

        Raises:
            ShapeError: if the mask belongs to another batch.
        """
        mask = self.attention_mask
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        if mask.shape[0] != num_sequences or mask.shape[1] < num_positions:
            raise ShapeError(
                f"attention_mask must have one entry for each token, ({num_sequences}, at least {num_positions}), "
                f"got {tuple(mask.shape)}. Pass the mask of the tokens that this stack reads."
            )
        # With a cache the mask covers past tokens too; those that run now are the last.
        valid_BP = mask[:, mask.shape[1] - num_positions :] != 0
        return valid_BP.reshape(-1).to(device)

    def wanted(self, block: nn.Module, terms: tuple[LossTerm, ...]) -> tuple[tuple[LossTerm, ...], bool]:
        """Which of a block's losses this forward is to work out, and whether they join the model's own."""
        for_training = block.training and torch.is_grad_enabled() and self.model is not None
        return terms if for_training or block in self.balance_wanted else (), for_training

    def is_heard(self, block: nn.Module) -> bool:
        """Whether anybody listens to a block: without, and without losses, it need not report."""
        return self.sink is not None and any(block in one.places for one in self.sink.listeners)

    def report(self, block: nn.Module, routing: Routing, terms: tuple[LossTerm, ...]) -> None:
        """Hand over what a block did.

        Losses are computed while activations are recomputed too, and thrown away: what the first forward saved for
        its backward has to be there again. Those that wait are computed where nothing is recomputed.
        """
        wanted, for_training = self.wanted(block, terms)
        waiting = tuple(term for term in wanted if waits(term))
        at_once = tuple(term for term in wanted if not waits(term))
        losses = {term.name: term.loss(routing) for term in at_once}
        scaled = {term.name: term.scale(routing) * losses[term.name] for term in at_once}
        if self.sink is not None:
            report = Report(block=block, routing=routing, losses=losses, scaled=scaled, frame=self)
            self.sink.take(report, waiting, for_training=for_training)

    def lend(self, logits_TE: Tensor) -> None:
        """Keep a layer's logits for the next layer of the stack."""
        if self.below is not None:
            self.below.logits_TE = logits_TE

    def shares_tokens(self, shape_BP: tuple[int, int] | None) -> bool:
        """Whether a stack of this model with an input of that shape reads the tokens that the model itself does."""
        if self.model is None or shape_BP is None or shape_BP != self.shape_BP:
            return False
        # An encoder's tokens are not the decoder's, be they as many.
        return not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether ``model`` is a part of the model whose forward this is."""
        return self.model is not None and any(part is model for part in self.model.modules())


_NOWHERE = Frame()
_FRAME: ContextVar[Frame] = ContextVar("moesaic.hf.frame", default=_NOWHERE)
_DOMAINS: ContextVar[int | Tensor | None] = ContextVar("moesaic.hf.domains", default=None)
_REPLAY: ContextVar[Replayed | None] = ContextVar("moesaic.hf.replay", default=None)
_EDITS: ContextVar[Mapping[nn.Module, tuple[Intervention, ...]] | None] = ContextVar("moesaic.hf.edits", default=None)
_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("moesaic.hf.listeners", default=())


@uncompiled
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
def entered(
    model: nn.Module,
    attention_mask: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None = None,
    cache: Any = None,
) -> Iterator[Sink | None]:
    """Run a forward of ``model`` in a frame of its own.

    Yields the sink that gathers the reports, or None if ``model`` is part of the model whose forward is running: its
    blocks report there, but under the mask of their own stack.
    """
    outer = _FRAME.get()
    frame = _frame_in(outer, model, attention_mask, input_ids, inputs_embeds, cache)
    with resumed(frame):
        yield None if frame.sink is outer.sink else frame.sink


@uncompiled
def _frame_in(
    outer: Frame,
    model: nn.Module,
    attention_mask: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    cache: Any,
) -> Frame:
    read = input_ids if inputs_embeds is None else inputs_embeds
    shape_BP = (read.shape[0], read.shape[1]) if isinstance(read, Tensor) and read.ndim > 1 else None
    # Asked before the forward writes its own tokens into the cache.
    past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    if outer.belongs_to(model):
        if outer.shares_tokens(shape_BP):
            # A stack within a stack reads the same tokens: what it is not told, or is told in another form, it knows.
            told = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
            attention_mask = attention_mask if told else outer.attention_mask
            input_ids = outer.input_ids if input_ids is None else input_ids
        return replace(
            outer,
            attention_mask=attention_mask,
            input_ids=input_ids,
            shape_BP=shape_BP,
            past=past,
            below=Below(),
        )
    # A whole forward that runs in backward is recomputed by somebody: it has been listened to.
    again = _in_backward()
    listeners, replayed = () if again else _LISTENERS.get(), _REPLAY.get()
    return Frame(
        model=model,
        attention_mask=attention_mask,
        input_ids=input_ids,
        shape_BP=shape_BP,
        past=past,
        domains=_DOMAINS.get(),
        below=Below(),
        balance_wanted=frozenset(
            block for listener in listeners if listener.wants_balance for block in listener.places
        ),
        replay=None if replayed is None else replayed.forward(),
        edits={block: Edits.of(asked) for block, asked in edits_now().items()},
        sink=Sink(listeners, is_recomputed=again),
    )


@contextmanager
def domains(domain_B: int | Sequence[int] | Tensor) -> Iterator[None]:
    """Say which domain each sequence of the batches within belongs to, for routers that ask (PanGu-Sigma).

    Domains are numbers from 0, as the router counts them. Traces that were given domain names take them too, in the
    order of the names; :func:`trace_domain` tells them by name and reaches no router.

    Args:
        domain_B: one number for all, or one for each sequence of the batch.
    """
    number = domain_B if isinstance(domain_B, int) else torch.as_tensor(domain_B)
    token = _DOMAINS.set(number)
    try:
        yield
    finally:
        _DOMAINS.reset(token)


def domain_of_each(given: int | Tensor, num_sequences: int) -> Tensor:
    """The domain of each sequence of a batch, where one number was given for all or one for each.

    Raises:
        ConfigError: if it is another number.
    """
    domain_B = torch.as_tensor(given)
    if domain_B.ndim == 0:
        return domain_B.expand(num_sequences)
    if domain_B.shape != (num_sequences,):
        raise ConfigError(
            f"domains needs one number for all or one for each of the batch's {num_sequences} sequences, got "
            f"{tuple(domain_B.shape)}. Give one for each; beams of generate and cut batches count as sequences."
        )
    return domain_B


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
def replaying(replayed: Replayed) -> Iterator[None]:
    """Let every forward that starts within, in this thread, take its choices from a trace."""
    token = _REPLAY.set(replayed)
    try:
        yield
    finally:
        _REPLAY.reset(token)


def edits_now() -> Mapping[nn.Module, tuple[Intervention, ...]]:
    """What was asked of blocks for the forwards that start here."""
    return _EDITS.get() or {}


@contextmanager
def editing(asked: Mapping[nn.Module, tuple[Intervention, ...]]) -> Iterator[None]:
    """Let every forward that starts within, in this thread, do to the choices of blocks what is asked."""
    token = _EDITS.set(asked)
    try:
        yield
    finally:
        _EDITS.reset(token)


@contextmanager
def resumed(frame: Frame) -> Iterator[None]:
    """Run what follows in a frame that is there already."""
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
        frame = _FRAME.get()
        kept = replace(frame, sink=None, below=frame.below and frame.below.copy())
        has_run = False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_run
            if not has_run:
                has_run = True
                return function(*args, **kwargs)
            # A copy again: a graph that is kept may be recomputed more than once.
            with resumed(replace(kept, below=kept.below and kept.below.copy())):
                return function(*args, **kwargs)

        return self.checkpoint(run, *args, **kwargs)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
