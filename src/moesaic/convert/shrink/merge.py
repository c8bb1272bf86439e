"""Join experts that do nearly the same into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.convert.checkpoint.source import Source, open_source
from moesaic.convert.layout.counts import check_choices, per_layer, shrinkable, with_counts
from moesaic.convert.layout.layouts import MoELayout
from moesaic.convert.progress import tracked
from moesaic.convert.run import Converted, convert
from moesaic.convert.shrink.calibration import Batch, statistics
from moesaic.convert.shrink.grouping import Cluster, check_count, distances, grouped
from moesaic.convert.shrink.saliency import ExpertStats
from moesaic.convert.steps import Change, Step
from moesaic.convert.weights.combine import aligned_orders, average, permuted, shares, take
from moesaic.convert.weights.stack import ExpertStack
from moesaic.core.errors import ConfigError

Average = Literal["frequency", "saliency", "uniform"]
Rows = Literal["mean", "dominant"]


def merge_experts(
    source: str | Path | PreTrainedModel,
    to: int | float | list[int],
    *,
    cluster: Cluster = "outputs",
    average: Average = "frequency",
    router: Rows = "mean",
    align: bool = True,
    batches: Iterable[Batch] | None = None,
    stats: Mapping[str, ExpertStats] | None = None,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    probe: Any = "random",
    shard_bytes: int | None = None,
) -> Converted:
    """Cluster each layer's experts, and put one expert in the place of each cluster: the average of its weights.

    The router keeps one row for each cluster, so that a token that wanted any of its members wants the merged expert.
    Two members that a token would both have chosen are one choice now, and the choice that is free goes to the next
    best expert: a fully shared routing, as in HC-SMoE's own code, where the router keeps all its rows and several rows
    lead to one expert, is something that no family can be saved as. Exact where all experts of a layer are the same and
    a token's weights add up to the same number always; else the receipt tells the gap.

    Args:
        source: a folder, or a model in memory, which stays as it is: one of ours, or of a family of transformers.
        to: experts that each layer shall have; or a share of those that it has; or a number for each layer.
        cluster: what experts are compared by; see :func:`~moesaic.convert.shrink.grouping.distances`.
        average: what each member counts in its cluster: "frequency", the tokens that it served; "saliency", all that it
            added to the layer's output; "uniform".
        router: the cluster's row: "mean" of its members' rows, weighted as the members are, or the row of the
            "dominant" member. A mean of unlike rows is short, and a short row's logits are small.
        align: bring hidden neurons of a cluster's members in the order of the heaviest one's before averaging; takes
            time cubic in F. Without it experts that began as copies are averaged as they stand.
        batches: text to see what experts do on; every expert runs on every token for "outputs" and "functions". None
            for "weights" or "router" with "uniform", which need none.
        stats: from :func:`~moesaic.convert.shrink.calibration.calibrate`, in place of ``batches``.
        max_tokens: of the batches to read.
        out: folder to write; None for a model in memory.
        probe: what the old and the new model are compared on; see :func:`~moesaic.convert.run.convert`.
        shard_bytes: see there.
    Raises:
        ConfigError: if the model, a number or a method does not allow it, or statistics are needed and not there.
        CheckpointError: see :func:`~moesaic.convert.run.convert`.

    Source: Chen et al. 2024, "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", arXiv:2410.08589;
    alignment and frequencies: Li et al. 2023, "Merge, Then Compress", arXiv:2310.01334.
    """
    if average not in get_args(Average) or router not in get_args(Rows):
        raise ConfigError(
            f"average must be one of {', '.join(get_args(Average))} and router one of {', '.join(get_args(Rows))}, got "
            f"{average!r} and {router!r}. Leave them out for 'frequency' and 'mean'."
        )
    opened = open_source(source)
    layouts = shrinkable(opened.blueprint)
    counts = per_layer(layouts, to, "merge to")
    for path, layout in layouts.items():
        check_count(layout.num_experts, counts[path], layout.groups, "merge to")
    check_choices(layouts, counts)
    if cluster in ("weights", "router") and average == "uniform":
        seen: Mapping[str, ExpertStats | None] = dict.fromkeys(layouts)
    else:
        every = cluster in ("outputs", "functions")
        told = {"batches": batches, "stats": stats, "max_tokens": max_tokens}
        seen = statistics(opened, layouts, what="merge_experts", every_expert=every, **told)  # type: ignore[arg-type]
    plans = {}
    for path, layout in tracked(layouts.items(), "clustering experts", len(layouts)):
        stack, rows_ED = _needed(opened, layout, align=align, cluster=cluster)
        distance_EE = distances(cluster, stats=seen[path], stack=stack, rows_ED=rows_ED)
        clusters = grouped(distance_EE, counts[path], groups=layout.groups)
        plans[path] = Merging.of(clusters, _weights(seen[path], layout.num_experts, average), stack if align else None)
    change = merged(opened, plans, router=router, method=f"merge_experts by {cluster}, {average} average")
    return convert(opened, change, out, probe=probe, shard_bytes=shard_bytes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Merging:
    """What becomes of one layer's experts.

    Attributes:
        clusters: members of each new expert.
        weight_E: what each old expert counts in its cluster.
        order_EF: in which order each old expert's neurons are taken; None for as they stand.
    """

    clusters: Sequence[Sequence[int]]
    weight_E: Tensor
    order_EF: Tensor | None

    @classmethod
    def of(cls, clusters: Sequence[Sequence[int]], weight_E: Tensor, stack: ExpertStack | None) -> Merging:
        """Line up the neurons of a stack's experts within clusters; None for as they stand."""
        order_EF = None if stack is None else aligned_orders(stack, clusters, weight_E)
        return cls(clusters=clusters, weight_E=weight_E, order_EF=order_EF)

    def experts(self, stack: ExpertStack) -> ExpertStack:
        """The merged experts."""
        if self.order_EF is not None:
            stack = permuted(stack, self.order_EF)
        index = [torch.tensor(members) for members in self.clusters]
        return ExpertStack.of([average(take(stack, members), self.weight_E[members]) for members in index])

    def row(self, rows: Tensor, dim: int, router: Rows) -> Tensor:
        """One row of a router's tensor for each cluster."""
        rows = rows.movedim(dim, 0)
        wide = torch.promote_types(rows.dtype, torch.float32)
        made = []
        for members in self.clusters:
            share = shares(self.weight_E[list(members)])
            if router == "dominant":
                share = torch.nn.functional.one_hot(share.argmax(), len(members)).double()
            made.append(torch.tensordot(share.to(rows.device, wide), rows[list(members)].to(wide), dims=1))
        return torch.stack(made).to(rows.dtype).movedim(0, dim)


def merged(
    source: Source, plans: Mapping[str, Merging], *, router: Rows = "mean", method: str = "merge_experts"
) -> Change:
    """The change that merges the experts of each layer as planned.

    Args:
        source: the checkpoint.
        plans: by the path of each layer's experts.
        router: see :func:`merge_experts`.
        method: name for the receipt.
    Raises:
        ConfigError: if the family cannot have so many experts.
    """
    layouts = shrinkable(source.blueprint)
    counts = {path: len(plan.clusters) for path, plan in plans.items()}
    check_choices(layouts, counts)
    notes = [
        f"{path}: {layout.num_experts} experts merged to {counts[path]}; {_in_words(plans[path])}"
        for path, layout in layouts.items()
    ]
    return Change(
        method=method,
        config=with_counts(source, layouts, counts),
        steps=tuple(_step(layout, plans[path], router) for path, layout in layouts.items()),
        notes=(f"router rows: {router} of each cluster's", *notes),
    )


def _step(layout: MoELayout, plan: Merging, router: Rows) -> Step:
    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = layout.write(plan.experts(layout.read(tensors))) if layout.weights[0] in tensors else {}
        for name, dims in layout.rows.items():
            if name in tensors:
                made[name] = tensors[name]
                for dim in dims:
                    made[name] = plan.row(made[name], dim, router)
        return made

    gives = (*layout.written(len(plan.clusters)), *layout.rows)
    # The moments of an average are taken as the average of the moments.
    return Step(takes=layout.names, gives=gives, run=run, moments=run)


def _needed(
    source: Source, layout: MoELayout, *, align: bool, cluster: Cluster
) -> tuple[ExpertStack | None, Tensor | None]:
    """What of a layer's weights has to be read to plan its merging."""
    stack = None
    if align or cluster == "weights":
        stack = layout.read({name: source.read(name) for name in layout.weights})
    if cluster != "router":
        return stack, None
    rows = []
    for name, dims in layout.rows.items():
        if len(source.names[name].shape) == 2 and dims == (0,):
            rows.append(source.read(name).double())
    if not rows:
        raise ConfigError(
            f"cluster='router' compares experts by their rows of the router, and {layout.block} has none. "
            "Use cluster='outputs'."
        )
    return stack, torch.cat(rows, dim=1)


def _weights(stats: ExpertStats | None, num_experts: int, average: Average) -> Tensor:
    if stats is None or average == "uniform":
        return torch.ones(num_experts, dtype=torch.float64)
    return stats.count_E.double() if average == "frequency" else stats.contribution_E


def _in_words(plan: Merging) -> str:
    return ", ".join("+".join(map(str, members)) for members in plan.clusters)
