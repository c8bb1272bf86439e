"""Bytes on one device while training, by what they are for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from functools import lru_cache

from moesaic.core.errors import ConfigError
from moesaic.plan.activations import Code, head_kept, input_kept, layer_kept, working
from moesaic.plan.layout import Layout, Stage
from moesaic.zoo import Experts, Layer, ModelShape, Parts, cost, count

OPTIMIZERS = {"adamw": 8, "adamw-bf16": 4, "momentum": 4, "sgd": 0}
"""Bytes of state for each weight; "adamw-bf16" keeps its two moments in bfloat16, as DeepSeek-V3 does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is trained, and how much at once.

    Attributes:
        context: tokens of a sequence.
        micro_batch: sequences that a data-parallel rank works on at once.
        batch: sequences of one optimizer step; None for one micro-batch for each rank and pipeline stage.
        dtype: of weights in products and of activations; "fp8" multiplies in 8 bits and keeps activations in 16.
        grad_dtype: that gradients are added up in.
        optimizer: see :data:`OPTIMIZERS`; weights that are not float32 have a float32 copy besides.
        recompute: whether a layer keeps its input alone and is computed anew in the backward.
        fused: whether operations are fused; False for plain PyTorch, as :mod:`moesaic.plan.verify` measures it.
    Raises:
        ConfigError: if a number is not positive, or a word is unknown.
    """

    context: int = 4096
    micro_batch: int = 1
    batch: int | None = None
    dtype: str = "bf16"
    grad_dtype: str = "fp32"
    optimizer: str = "adamw"
    recompute: bool = False
    fused: bool = True

    def __post_init__(self) -> None:
        for name in ("context", "micro_batch", "batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}. Give a positive number.")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}. Choose one.")
        if self.dtype not in ("fp32", "bf16", "fp16", "fp8"):
            raise ConfigError(f"dtype for training must be fp32, bf16, fp16 or fp8, got {self.dtype!r}. Choose one.")
        cost.bits(self.grad_dtype)

    @property
    def code(self) -> Code:
        """How activations are kept: in 16 bits where products are in 8."""
        return Code(fused=self.fused, dtype="bf16" if self.dtype == "fp8" else self.dtype)

    @property
    def tokens(self) -> int:
        """Of a micro-batch of one data-parallel rank."""
        return self.micro_batch * self.context

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of one rank in one step.

        Raises:
            ConfigError: if the batch cannot be divided so.
        """
        each = layout.dp * self.micro_batch
        if self.batch is None:
            return layout.pp
        if self.batch % each:
            below = self.batch // each * each
            raise ConfigError(
                f"batch must be a multiple of ranks * micro_batch = {layout.dp} * {self.micro_batch} = {each}, got "
                f"{self.batch}. {below or each}{f' or {below + each}' if below else ''} would fit."
            )
        return self.batch // each

    def state_bytes(self) -> int:
        """Of the optimizer, for each weight."""
        return OPTIMIZERS[self.optimizer] + (0 if self.dtype == "fp32" else 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on the fullest device.

    Attributes:
        weights: in their dtype.
        gradients: as they are added up.
        optimizer: states and float32 copies.
        activations: kept between forward and backward, of all micro-batches under way, and the layer being worked on.
        logits: of the vocabulary and the loss.
        buffers: weights fetched from other ranks, gradients on their way, rows sent to and come from other devices.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        """All of them together."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, float]:
        """Each part's name and bytes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Weights of one stage on one device before anything is split over ranks.

    Attributes:
        common: what is not experts, cut by tensor parallelism.
        experts: of the layers here, those of this device.
        largest: weights of the largest layer here, which is fetched as one.
    """

    common: float
    experts: float
    largest: float

    @classmethod
    def of(cls, shape: ModelShape, stage: Stage, layout: Layout) -> Held:
        """Count them."""
        layers = [cut(shape, layer, layout) for layer in stage.layers]
        common = sum(one for one, _ in layers) + _ends(shape, stage) / layout.tp
        return cls(
            common=common,
            experts=sum(experts for _, experts in layers),
            largest=max(one + experts for one, experts in layers),
        )


def cut(shape: ModelShape, layer: Layer, layout: Layout) -> tuple[float, float]:
    """Weights of one layer on one device: what is not experts, and experts."""
    parts = _layer_parts(shape.width, shape.norm_params, layer)
    # Every device of a tensor-parallel group has all norms and routers.
    whole = parts.norms + parts.routers
    return (parts.total - parts.experts - whole) / layout.tp + whole, parts.experts / layout.ep


@lru_cache(maxsize=512)
def _layer_parts(width: int, norm: int, layer: Layer) -> Parts:
    return count.layer_params(layer, width=width, norm=norm)


def _ends(shape: ModelShape, stage: Stage) -> int:
    """Tables and last norms of the first and the last stage; a shared table is on both."""
    if not (stage.has_embeddings or stage.has_head):
        return 0
    parts = shape.params()
    layers = Counter((*shape.encoder, *shape.layers))
    inside = sum(times * _layer_parts(shape.width, shape.norm_params, layer).total for layer, times in layers.items())
    first = parts.total - inside - parts.head
    tables = parts.head + (parts.embeddings if shape.tied and stage.of > 1 else 0)
    return (first if stage.has_embeddings else 0) + (tables if stage.has_head else 0)


def stage_memory(shape: ModelShape, stage: Stage, layout: Layout, job: Job, *, load: float, in_flight: int) -> Memory:
    """Bytes on a device of one stage.

    Args:
        shape: of the model.
        stage: of the pipeline.
        layout: over devices.
        job: what is trained.
        load: rows of the mixtures on this device, as a multiple of the mean.
        in_flight: micro-batches whose activations are kept at once.
    """
    held = Held.of(shape, stage, layout)
    split, expert_split = layout.fsdp, layout.expert_fsdp
    stored = held.common / split + held.experts / expert_split
    at_rest = stored if layout.shard == "all" else held.common + held.experts
    activations, logits = _kept(shape, stage, layout, job, load, in_flight)
    return Memory(
        weights=at_rest * cost.bits(job.dtype) / 8,
        gradients=at_rest * cost.bits(job.grad_dtype) / 8,
        optimizer=stored * job.state_bytes(),
        activations=activations,
        logits=logits,
        buffers=_buffers(shape, stage, layout, job, held, load),
    )


def _kept(
    shape: ModelShape, stage: Stage, layout: Layout, job: Job, load: float, in_flight: int
) -> tuple[float, float]:
    # With tensor parallelism the tokens between matrices are cut as well (sequence parallelism), and so are rows.
    tokens = job.tokens / layout.tp
    code, width = job.code, shape.width
    kept, latest = 0.0, []
    for layer, times in Counter(stage.layers).items():
        rows = tokens * layer.experts.top_k * load if layer.experts is not None else 0.0
        found = layer_kept(layer, width, code)
        full, hand = found.token * tokens + found.row * rows, working(layer, width, tokens, rows, code)
        kept += times * (input_kept(width, code).token * tokens if job.recompute else full)
        latest.append(full + hand if job.recompute else hand)
    logits = head_kept(shape, code) * tokens if stage.has_head else 0.0
    # The loss is done with before the last layer's backward begins: only the larger of the two is there at a time.
    return in_flight * kept + max(0.0, max(latest) - logits), logits


def _buffers(shape: ModelShape, stage: Stage, layout: Layout, job: Job, held: Held, load: float) -> float:
    found = 0.0
    if layout.fsdp > 1 and layout.shard == "all":
        # The layer at work and the next one, already on its way; the gradients of one on their way back.
        found += held.largest * (2 * cost.bits(job.dtype) + cost.bits(job.grad_dtype)) / 8
    if layout.ep > 1:
        mixtures = [layer.experts for layer in stage.layers if layer.experts is not None]
        rows = job.tokens / layout.tp * max((one.top_k * (one.width or shape.width) for one in mixtures), default=0)
        # What is sent is mine, the mean; what comes depends on my experts.
        found += rows * (1 + load) * job.code.bytes
    return found


def expert_bytes(experts: Experts, width: int, dtype: str) -> float:
    """Bytes of one routed expert."""
    return count.expert_params(experts, width) * cost.bits(dtype) / 8
