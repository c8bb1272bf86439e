"""What the experts took since the service began: how much, and lately which tokens."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing
from moesaic.lens.measures import PreferredToken, preferred_tokens
from moesaic.telemetry.trace import RoutingTrace, TraceMetadata

_NEWEST = 65_536
# A trace has tens of thousands of tokens, a service may have seen a hundred; the interval takes care of small numbers.
_LEAST_ROWS = 5


class Heard:
    """Counts what experts take, in bounded memory; filled by one thread and read by others.

    Args:
        layers: module path of each MoE layer and how many experts it has, in depth order.
        token_text: of each token id, as in a routing trace.
        newest: choices of each layer to remember with their tokens.
    Attributes:
        from_trace: tokens that a trace brought in, as the first layer counts them.
        from_service: tokens that were read while serving.
    """

    def __init__(self, layers: Mapping[str, int], token_text: Sequence[str], newest: int = _NEWEST) -> None:
        self._layers = dict(layers)
        self._token_text = tuple(token_text)
        self._newest = newest
        self._lock = threading.Lock()
        self._load = [np.zeros(count, dtype=np.int64) for count in layers.values()]
        self._dropped = [np.zeros(count, dtype=np.int64) for count in layers.values()]
        self._token = [np.zeros(newest, dtype=np.int32) for _ in layers]
        self._expert = [np.zeros(newest, dtype=np.int32) for _ in layers]
        self._count = [0 for _ in layers]
        self.from_trace = 0
        self.from_service = 0

    def read_trace(self, path: Path) -> None:
        """Remember the newest choices of a trace; loads count what is served alone.

        Raises:
            ConfigError: if the trace is of another model.
            CheckpointError: if it cannot be read.
            BackendError: if pyarrow is not installed.
        """
        for part in RoutingTrace.parts(path):
            theirs = dict(zip(part.metadata.layer_names, part.metadata.num_experts, strict=True))
            if theirs != self._layers:
                raise ConfigError(
                    f"The trace {path} must be of this model, with the layers {_named(self._layers)}, got "
                    f"{_named(theirs)}. Record it again with moesaic inspect, or serve the model that it is of."
                )
            for layer in range(len(self._layers)):
                rows = (part.layer == layer) & (part.token_id >= 0)
                self._remember(layer, part.token_id[rows], part.expert[rows])
            self.from_trace += int(np.count_nonzero((part.layer == 0) & (part.choice == 0)))

    def add(
        self, layer: int, routing: Routing, ids: Sequence[int], num_new: int, *, is_own_choice: bool = True
    ) -> None:
        """Take in what one layer did with the last ``num_new`` of the tokens that it read.

        Args:
            layer: its index.
            routing: what it did.
            ids: the tokens that it read.
            num_new: how many of them it had not read before.
            is_own_choice: False where experts were switched off: that is load, but tells nothing of what experts like.
        """
        if routing.num_tokens != len(ids):
            return
        token_N = routing.token_N.cpu().numpy()
        is_new_N = token_N >= len(ids) - num_new
        token_N, expert_N = token_N[is_new_N], routing.expert_N.cpu().numpy()[is_new_N]
        kept_N = routing.kept_N.cpu().numpy()[is_new_N]
        with self._lock:
            self._load[layer] += np.bincount(expert_N, minlength=len(self._load[layer]))
            self._dropped[layer] += np.bincount(expert_N[~kept_N], minlength=len(self._load[layer]))
            if is_own_choice:
                self._remember(layer, np.asarray(ids, dtype=np.int32)[token_N], expert_N)
            self.from_service += num_new if layer == 0 else 0

    def load(self, layer: int) -> npt.NDArray[np.int64]:
        """Choices that each expert of a layer got while serving."""
        with self._lock:
            return self._load[layer].copy()

    def dropped(self, layer: int) -> npt.NDArray[np.int64]:
        """Those of them that it dropped."""
        with self._lock:
            return self._dropped[layer].copy()

    def favourites(self, layer: int, expert: int, *, limit: int = 12) -> tuple[list[PreferredToken], int]:
        """The tokens that an expert takes more often than chance would give it, and of how many choices that is told.

        As in a report: ranked by the lower end of a 95 % interval of the token's lift.
        """
        with self._lock:
            count = min(self._count[layer], self._newest)
            token_N, expert_N = self._token[layer][:count].copy(), self._expert[layer][:count].copy()
        trace = self._as_trace(layer, token_N, expert_N)
        return preferred_tokens(trace, layer, limit=limit, min_rows=_LEAST_ROWS)[expert], count

    def _remember(self, layer: int, token_N: npt.NDArray[np.int32], expert_N: npt.NDArray[np.int32]) -> None:
        token_N, expert_N = token_N[-self._newest :], expert_N[-self._newest :]
        place_N = (self._count[layer] + np.arange(len(token_N))) % self._newest
        self._token[layer][place_N] = token_N
        self._expert[layer][place_N] = expert_N
        self._count[layer] += len(token_N)

    def _as_trace(self, layer: int, token_N: npt.NDArray[np.int32], expert_N: npt.NDArray[np.int32]) -> RoutingTrace:
        count = len(token_N)
        metadata = TraceMetadata(
            model="",
            layer_names=tuple(self._layers),
            num_experts=tuple(self._layers.values()),
            top_k=None,
            token_text=self._token_text,
        )
        return RoutingTrace(
            metadata=metadata,
            sequence=np.zeros(count, dtype=np.int32),
            position=np.arange(count, dtype=np.int32),
            layer=np.full(count, layer, dtype=np.int16),
            choice=np.zeros(count, dtype=np.int16),
            token_id=token_N,
            expert=expert_N,
            weight=np.ones(count, dtype=np.float32),
            score=np.ones(count, dtype=np.float32),
            kept=np.ones(count, dtype=np.bool_),
            domain=np.full(count, -1, dtype=np.int16),
        )


def _named(layers: Mapping[str, int]) -> str:
    shown = [f"{name} ({count} experts)" for name, count in list(layers.items())[:3]]
    rest = len(layers) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
