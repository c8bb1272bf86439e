"""Record what every router does, as a routing trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing
from moesaic.hf.layers import blocks
from moesaic.hf.reports import Place, Report, Sink
from moesaic.hf.scope import Frame, domain_of_each, listening
from moesaic.hf.watching import detached, places
from moesaic.telemetry.trace import RoutingTrace, TraceMetadata, TraceWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOMAIN: ContextVar[str | Sequence[str] | None] = ContextVar("moesaic.hf.domain", default=None)


@contextmanager
def record(
    model: nn.Module, *, tokenizer: PreTrainedTokenizerBase | None = None, domains: Sequence[str] = ()
) -> Iterator[RoutingTrace]:
    """Write down every choice of every router in the forwards that start within.

    The trace is empty within the block and complete after it. Positions count the tokens of a sequence without its
    padding; steps of ``generate`` with a cache go on in the sequences of its first step.

        with moesaic.record(model, tokenizer=tokenizer) as trace:
            with moesaic.hf.trace_domain("code"):
                model(**batch)
        trace.save("trace.parquet")

    Args:
        model: one that has MoE layers.
        tokenizer: puts the text of each token into the trace.
        domains: names in the order that the trace shall list them, which is how :func:`domains` counts them; others
            join as :func:`trace_domain` names them.
    Raises:
        ConfigError: if the model has no MoE layers.
    """
    where = places(model)
    metadata = _metadata(model, tokenizer, domains)
    listener = _Recorder(where, TraceWriter(metadata), list(domains))
    trace = listener.finished()
    try:
        with listening(listener):
            yield trace
    finally:
        # The same object that was handed out: frozen for everybody else.
        complete = listener.finished()
        for field in fields(RoutingTrace):
            object.__setattr__(trace, field.name, getattr(complete, field.name))


@contextmanager
def trace_domain(domain: str | Sequence[str]) -> Iterator[None]:
    """Say what kind of text the forwards within read: one name for the batch, or one for each of its sequences."""
    token = _DOMAIN.set(domain)
    try:
        yield
    finally:
        _DOMAIN.reset(token)


class _Recorder:
    wants_balance = False
    batch_load_E = None

    def __init__(self, places: Mapping[nn.Module, Place], writer: TraceWriter, domains: list[str]) -> None:
        self.places = places
        self.writer = writer
        self.domains = domains
        self.choices: set[int] = set()
        self.forward: Sink | None = None
        self.first_sequence = 0
        self.next_sequence = 0

    def hear(self, place: Place, report: Report) -> None:
        frame, routing = report.frame, detached(report.routing)
        if routing.sequence_T is None:
            raise ConfigError(
                f"A trace needs a batch of sequences, (sequences, positions, width), at {place.layer}. "
                "Use moesaic.hf.observe for models that mix sequences."
            )
        num_sequences = int(routing.sequence_T.max()) + 1 if routing.num_tokens else 0
        positions = routing.num_tokens // max(num_sequences, 1)
        before_B1 = _tokens_before(frame.attention_mask, positions)
        if frame.sink is not self.forward:
            self.forward = frame.sink
            if before_B1 is None or not self.next_sequence:
                self.first_sequence = self.next_sequence
        self.next_sequence = max(self.next_sequence, self.first_sequence + num_sequences)
        self.choices |= set(_rows_of_each(routing).tolist())
        valid_BP = routing.valid_T.view(num_sequences, positions)
        position_BP = (valid_BP.cumsum(dim=1) - 1).clamp_min(0) + (0 if before_B1 is None else before_B1)
        self.writer.add(
            place.index,
            routing,
            None if frame.input_ids is None else frame.input_ids.reshape(-1),
            position_BP.reshape(-1),
            routing.sequence_T + self.first_sequence,
            self._domain(frame, num_sequences).to(routing.sequence_T.device)[routing.sequence_T],
        )

    def _domain(self, frame: Frame, num_sequences: int) -> Tensor:
        named = _DOMAIN.get()
        if named is None and frame.domains is not None and self.domains:
            domain_B = domain_of_each(frame.domains, num_sequences)
            return domain_B.where(domain_B < len(self.domains), -1)
        names = [named] * num_sequences if named is None or isinstance(named, str) else list(named)
        if len(names) != num_sequences:
            raise ConfigError(
                f"trace_domain needs one name for the batch or one for each of its {num_sequences} sequences, "
                f"got {len(names)}. Give a name for each sequence."
            )
        for name in names:
            if name is not None and name not in self.domains:
                self.domains.append(name)
        return torch.tensor([-1 if name is None else self.domains.index(name) for name in names])

    def finished(self) -> RoutingTrace:
        (top_k,) = self.choices if len(self.choices) == 1 else (None,)
        return self.writer.trace(replace(self.writer.metadata, domains=tuple(self.domains), top_k=top_k))


def _rows_of_each(routing: Routing) -> Tensor:
    """How many rows each token has that is no padding."""
    count_T = torch.bincount(routing.token_N, minlength=routing.num_tokens)
    return count_T[routing.valid_T]


def _tokens_before(mask: object, positions: int) -> Tensor | None:
    """How many tokens of each sequence a cache holds, (B, 1); None if there is no cache."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] <= positions:
        return None
    return (mask[:, : mask.shape[1] - positions] != 0).sum(dim=1, keepdim=True)


def _metadata(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, domains: Sequence[str]) -> TraceMetadata:
    layers = {path: block.moe for path, block in blocks(model).items()}
    config = getattr(model, "config", None)
    return TraceMetadata(
        model=str(getattr(config, "name_or_path", "") or type(model).__name__),
        recipe=getattr(config, "moesaic", {}).get("recipe", ""),
        layer_names=tuple(layers),
        num_experts=tuple(layer.num_experts for layer in layers.values()),
        top_k=None,
        token_text=() if tokenizer is None else token_texts(tokenizer),
        domains=tuple(domains),
    )


def token_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The text of each token id; bytes that are no whole characters come as lone surrogates, as a trace wants them."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    byte_of = _byte_of_character()
    plain = {token for token in tokens if token is not None and token not in special}
    if all(character in byte_of for token in plain for character in token):  # byte-level, as in GPT-2
        return tuple(
            bytes(byte_of[character] for character in token).decode("utf-8", "surrogateescape")
            if token in plain
            else token or ""
            for token in tokens
        )
    # SentencePiece marks the space before a word.
    return tuple((token or "").replace("\N{LOWER ONE EIGHTH BLOCK}", " ") for token in tokens)


def _byte_of_character() -> dict[str, int]:
    """Byte-level tokenizers write each byte as one printable character: itself, or one from 256 on."""
    itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + index): byte for index, byte in enumerate(others)}
