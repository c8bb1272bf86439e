"""Record what every router does, as a routing trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing
from moesaic.hf.layers import moe_layers
from moesaic.hf.reports import Place, Report, Sink
from moesaic.hf.scope import Frame, domain_of_each, listening
from moesaic.hf.sequences import SequenceNumbers, positions, tokens_before
from moesaic.hf.watching import adopted, detached, places
from moesaic.telemetry.trace import RoutingTrace, TraceMetadata
from moesaic.telemetry.writer import TraceStream, TraceWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOMAIN: ContextVar[str | Sequence[str] | None] = ContextVar("moesaic.hf.domain", default=None)


@contextmanager
def record(
    model: nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    domains: Sequence[str] = (),
    to: str | Path | None = None,
    sample: float = 1.0,
) -> Iterator[RoutingTrace]:
    """Write down every choice of every router in the forwards that start within.

    The trace is empty within the block and complete after it. Positions count the tokens of a sequence without its
    padding; steps of ``generate`` with a cache go on in the sequences of its first step.

        with moesaic.record(model, tokenizer=tokenizer) as trace:
            with moesaic.hf.trace_domain("code"):
                model(**batch)
        trace.save("trace.parquet")

    Args:
        model: one that has MoE layers: ours, adopted, or one of transformers, which is adopted for the time of the
            block and left as it was after it.
        tokenizer: puts the text of each token into the trace.
        domains: names in the order that the trace shall list them, which is how :func:`domains` counts them; others
            join as :func:`trace_domain` names them.
        to: a Parquet file to stream the rows to, in bounded memory: the trace that is handed out stays empty, and
            ``RoutingTrace.load`` or ``RoutingTrace.parts`` reads the file. It is there when the block ends without an
            error, whole; what stood there before stays until then.
        sample: the share of sequences to write down, each whole; the same ones at every recording.
    Raises:
        ConfigError: if the model has no MoE layers, or some that Moesaic cannot describe, or ``sample`` is no share.
        BackendError: if ``to`` is given and pyarrow is not installed.
        CheckpointError: if the file cannot be written.
    """
    with adopted(model):
        where = places(model)
        metadata = _metadata(model, tokenizer, domains)
        writer = TraceWriter(metadata, sample) if to is None else TraceStream(metadata, Path(to), sample=sample)
        listener = _Recorder(where, writer, list(domains))
        trace = TraceWriter(writer.metadata).trace()
        try:
            with listening(listener):
                yield trace
        except BaseException:
            if isinstance(writer, TraceStream):
                writer.discard()
            raise
        finally:
            if not isinstance(writer, TraceStream):
                # The same object that was handed out: frozen for everybody else.
                complete = writer.trace(listener.metadata())
                for field in fields(RoutingTrace):
                    object.__setattr__(trace, field.name, getattr(complete, field.name))
        if isinstance(writer, TraceStream):
            writer.close(listener.metadata())


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

    def __init__(
        self, places: Mapping[nn.Module, Place], writer: TraceWriter | TraceStream, domains: list[str]
    ) -> None:
        self.places = places
        self.writer = writer
        self.domains = domains
        self.choices: set[int] = set()
        self.forward: Sink | None = None
        self.numbers = SequenceNumbers()

    def hear(self, place: Place, report: Report) -> None:
        frame, routing = report.frame, detached(report.routing)
        # Where nobody knows sequences, such as among the patches of images, all tokens are one.
        sequence_T = torch.zeros_like(routing.valid_T, dtype=torch.int64)
        sequence_T = sequence_T if routing.sequence_T is None else routing.sequence_T
        num_sequences = int(sequence_T.max()) + 1 if routing.num_tokens else 0
        num_positions = routing.num_tokens // max(num_sequences, 1)
        before_B1 = tokens_before(frame, num_sequences, num_positions)
        if frame.sink is not self.forward:
            self.forward = frame.sink
            self.numbers.begin(continues=before_B1 is not None)
        self.numbers.see(num_sequences)
        self.choices |= set(_rows_of_each(routing).tolist())
        # A router that reads some of the tokens leaves the others out; they are in the sequence all the same.
        known = routing.sequence_T is not None
        valid_T = frame.valid(num_sequences, num_positions, sequence_T.device) if known else routing.valid_T
        valid_T = torch.ones_like(routing.valid_T) if valid_T is None else valid_T
        valid_BP = valid_T.view(num_sequences, num_positions)
        ids_T = None if frame.input_ids is None else frame.input_ids.reshape(-1)
        self.writer.add(
            place.index,
            routing,
            ids_T if ids_T is not None and ids_T.shape == routing.valid_T.shape else None,
            positions(valid_BP, before_B1).reshape(-1),
            sequence_T + self.numbers.first,
            self._domain(frame, num_sequences).to(sequence_T.device)[sequence_T],
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

    def metadata(self) -> TraceMetadata:
        """What was met on the way joins what was known before."""
        (top_k,) = self.choices if len(self.choices) == 1 else (None,)
        return replace(self.writer.metadata, domains=tuple(self.domains), top_k=top_k)


def _rows_of_each(routing: Routing) -> Tensor:
    """How many rows each token has that is no padding."""
    count_T = torch.bincount(routing.token_N, minlength=routing.num_tokens)
    return count_T[routing.valid_T]


def _metadata(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, domains: Sequence[str]) -> TraceMetadata:
    layers = moe_layers(model)
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
