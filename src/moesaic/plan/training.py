"""What training a model costs on so many devices: memory by part, traffic by layer, and the time of a step at best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moesaic.plan.devices import Device
from moesaic.plan.layout import Layout, Stage
from moesaic.plan.load import Drops, Loads, drops, loads
from moesaic.plan.memory import Job, Memory, stage_memory
from moesaic.plan.popularity import Popularity
from moesaic.plan.step import Times, stage_times
from moesaic.plan.traffic import Bytes, Dispatch, LayerTraffic, layer_traffic, pipe_traffic, step_traffic
from moesaic.zoo import ModelShape, Parts

ASSUMES = (
    "Fused attention, norms and activations: attention scores are never stored, experts run as grouped products.",
    "FLOPs of matrix products alone, attention's over the half of pairs that a token may see; backward twice forward.",
    "Tokens choose experts independently of each other; loads of a trace are drawn by whole sequences. Memory and "
    "times count no drops.",
    "Memory of tensors alone: add 1 to 2 GB for the runtime, and what the allocator cannot use.",
    "Times are bounds from the maker's peaks, never reached: kernels, latency, stragglers and input cost more.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What one kind of layer sends.

    Attributes:
        kind: in words.
        layers: how many there are.
        bytes: of one, for one micro-batch on one device.
    """

    kind: str
    layers: int
    bytes: LayerTraffic


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """What a training step takes, as far as shapes and stated peaks decide it.

    Attributes:
        model: its name.
        device: that it runs on.
        layout: over devices.
        job: what is trained.
        routing: in words.
        stage: the fullest pipeline stage, from 0.
        memory: on its fullest device at mean load.
        memory_p99: with as many rows as it has in 1 of 100 micro-batches.
        other_recompute: at p99, had activations been kept instead of computed anew, or the other way round.
        p99_load: rows of that device as a multiple of the mean.
        busiest_load: rows of a layer's busiest device, on average.
        flops: of one token forward, by part.
        flops_backward: of one token backward.
        traffic: by kind of layer.
        once: bytes sent once a step by a device of the fullest stage.
        pipe: bytes of one micro-batch between stages.
        times: of the slowest stage at mean load.
        times_busiest: of the slowest stage where each layer waits for its busiest device.
        batch_tokens: of one step, over all devices.
        drops: at the capacity factor, averaged over layers; None without one.
        mean_drop_rate: of all layers; None without a capacity.
        assumes: what all this rests on.
    """

    model: str
    device: Device
    layout: Layout
    job: Job
    routing: str
    stage: int
    memory: Memory
    memory_p99: Memory
    other_recompute: Memory
    p99_load: float
    busiest_load: float
    flops: Parts
    flops_backward: int
    traffic: tuple[Traffic, ...]
    once: Bytes
    pipe: Bytes
    times: Times
    times_busiest: Times
    batch_tokens: int
    drops: Drops | None
    mean_drop_rate: float | None
    assumes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the tensors of the p99 load fit into a device."""
        return self.memory_p99.total <= self.device.memory_bytes

    @property
    def model_flops(self) -> int:
        """Of one token, forward and backward, without computing anything twice."""
        return self.flops.total + self.flops_backward

    def tokens_per_s(self, seconds: float | None = None) -> float:
        """Tokens per second of all devices, at the bound or at another time of a step."""
        return self.batch_tokens / (self.times.bound if seconds is None else seconds)

    def mfu(self, seconds: float | None = None) -> float:
        """Model FLOPs per second over the peak of all devices in the job's dtype, at the bound or another time."""
        peak = self.layout.devices * self.device.peak(self.job.dtype)
        return self.model_flops * self.tokens_per_s(seconds) / peak


def train(
    shape: ModelShape,
    device: Device,
    layout: Layout,
    job: Job,
    popularity: Popularity,
    *,
    capacity_factor: float | None = None,
    dispatch: Dispatch = "once-per-node",
    seed: int = 0,
) -> TrainingPlan:
    """Plan the training of a model.

    Args:
        shape: of the model.
        device: that there are many of.
        layout: over them.
        job: what is trained, and how much at once.
        popularity: of experts.
        capacity_factor: of places for rows, counted over the tokens of one data-parallel rank; None to drop nothing.
        dispatch: how tokens travel; see :func:`moesaic.plan.traffic.all_to_all`.
        seed: of the draws of loads.
    Raises:
        ConfigError: if the model or the batch cannot be cut so.
    """
    layout.check(shape)
    times_each = job.micro_batches(layout)
    drawn = _loads(shape, layout, job, popularity, seed)
    traffic = _traffic(shape, device, layout, job, popularity, dispatch)
    mean, at_p99, stage, p99 = _fullest(shape, layout, job, drawn, times_each)
    other = _fullest(shape, layout, replace(job, recompute=not job.recompute), drawn, times_each)[1]
    busiest = drawn.busiest()
    flops = shape.flops(job.context, causal=True)
    dropped = _drops(shape, job, popularity, capacity_factor)
    return TrainingPlan(
        model=shape.name,
        device=device,
        layout=layout,
        job=job,
        routing=popularity.name,
        stage=stage.number,
        memory=mean,
        memory_p99=at_p99,
        other_recompute=other,
        p99_load=p99,
        busiest_load=busiest,
        flops=flops,
        flops_backward=2 * flops.total,
        traffic=_by_kind(shape, traffic),
        once=step_traffic(shape, stage, device, layout, job),
        pipe=pipe_traffic(shape, device, layout, job),
        times=_slowest(shape, traffic, device, layout, job, 1.0),
        times_busiest=_slowest(shape, traffic, device, layout, job, busiest),
        batch_tokens=times_each * layout.dp * job.tokens,
        drops=dropped[0] if dropped else None,
        mean_drop_rate=sum(one.rate for one in dropped) / len(dropped) if dropped else None,
        assumes=(*ASSUMES, *_further(layout, job, dispatch)),
    )


def _loads(shape: ModelShape, layout: Layout, job: Job, popularity: Popularity, seed: int) -> Loads:
    tokens = job.tokens * layout.ep // layout.tp
    return loads(popularity, shape.mixtures, ep=layout.ep, tokens=max(tokens, 1), seed=seed)


def _mixtures_of(shape: ModelShape, stage: Stage) -> tuple[int, int]:
    before = (*shape.encoder, *shape.layers)[: stage.first]
    start = sum(layer.experts is not None for layer in before)
    return start, start + sum(layer.experts is not None for layer in stage.layers)


def _fullest(
    shape: ModelShape, layout: Layout, job: Job, drawn: Loads, micro_batches: int
) -> tuple[Memory, Memory, Stage, float]:
    found = []
    for stage in layout.stages(shape):
        load = max(1.0, drawn.p99(*_mixtures_of(shape, stage)))
        under_way = min(micro_batches, in_flight(layout, stage))
        at_p99 = stage_memory(shape, stage, layout, job, load=load, in_flight=under_way)
        found.append((at_p99, stage, load, under_way))
    at_p99, stage, load, under_way = max(found, key=lambda one: one[0].total)
    return stage_memory(shape, stage, layout, job, load=1.0, in_flight=under_way), at_p99, stage, load


def in_flight(layout: Layout, stage: Stage) -> int:
    """Micro-batches whose activations a stage keeps at most when forward and backward take turns (1F1B).

    Interleaved, pieces of ``1 / interleave`` of a stage are kept, ``2 (pp - stage - 1) + (interleave - 1) pp + 1`` of
    them.

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.
    """
    later = layout.pp - stage.number - 1
    if layout.interleave == 1:
        return later + 1
    pieces = 2 * later + (layout.interleave - 1) * layout.pp + 1
    return -(-pieces // layout.interleave)


def _traffic(
    shape: ModelShape, device: Device, layout: Layout, job: Job, popularity: Popularity, dispatch: Dispatch
) -> list[LayerTraffic]:
    found, index = [], 0
    same: dict[object, LayerTraffic] = {}
    for layer in (*shape.encoder, *shape.layers):
        # Layers of one shape send the same, unless their experts are not equally popular.
        key = (layer, None if layer.experts is None or popularity.alike else index)
        if key not in same:
            same[key] = layer_traffic(
                shape, layer, index, device=device, layout=layout, job=job, popularity=popularity, dispatch=dispatch
            )
        found.append(same[key])
        index += layer.experts is not None
    return found


def _slowest(
    shape: ModelShape, traffic: list[LayerTraffic], device: Device, layout: Layout, job: Job, load: float
) -> Times:
    found = [
        stage_times(
            shape,
            stage,
            traffic[stage.first : stage.first + len(stage.layers)],
            device=device,
            layout=layout,
            job=job,
            load=load,
        )
        for stage in layout.stages(shape)
    ]
    return max(found, key=lambda times: times.bound)


def _by_kind(shape: ModelShape, traffic: list[LayerTraffic]) -> tuple[Traffic, ...]:
    """One row for each kind of layer; where its traffic varies with popularity, that of the first."""
    layers = (*shape.encoder, *shape.layers)
    counted = Counter(layers)
    first: Mapping[object, LayerTraffic] = dict(zip(reversed(layers), reversed(traffic), strict=True))
    return tuple(
        Traffic(
            kind=f"{layer.experts.num_experts} experts, {layer.experts.top_k} each" if layer.experts else "dense",
            layers=times,
            bytes=first[layer],
        )
        for layer, times in counted.items()
    )


def _drops(shape: ModelShape, job: Job, popularity: Popularity, factor: float | None) -> list[Drops]:
    if factor is None:
        return []
    return [
        drops(popularity, layer, experts, tokens=job.tokens, factor=factor)
        for layer, experts in enumerate(shape.mixtures)
    ]


def _further(layout: Layout, job: Job, dispatch: Dispatch) -> list[str]:
    found = [
        "Devices of a tensor-parallel group cut tokens too (sequence parallelism); experts are whole, on ep of a "
        "stage's devices (parallel folding)."
    ]
    if layout.ep > 1:
        way = "once to each other node, and on from there" if dispatch == "once-per-node" else "once for each choice"
        found.append(f"A token is sent {way}; the network is as fast for many small pieces as for one large.")
    if layout.pp > 1:
        found.append("Stages take turns forward and backward (1F1B); the bound lets none of them wait.")
    if layout.fsdp > 1 and layout.shard == "all":
        found.append("Weights are fetched for each micro-batch, forward and backward, one layer ahead.")
    if job.dtype == "fp8":
        found.append("Products in 8 bits at their peak; activations, outputs and gradients of rows travel in 16.")
    return found
