"""The picture of the experiment: bits per byte of each model while it is trained."""

from __future__ import annotations

from importlib.util import find_spec
from io import StringIO
from typing import TYPE_CHECKING

from moesaic.core.errors import BackendError
from moesaic.lab.pretrained.plan import Story
from moesaic.lab.pretrained.starts import ALONE, DENSE, FASTER, PAIRED, SPLIT
from moesaic.lens import palette
from moesaic.lens.drawing import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {DENSE: palette.DENSE, ALONE: palette.SPARSE, PAIRED: palette.OTHERS[0], SPLIT: palette.OTHERS[1]}


def needs_curves() -> None:
    """See that the picture can be drawn.

    Raises:
        BackendError: naming the extra that brings what is missing.
    """
    if find_spec("matplotlib") is None:
        raise BackendError(
            "The picture of the curves needs matplotlib, which is not there. Install it with: pip install "
            "'moesaic[lab]'"
        )


def curves(story: Story) -> str:
    """Draw a panel for each domain and one for their mean, as SVG on paper of its own.

    Raises:
        BackendError: without matplotlib.
    """
    needs_curves()
    import matplotlib

    style = {**STYLE, "font.family": ["DejaVu Sans", "sans-serif"], "svg.hashsalt": "pretrained"}
    with matplotlib.rc_context(style):
        svg = StringIO()
        _paint(story).savefig(svg, format="svg", facecolor=palette.PAPER, metadata={"Date": None})
    return svg.getvalue()


def _paint(story: Story) -> Figure:
    from matplotlib.figure import Figure

    domains = list(next(iter(story.looks.values()))[0][1])
    figure = Figure(figsize=(7.2, 2.5 * ((len(domains) + 1) // 2)), layout="constrained")
    for place, domain in enumerate(sorted(domains, key=lambda name: name != "mean"), start=1):
        axes = figure.add_subplot((len(domains) + 1) // 2, 2, place)
        _panel(axes, story, domain)
        if place == 1:
            axes.legend(loc="upper right", handlelength=1.2)
    return figure


def _panel(axes: Axes, story: Story, domain: str) -> None:
    drawn = [(name, name, "o-") for name in _COLOURS] + [(name, f"{name}{FASTER}", "o--") for name in _COLOURS]
    for model, name, line in drawn:
        if name in story.looks:
            tokens = [point[0] / 1000 for point in story.looks[name]]
            bits = [point[1][domain] for point in story.looks[name]]
            width = 1.0 if model == DENSE else 1.7
            axes.plot(tokens, bits, line, color=_COLOURS[model], markersize=3, linewidth=width, label=name)
    axes.set_title("mean of the domains" if domain == "mean" else domain)
    axes.set_xlabel("thousand tokens read")
    axes.set_ylabel("bits per byte")
    axes.grid(axis="y")
