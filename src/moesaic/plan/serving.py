"""What serving a model costs: memory, and the time of one output token at best, by how many sequences run together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from moesaic.core.errors import ConfigError
from moesaic.plan.devices import Device
from moesaic.plan.layout import Layout, Stage
from moesaic.plan.load import distinct, reach
from moesaic.plan.memory import Held, expert_bytes
from moesaic.plan.popularity import Popularity
from moesaic.plan.traffic import Bytes, all_gather, all_to_all, ranks_in_node
from moesaic.zoo import LatentAttention, Layer, ModelShape, cost

ASSUMES = (
    "Each step reads the weights outside of experts once, each expert that some token uses once, and the whole cache.",
    "Tokens choose experts independently of each other, in the shares of a trace if one is given; those used are "
    "spread evenly over devices.",
    "Times are bounds from the maker's peaks, never reached: kernels, latency, sampling and scheduling cost more.",
    "A latent cache (MLA) is repeated over tensor-parallel devices; other caches are cut by heads.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeJob:
    """What is served, and how much at once.

    Attributes:
        context: tokens in the cache of each sequence.
        batches: how many sequences run together, over all devices; one row of the plan for each.
        dtype: of weights.
        cache_dtype: of the cache.
    Raises:
        ConfigError: if a number is not positive, or a dtype is unknown.
    """

    context: int = 4096
    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    dtype: str = "bf16"
    cache_dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.context < 1 or not self.batches or min(self.batches) < 1:
            raise ConfigError(
                f"context and batches must be positive, got {self.context} and {self.batches}. Give at least 1."
            )
        cost.bits(self.dtype)
        cost.bits(self.cache_dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """One step of all sequences.

    Attributes:
        batch: sequences.
        experts_touched: different experts of a layer that the tokens use, on average over layers.
        experts: of a layer, on average.
        seconds: per output token, at best.
        binds: what that comes from.
        tokens_per_s: of all sequences together, at best.
        memory: bytes on the fullest device: weights, cache and logits.
        fits: whether that is there.
    """

    batch: int
    experts_touched: float
    experts: float
    seconds: float
    binds: str
    tokens_per_s: float
    memory: float
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingPlan:
    """What serving takes, as far as shapes and stated peaks decide it.

    Attributes:
        model: its name.
        device: that it runs on.
        layout: over devices.
        job: what is served.
        routing: in words.
        weights: bytes on the fullest device.
        cache: bytes of one sequence on one device.
        most_sequences: that fit beside the weights, over all devices.
        prompt_tokens_per_s: of all devices, at best, for prompts of the job's context.
        decode: one row for each batch.
        assumes: what all this rests on.
    """

    model: str
    device: Device
    layout: Layout
    job: ServeJob
    routing: str
    weights: float
    cache: float
    most_sequences: int
    prompt_tokens_per_s: float
    decode: tuple[Decode, ...]
    assumes: tuple[str, ...]


def serve(shape: ModelShape, device: Device, layout: Layout, job: ServeJob, popularity: Popularity) -> ServingPlan:
    """Plan the serving of a model.

    Args:
        shape: of the model.
        device: that there are many of.
        layout: over them; ``fsdp`` must be 1.
        job: what is served.
        popularity: of experts.
    Raises:
        ConfigError: if the model cannot be cut so.
    """
    layout.check(shape)
    if layout.fsdp != 1:
        raise ConfigError(f"fsdp must be 1 for serving, got {layout.fsdp}. Cut weights with tp, ep or pp instead.")
    stages = layout.stages(shape)
    fullest = max(stages, key=lambda stage: _weights(shape, stage, layout, job))
    weights = _weights(shape, fullest, layout, job)
    # One sequence of a rank; the fullest stage's layers.
    cache = max(_cache(stage, layout, job) for stage in stages)
    room = device.memory_bytes - weights
    rank = int(room // cache) if room > 0 and cache else 0
    flops = shape.flops_per_token(job.context, causal=True)
    return ServingPlan(
        model=shape.name,
        device=device,
        layout=layout,
        job=job,
        routing=popularity.name,
        weights=weights,
        cache=cache,
        most_sequences=rank * layout.dp,
        prompt_tokens_per_s=layout.devices * device.peak(job.dtype) / flops,
        decode=tuple(_decode(shape, stages, device, layout, job, popularity, batch, weights) for batch in job.batches),
        assumes=ASSUMES,
    )


def _weights(shape: ModelShape, stage: Stage, layout: Layout, job: ServeJob) -> float:
    held = Held.of(shape, stage, layout)
    return (held.common + held.experts) * cost.bits(job.dtype) / 8


def _cache(stage: Stage, layout: Layout, job: ServeJob) -> float:
    """Bytes that one sequence keeps on a device of a stage."""
    numbers = sum(times * _cached(layer, layout.tp, job.context) for layer, times in Counter(stage.layers).items())
    return numbers * cost.bits(job.cache_dtype) / 8


def _cached(layer: Layer, tp: int, context: int) -> float:
    found = 0.0
    for mixer in layer.mixers:
        parts = 1 if isinstance(mixer, LatentAttention) else tp
        kv_heads = getattr(mixer, "kv_heads", tp)
        # With more devices than key-value heads, heads are repeated.
        found += cost.cached_numbers(mixer, context) / min(parts, max(kv_heads, 1))
    return found


def _decode(
    shape: ModelShape,
    stages: tuple[Stage, ...],
    device: Device,
    layout: Layout,
    job: ServeJob,
    popularity: Popularity,
    batch: int,
    weights: float,
) -> Decode:
    # Stages work at the same time, each on its share of the sequences; a token passes them all.
    together = batch / layout.pp
    rank = together / layout.dp
    seconds, resources = 0.0, Counter[str]()
    for stage in stages:
        needed = _stage_seconds(shape, stage, device, layout, job, popularity, rank)
        seconds += max(needed.values())
        resources.update(needed)
    memory = weights + -(-batch // layout.dp) * max(_cache(stage, layout, job) for stage in stages)
    memory += rank * shape.vocab * 4 / layout.tp
    touched = [distinct(popularity, index, experts, together) for index, experts in enumerate(shape.mixtures)]
    return Decode(
        batch=batch,
        experts_touched=sum(touched) / len(touched) if touched else 0.0,
        experts=sum(experts.num_experts for experts in shape.mixtures) / max(len(touched), 1),
        seconds=seconds,
        binds=max(resources, key=lambda name: resources[name]),
        tokens_per_s=batch / seconds,
        memory=memory,
        fits=memory <= device.memory_bytes,
    )


def _stage_seconds(
    shape: ModelShape,
    stage: Stage,
    device: Device,
    layout: Layout,
    job: ServeJob,
    popularity: Popularity,
    rank: float,
) -> dict[str, float]:
    """Seconds of each resource for one step of ``rank`` sequences on each data-parallel rank."""
    held = Held.of(shape, stage, layout)
    tables = _looked_up(shape, stage) / layout.tp
    read = (held.common - tables) * cost.bits(job.dtype) / 8 + rank * _cache(stage, layout, job)
    flops, sent = 0.0, Bytes()
    before = (*shape.encoder, *shape.layers)[: stage.first]
    index = sum(layer.experts is not None for layer in before)
    share = rank / layout.tp
    for layer in stage.layers:
        flops += cost.layer_flops(layer, width=shape.width, context=job.context, causal=False).total * share
        if layer.experts is not None:
            # The tokens of all ranks meet at the experts; each device has an equal part of those that are used.
            used = distinct(popularity, index, layer.experts, rank * layout.dp) / layout.ep
            read += min(used, layer.experts.num_experts / layout.ep) * expert_bytes(
                layer.experts, shape.width, job.dtype
            )
            sent += _exchange(shape, layer, index, device, layout, popularity) * share
            index += 1
        blocks = len(layer.mixers) + sum(1 for feed in layer.feeds if feed is not layer.experts)
        sent += all_gather(rank * shape.width * 2, layout.tp, ranks_in_node(device, 1, layout.tp)) * (2 * blocks)
    flops += 2 * shape.vocab * shape.width * share if stage.has_head else 0
    return {
        "memory": read / device.bandwidth,
        "compute": flops / device.peak(job.dtype),
        "links in a node": sent.inside / device.link_in,
        "links between nodes": sent.across / device.link_out,
    }


def _exchange(
    shape: ModelShape, layer: Layer, index: int, device: Device, layout: Layout, popularity: Popularity
) -> Bytes:
    """Bytes of one token to its experts and back."""
    if layer.experts is None or layout.ep == 1:
        return Bytes()
    near = ranks_in_node(device, 1, layout.ep)
    reached = reach(popularity, index, layer.experts, ep=layout.ep, per_node=near)
    one = all_to_all(
        reached,
        ep=layout.ep,
        per_node=near,
        numbers=layer.experts.width or shape.width,
        bytes_each=2,
        dispatch="once-per-node",
    )
    return one * 2


@lru_cache(maxsize=64)
def _tables(shape: ModelShape) -> int:
    parts = shape.params()
    return 0 if shape.tied else parts.embeddings


def _looked_up(shape: ModelShape, stage: Stage) -> int:
    """Weights of which a step reads a row for each token alone: the input table, where the output has its own."""
    return _tables(shape) if stage.has_embeddings else 0
