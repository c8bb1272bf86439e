"""A plan as a picture: memory by part beside what a device has, and what the time of a step or a token comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.core.errors import BackendError, ConfigError
from moesaic.core.files import cannot_write, replacing_file
from moesaic.plan.serving import ServingPlan
from moesaic.plan.training import TrainingPlan

# Okabe and Ito's colours, which differ to the colour-blind too.
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999")


def plot(plans: Sequence[TrainingPlan] | Sequence[ServingPlan], path: str | Path) -> Path:
    """Draw plans of one kind.

    Args:
        plans: one, or several to compare.
        path: of the picture; its ending says the form (svg, png, pdf).
    Raises:
        BackendError: if matplotlib is not installed.
        ConfigError: if the ending is none of these.
        CheckpointError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"A plot's name must end with .svg, .png or .pdf, got {path.name!r}. Try plan.svg.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError(
            "A plot needs matplotlib, which is not installed. Try: pip install 'moesaic[report]'"
        ) from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    training = [plan for plan in plans if isinstance(plan, TrainingPlan)]
    serving = [plan for plan in plans if isinstance(plan, ServingPlan)]
    if training:
        _memory(left, training)
        _times(right, training)
    else:
        _latency(left, serving)
        _throughput(right, serving)
    try:
        with replacing_file(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150)
    except OSError as error:
        raise cannot_write("plot", path, error) from error
    return path


def _stacked(axes: Any, names: Sequence[str], parts: Sequence[dict[str, float]], unit: float) -> None:
    start = [0.0] * len(names)
    for colour, part in zip(_COLOURS, parts[0], strict=False):
        sizes = [one[part] / unit for one in parts]
        if any(sizes):
            axes.barh(names, sizes, left=start, label=part, color=colour)
        start = [done + size for done, size in zip(start, sizes, strict=True)]
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)


def _memory(axes: Any, plans: Sequence[TrainingPlan]) -> None:
    names, parts = [], []
    for plan in plans:
        names += [f"{plan.model}\nmean load", f"{plan.model}\np99 load"]
        parts += [plan.memory.as_dict(), plan.memory_p99.as_dict()]
    _stacked(axes, names, parts, 1e9)
    device = plans[0].device
    axes.axvline(device.memory_bytes / 1e9, color="black", linestyle="--", linewidth=1)
    axes.set_title("Memory of the fullest device, GB")
    axes.set_xlabel(f"dashed: {device.name} has {device.memory_bytes / 1e9:.0f} GB")


def _times(axes: Any, plans: Sequence[TrainingPlan]) -> None:
    names = [plan.model for plan in plans]
    parts = [
        {
            "products": it.compute,
            "own memory": it.memory,
            "links in a node": it.inside,
            "links between nodes": it.across,
        }
        for it in (plan.times for plan in plans)
    ]
    _stacked(axes, names, parts, 1.0)
    for row, plan in enumerate(plans):
        axes.plot([plan.times.bound] * 2, [row - 0.4, row + 0.4], color="black", linewidth=2)
    axes.set_title("One step at stated peaks, s")
    axes.set_xlabel("whole bar: nothing overlaps; black mark: all does (the bound)")


def _latency(axes: Any, plans: Sequence[ServingPlan]) -> None:
    for colour, plan in zip(_COLOURS, plans, strict=False):
        batches = [one.batch for one in plan.decode]
        axes.plot(batches, [one.seconds * 1e3 for one in plan.decode], color=colour, alpha=0.4, label=plan.model)
        fitting = [one for one in plan.decode if one.fits]
        axes.plot([one.batch for one in fitting], [one.seconds * 1e3 for one in fitting], "o", color=colour)
    _sequences(axes, plans)
    axes.set_ylim(bottom=0)
    axes.set_title("Time of an output token at best, ms")
    axes.set_xlabel("sequences together; dots: what fits into memory")
    axes.legend(frameon=False)


def _throughput(axes: Any, plans: Sequence[ServingPlan]) -> None:
    for colour, plan in zip(_COLOURS, plans, strict=False):
        fitting = [one for one in plan.decode if one.fits]
        axes.plot(
            [one.batch for one in plan.decode], [one.tokens_per_s for one in plan.decode], color=colour, alpha=0.4
        )
        axes.plot([one.batch for one in fitting], [one.tokens_per_s for one in fitting], "o", color=colour)
    _sequences(axes, plans)
    axes.set_yscale("log")
    axes.set_title("Tokens per second at best")
    axes.set_xlabel("sequences together; dots: what fits into memory")


def _sequences(axes: Any, plans: Sequence[ServingPlan]) -> None:
    axes.set_xscale("log", base=2)
    batches = sorted({one.batch for plan in plans for one in plan.decode})
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
