"""Runs that were published, and where the planner's bound for them stands: a bound that a run has beaten is a bug."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from moesaic import zoo
from moesaic.plan import devices
from moesaic.plan.layout import Layout
from moesaic.plan.memory import Job
from moesaic.plan.popularity import Zipf
from moesaic.plan.training import TrainingPlan, train
from moesaic.zoo import Attention, Dense, Layer, ModelShape, cost

_BALANCED = Zipf(exponent=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run and its bound.

    Attributes:
        name: of the run.
        what: the figure, with its unit; more is better.
        reached: as published.
        bound: computes the planner's figure.
        source: of what was reached.
        assumed: of the layout, where the source does not say or it is from memory.
    """

    name: str
    what: str
    reached: float
    bound: Callable[[], float]
    source: str
    assumed: str = ""


def _plan(model: str, device: str, layout: Layout, job: Job) -> TrainingPlan:
    return train(zoo.get(model), devices.get(device), layout, job, _BALANCED)


def _each(model: str, device: str, layout: Layout, job: Job) -> Callable[[], float]:
    return lambda: _plan(model, device, layout, job).tokens_per_s() / layout.devices


def _mfu(model: str, device: str, layout: Layout, job: Job) -> Callable[[], float]:
    return lambda: 100 * _plan(model, device, layout, job).mfu()


def _gshard(model: str, cores: int, tokens: float) -> Callable[[], float]:
    def bound() -> float:
        experts = zoo.get(model).mixtures[0].num_experts
        # Of a batch half the tokens are read and half written: the planner's token is one of each.
        job = Job(context=128, micro_batch=max(1, round(tokens / 2 / 128 / cores)))
        layout = Layout(devices=cores, ep=min(cores, experts))
        plan = _plan(model, "tpu-v3-core", layout, job)
        return plan.tokens_per_s() * 2 / tokens

    return bound


def dense_gpt(name: str, *, depth: int, width: int, heads: int) -> ModelShape:
    """A dense GPT with a vocabulary of 51,200 and feed-forward networks of four times its width."""
    attention = Attention(heads=heads, kv_heads=heads, head_dim=width // heads, qkv_bias=True, out_bias=True)
    layer = Layer(mixers=(attention,), feeds=(Dense(hidden=4 * width, gated=False, bias=True),))
    return ModelShape(
        name=name, width=width, vocab=51_200, layers=(layer,) * depth, tied=True, positions=2048, norm="layer"
    )


def _deepspeed(shape: Callable[[], ModelShape], layout: Layout) -> Callable[[], float]:
    def bound() -> float:
        job = Job(context=2048, micro_batch=1, batch=512)
        return train(shape(), devices.get("a100-40g"), layout, job, _BALANCED).tokens_per_s() / 2048

    return bound


def sequence_flops(model: str, *, source: int = 512, target: int = 114) -> float:
    """Forward FLOPs of one sequence of an encoder-decoder without the map to the vocabulary, as Switch counts them.

    Args:
        model: of the zoo.
        source: tokens read.
        target: tokens written.
    """
    shape = zoo.get(model)
    reads = sum(cost.layer_flops(it, width=shape.width, context=source, causal=False).total for it in shape.encoder)
    writes = sum(cost.layer_flops(it, width=shape.width, context=target, causal=True).total for it in shape.layers)
    return float(reads * source + writes * target)


def _switch(model: str, cores: int) -> Callable[[], float]:
    return lambda: cores * devices.get("tpu-v3-core").peak("bf16") / (3 * sequence_flops(model))


_V3 = Layout(devices=2048, ep=64, pp=16, fsdp=128, shard="optimizer", uneven=True)
_V3_JOB = Job(context=4096, batch=15_360, dtype="fp8", optimizer="adamw-bf16")
_GSHARD = "GShard, arXiv:2006.16668, table 2"
_AUTOMODEL = "NeMo AutoModel documentation (balanced gate, mock data)"
_FOLDING = "MoE Parallel Folding, arXiv:2504.14960"
_PAIRS = "a batch's tokens half read, half written; sequences of 128; all experts over all cores"

RUNS: tuple[Run, ...] = (
    Run(
        name="DeepSeek-V3, 14.8T tokens in 2.788M hours of H800",
        what="tokens/s a device",
        reached=14.8e12 / 2.788e6 / 3600,
        bound=_each("deepseek-v3", "h800-80g", _V3, _V3_JOB),
        source="DeepSeek-V3, arXiv:2412.19437; the hours hold context extension and post-training too",
        assumed="products in fp8, nothing computed anew; 16 stages, 64-way experts, ZeRO-1",
    ),
    Run(
        name="Mixtral-8x22B with parallel folding, 128 H100",
        what="MFU, %",
        reached=49.3,
        bound=_mfu(
            "mixtral-8x22b",
            "h100-80g",
            Layout(devices=128, tp=2, ep=8, pp=8, fsdp=8, shard="optimizer"),
            Job(batch=256),
        ),
        source=_FOLDING,
        assumed="tp 2, ep 8, pp 8, batch 256",
    ),
    Run(
        name="Qwen2-57B-A14B with parallel folding, 64 H100",
        what="MFU, %",
        reached=39.0,
        bound=_mfu(
            "qwen2-57b-a14b",
            "h100-80g",
            Layout(devices=64, tp=2, ep=4, pp=4, fsdp=8, shard="optimizer"),
            Job(batch=256),
        ),
        source=_FOLDING,
        assumed="tp 2, ep 4, pp 4, batch 256",
    ),
    Run(
        name="DeepSeek-V3, 256 H100",
        what="tokens/s a device",
        reached=1002,
        bound=_each("deepseek-v3", "h100-80g", Layout(devices=256, ep=64, fsdp=256), Job(batch=512)),
        source=_AUTOMODEL,
        assumed="64-way experts, FSDP over all",
    ),
    Run(
        name="Qwen3-30B-A3B, 8 H100",
        what="tokens/s a device",
        reached=12_040,
        bound=_each("qwen3-30b-a3b", "h100-80g", Layout(devices=8, ep=8, fsdp=8), Job(batch=64, micro_batch=4)),
        source=_AUTOMODEL,
        assumed="8-way experts, FSDP over all",
    ),
    Run(
        name="gpt-oss-20b, 8 H100",
        what="tokens/s a device",
        reached=13_058,
        bound=_each("gpt-oss-20b", "h100-80g", Layout(devices=8, ep=8, fsdp=8), Job(batch=64, micro_batch=4)),
        source=_AUTOMODEL,
        assumed="8-way experts, FSDP over all",
    ),
    Run(
        name="OLMoE-1B-7B, 256 H100",
        what="tokens/s a device",
        reached=24_400,
        bound=_each("olmoe-1b-7b", "h100-80g", Layout(devices=256, fsdp=8), Job(batch=1024, micro_batch=4)),
        source="OLMoE, arXiv:2409.02060, ablation of dropless routing",
        assumed="every expert on every device, FSDP within a node",
    ),
    Run(
        name="Skywork-MoE, 1,536 A800",
        what="tokens/s a device",
        reached=690,
        bound=_each(
            "skywork-moe",
            "a100-80g",
            Layout(devices=1536, tp=1, pp=12, ep=8, fsdp=128, shard="optimizer", uneven=True),
            Job(context=8192, batch=1536),
        ),
        source="Skywork-MoE, arXiv:2406.06563",
        assumed="an A800 is an A100 with slower NVLink: the faster links are taken; 12 stages, 8-way experts",
    ),
    *(
        Run(
            name=f"GShard {size}, {cores:,} TPUv3 cores",
            what="steps/s",
            reached=steps,
            bound=_gshard(f"gshard-{size}", cores, tokens),
            source=_GSHARD,
            assumed=_PAIRS,
        )
        for size, cores, tokens, steps in (
            ("600b", 2048, 4e6, 0.72),
            ("200b", 2048, 4e6, 2.15),
            ("150b", 512, 1e6, 1.05),
            ("50b", 512, 1e6, 3.28),
            ("37b", 128, 1e6, 0.67),
            ("12.5b", 128, 1e6, 2.16),
        )
    ),
    Run(
        name="Switch-Base, 128 experts, capacity 1.0",
        what="sequences/s",
        reached=1000,
        bound=_switch("switch-base-128", 32),
        source="Switch, arXiv:2101.03961, table 1",
        assumed="32 TPUv3 cores; 512 tokens read and 114 written; products alone",
    ),
    Run(
        name="DeepSpeed 1.3B+MoE-128, 128 A100",
        what="sequences/s",
        reached=372,
        bound=_deepspeed(lambda: zoo.get("deepspeed-1.3b-moe-128"), Layout(devices=128, ep=128)),
        source="DeepSpeed-MoE, arXiv:2201.05596",
        assumed="sequences of 2,048; experts over all devices",
    ),
    Run(
        name="its dense equal in quality, 6.7B, 128 A100",
        what="sequences/s",
        reached=70,
        bound=_deepspeed(
            lambda: dense_gpt("6.7B dense", depth=32, width=4096, heads=32),
            Layout(devices=128, tp=8, fsdp=16, shard="optimizer"),
        ),
        source="DeepSpeed-MoE, arXiv:2201.05596",
        assumed="sequences of 2,048; tp 8",
    ),
)
"""Published runs of Mixture-of-Experts models."""

ABOUT = (
    "A bound is what no run can beat: peaks as makers state them, all of it overlapping, experts equally loaded.",
    "Layouts are those of the source where it gives them, else from memory or assumed: --json says which.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A run beside its bound; see :class:`Run`."""

    name: str
    what: str
    reached: float
    bound: float
    source: str
    assumed: str

    @property
    def share(self) -> float:
        """Of the bound that was reached."""
        return self.reached / self.bound


@cache
def standings() -> tuple[Standing, ...]:
    """Compute the bound of every run."""
    return tuple(
        Standing(
            name=run.name,
            what=run.what,
            reached=run.reached,
            bound=run.bound(),
            source=run.source,
            assumed=run.assumed,
        )
        for run in RUNS
    )


SEQUENCE_FLOPS: tuple[tuple[str, float], ...] = (
    ("switch-base-128", 124e9),
    ("switch-large-128", 425e9),
    ("switch-xxl-128", 6.3e12),
    ("switch-c-2048", 890e9),
)
"""FLOPs of a sequence as table 9 of Switch prints them."""
