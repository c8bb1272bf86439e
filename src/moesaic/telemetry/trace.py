"""A routing trace: every choice that every router made over some text, as columns, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.core.errors import BackendError, CheckpointError, ConfigError
from moesaic.core.files import cannot_write, replacing_file
from moesaic.telemetry.sample import check_share, in_sample

SCHEMA_VERSION = 2
"""The newest form of trace file that this version writes and reads; 1 always has a number for ``top_k``."""

METADATA_KEY = b"moesaic.routing_trace"
"""Where a file keeps what its columns refer to."""

COLUMNS: dict[str, type[np.generic]] = {
    "sequence": np.int32,
    "position": np.int32,
    "layer": np.int16,
    "choice": np.int16,
    "token_id": np.int32,
    "expert": np.int32,
    "weight": np.float32,
    "score": np.float32,
    "kept": np.bool_,
    "domain": np.int16,
}
"""What a trace has one of for each choice, and how wide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceMetadata:
    """What the columns of a trace refer to.

    Attributes:
        schema_version: the form of the file; ``SCHEMA_VERSION`` for traces made by this version.
        model: what was traced, in words for a reader: a path or a model's name.
        recipe: the recipe of its MoE layers, or empty.
        layer_names: module path of each MoE layer, in depth order; ``layer`` indexes it.
        num_experts: experts of each layer, in the same order.
        top_k: choices that every token gets in every layer; None where the number differs. A token that no expert
            of a layer took has no row there.
        token_text: the text of each token id, or empty. A token whose bytes are no whole characters is
            ``raw_bytes.decode("utf-8", "surrogateescape")``, so that every byte can be told.
        domains: names of the kinds of text; ``domain`` indexes it, and -1 is a row of unknown kind.
        sampled: the share of sequences that were kept of those that were read; None where it differs.
    """

    model: str
    layer_names: tuple[str, ...]
    num_experts: tuple[int, ...]
    top_k: int | None
    recipe: str = ""
    token_text: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    sampled: float | None = 1.0
    schema_version: int = SCHEMA_VERSION

    def to_bytes(self) -> bytes:
        """As a file keeps it."""
        return json.dumps(asdict(self)).encode()

    def after_sampling(self, share: float) -> TraceMetadata:
        """The same for a trace of which only this share of the sequences is kept."""
        return replace(self, sampled=None if self.sampled is None else self.sampled * share)

    def __post_init__(self) -> None:
        if len(self.layer_names) != len(self.num_experts):
            raise ConfigError(
                f"layer_names and num_experts must have one entry for each MoE layer, got {len(self.layer_names)} "
                f"names and {len(self.num_experts)} counts. Give both, in depth order."
            )
        if any(count < 1 for count in self.num_experts):
            raise ConfigError(
                f"num_experts must be at least 1 in every layer, got {self.num_experts}. Leave dense layers out."
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingTrace:
    """One row for each (sequence, position, layer, choice); padding is left out.

    Attributes:
        metadata: what the numbers below refer to.
        sequence: which piece of text, int32.
        position: place of the token in its sequence, int32.
        layer: index into ``metadata.layer_names``, int16.
        choice: 0 for the token's best expert, int16.
        token_id: the token, int32; -1 where the model reads no tokens.
        expert: the chosen expert, int32.
        weight: what the expert's output is multiplied by, float32.
        score: the router's score of that expert, before any selection bias, float32.
        kept: False where capacity dropped the row, bool.
        domain: index into ``metadata.domains``, or -1, int16.
    Raises:
        ConfigError: if the columns differ in length or point outside the metadata.
    """

    metadata: TraceMetadata
    sequence: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    layer: npt.NDArray[np.int16]
    choice: npt.NDArray[np.int16]
    token_id: npt.NDArray[np.int32]
    expert: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]
    kept: npt.NDArray[np.bool_]
    domain: npt.NDArray[np.int16]

    def __post_init__(self) -> None:
        for name, dtype in COLUMNS.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        lengths = {name: len(getattr(self, name)) for name in COLUMNS}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"Every column of a trace must have the same number of rows, got {lengths}.")
        if self.num_rows:
            self._check_indices()

    def _check_indices(self) -> None:
        bounds = (
            ("layer", self.layer, 0, len(self.metadata.layer_names), "layer_names"),
            ("domain", self.domain, -1, len(self.metadata.domains), "domains"),
        )
        for name, column, low, high, source in bounds:
            smallest, largest = int(column.min()), int(column.max())
            if smallest < low or largest >= high:
                raise ConfigError(
                    f"The {name} column must lie in {low}..{high - 1} (metadata.{source} has {high}), "
                    f"got {smallest}..{largest}. Give metadata that names every {name}."
                )
        num_experts_L = np.asarray(self.metadata.num_experts, dtype=np.int32)
        if self.expert.min() >= 0 and self.expert.max() < num_experts_L.min():
            return
        outside_N = (self.expert < 0) | (self.expert >= num_experts_L[self.layer])
        if outside_N.any():
            row = int(np.argmax(outside_N))
            raise ConfigError(
                f"Layer {int(self.layer[row])} has {num_experts_L[self.layer[row]]} experts, "
                f"but row {row} names expert {int(self.expert[row])}. Give metadata of the model that was traced."
            )

    @property
    def num_rows(self) -> int:
        """Rows of the trace: choices, over all tokens and layers."""
        return len(self.expert)

    @property
    def num_tokens(self) -> int:
        """Different (sequence, position) pairs; a token that no expert of any layer took is not among them."""
        place_N = self.sequence.astype(np.int64) << 32 | self.position.astype(np.int64)
        # A token's rows mostly stand together: what is left after that is far less to sort.
        return len(np.unique(place_N[np.flatnonzero(np.diff(place_N, prepend=-1))]))

    @property
    def num_layers(self) -> int:
        """MoE layers that the metadata names."""
        return len(self.metadata.layer_names)

    def where(self, mask: npt.NDArray[np.bool_]) -> RoutingTrace:
        """The rows at which ``mask`` is True, under the same metadata."""
        return replace(self, **{name: getattr(self, name)[mask] for name in COLUMNS})

    def sample(self, share: float) -> RoutingTrace:
        """Some of the sequences, each whole and kept with probability ``share``; the same ones every time.

        Raises:
            ConfigError: if ``share`` is not above 0 and at most 1.
        """
        check_share(share)
        kept = self.where(in_sample(self.sequence, share, self.metadata.sampled))
        return replace(kept, metadata=self.metadata.after_sampling(share))

    @classmethod
    def concatenate(cls, traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """Put traces of one model end to end; sequences are numbered on, domains are joined by name.

        ``top_k`` and ``sampled`` are None where they differ in it.

        Raises:
            ConfigError: if there are none, or if they come from models with other layers, experts or tokens.
        """
        if not traces:
            raise ConfigError("concatenate needs at least one trace, got none.")
        first = traces[0].metadata
        for number, trace in enumerate(traces):
            for name in ("layer_names", "num_experts", "token_text"):
                if getattr(trace.metadata, name) != getattr(first, name):
                    raise ConfigError(
                        f"Only traces of one model can be joined, but trace {number} has another {name} than "
                        "trace 0. Join traces that were recorded from the same model and tokenizer."
                    )
        domains = tuple(dict.fromkeys(name for trace in traces for name in trace.metadata.domains))
        columns = {name: np.concatenate([getattr(trace, name) for trace in traces]) for name in COLUMNS}
        start = 0
        sequence, domain = [], []
        for trace in traces:
            sequence.append(trace.sequence + start)
            start += int(trace.sequence.max(initial=-1)) + 1
            # The last entry is what -1 picks.
            renumber = np.asarray([*(domains.index(name) for name in trace.metadata.domains), -1])
            domain.append(renumber[trace.domain])
        columns |= {"sequence": np.concatenate(sequence), "domain": np.concatenate(domain)}
        same: dict[str, Any] = {
            name: getattr(first, name) if len({getattr(trace.metadata, name) for trace in traces}) == 1 else None
            for name in ("top_k", "sampled")
        }
        return cls(metadata=replace(first, domains=domains, **same), **columns)

    def save(self, path: str | Path) -> Path:
        """Write a Parquet file, whole or not at all; what stood at ``path`` stays until the new file is complete.

        Raises:
            BackendError: if pyarrow is not installed.
            CheckpointError: if the file cannot be written.
        """
        pa, parquet = pyarrow_modules()
        path = Path(path)
        metadata = {METADATA_KEY: self.metadata.to_bytes()}
        table = pa.table({name: getattr(self, name) for name in COLUMNS}).replace_schema_metadata(metadata)
        try:
            with replacing_file(path) as file:
                parquet.write_table(table, file, compression="zstd")
        except OSError as error:
            raise cannot_write("routing trace", path, error) from error
        return path

    @classmethod
    def load(cls, path: str | Path, *, sample: float = 1.0) -> RoutingTrace:
        """Read what ``save`` wrote.

        Args:
            path: the file.
            sample: the share of sequences to read, as :meth:`sample` picks them; the rest never is in memory.
        Raises:
            BackendError: if pyarrow is not installed.
            CheckpointError: if the file is missing, damaged, not a trace, or of a newer version.
            ConfigError: if ``sample`` is not above 0 and at most 1.
        """
        check_share(sample)
        pieces: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in COLUMNS}
        metadata = cls.metadata_of(path)
        for part in cls.parts(path):
            kept = part if sample == 1 else part.where(in_sample(part.sequence, sample, metadata.sampled))
            for name, pieces_of_one in pieces.items():
                pieces_of_one.append(getattr(kept, name))
        columns = {}
        for name, dtype in COLUMNS.items():
            # Let go of the pieces of one column before the next is joined: half of the memory at the peak.
            columns[name] = np.concatenate([np.empty(0, dtype), *pieces.pop(name)])
        return cls(metadata=metadata if sample == 1 else metadata.after_sampling(sample), **columns)

    @classmethod
    def metadata_of(cls, path: str | Path) -> TraceMetadata:
        """Read what a file's columns refer to, and none of its rows.

        Raises:
            BackendError: if pyarrow is not installed.
            CheckpointError: if the file is missing, damaged, not a trace, or of a newer version.
        """
        pa, parquet = pyarrow_modules()
        path = _existing(Path(path))
        try:
            with path.open("rb") as file:
                return _metadata(_described(parquet.ParquetFile(file)), path)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path) from error

    @classmethod
    def parts(cls, path: str | Path, rows: int = 1_000_000) -> Iterator[RoutingTrace]:
        """Read what ``save`` or a recording to disk wrote, piece by piece, in bounded memory.

        Args:
            path: the file.
            rows: of a piece, at most; a sequence may go on in the next one.
        Raises:
            BackendError: if pyarrow is not installed.
            CheckpointError: if the file is missing, damaged, not a trace, or of a newer version.
        """
        pa, parquet = pyarrow_modules()
        path = _existing(Path(path))
        try:
            with path.open("rb") as file:
                stored = parquet.ParquetFile(file)
                metadata = _metadata(_described(stored), path)
                for batch in stored.iter_batches(batch_size=rows):
                    yield cls._of_table(pa.Table.from_batches([batch]), metadata, path)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path) from error

    @classmethod
    def _of_table(cls, table: Any, metadata: TraceMetadata, path: Path) -> RoutingTrace:
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise CheckpointError(
                f"{path} is a routing trace without the columns {', '.join(missing)}: something else has rewritten it. "
                "Record the trace again."
            )
        try:
            return cls(metadata=metadata, **{name: table.column(name).to_numpy() for name in COLUMNS})
        except (ConfigError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is a routing trace that contradicts itself. {error}") from error


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    what = "is a folder" if path.is_dir() else "does not exist"
    raise CheckpointError(f"A routing trace was expected at {path}, which {what}. Record one and save it there.")


def _unreadable(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is no readable Parquet file: it is another kind of file, cut short or damaged. "
        "Record the trace again, or give the path of a file that RoutingTrace.save wrote."
    )


def _described(stored: Any) -> dict[bytes, bytes]:
    """What a file says of itself: with its schema, or at its end, where it was written row by row."""
    return {**(stored.metadata.metadata or {}), **(stored.schema_arrow.metadata or {})}


def _metadata(stored: dict[bytes, bytes] | None, path: Path) -> TraceMetadata:
    if not stored or METADATA_KEY not in stored:
        raise CheckpointError(
            f"{path} is a Parquet file, but not a routing trace. Give the path of a file that RoutingTrace.save wrote."
        )
    try:
        values = json.loads(stored[METADATA_KEY])
        version = int(values["schema_version"])
        if version > SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has trace schema version {version}, and this Moesaic reads up to {SCHEMA_VERSION}. "
                "Update Moesaic, or record the trace again."
            )
        known = {item.name for item in fields(TraceMetadata)}
        return TraceMetadata(**{k: _frozen(v) for k, v in values.items() if k in known})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a routing trace whose description is damaged. Record it again.") from error


def _frozen(value: object) -> Any:
    return tuple(value) if isinstance(value, list) else value


def pyarrow_modules() -> tuple[ModuleType, ModuleType]:
    """``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        BackendError: if they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BackendError(
            "Routing traces on disk need pyarrow, which is not installed. Try: pip install 'moesaic[data]'"
        ) from error
    return pyarrow, pyarrow.parquet
