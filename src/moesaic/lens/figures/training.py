"""Pictures of training: the losses of the runs side by side, and how the routers settled down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesaic.lens import palette
from moesaic.lens.drawing import Picture, draw, label_ends, panels
from moesaic.lens.layers import layer_labels
from moesaic.lens.measures.measured import FloatArray
from moesaic.lens.runs import Run, Series
from moesaic.lens.tokens import brief, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMED_LAYERS = 8
_MOST_STACKED_EXPERTS = 12
_DROPPED, _ENTROPY = "choices dropped for lack of room, % of all choices", "router entropy, % of ln(E)"


def run_colours(runs: list[Run]) -> dict[str, str]:
    """A colour for each run: the first sparse and the first dense one have their own."""
    spare = iter(palette.OTHERS * (1 + len(runs)))
    colours: dict[str, str] = {}
    for run in runs:
        own = palette.SPARSE if run.is_sparse else palette.DENSE
        colours[run.label] = own if own not in colours.values() else next(spare)
    return colours


def loss_curves(runs: list[Run]) -> Picture:
    """Training loss, raw and smoothed, above held-out bits per byte."""
    colours = run_colours(runs)
    trained = [run for run in runs if np.isfinite(run.loss).any()]
    evaluated = [run for run in runs if np.isfinite(_mean_bits(run)).any()]
    smooth = {run.label: _smooth(run.loss) for run in trained}

    def paint(figure: Figure) -> None:
        axes = panels(figure, bool(trained) + bool(evaluated), sharex=True)
        axes[-1].set_xlabel("optimizer step")
        if trained:
            panel = axes[0]
            for run in trained:
                panel.plot(run.step, run.loss, color=colours[run.label], linewidth=0.7, alpha=0.35)
                panel.plot(run.step, smooth[run.label], color=colours[run.label])
            panel.set_title("training loss, nats per token")
            _leave_out_the_start(panel, list(smooth.values()))
            _name_runs(panel, smooth, colours)
        if evaluated:
            panel = axes[-1]
            for run in evaluated:
                panel.plot(run.eval_step, _mean_bits(run), "o-", color=colours[run.label], markersize=3.5)
            panel.set_title("held-out text, bits per byte (mean over domains)")
            _leave_out_the_start(panel, [_mean_bits(run) for run in evaluated])
            _name_runs(panel, {run.label: _mean_bits(run) for run in evaluated}, colours)

    counts = ", ".join(f"{one_line(run.label)} {len(run.loss):,} and {len(run.eval_step):,}" for run in runs)
    return draw(
        "loss",
        "How well the models learn to predict the text",
        "Lower is better. Thin line: each logged training step; thick line: running mean over a thirtieth of them. "
        "A mixture's training loss has its balance losses in it; held-out bits do not. "
        f"n (training lines and evaluations): {counts}. Guessing each byte at random costs 8 bits per byte.",
        0.4 + 1.9 * (bool(trained) + bool(evaluated)),
        paint,
    )


def bits_by_domain(runs: list[Run]) -> Picture:
    """The last held-out bits per byte of every run, domain by domain."""
    colours = run_colours(runs)
    finals = {run.label: run.last_bits_per_byte for run in runs}
    captions = [brief(one_line(run.caption)) for run in runs]
    columns = max(1, min(4, len(runs), 48 // max(map(len, captions))))
    names = [name for name in dict.fromkeys(name for final in finals.values() for name in final) if name != "mean"]
    if any("mean" in final for final in finals.values()):
        names.append("mean")

    def paint(figure: Figure) -> None:
        (panel,) = panels(figure, 1)
        for row, name in enumerate(names):
            values = {label: final[name] for label, final in finals.items() if name in final}
            panel.plot([min(values.values()), max(values.values())], [row, row], color=palette.LINE, linewidth=5)
            for place, (label, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
                panel.plot(value, row, "o", color=colours[label], markersize=8, zorder=3)
                first, last = place == 0, place == len(values) - 1
                if first or last:
                    panel.annotate(
                        f"{value:.3f}",
                        (value, row),
                        xytext=(-9 if first and len(values) > 1 else 9, 0),
                        textcoords="offset points",
                        ha="right" if first and len(values) > 1 else "left",
                        va="center",
                        fontsize=8.5,
                    )
        panel.set_yticks(range(len(names)), [brief(one_line(name)) for name in names])
        panel.tick_params(axis="y", labelcolor=palette.INK)
        panel.set_ylim(len(names) - 0.5, -0.6)
        panel.margins(x=0.22)
        panel.set_xlabel("bits per byte of held-out text (lower is better)")
        panel.grid(axis="x")
        panel.spines["left"].set_visible(False)
        handles = [
            panel.plot([], [], "o", color=colours[run.label], label=brief(one_line(run.caption)))[0] for run in runs
        ]
        panel.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, handletextpad=0.2)

    return draw(
        "by_domain",
        "Held-out bits per byte, by domain",
        "Each dot is one run's last evaluation; text it has never been trained on. "
        "Guessing each byte at random costs 8 bits per byte. n = 1 run each: another seed would move the dots.",
        0.6 + 0.34 * len(names) + 0.16 * -(-len(runs) // columns),
        paint,
    )


def imbalance_over_training(run: Run) -> Picture | None:
    """The busiest expert's load over the mean, by layer; None where the run does not tell."""
    if not run.max_over_mean:
        return None
    num_experts = max((series.shape[1] for series in run.load.values()), default=0)
    worst = f", {num_experts} is one expert doing everything" if num_experts else ""

    def paint(figure: Figure) -> None:
        (panel,) = panels(figure, 1)
        panel.axhline(1, color=palette.INK, linewidth=1, linestyle=(0, (3, 2)))
        panel.yaxis.set_major_formatter("{x:g}×")
        panel.set_xlabel("optimizer step")
        _layer_lines(panel, run, run.max_over_mean, range_y=(0.9, None))

    return draw(
        "imbalance",
        "How uneven the load is while the model learns",
        f"The busiest expert's load over the mean of all experts, idle ones included. Dashed: 1, perfect "
        f"balance{worst}. Each point is one logged step (n = {len(run.step):,}), smoothed over a thirtieth of them.",
        2.5,
        paint,
    )


def load_film(run: Run) -> Picture | None:
    """Share of every expert over the steps, in the first, middle and last layer; None where the run does not tell."""
    if not run.load:
        return None
    names = list(run.load)
    picked = list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
    labels = layer_labels(names)
    most = max(run.load[name].shape[1] for name in picked)
    colours = [light for light, _ in palette.expert_colours(most)]

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(picked), sharex=True)
        for panel, name in zip(axes, picked, strict=True):
            share = np.nan_to_num(run.load[name]) * 100
            if share.shape[1] <= _MOST_STACKED_EXPERTS:
                _stack(panel, run.step, share, colours)
            else:
                panel.pcolormesh(run.step, np.arange(share.shape[1]), share.T, cmap="cividis", rasterized=True)
                panel.set_ylabel("expert")
            panel.set_title(labels[name])
        axes[-1].set_xlabel("optimizer step")

    stacked = most <= _MOST_STACKED_EXPERTS
    return draw(
        "film",
        "Who does the work, from the first step to the last",
        (
            "Each band is one expert; its height is its share of the layer's choices, and the small numbers name it. "
            f"A uniform router gives every band {100 / most:.3g} %. "
            if stacked
            else "Each row is one expert; the brighter, the larger its share of the layer's choices. "
            f"A uniform router gives every expert {100 / most:.3g} %. "
        )
        + f"n = {len(run.step):,} logged steps.",
        0.35 + 1.3 * len(picked),
        paint,
        num_experts=most,
    )


def drops_and_entropy(run: Run) -> Picture | None:
    """Share of dropped rows, and how undecided the routers are, by layer; None where the run tells neither."""
    dropped = {name: 100 * line for name, line in run.drop_rate.items() if np.nansum(line) > 0}
    none = "No choice was dropped at any logged step. " if run.drop_rate and not dropped else ""
    # Without the layer's load the number of experts, and so the largest entropy, is not known.
    entropy = {
        name: 100 * line / np.log(run.load[name].shape[1])
        for name, line in run.router_entropy.items()
        if name in run.load and run.load[name].shape[1] > 1
    }
    shown = [(series, title) for series, title in ((dropped, _DROPPED), (entropy, _ENTROPY)) if series]
    if not shown:
        return None

    def paint(figure: Figure) -> None:
        axes = panels(figure, len(shown), sharex=True)
        axes[-1].set_xlabel("optimizer step")
        for panel, (_, title) in zip(axes, shown, strict=True):
            panel.set_title(title)
            panel.yaxis.set_major_formatter("{x:g} %")
            if title == _ENTROPY:
                panel.axhline(100, color=palette.INK, linewidth=1, linestyle=(0, (3, 2)))
        for panel, (series, title) in zip(axes, shown, strict=True):
            _layer_lines(panel, run, series, range_y=(0, 105 if title == _ENTROPY else None))

    return draw(
        "drops_entropy",
        "What is dropped, and how sure the routers are" if dropped else "How sure the routers are",
        f"{none}Entropy: of each token's probabilities over all experts, averaged; 100 % (dashed) is a router that "
        f"cannot decide, 0 % one that always does. n = {len(run.step):,} logged steps, smoothed over a thirtieth of "
        "them.",
        0.3 + 1.75 * len(shown),
        paint,
    )


def _stack(panel: Axes, step: FloatArray, share: FloatArray, colours: list[str]) -> None:
    panel.stackplot(step, share.T, colors=colours, edgecolor=palette.PAPER, linewidth=0.5)
    panel.set_ylim(0, 100)
    panel.set_xlim(step.min(), max(step.max(), step.min() + 1))
    panel.yaxis.set_major_formatter("{x:.0f} %")
    panel.set_yticks([0, 50, 100])
    middles = share[-1].cumsum() - share[-1] / 2
    for expert, middle in enumerate(middles):
        if share[-1, expert] >= 6:
            panel.annotate(
                str(expert), (1, middle), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=7, color=palette.MUTED, annotation_clip=False,
            )  # fmt: skip


def _layer_lines(panel: Axes, run: Run, series: Series, range_y: tuple[float, float | None]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    labels = layer_labels(list(series))
    # Middle tones all the way, to be seen on light and on dark.
    tones = LinearSegmentedColormap.from_list("depth", palette.DEPTH)
    depth = np.linspace(0, 1, max(2, len(series)))
    ends = []
    for place, (name, values) in enumerate(series.items()):
        colour = to_hex(tones(depth[place]))
        smooth = _smooth(values)
        panel.plot(run.step, smooth, color=colour, linewidth=1.6)
        finite = smooth[np.isfinite(smooth)]
        if len(finite):
            ends.append((float(finite[-1]), labels[name], colour))
    panel.grid(axis="y")
    panel.spines["left"].set_visible(False)
    # Of many layers only the first and the last are named: the colours run from one to the other.
    if len(ends) > _MOST_NAMED_LAYERS:
        ends = [ends[0], ends[-1]]
    low, high = range_y
    panel.set_ylim(low, max(high or 0.0, panel.get_ylim()[1], 1.0))
    label_ends(panel, ends)


def _name_runs(panel: Axes, curves: dict[str, FloatArray], colours: dict[str, str]) -> None:
    panel.grid(axis="y")
    panel.spines["left"].set_visible(False)
    ends = [(curve[np.isfinite(curve)][-1], one_line(label), colours[label]) for label, curve in curves.items()]
    label_ends(panel, ends)


def _leave_out_the_start(panel: Axes, curves: list[FloatArray]) -> None:
    """Give the height to where the curves differ: the first tenth, where everything falls, may leave the frame."""
    later = np.concatenate([curve[len(curve) // 10 :] for curve in curves])
    later = later[np.isfinite(later)]
    if len(later) < 2 or np.ptp(later) == 0:
        return
    low, high = later.min(), later.max()
    panel.set_ylim(low - 0.08 * (high - low), high + 0.05 * (high - low))


def _mean_bits(run: Run) -> FloatArray:
    if "mean" in run.bits_per_byte:
        return run.bits_per_byte["mean"]
    if not run.bits_per_byte:
        return np.empty(0)
    mean: FloatArray = np.mean(list(run.bits_per_byte.values()), axis=0)
    return mean


def _smooth(values: FloatArray) -> FloatArray:
    """Running mean over a thirtieth of the values, fewer at both ends; values that are not finite are left out."""
    window = max(1, len(values) // 30)
    finite = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(finite, values, 0), kernel, mode="full")
    count = np.convolve(finite, kernel, mode="full")
    start = (window - 1) // 2
    total, count = total[start : start + len(values)], count[start : start + len(values)]
    smooth: FloatArray = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
    return smooth
