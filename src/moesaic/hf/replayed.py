"""Replay a trace: the same choices as then, with fresh scores, so that gradients flow to the routers of today."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.hf.block import SparseBlock
from moesaic.hf.layers import Block, blocks, moe_layers
from moesaic.hf.scope import NOT_GIVEN, Frame, replaying
from moesaic.hf.sequences import SequenceNumbers, positions, tokens_before
from moesaic.routers.token_choice import TokenChoiceRouter
from moesaic.telemetry.trace import RoutingTrace


@contextmanager
def replay(model: nn.Module, trace: RoutingTrace) -> Iterator[None]:
    """Let the routers of a model choose as they did when a trace was recorded; weights come from their scores now.

    For recomputation, for debugging, and for reinforcement learning, where the policy that is trained shall send each
    token where the one that wrote it did. Sequences are counted as :func:`moesaic.record` counts them: the forwards
    within take those of the trace in their order, and steps of ``generate`` with a cache go on in those of the first
    step. A whole sequence may be replayed that was recorded token by token; its last token was written and never read.
    Padding, which a trace leaves out, goes where the router sends it now.

        with moesaic.record(model) as trace:
            written = model.generate(**prompt)
        with moesaic.hf.replay(model, trace):
            loss = policy_loss(model(written[:, :-1]).logits)

    Source: Ma et al. 2025, "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers".

    Args:
        model: sparse, or adopted.
        trace: of the same layers.
    Raises:
        ConfigError: if the model has other layers than the trace, or other numbers of experts or choices; a router
            whose choices cannot be given; or tokens that the trace does not have.
    """
    found, layers = blocks(model), moe_layers(model)
    if tuple(found) != trace.metadata.layer_names:
        raise ConfigError(
            f"replay needs a model with the layers of the trace, {_few(trace.metadata.layer_names)}, got "
            f"{_few(tuple(found))}. Replay on the model that was recorded, adopted if it is one of transformers."
        )
    for path, block in found.items():
        if not _takes_choices(block):
            raise ConfigError(
                f"replay needs routers in which each token's choice can be given, got {type(block).__name__} at "
                f"{path}, whose choices hang on the batch or come from outside. Leave replay out."
            )
    tables = [_Table(trace, layer) for layer in range(trace.num_layers)]
    for table, (path, block) in zip(tables, found.items(), strict=True):
        table.check(layers[path].num_experts, _top_k(block))
    with replaying(_Replayed(dict(zip(found.values(), tables, strict=True)))):
        yield


class _Replayed:
    def __init__(self, tables: Mapping[nn.Module, _Table]) -> None:
        self.tables = tables
        self.numbers = SequenceNumbers()

    def forward(self) -> _Forward:
        return _Forward(self)


class _Forward:
    """The choices of one forward; kept with its frame, so that recomputed activations get the same."""

    def __init__(self, replayed: _Replayed) -> None:
        self.replayed = replayed
        self.first: int | None = None

    def choices(self, block: nn.Module, frame: Frame, hidden_states: Tensor) -> Tensor | None:
        table = self.replayed.tables.get(block)
        if table is None:
            return None
        part_T = frame.parts.get(block)
        valid_T, context = frame.tokens(hidden_states if part_T is None else part_T[:, None])
        num_tokens = hidden_states.shape[:-1].numel() if part_T is None else part_T.shape[0]
        device = hidden_states.device
        sequence_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        sequence_T = sequence_T if context.sequence_T is None else context.sequence_T
        valid_T = torch.ones(num_tokens, dtype=torch.bool, device=device) if valid_T is None else valid_T
        num_sequences = int(sequence_T.max()) + 1 if num_tokens else 0
        before_B1 = tokens_before(frame, num_sequences, num_tokens // max(num_sequences, 1))
        if self.first is None:
            self.first = self.replayed.numbers.begin(continues=before_B1 is not None)
        self.replayed.numbers.see(num_sequences)
        position_T = positions(valid_T.view(num_sequences, -1), before_B1).reshape(-1)
        wanted_T = valid_T if part_T is None else valid_T & part_T
        expert_TK = table.look_up(sequence_T + self.first, position_T, wanted_T)
        return expert_TK if part_T is None else expert_TK[part_T]


class _Table:
    """The choices of one layer, by sequence and position."""

    def __init__(self, trace: RoutingTrace, layer: int) -> None:
        rows = np.flatnonzero(trace.layer == layer)
        key_N, choice_N = _key(trace.sequence[rows], trace.position[rows]), trace.choice[rows]
        order = np.lexsort((choice_N, key_N))
        self.layer = trace.metadata.layer_names[layer]
        self.key_T, first, count = np.unique(key_N[order], return_index=True, return_counts=True)
        if len(count) and count.min() != count.max():
            raise ConfigError(
                f"replay needs a trace with as many choices for every token, got {count.min()} to {count.max()} in "
                f"layer {self.layer}. Traces of routers with any number of experts cannot be replayed."
            )
        self.top_k = int(count[0]) if len(count) else 1
        experts = trace.expert[rows][order]
        self.expert_TK = experts[first[:, None] + np.arange(self.top_k)] if len(count) else experts.reshape(0, 1)
        self.num_experts = trace.metadata.num_experts[layer]

    def check(self, num_experts: int, top_k: int) -> None:
        """Refuse a layer that chooses among others, or as many others."""
        if self.num_experts != num_experts or (len(self.key_T) and self.top_k != top_k):
            raise ConfigError(
                f"replay needs a router that chooses {self.top_k} of {self.num_experts} experts in layer "
                f"{self.layer}, as the trace does, got one that chooses {top_k} of {num_experts}. Replay on the model "
                "that was recorded."
            )

    def look_up(self, sequence_T: Tensor, position_T: Tensor, wanted_T: Tensor) -> Tensor:
        wanted = wanted_T.cpu().numpy()
        key_T = _key(sequence_T.cpu().numpy(), position_T.cpu().numpy())
        place_T = np.searchsorted(self.key_T, key_T).clip(max=max(len(self.key_T) - 1, 0))
        found = np.zeros_like(wanted) if not len(self.key_T) else self.key_T[place_T] == key_T
        missing = np.flatnonzero(wanted & ~found)
        if len(missing):
            at = int(missing[0])
            raise ConfigError(
                f"The trace has no row for sequence {int(sequence_T[at])}, position {int(position_T[at])} in layer "
                f"{self.layer}. Replay the batches that were recorded, in their order; the last token that generate "
                "writes is read by no forward."
            )
        expert_TK = np.full((len(wanted), self.top_k), NOT_GIVEN, dtype=np.int64)
        expert_TK[wanted] = self.expert_TK[place_T[wanted]]
        return torch.from_numpy(expert_TK).to(sequence_T.device)


def _key(sequence: npt.NDArray[np.integer], position: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    return sequence.astype(np.int64) << 32 | position.astype(np.int64)


def _takes_choices(block: Block) -> bool:
    if isinstance(block, SparseBlock):
        return isinstance(getattr(block.moe, "router", None), TokenChoiceRouter)
    return bool(block.takes_choices)


def _top_k(block: Block) -> int:
    return cast(Any, block.moe).router.top_k if isinstance(block, SparseBlock) else block.adoption.spec.top_k


def _few(names: tuple[str, ...]) -> str:
    return f"{len(names)} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})"
