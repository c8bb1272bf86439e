"""Layouts that fit, best first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from moesaic.core.errors import ConfigError
from moesaic.plan.devices import Device
from moesaic.plan.layout import Layout
from moesaic.plan.memory import Job
from moesaic.plan.popularity import Popularity
from moesaic.plan.serving import ServeJob, ServingPlan, serve
from moesaic.plan.training import TrainingPlan, train
from moesaic.zoo import ModelShape

USABLE = 0.9
"""Share of a device's memory that tensors may fill: the rest is for the runtime and for gaps between tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search came to.

    Attributes:
        plans: that fit, best first.
        tried: layouts that divide.
        fitted: of these, how many fit.
        closest: the least memory of those that do not fit, in bytes; 0 if one fits.
    """

    plans: tuple[TrainingPlan, ...]
    tried: int
    fitted: int
    closest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundServing:
    """What a search for serving came to; see :class:`Found`."""

    plans: tuple[ServingPlan, ...]
    tried: int
    fitted: int
    closest: float


def search(
    shape: ModelShape,
    device: Device,
    devices: int,
    job: Job,
    popularity: Popularity,
    *,
    top: int = 10,
    say: Callable[[int, int], None] = lambda _done, _all: None,
) -> Found:
    """Try layouts for training and rank those that fit.

    Ranked by the time of a step in which nothing overlaps and each layer waits for its busiest device: the bound alone
    is the same for most. All train the same batch, so what is compared is the time of the same step.

    Args:
        shape: of the model.
        device: that there are many of.
        devices: how many.
        job: what is trained; its micro-batch and whether it computes anew are varied. Without a batch, one of about 4
            million tokens.
        popularity: of experts.
        top: how many to give.
        say: told how many are done, and of how many.
    """
    if job.batch is None:
        job = replace(job, batch=devices * max(1, round(4e6 / job.context / devices)))
    tries = list(_tries(shape, device, devices, job))
    fitting: list[TrainingPlan] = []
    least = math.inf
    for done, (layout, one) in enumerate(tries):
        plan = train(shape, device, layout, one, popularity)
        need = plan.memory_p99.total
        if need <= USABLE * device.memory_bytes:
            fitting.append(plan)
        least = min(least, need)
        say(done + 1, len(tries))
    fitting.sort(key=lambda plan: (plan.times_busiest.in_turn, plan.memory_p99.total))
    return Found(
        plans=tuple(fitting[:top]),
        tried=len(tries),
        fitted=len(fitting),
        closest=0.0 if fitting or not tries else least,
    )


def _tries(shape: ModelShape, device: Device, devices: int, job: Job) -> Iterator[tuple[Layout, Job]]:
    for layout in layouts(shape, device, devices):
        for shares in sorted({1, layout.expert_copies, layout.dp}):
            if layout.dp % shares:
                continue
            for shard in ("all", "optimizer") if shares > 1 else ("all",):
                split = replace(layout, fsdp=shares, shard=shard)
                for micro in (1, 2, 4):
                    if job.batch is None or job.batch % (split.dp * micro):
                        continue
                    for recompute in (False, True):
                        yield split, replace(job, micro_batch=micro, recompute=recompute)


def layouts(shape: ModelShape, device: Device, devices: int) -> Iterator[Layout]:
    """Give all layouts that divide, without splitting of states: tp within a node, at most 16 stages."""
    counts = [experts.num_experts for experts in shape.mixtures]
    for tp in (1, 2, 4, 8):
        for pp in range(1, min(16, shape.depth) + 1):
            if tp > device.node or devices % (tp * pp):
                continue
            stage = devices // pp
            for ep in range(1, stage + 1):
                if stage % ep or (counts and math.gcd(*counts) % ep) or (not counts and ep > 1):
                    continue
                layout = Layout(devices=devices, tp=tp, pp=pp, ep=ep, uneven=True)
                try:
                    layout.check(shape)
                except ConfigError:
                    continue
                yield layout


def search_serving(
    shape: ModelShape,
    device: Device,
    devices: int,
    job: ServeJob,
    popularity: Popularity,
    *,
    top: int = 10,
    say: Callable[[int, int], None] = lambda _done, _all: None,
) -> FoundServing:
    """Try layouts for serving and rank those in which the largest batch fits by its time per output token."""
    fitting, least = [], math.inf
    tries = list(layouts(shape, device, devices))
    for done, layout in enumerate(tries):
        plan = serve(shape, device, layout, job, popularity)
        say(done + 1, len(tries))
        need = max(one.memory for one in plan.decode)
        least = min(least, need)
        if need <= USABLE * device.memory_bytes:
            fitting.append(plan)
    fitting.sort(key=lambda plan: (max(plan.decode, key=lambda one: one.batch).seconds, plan.weights))
    return FoundServing(
        plans=tuple(fitting[:top]),
        tried=len(tries),
        fitted=len(fitting),
        closest=0.0 if fitting or not tries else least,
    )
