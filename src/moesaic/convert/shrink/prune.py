"""Take the least useful experts out of a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.convert.checkpoint.source import Source, open_source
from moesaic.convert.layout.counts import check_choices, per_layer, shrinkable, with_counts
from moesaic.convert.layout.layouts import MoELayout
from moesaic.convert.run import Converted, convert
from moesaic.convert.shrink.calibration import Batch, statistics
from moesaic.convert.shrink.grouping import check_count
from moesaic.convert.shrink.saliency import By, ExpertStats, super_experts
from moesaic.convert.steps import Change, Step
from moesaic.convert.weights.combine import take
from moesaic.core.errors import ConfigError

Protect = Literal["super-experts"] | Mapping[str, Sequence[int]]


def prune_experts(
    source: str | Path | PreTrainedModel,
    keep: int | float | list[int],
    *,
    by: By = "reap",
    batches: Iterable[Batch] | None = None,
    stats: Mapping[str, ExpertStats] | None = None,
    protect: Protect | None = None,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    probe: Any = "random",
    shard_bytes: int | None = None,
) -> Converted:
    """Remove the least useful experts of each layer, with their rows of the router.

    Tokens that chose an expert that is gone choose the next best of those that stay. Where a router chooses among
    groups of experts, each group keeps as many, so that the groups stay what they were. What no token of the text ever
    used goes without a trace on that text, where weights are normalised over the chosen.

    Args:
        source: a folder, or a model in memory, which stays as it is: one of ours, or of a family of transformers.
        keep: experts that each layer keeps; or a share, above 0 and at most 1; or a number for each layer in depth
            order, where the model can have that (ours can).
        by: what experts are ranked by; see :meth:`~moesaic.convert.shrink.saliency.ExpertStats.saliency`.
        batches: text to rank them on, as the model takes it; see :func:`moesaic.convert.calibrate`.
        stats: what that gave, in place of ``batches``.
        protect: "super-experts" keeps those of :func:`~moesaic.convert.shrink.saliency.super_experts`; or indices to
            keep, by the path of a layer's experts.
        max_tokens: of the batches to read.
        out: folder to write; None for a model in memory.
        probe: what the old and the new model are compared on; see :func:`~moesaic.convert.run.convert`.
        shard_bytes: see there.
    Raises:
        ConfigError: if the model or a number does not allow it, or neither ``batches`` nor ``stats`` are given.
        CheckpointError: see :func:`~moesaic.convert.run.convert`.

    Source: Lasby et al. 2025, "REAP the Experts", arXiv:2510.13999. Within groups: as llm-compressor does.
    """
    opened = open_source(source)
    layouts = shrinkable(opened.blueprint)
    counts = per_layer(layouts, keep, "keep")
    # All that can be refused is refused before the text is read.
    for path, layout in layouts.items():
        check_count(layout.num_experts, counts[path], layout.groups, "keep")
    check_choices(layouts, counts)
    seen = statistics(opened, layouts, batches=batches, stats=stats, max_tokens=max_tokens, what="prune_experts")
    protected = _protected(layouts, seen, protect)
    kept = {
        path: keep_best(seen[path].saliency(by), counts[path], groups=layout.groups, protect=protected[path])
        for path, layout in layouts.items()
    }
    change = pruned(opened, kept, method=f"prune_experts by {by}")
    return convert(opened, change, out, probe=probe, shard_bytes=shard_bytes)


def pruned(source: Source, kept: Mapping[str, Tensor], *, method: str = "prune_experts") -> Change:
    """The change that leaves these experts of each layer, in this order.

    Args:
        source: the checkpoint.
        kept: indices by the path of each layer's experts.
        method: name for the receipt.
    Raises:
        ConfigError: if the family cannot have so many.
    """
    layouts = shrinkable(source.blueprint)
    counts = {path: len(index_E) for path, index_E in kept.items()}
    check_choices(layouts, counts)
    notes = [
        f"{path}: kept {len(kept[path])} of {layout.num_experts} experts; pruned {_gone(layout, kept[path])}"
        for path, layout in layouts.items()
    ]
    return Change(
        method=method,
        config=with_counts(source, layouts, counts),
        steps=tuple(_step(layout, kept[path]) for path, layout in layouts.items()),
        notes=tuple(notes),
    )


def keep_best(score_E: Tensor, keep: int, *, groups: int = 1, protect: Sequence[int] = ()) -> Tensor:
    """The experts with the highest scores, rising indices, int64; the lowest index among equals.

    Args:
        score_E: what each is worth.
        keep: how many.
        groups: equal, neighbouring groups that keep equally many each.
        protect: experts that stay whatever their score.
    Raises:
        ConfigError: if more are protected than may stay, or groups cannot keep equally many.
    """
    check_count(len(score_E), keep, groups, "keep")
    score_E = score_E.double().clone()
    score_E[list(protect)] = torch.inf
    score_GE, each = score_E.view(groups, -1), keep // groups
    crowded = (score_GE == torch.inf).sum(dim=1)
    if int(crowded.max()) > each:
        where = "" if groups == 1 else " of one group"
        raise ConfigError(
            f"{int(crowded.max())} experts{where} are protected, and {each} are to be kept. "
            "Keep more, or protect fewer."
        )
    best_GE = score_GE.argsort(dim=1, descending=True, stable=True)[:, :each].sort(dim=1).values
    start_G1 = torch.arange(groups)[:, None] * score_GE.shape[1]
    return (best_GE + start_G1).flatten()


def _protected(
    layouts: Mapping[str, MoELayout], stats: Mapping[str, ExpertStats], protect: Protect | None
) -> dict[str, list[int]]:
    if protect is None:
        return {path: [] for path in layouts}
    if isinstance(protect, str):
        if protect != "super-experts":
            raise ConfigError(
                f"protect must be 'super-experts', or indices by the path of a layer's experts, got {protect!r}. "
                "Leave it out to protect none."
            )
        masks = super_experts({path: stats[path] for path in layouts})
        return {path: mask.nonzero().flatten().tolist() for path, mask in masks.items()}
    unknown = sorted(set(protect) - set(layouts))
    if unknown:
        raise ConfigError(
            f"protect names layers by the path of their experts, such as {next(iter(layouts))}, got {unknown[0]}. "
            "See the keys of calibrate's result."
        )
    return {path: list(protect.get(path, ())) for path in layouts}


def _step(layout: MoELayout, index_E: Tensor) -> Step:
    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return select(layout, tensors, index_E)

    # Moments have the shapes of their weights, and go where these go.
    return Step(takes=layout.names, gives=(*layout.written(len(index_E)), *layout.rows), run=run, moments=run)


def select(layout: MoELayout, tensors: Mapping[str, Tensor], index_E: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer that has only these experts, of weights or of what has their shapes."""
    made = layout.write(take(layout.read(tensors), index_E)) if layout.weights[0] in tensors else {}
    for name, dims in layout.rows.items():
        if name in tensors:
            made[name] = tensors[name]
            for dim in dims:
                made[name] = made[name].index_select(dim, index_E.to(tensors[name].device))
    return made


def _gone(layout: MoELayout, index_E: Tensor) -> str:
    gone = sorted(set(range(layout.num_experts)) - set(index_E.tolist()))
    return ", ".join(map(str, gone)) or "none"
