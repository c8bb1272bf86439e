"""Pictures of fitted mixtures: who answers where, the tree of gates, and how the likelihood rose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from moesaic.classic.tree import ROOT, Floats, Tree
from moesaic.core.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#cc6677", "#332288", "#ddcc77", "#117733", "#88ccee", "#882255", "#44aa99", "#999933", "#aa4499")
"""Of the experts: Paul Tol's muted scheme, which colour-blind readers tell apart; the tenth is as the first."""
INK, LINE = "#1c2024", "#dfe3e8"
_PALE = {"#ddcc77", "#88ccee"}

_GRID = 240
"""Points along each side of a picture, at which experts and gates are asked."""


def plot_experts(estimator: Any, X: Any, y: Any, ax: Axes | None = None) -> Axes:
    """Draw rows with one or two inputs, the regions in which each expert is trusted most, and what experts say there.

    An expert of a regression is a line over one input and contours over two; an expert of a classification is the line
    at which it changes its mind.

    Args:
        estimator: fitted.
        X: inputs, (n_samples, 1) or (n_samples, 2).
        y: targets, one for each row.
        ax: where to draw; by default a figure of its own.
    Returns:
        The axes.
    Raises:
        ConfigError: if there are other inputs or targets than that.
        BackendError: without matplotlib.
    """
    check_is_fitted(estimator, "mixture_")
    ax = _axes(ax)
    X, y = np.asarray(X, dtype=np.float64), np.asarray(y)
    if X.ndim != 2 or X.shape[1] not in {1, 2} or y.ndim != 1:
        raise ConfigError(
            f"plot_experts draws one or two inputs and one target, got inputs of shape {X.shape} and targets of shape "
            f"{y.shape}. Fit to fewer columns to see them."
        )
    draw = _over_one_input if X.shape[1] == 1 else _over_two_inputs
    draw(estimator, X, y, ax)
    _tidy(ax)
    return ax


def plot_likelihood(estimators: Any, ax: Axes | None = None) -> Axes:
    """Draw how the log-likelihood of a row rose, pass by pass.

    Args:
        estimators: a fitted estimator, or several with their names, as ``{"EM": …, "gradient": …}``.
        ax: where to draw; by default a figure of its own.
    Returns:
        The axes.
    Raises:
        BackendError: without matplotlib.
    """
    ax = _axes(ax)
    several = estimators if isinstance(estimators, Mapping) else {"": estimators}
    for number, (name, estimator) in enumerate(several.items()):
        check_is_fitted(estimator, "loglik_curve_")
        ax.plot(estimator.loglik_curve_, color=COLOURS[number % len(COLOURS)], label=name)
    if len(several) > 1:
        ax.legend(frameon=False)
    ax.set_xlabel("passes over the data")
    ax.set_ylabel("log-likelihood of a row")
    _tidy(ax)
    return ax


def plot_tree(
    estimator: Any, X: Any = None, ax: Axes | None = None, feature_names: Sequence[str] | None = None
) -> Axes:
    """Draw the tree of gates: what each gate looks at most, and how many of the rows each branch gets.

    Args:
        estimator: fitted.
        X: inputs to count; without them all branches are drawn alike.
        ax: where to draw; by default a figure of its own.
        feature_names: of the inputs; by default those that the estimator saw.
    Returns:
        The axes.
    Raises:
        BackendError: without matplotlib.
    """
    check_is_fitted(estimator, "mixture_")
    ax = _axes(ax)
    tree = estimator.mixture_.tree
    share_E = np.full(tree.num_experts, np.nan) if X is None else estimator.gate(X).mean(axis=0)
    place = _places(tree)
    share = {ROOT: share_E.sum()} | dict(enumerate((tree.path_AE * share_E).sum(axis=1)))
    for branch, parent in enumerate(tree.parents):
        (x0, y0), (x1, y1) = place[parent], place[branch]
        width = 1.5 if X is None else 0.5 + 9 * share[branch]
        ax.plot([x0, x1], [y0, y1], color=LINE, linewidth=width, solid_capstyle="round", zorder=1)
    names = _feature_names(estimator, feature_names)
    for node in (ROOT, *range(tree.num_branches)):
        if tree.children(node):
            _label(ax, place[node], _gate_words(estimator, names, node), "white", INK)
    for expert, leaf in enumerate(tree.leaf_E.tolist()):
        words = f"expert {expert}" if X is None else f"expert {expert}\n{share_E[expert]:.0%}"
        colour = COLOURS[expert % len(COLOURS)]
        _label(ax, place[leaf], words, colour, INK if colour in _PALE else "white")
    ax.margins(0.08, 0.15)
    ax.set_axis_off()
    return ax


def _over_one_input(estimator: Any, X: Floats, y: Any, ax: Axes) -> None:
    classes = getattr(estimator, "classes_", None)
    height = y if classes is None else np.searchsorted(classes, y)
    grid = _line(X[:, 0])[:, None]
    gate_TE, means = estimator.gate(grid), _answers(estimator, grid)
    whole = estimator.predict(grid) if classes is None else estimator.predict_proba(grid)[:, -1]
    owner_T = gate_TE.argmax(axis=1)
    for expert in range(estimator.num_experts_):
        colour = COLOURS[expert % len(COLOURS)]
        mine = owner_T == expert
        ax.fill_between(
            grid[:, 0], 0, 1, where=mine, transform=ax.get_xaxis_transform(), color=colour, alpha=0.12, lw=0
        )
        if mine.any():
            ax.plot(grid[:, 0], np.where(mine, means[:, expert], np.nan), color=colour, linewidth=2.4, zorder=3)
    ax.scatter(X[:, 0], height, s=9, color=INK, alpha=0.45, linewidth=0, zorder=2)
    # Experts may say wild things where nobody listens: the rows decide what is in view.
    ax.set_ylim(*_limits(np.append(height, whole)))
    ax.plot(grid[:, 0], whole, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=4)
    ax.set_xlim(grid[0, 0], grid[-1, 0])
    ax.set_xlabel("input")
    ax.set_ylabel("target" if classes is None else f"probability of {classes[-1]}")


def _over_two_inputs(estimator: Any, X: Floats, y: Any, ax: Axes) -> None:
    across, up = _line(X[:, 0]), _line(X[:, 1])
    mesh = np.meshgrid(across, up)
    grid = np.stack([one.ravel() for one in mesh], axis=1)
    owner_T = estimator.gate(grid).argmax(axis=1)
    count = estimator.num_experts_
    colours = [COLOURS[expert % len(COLOURS)] for expert in range(count)]
    shown = owner_T.reshape(mesh[0].shape)
    ax.contourf(*mesh, shown, levels=np.arange(-0.5, count), colors=colours, alpha=0.16)
    answers = _answers(estimator, grid)
    for expert in range(count):
        for line in _lines(estimator, answers, expert):
            drawn = np.where(owner_T == expert, line, np.nan).reshape(mesh[0].shape)
            levels: Any = [0.0] if hasattr(estimator, "classes_") else 7
            if _crosses(drawn, levels):
                ax.contour(*mesh, drawn, levels=levels, colors=[colours[expert]], linewidths=2, linestyles="solid")
    _scatter(estimator, X, y, ax)
    ax.set_xlim(across[0], across[-1])
    ax.set_ylim(up[0], up[-1])
    ax.set_xlabel("first input")
    ax.set_ylabel("second input")


def _scatter(estimator: Any, X: Floats, y: Any, ax: Axes) -> None:
    if not hasattr(estimator, "classes_"):
        ax.scatter(X[:, 0], X[:, 1], c=y, s=12, cmap="cividis", linewidth=0.3, edgecolor="white", zorder=3)
        return
    for number, label in enumerate(estimator.classes_):
        mine = y == label
        marker = "ovs^D<>pP*"[number % 10]
        face = INK if number % 2 == 0 else "white"
        ax.scatter(
            X[mine, 0],
            X[mine, 1],
            s=16,
            marker=marker,
            facecolor=face,
            edgecolor=INK,
            linewidth=0.7,
            zorder=3,
            label=label,
        )
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8, frameon=False, borderaxespad=0.2)


def _answers(estimator: Any, grid: Floats) -> Any:
    """What each expert says: a number, or the probability of each class."""
    mean_TEO = estimator.frame_.targets_back(estimator.mixture_.means(estimator._inputs(grid)))
    if not hasattr(estimator, "classes_"):
        return mean_TEO[..., 0]
    if grid.shape[1] == 1:
        return mean_TEO[..., -1]
    return np.concatenate([1 - mean_TEO, mean_TEO], axis=-1) if mean_TEO.shape[-1] == 1 else mean_TEO


def _lines(estimator: Any, answers: Any, expert: int) -> list[Floats]:
    """Functions of the grid to draw contours of: the answer, or by how much a class leads the others."""
    if not hasattr(estimator, "classes_"):
        return [answers[:, expert]]
    chance = answers[:, expert]
    lead = [chance[:, one] - np.delete(chance, one, axis=1).max(axis=1) for one in range(chance.shape[1])]
    return lead[:1] if len(lead) == 2 else lead


def _crosses(drawn: Floats, levels: Any) -> bool:
    """Whether there is a contour to be seen: an expert may answer nowhere, or all the same."""
    seen = drawn[np.isfinite(drawn)]
    if not seen.size or seen.min() == seen.max():
        return False
    return levels != [0.0] or bool(seen.min() < 0 < seen.max())


def _places(tree: Tree) -> dict[int, tuple[float, float]]:
    """Leaves side by side, each gate over the middle of what is below it."""
    place: dict[int, tuple[float, float]] = {}
    next_leaf = iter(range(tree.num_experts))

    def visit(node: int, depth: int) -> float:
        below = [visit(child, depth + 1) for child in tree.children(node)]
        across = sum(below) / len(below) if below else float(next(next_leaf))
        place[node] = (across, -depth)
        return across

    visit(ROOT, 0)
    return place


def _gate_words(estimator: Any, names: Sequence[str], node: int) -> str:
    """The input that a gate's logits differ most by, over its spread; of two branches on one input, where they part."""
    branches = estimator.mixture_.tree.children(node)
    slopes = estimator.mixture_.gate_AD[branches, :-1]
    spread = np.ptp(slopes, axis=0) * (1 if estimator.standardize else estimator.frame_.scale_D)
    if len(names) == 1 and len(branches) == 2:
        slope = np.subtract(*estimator.gate_coef_[branches, 0])
        where = -np.subtract(*estimator.gate_intercept_[branches]) / slope
        return f"{names[0]} {'>' if slope > 0 else '<'} {where:.3g}?"
    return f"{names[int(spread.argmax())]}?"


def _feature_names(estimator: Any, given: Sequence[str] | None) -> Sequence[str]:
    count = estimator.n_features_in_
    if given is not None and len(given) != count:
        raise ConfigError(f"feature_names needs a name for each of {count} inputs, got {len(given)}.")
    seen = getattr(estimator, "feature_names_in_", None)
    return list(given if given is not None else seen if seen is not None else (f"x{one}" for one in range(count)))


def _label(ax: Axes, place: tuple[float, float], words: str, face: str, ink: str) -> None:
    box = {"boxstyle": "round,pad=0.35", "facecolor": face, "edgecolor": LINE if face == "white" else face}
    label = ax.text(*place, words, ha="center", va="center", fontsize=8, color=ink, bbox=box, zorder=2)
    # It hangs on a place among the rows' shares, so that a layout that made room for it would move it along.
    label.set_in_layout(False)


def _limits(values: Any) -> tuple[float, float]:
    low, high = float(np.min(values)), float(np.max(values))
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _line(values: Floats) -> Floats:
    return np.linspace(*_limits(values), _GRID)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise BackendError(
            "Pictures need matplotlib, which is not installed. Try: pip install 'moesaic[classic]'"
        ) from error
    created: Axes = pyplot.subplots(figsize=(5.2, 3.6), layout="constrained")[1]
    return created


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(length=0, labelsize=8)
