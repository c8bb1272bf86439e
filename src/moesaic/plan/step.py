"""How long a training step takes at least, and what it waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.plan.activations import layer_kept
from moesaic.plan.devices import Device
from moesaic.plan.layout import Layout, Stage
from moesaic.plan.memory import Held, Job
from moesaic.plan.traffic import Bytes, LayerTraffic, pipe_traffic, step_traffic
from moesaic.zoo import Layer, ModelShape, cost


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Seconds that each resource of the slowest device needs for one step, alone and at its stated peak.

    Attributes:
        compute: matrix products at the dense peak.
        memory: weights, gradients, states and activations through the device's own memory.
        inside: links within a node.
        across: links between nodes.
        idle: share that a pipeline stage waits when it fills and empties.
    """

    compute: float
    memory: float
    inside: float
    across: float
    idle: float

    @property
    def bound(self) -> float:
        """No step is shorter: everything overlaps, and no stage waits."""
        return max(self.compute, self.memory, self.inside, self.across)

    @property
    def binds(self) -> str:
        """What the bound comes from."""
        found = {"compute": self.compute, "memory": self.memory, "links in a node": self.inside}
        found["links between nodes"] = self.across
        return max(found, key=lambda name: found[name])

    @property
    def in_turn(self) -> float:
        """Seconds if nothing overlaps and stages wait for each other; a careful run is faster, a slow kernel slower."""
        return (self.compute + self.memory + self.inside + self.across) * (1 + self.idle)


def stage_times(
    shape: ModelShape,
    stage: Stage,
    traffic: Sequence[LayerTraffic],
    *,
    device: Device,
    layout: Layout,
    job: Job,
    load: float,
) -> Times:
    """Add up one stage's work of a step.

    Args:
        shape: of the model.
        stage: of the pipeline.
        traffic: of each of its layers.
        device: that does it.
        layout: over devices.
        job: what is trained.
        load: rows of the busiest device, as a multiple of the mean.
    """
    times = job.micro_batches(layout)
    sent = Bytes()
    for one in traffic:
        sent += (one.dispatch + one.combine) * load + one.tensor + one.fetch + one.gradients
    sent = (sent + pipe_traffic(shape, device, layout, job)) * times
    sent += step_traffic(shape, stage, device, layout, job)
    return Times(
        compute=stage_flops(shape, stage, layout, job, load) * times / device.peak(job.dtype),
        memory=_moved(shape, stage, layout, job, load, times) / device.bandwidth,
        inside=sent.inside / device.link_in,
        across=sent.across / device.link_out,
        idle=(layout.pp - 1) / (times * layout.interleave),
    )


def stage_flops(shape: ModelShape, stage: Stage, layout: Layout, job: Job, load: float) -> float:
    """FLOPs of one device for one micro-batch, forward and backward, computing anew included."""
    forward = 0.0
    for offset, layer in enumerate(stage.layers):
        reads = stage.first + offset < len(shape.encoder)
        forward += _layer_flops(layer, shape.width, job.context, not reads, load)
    head = 2 * shape.vocab * shape.width if stage.has_head else 0
    return (forward * (4 if job.recompute else 3) + head * 3) * job.tokens / layout.tp


def _layer_flops(layer: Layer, width: int, context: int, causal: bool, load: float) -> float:
    parts = cost.layer_flops(layer, width=width, context=context, causal=causal)
    return parts.total + parts.experts * (load - 1)


def _moved(shape: ModelShape, stage: Stage, layout: Layout, job: Job, load: float, times: int) -> float:
    held = Held.of(shape, stage, layout)
    weights = held.common + held.experts
    grad, weight = cost.bits(job.grad_dtype) / 8, cost.bits(job.dtype) / 8
    tokens = job.tokens / layout.tp
    kept = 0.0
    for layer in stage.layers:
        found = layer_kept(layer, shape.width, job.code)
        rows = layer.experts.top_k * load if layer.experts is not None else 0.0
        kept += (found.token + found.row * rows) * tokens
    passes = 3 if job.recompute else 2
    # Weights are read in each pass, activations written and read once each. Gradients are written each time, and read
    # again from the second micro-batch on; the optimizer reads them and its states, and writes states and weights.
    added = weights * grad * (2 * times - 1)
    stored = held.common / layout.fsdp + held.experts / layout.expert_fsdp
    updated = stored * (2 * job.state_bytes() + grad + weight)
    return (weights * passes * weight + 2 * kept) * times + added + updated
