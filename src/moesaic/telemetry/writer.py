"""Collect the routings of a model into a trace: in memory, or row by row into a file."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moesaic.core.errors import ConfigError
from moesaic.core.files import cannot_write, replacing_file
from moesaic.core.routing import Routing
from moesaic.telemetry.sample import check_share, in_sample
from moesaic.telemetry.trace import COLUMNS, METADATA_KEY, RoutingTrace, TraceMetadata, pyarrow_modules

_ROWS_HELD = 1 << 20


class TraceWriter:
    """Collects the routings of a model, layer by layer and batch by batch, into one trace.

    Holds 31 bytes for each choice, as narrow columns on the CPU; nothing of the graph or of the scores that were not
    chosen stays alive.

    Args:
        metadata: layers and experts are checked against it as rows come; its domains may be given later, to ``trace``.
        sample: the share of sequences to keep, each whole.
    Raises:
        ConfigError: if ``sample`` is not above 0 and at most 1.
    """

    def __init__(self, metadata: TraceMetadata, sample: float = 1.0):
        check_share(sample)
        self.metadata = metadata.after_sampling(sample)
        self._before = metadata.sampled
        self._share = sample
        self._chunks: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in COLUMNS}

    @property
    def num_rows(self) -> int:
        """Rows collected so far."""
        return sum(map(len, self._chunks["expert"]))

    def add(
        self,
        layer: int,
        routing: Routing,
        token_id_T: Tensor | None,
        position_T: Tensor,
        sequence_T: Tensor,
        domain_T: Tensor | None = None,
    ) -> None:
        """Take down one layer's routing of one batch.

        Args:
            layer: index of the layer in ``metadata.layer_names``.
            routing: its rows of padding tokens are left out.
            token_id_T: the tokens; None where the model reads none.
            position_T: place of each token in its sequence.
            sequence_T: number of each token's sequence, different for every sequence of the whole trace.
            domain_T: index of each token's domain, -1 where unknown; None for all unknown.
        Raises:
            ConfigError: if the layer is not in the metadata, has another number of experts, or a column another length.
        """
        given = {"token_id_T": token_id_T, "position_T": position_T, "sequence_T": sequence_T, "domain_T": domain_T}
        self._check(layer, routing, given)
        valid_N = _numpy(routing.valid_N)
        if self._share < 1:
            valid_N = valid_N & in_sample(_numpy(sequence_T), self._share, self._before)[_numpy(routing.token_N)]
        token_N = _numpy(routing.token_N)[valid_N]
        rows = {
            "choice": _numpy(routing.choice_N)[valid_N],
            "expert": _numpy(routing.expert_N)[valid_N],
            "weight": _numpy(routing.weight_N.float())[valid_N],
            "score": _numpy(routing.scores_TE[routing.token_N, routing.expert_N].float())[valid_N],
            "kept": _numpy(routing.kept_N)[valid_N],
            "layer": np.full(len(token_N), layer),
        }
        for name, column_T in given.items():
            column = np.full(len(token_N), -1) if column_T is None else _numpy(column_T)[token_N]
            rows[name.removesuffix("_T")] = column
        self.take({name: rows[name].astype(dtype) for name, dtype in COLUMNS.items()})

    def take(self, rows: dict[str, npt.NDArray[Any]]) -> None:
        """Keep some rows."""
        for name, column in rows.items():
            self._chunks[name].append(column)

    def discard(self) -> None:
        """Forget everything collected so far."""
        for chunks in self._chunks.values():
            chunks.clear()

    def _check(self, layer: int, routing: Routing, given: dict[str, Tensor | None]) -> None:
        if not 0 <= layer < len(self.metadata.layer_names):
            raise ConfigError(
                f"layer must be in 0..{len(self.metadata.layer_names) - 1}, got {layer}. Name it in the metadata first."
            )
        if routing.num_experts != self.metadata.num_experts[layer]:
            raise ConfigError(
                f"Layer {layer} has {self.metadata.num_experts[layer]} experts in the metadata, but this routing has "
                f"{routing.num_experts}. Give metadata of the model that is being traced."
            )
        for name, column_T in given.items():
            if column_T is not None and tuple(column_T.shape) != (routing.num_tokens,):
                raise ConfigError(
                    f"{name} must have one entry for each of the routing's {routing.num_tokens} tokens, "
                    f"got shape {tuple(column_T.shape)}. Flatten it as the tokens were flattened."
                )

    def trace(self, metadata: TraceMetadata | None = None) -> RoutingTrace:
        """Everything collected so far; ``metadata`` replaces the writer's, for domains that were met on the way."""
        columns = {
            name: np.concatenate([np.empty(0, dtype), *self._chunks[name]], dtype=dtype)
            for name, dtype in COLUMNS.items()
        }
        return RoutingTrace(metadata=metadata or self.metadata, **columns)


class TraceStream(TraceWriter):
    """Collects into a Parquet file, and holds no more than about a million choices (31 MB) at a time.

    Args:
        metadata: as of :class:`TraceWriter`.
        path: of the file; what stands there stays until :meth:`close`.
        rows_held: choices to gather before they are written; None for about a million.
        sample: as of :class:`TraceWriter`.
    Raises:
        BackendError: if pyarrow is not installed.
        CheckpointError: if the file cannot be written.
    """

    def __init__(self, metadata: TraceMetadata, path: Path, rows_held: int | None = None, sample: float = 1.0) -> None:
        super().__init__(metadata, sample)
        self.path = path
        self.rows_held = _ROWS_HELD if rows_held is None else rows_held
        self._pa, self._parquet = pyarrow_modules()
        self._held = ExitStack()
        try:
            file = self._held.enter_context(replacing_file(path))
        except OSError as error:
            raise cannot_write("routing trace", path, error) from error
        schema = self._pa.schema([(name, self._pa.from_numpy_dtype(dtype)) for name, dtype in COLUMNS.items()])
        self._file = self._parquet.ParquetWriter(file, schema, compression="zstd")

    def take(self, rows: dict[str, npt.NDArray[Any]]) -> None:
        """Keep some rows, and write what is held when it is enough."""
        super().take(rows)
        if self.num_rows >= self.rows_held:
            self._flush()

    def _flush(self) -> None:
        columns = {name: np.concatenate([np.empty(0, dtype), *self._chunks[name]]) for name, dtype in COLUMNS.items()}
        try:
            self._file.write_table(self._pa.table({name: columns[name].astype(COLUMNS[name]) for name in COLUMNS}))
        except OSError as error:
            self.discard()
            raise cannot_write("routing trace", self.path, error) from error
        super().discard()

    def close(self, metadata: TraceMetadata) -> None:
        """Write the rest and what the columns refer to, and put the file in its place.

        Raises:
            CheckpointError: if it cannot be written.
        """
        self._flush()
        try:
            self._file.add_key_value_metadata({METADATA_KEY: metadata.to_bytes()})
            self._file.close()
            self._held.close()
        except OSError as error:
            self.discard()
            raise cannot_write("routing trace", self.path, error) from error

    def discard(self) -> None:
        """Forget everything; what stood at the path stays."""
        super().discard()
        with suppress(OSError):
            self._file.close()
        with suppress(_Discarded), self._held:
            raise _Discarded


class _Discarded(Exception):  # noqa: N818  (never seen outside)
    """Tells the file that is being replaced to stay as it was."""


def _numpy(column: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = column.detach().cpu().numpy()
    return array
