"""Bytes that one device sends, for each collective and over each kind of link."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moesaic.plan.devices import Device
from moesaic.plan.layout import Layout, Stage
from moesaic.plan.load import Reach, reach
from moesaic.plan.memory import Held, Job, cut
from moesaic.plan.popularity import Popularity
from moesaic.zoo import Layer, ModelShape, cost

Dispatch = Literal["once-per-node", "per-choice"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """Sent by one device; it receives as many.

    Attributes:
        inside: to devices of its node.
        across: to other nodes.
    """

    inside: float = 0.0
    across: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(inside=self.inside + other.inside, across=self.across + other.across)

    def __mul__(self, factor: float) -> Bytes:
        return Bytes(inside=self.inside * factor, across=self.across * factor)


def all_to_all(
    reached: Reach, *, ep: int, per_node: int, numbers: float, bytes_each: float, dispatch: Dispatch
) -> Bytes:
    """Bytes that take one token to its experts, or their outputs back.

    "per-choice" sends a copy for each expert straight to its device. "once-per-node" sends one copy to each other node,
    to the device of the sender's place in it, which hands one copy to each device that needs it (DeepSeek-V3, section
    3.2.2). A sender is as likely to be on one device as on another.

    Args:
        reached: devices and nodes of a token's experts.
        ep: devices that share the experts.
        per_node: of these, in one node.
        numbers: of a token.
        bytes_each: of a number.
        dispatch: which of the two.
    """
    nodes = math.ceil(ep / per_node)
    one = numbers * bytes_each
    if dispatch == "per-choice":
        return Bytes(
            inside=one * reached.rows * (per_node - 1) / ep,
            across=one * reached.rows * (1 - 1 / nodes),
        )
    return Bytes(
        inside=one * reached.devices * (1 - 1 / per_node),
        across=one * reached.nodes * (1 - 1 / nodes),
    )


def all_gather(size: float, ranks: int, per_node: int) -> Bytes:
    """Bytes that each rank sends so that all have all parts, ``size`` bytes together; reduce-scatter sends as many.

    The parts of other nodes come into a node once, over all its ranks' links, and are passed on inside.

    Args:
        size: of all parts together.
        ranks: that have one part each.
        per_node: ranks of them in one node.
    """
    per_node = min(per_node, ranks)
    nodes = math.ceil(ranks / per_node)
    return Bytes(
        inside=size * (per_node - 1) / per_node,
        across=size * (1 - 1 / nodes) / per_node,
    )


def ranks_in_node(device: Device, stride: int, ranks: int) -> int:
    """How many of ranks that are ``stride`` devices apart share a node."""
    return max(1, min(ranks, device.node // stride))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTraffic:
    """What one layer sends for one micro-batch, forward and backward, on one device.

    Attributes:
        dispatch: tokens to their experts, and their gradients' way back.
        combine: outputs back, and the gradients' way there.
        tensor: all-gathers and reduce-scatters of tensor parallelism.
        fetch: all-gathers of split weights.
        gradients: reduce-scatters of gradients to the ranks that split them.
    """

    dispatch: Bytes
    combine: Bytes
    tensor: Bytes
    fetch: Bytes
    gradients: Bytes

    @property
    def total(self) -> Bytes:
        """All of them together."""
        return self.dispatch + self.combine + self.tensor + self.fetch + self.gradients


def layer_traffic(
    shape: ModelShape,
    layer: Layer,
    index: int,
    *,
    device: Device,
    layout: Layout,
    job: Job,
    popularity: Popularity,
    dispatch: Dispatch = "once-per-node",
) -> LayerTraffic:
    """Count what one layer sends.

    Args:
        shape: of the model.
        layer: one of its layers.
        index: of it among those with a mixture; not used for one without.
        device: whose node size counts.
        layout: over devices.
        job: what is trained.
        popularity: of experts.
        dispatch: see :func:`all_to_all`.
    """
    out = back = Bytes()
    tokens = job.tokens / layout.tp
    again = 1 if job.recompute else 0
    experts = layer.experts
    if experts is not None and layout.ep > 1:
        per_node = ranks_in_node(device, 1, layout.ep)
        reached = reach(popularity, index, experts, ep=layout.ep, per_node=per_node)
        sizes = {"ep": layout.ep, "per_node": per_node, "numbers": float(experts.width or shape.width)}
        sent = 1 if job.dtype == "fp8" else job.code.bytes
        forward = all_to_all(reached, **sizes, bytes_each=sent, dispatch=dispatch)  # type: ignore[arg-type]
        wide = all_to_all(reached, **sizes, bytes_each=job.code.bytes, dispatch=dispatch)  # type: ignore[arg-type]
        out = (forward * (1 + again) + wide) * tokens
        back = (wide * (1 + again) + forward) * tokens
    return LayerTraffic(
        dispatch=out,
        combine=back,
        tensor=_tensor(shape, layer, device, layout, job),
        **_states(shape, layer, device, layout, job),
    )


def _tensor(shape: ModelShape, layer: Layer, device: Device, layout: Layout, job: Job) -> Bytes:
    if layout.tp == 1:
        return Bytes()
    # Each block that is cut gathers its tokens before and scatters its sums after, and the same backward.
    blocks = len(layer.mixers) + sum(1 for feed in layer.feeds if feed is not layer.experts)
    if layer.experts is not None and layer.experts.shared_hidden:
        blocks += 1
    size = job.tokens * shape.width * job.code.bytes
    passes = 4 + (2 if job.recompute else 0)
    return all_gather(size, layout.tp, ranks_in_node(device, 1, layout.tp)) * (blocks * passes)


def _states(shape: ModelShape, layer: Layer, device: Device, layout: Layout, job: Job) -> dict[str, Bytes]:
    if layout.shard != "all":
        return {"fetch": Bytes(), "gradients": Bytes()}
    common, experts = cut(shape, layer, layout)
    fetched = scattered = Bytes()
    for numbers, ranks, stride in (
        (common, layout.fsdp, layout.tp),
        (experts, layout.expert_fsdp, layout.ep),
    ):
        near = ranks_in_node(device, stride, ranks)
        # Forward and backward each fetch the weights; computing anew uses those of the backward.
        fetched += all_gather(numbers * cost.bits(job.dtype) / 8, ranks, near) * 2
        scattered += all_gather(numbers * cost.bits(job.grad_dtype) / 8, ranks, near)
    return {"fetch": fetched, "gradients": scattered}


def step_traffic(shape: ModelShape, stage: Stage, device: Device, layout: Layout, job: Job) -> Bytes:
    """Bytes sent once a step: gradients summed over replicas, and weights handed out where the optimizer is split."""
    held = Held.of(shape, stage, layout)
    found = Bytes()
    grad, weight = cost.bits(job.grad_dtype) / 8, cost.bits(job.dtype) / 8
    for numbers, ranks, split, stride in (
        (held.common, layout.dp, layout.fsdp, layout.tp),
        (held.experts, layout.expert_copies, layout.expert_fsdp, layout.ep),
    ):
        near = ranks_in_node(device, stride, ranks)
        if layout.shard == "all":
            # Each rank's share is summed over the groups that hold the same: a reduce-scatter and an all-gather.
            groups = ranks // split
            apart = ranks_in_node(device, stride * split, groups)
            found += all_gather(numbers / split * grad, groups, apart) * 2
        else:
            found += all_gather(numbers * grad, ranks, near) + all_gather(numbers * weight, ranks, near)
    return found


def pipe_traffic(shape: ModelShape, device: Device, layout: Layout, job: Job) -> Bytes:
    """Bytes of one micro-batch from stage to stage, forward and backward."""
    if layout.pp == 1:
        return Bytes()
    size = 2 * job.tokens / layout.tp * shape.width * job.code.bytes * layout.interleave
    same_node = layout.devices <= device.node
    return Bytes(inside=size) if same_node else Bytes(across=size)
