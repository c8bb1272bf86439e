"""From a painter to SVG in the house's style, on paper of its own so that it reads on a dark page too."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from io import StringIO
from typing import TYPE_CHECKING, Any

from moesaic.core.errors import BackendError
from moesaic.lens import palette
from moesaic.lens.drawing import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def needs(*libraries: str) -> None:
    """See that optional libraries are there before the work, not after it.

    Raises:
        BackendError: naming the extra that brings what is missing.
    """
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"This experiment needs {' and '.join(missing)}, which is not there. Install it with: pip install "
            "'moesaic[lab]'"
        )


def svg(name: str, size_inches: tuple[float, float], paint: Callable[[Figure], None]) -> str:
    """Let ``paint`` fill a figure.

    Args:
        name: so that the same picture is the same file.
        size_inches: width and height.
        paint: gets the empty figure.
    Raises:
        BackendError: without matplotlib.
    """
    needs("matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**STYLE, "font.family": ["DejaVu Sans", "sans-serif"], "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size_inches, layout="constrained")
        paint(figure)
        written = StringIO()
        figure.savefig(written, format="svg", facecolor=palette.PAPER, metadata={"Date": None})
    return written.getvalue()
