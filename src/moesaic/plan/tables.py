"""A plan as tables of words, for a terminal or a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.plan.layout import Layout
from moesaic.plan.offloading import Offload
from moesaic.plan.published import Standing
from moesaic.plan.ranking import USABLE, Found, FoundServing
from moesaic.plan.serving import ServingPlan
from moesaic.plan.traffic import Bytes
from moesaic.plan.training import TrainingPlan

if TYPE_CHECKING:
    from moesaic.plan.verify import Verified

_COLLECTIVES = {
    "dispatch": "all-to-all, tokens to experts",
    "combine": "all-to-all, outputs back",
    "tensor": "all-gather and reduce-scatter, tensor parallel",
    "fetch": "all-gather of split weights",
    "gradients": "reduce-scatter of gradients",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of words.

    Attributes:
        title: above it.
        columns: heads.
        rows: one word for each column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def gb(size: float) -> str:
    """Bytes in GB, of 10 to the 9."""
    return f"{size / 1e9:,.2f}"


def described(layout: Layout) -> str:
    """A layout in a line."""
    found = f"tp {layout.tp} · pp {layout.pp} · ep {layout.ep} · dp {layout.dp}"
    if layout.fsdp > 1:
        found += f" · {'fsdp' if layout.shard == 'all' else 'zero-1'} {layout.fsdp}"
    return found


def training_tables(plan: TrainingPlan) -> Iterator[Table]:
    """Memory, FLOPs, traffic, times and capacity of a training."""
    yield _memory(plan)
    yield _flops(plan)
    yield _traffic(plan)
    yield _times(plan)
    if plan.drops is not None and plan.mean_drop_rate is not None:
        yield Table(
            title=f"Capacity under routing {plan.routing}",
            columns=("figure", "expected"),
            rows=(
                ("rows that one expert may take (first mixture)", f"{plan.drops.capacity:,}"),
                ("dropped rows, mean of layers", f"{plan.mean_drop_rate:.3%}"),
                ("empty places (first mixture)", f"{plan.drops.empty:.1%}"),
            ),
        )


def _memory(plan: TrainingPlan) -> Table:
    mean, p99 = plan.memory.as_dict(), plan.memory_p99.as_dict()
    rows = [(name, gb(mean[name]), gb(p99[name])) for name in mean]
    rows.append(("total", gb(plan.memory.total), gb(plan.memory_p99.total)))
    other = "with activations kept" if plan.job.recompute else "with layers computed anew (recompute)"
    rows.append((f"total {other}", "", gb(plan.other_recompute.total)))
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    rows.append(("of a device", gb(plan.device.memory_bytes), verdict))
    where = f", stage {plan.stage + 1} of {plan.layout.pp}" if plan.layout.pp > 1 else ""
    title = f"Memory of the fullest device{where}, GB"
    return Table(title=title, columns=("part", "mean load", f"p99 load ({plan.p99_load:.2f} x)"), rows=tuple(rows))


def _flops(plan: TrainingPlan) -> Table:
    rows = [
        (name, f"{value / 1e9:,.3f}", f"{2 * value / 1e9:,.3f}")
        for name, value in plan.flops.as_dict().items()
        if value
    ]
    rows.append(("total", f"{plan.flops.total / 1e9:,.3f}", f"{plan.flops_backward / 1e9:,.3f}"))
    title = f"GFLOPs of one token at context {plan.job.context:,}"
    return Table(title=title, columns=("part", "forward", "backward"), rows=tuple(rows))


def _traffic(plan: TrainingPlan) -> Table:
    rows: list[tuple[str, ...]] = []
    for one in plan.traffic:
        for name, words in _COLLECTIVES.items():
            sent = getattr(one.bytes, name)
            if sent.inside or sent.across:
                rows.append((f"{one.layers} x {one.kind}", words, *_mb(sent)))
    if plan.pipe.inside or plan.pipe.across:
        rows.append(("each micro-batch", "stage to stage", *_mb(plan.pipe)))
    if plan.once.inside or plan.once.across:
        rows.append(("each step", "gradients and weights over replicas", *_mb(plan.once)))
    if not rows:
        rows.append(("", "nothing is sent", "0.0", "0.0"))
    return Table(
        title="Sent by one device, MB (forward and backward of one layer and micro-batch, unless said)",
        columns=("layers", "what", "in its node", "to other nodes"),
        rows=tuple(rows),
    )


def _mb(sent: Bytes) -> tuple[str, str]:
    return f"{sent.inside / 1e6:,.1f}", f"{sent.across / 1e6:,.1f}"


def _times(plan: TrainingPlan) -> Table:
    both = (plan.times, plan.times_busiest)
    rows = [
        ("matrix products at peak, s", *(f"{it.compute:.4f}" for it in both)),
        ("own memory at peak, s", *(f"{it.memory:.4f}" for it in both)),
        ("links in a node at peak, s", *(f"{it.inside:.4f}" for it in both)),
        ("links between nodes at peak, s", *(f"{it.across:.4f}" for it in both)),
        ("bound: all of it overlaps, s", *(f"{it.bound:.4f}" for it in both)),
        ("what binds", *(it.binds for it in both)),
        ("tokens/s at the bound", *(f"{plan.tokens_per_s(it.bound):,.0f}" for it in both)),
        ("MFU at the bound", *(f"{plan.mfu(it.bound):.1%}" for it in both)),
        (f"nothing overlaps, idle {plan.times.idle:.0%}, s", *(f"{it.in_turn:.4f}" for it in both)),
        ("MFU if nothing overlaps", *(f"{plan.mfu(it.in_turn):.1%}" for it in both)),
    ]
    title = f"One step of {plan.batch_tokens:,} tokens on {plan.layout.devices} x {plan.device.name}: at best"
    return Table(
        title=title,
        columns=("", "mean load", f"busiest device ({plan.busiest_load:.2f} x)"),
        rows=tuple(rows),
    )


def serving_tables(plan: ServingPlan) -> Iterator[Table]:
    """Memory and decoding of a service."""
    yield Table(
        title="Memory of the fullest device, GB",
        columns=("part", "GB"),
        rows=(
            ("weights", gb(plan.weights)),
            (f"cache of one sequence of {plan.job.context:,} tokens", f"{plan.cache / 1e9:,.3f}"),
            ("of a device", gb(plan.device.memory_bytes)),
            ("sequences that fit, over all devices", f"{plan.most_sequences:,}"),
        ),
    )
    rows = [
        (
            f"{one.batch:,}",
            f"{one.experts_touched:.1f} of {one.experts:g}",
            f"{one.seconds * 1e3:,.2f}",
            f"{one.tokens_per_s:,.0f}",
            one.binds,
            gb(one.memory) + ("" if one.fits else " DOES NOT FIT"),
        )
        for one in plan.decode
    ]
    yield Table(
        title=f"Decoding at best; prompts: {plan.prompt_tokens_per_s:,.0f} tokens/s at best",
        columns=("sequences", "experts touched in a layer", "ms a token", "tokens/s", "what binds", "GB"),
        rows=tuple(rows),
    )


def offload_table(found: Offload) -> Table:
    """Hit rates and times of experts in the host's memory."""
    rules = {"lru": "least recently used goes", "static": "most used stay", "best": "the best there is (Belady)"}
    rows = [
        (
            words,
            f"{getattr(found.rates, rule):.1%}",
            f"{found.seconds[rule] * 1e3:,.1f}",
            f"{1 / found.seconds[rule]:,.2f}",
        )
        for rule, words in rules.items()
    ]
    return Table(
        title=f"Experts in the host's memory, {found.slots} of each layer in {gb(found.fast_bytes)} GB "
        f"({gb(found.pinned)} GB pinned; routing {found.routing}, {found.tokens:,} tokens)",
        columns=("rule", "hits", "ms a token at best", "tokens/s at best"),
        rows=tuple(rows),
    )


def search_table(found: Found) -> Table:
    """Ranked layouts for training."""
    rows = [
        (
            str(rank),
            described(plan.layout),
            str(plan.job.micro_batch),
            "yes" if plan.job.recompute else "no",
            gb(plan.memory_p99.total),
            f"{plan.mfu(plan.times_busiest.in_turn):.1%}",
            f"{plan.mfu(plan.times_busiest.bound):.1%}",
            plan.times_busiest.binds,
        )
        for rank, plan in enumerate(found.plans, 1)
    ]
    return Table(
        title=f"{found.fitted} of {found.tried} layouts fit into {USABLE:.0%} of the memory"
        + (f"; the smallest needs {gb(found.closest)} GB" if found.closest else ""),
        columns=("", "layout", "micro-batch", "recompute", "GB at p99", "MFU in turn", "MFU bound", "what binds"),
        rows=tuple(rows),
    )


def search_serving_table(found: FoundServing) -> Table:
    """Ranked layouts for serving."""
    rows = []
    for rank, plan in enumerate(found.plans, 1):
        most = max(plan.decode, key=lambda one: one.batch)
        rows.append(
            (
                str(rank),
                described(plan.layout),
                f"{most.batch:,}",
                f"{most.seconds * 1e3:,.2f}",
                f"{most.tokens_per_s:,.0f}",
                gb(most.memory),
                most.binds,
            )
        )
    return Table(
        title=f"{found.fitted} of {found.tried} layouts fit into {USABLE:.0%} of the memory"
        + (f"; the smallest needs {gb(found.closest)} GB" if found.closest else ""),
        columns=("", "layout", "sequences", "ms a token at best", "tokens/s at best", "GB", "what binds"),
        rows=tuple(rows),
    )


def verify_table(found: Sequence[Verified]) -> Table:
    """Memory predicted and measured."""
    rows = [
        (
            one.case,
            "computed anew" if one.recompute else "kept",
            f"{one.kept_predicted / 1e6:,.1f}",
            f"{one.kept_measured / 1e6:,.1f}",
            f"{one.predicted / 1e6:,.1f}",
            f"{one.measured / 1e6:,.1f}",
            f"{one.error:+.1%}",
        )
        for one in found
    ]
    return Table(
        title=f"Peak of a training step, MB; {found[0].tokens:,} tokens",
        columns=("family", "activations", "them, predicted", "measured", "peak, predicted", "measured", "error"),
        rows=tuple(rows),
    )


def published_table(found: Sequence[Standing]) -> Table:
    """What runs reached beside the bound."""
    rows = [(it.name, it.what, _short(it.reached), _short(it.bound), f"{it.share:.0%}") for it in found]
    return Table(
        title="Published runs and the planner's bound",
        columns=("run", "figure", "reached", "bound", "share"),
        rows=tuple(rows),
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def compare_table(plans: Sequence[TrainingPlan] | Sequence[ServingPlan]) -> Table:
    """Models side by side, in the same units."""
    rows: list[tuple[str, ...]] = []
    for name, values in _figures(plans).items():
        rows.append((name, *values))
    return Table(title="Side by side", columns=("", *(plan.model for plan in plans)), rows=tuple(rows))


def _figures(plans: Sequence[TrainingPlan] | Sequence[ServingPlan]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}

    def put(name: str, value: str) -> None:
        found.setdefault(name, []).append(value)

    for plan in plans:
        put("layout", described(plan.layout))
        if isinstance(plan, TrainingPlan):
            put("memory at mean load, GB", gb(plan.memory.total))
            put("memory at p99 load, GB", gb(plan.memory_p99.total))
            put("fits", "yes" if plan.fits else "no")
            put("GFLOPs a token, forward and backward", f"{plan.model_flops / 1e9:,.2f}")
            put("tokens/s at the bound", f"{plan.tokens_per_s():,.0f}")
            put("what binds", plan.times.binds)
            put("MFU at the bound", f"{plan.mfu():.1%}")
            put("MFU if nothing overlaps", f"{plan.mfu(plan.times.in_turn):.1%}")
        else:
            put("weights on a device, GB", gb(plan.weights))
            put("cache of a sequence, GB", f"{plan.cache / 1e9:,.3f}")
            for one in plan.decode:
                put(f"ms a token at best, {one.batch:,} sequences", f"{one.seconds * 1e3:,.2f}")
                put(f"tokens/s at best, {one.batch:,} sequences", f"{one.tokens_per_s:,.0f}")
    return found
