"""Pictures show each expert where it is trusted; they need matplotlib, and say so."""

import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.exceptions import NotFittedError

from moesaic.classic import (
    AdaptiveMixtureClassifier,
    AdaptiveMixtureRegressor,
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
    plot_experts,
    plot_likelihood,
    plot_tree,
)
from moesaic.classic.pictures import COLOURS
from moesaic.core.errors import BackendError, ConfigError
from tests.classic.test_classifiers import corners, thirds
from tests.classic.test_regressors import kinked


@pytest.fixture
def ax():
    return Figure().add_subplot()


def words(ax):
    return [text.get_text() for text in ax.texts]


def test_over_one_input_each_expert_is_a_line_where_it_is_trusted(ax):
    X, y = kinked()
    model = AdaptiveMixtureRegressor(2, random_state=0, tol=1e-6).fit(X, y)
    plot_experts(model, X, y, ax)
    *experts, whole = ax.lines
    assert [line.get_color() for line in experts] == list(COLOURS[:2])
    for line in experts:
        drawn = np.isfinite(line.get_ydata())
        side = np.sign(line.get_xdata()[drawn]).mean()
        assert abs(side) > 0.95
        slope = np.polyfit(line.get_xdata()[drawn], line.get_ydata()[drawn], 1)[0]
        assert slope == pytest.approx(3 if side > 0 else -1, abs=0.05)
    np.testing.assert_allclose(whole.get_ydata(), model.predict(whole.get_xdata()[:, None]))


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (AdaptiveMixtureClassifier(2, random_state=0), (kinked()[0], kinked()[1] > 1)),
        (HierarchicalMixtureClassifier((2, 2), random_state=0), corners()),
        (HierarchicalMixtureClassifier((2,), random_state=0), thirds()),
        (AdaptiveMixtureClassifier(2, random_state=0), (corners()[0], np.full(300, "one"))),
        (HierarchicalMixtureRegressor((2,), random_state=0), (corners()[0], corners()[0] @ [1.0, -2.0])),
        (HierarchicalMixtureRegressor((2, 2), random_state=0), (corners()[0], np.zeros(300))),
        (HierarchicalMixtureRegressor((), random_state=0), kinked()),
    ],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_kind_of_model_can_be_drawn(model, data, ax):
    X, y = data
    plot_experts(model.fit(X, y), X, y, ax)
    ax.figure.canvas.draw()
    assert ax.get_xlim()[0] < X[:, 0].min()
    assert ax.collections


def test_over_two_inputs_an_expert_s_line_is_where_it_changes_its_mind(ax):
    X, y = corners()
    model = HierarchicalMixtureClassifier((2, 2), random_state=0).fit(X, y)
    plot_experts(model, X, y, ax)
    contours = [one for one in ax.collections if type(one).__name__ == "QuadContourSet" and not one.filled]
    assert contours
    for contour in contours:
        expert = COLOURS.index(to_hex(contour.get_edgecolor()[0]))
        corners_of = np.concatenate([path.vertices for path in contour.get_paths()])
        means = model.mixture_.means(model._inputs(corners_of))[:, expert, 0]
        np.testing.assert_allclose(means, 0.5, atol=0.05)


def test_the_tree_is_drawn_with_gates_and_shares(ax):
    X, y = kinked()
    model = HierarchicalMixtureRegressor((2, 2), random_state=0).fit(X, y)
    plot_tree(model, X, ax, feature_names=["time"])
    gates, leaves = words(ax)[:3], words(ax)[3:]
    assert all(text.startswith("time ") and text.endswith("?") for text in gates)
    assert [text.split("\n")[0] for text in leaves] == [f"expert {number}" for number in range(4)]
    assert sum(int(text.split("\n")[1].rstrip("%")) for text in leaves) == pytest.approx(100, abs=2)
    assert len(ax.lines) == 6


def test_gates_over_several_inputs_name_the_one_that_counts_most(ax):
    random = np.random.RandomState(0)
    X = random.normal(size=(300, 3)) * [1, 1e3, 1]
    y = np.where(X[:, 1] > 0, 5 * X[:, 0], -5 * X[:, 0])
    model = HierarchicalMixtureRegressor((2,), random_state=1, n_init=3).fit(X, y)
    plot_tree(model, ax=ax)
    assert words(ax) == ["x1?", "expert 0", "expert 1"]


def test_curves_have_their_names(ax):
    X, y = kinked()
    one = HierarchicalMixtureRegressor((2,), random_state=0).fit(X, y)
    other = HierarchicalMixtureRegressor((2,), solver="lbfgs", random_state=0).fit(X, y)
    plot_likelihood({"EM": one, "L-BFGS": other}, ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["EM", "L-BFGS"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), one.loglik_curve_)


def test_a_figure_of_its_own_is_made_where_none_is_given():
    from matplotlib import pyplot

    with mpl.rc_context({"backend": "agg"}):
        X, y = kinked()
        axes = plot_likelihood(HierarchicalMixtureRegressor((2,), random_state=0).fit(X, y))
        assert axes.figure.number in pyplot.get_fignums()
        assert axes.get_legend() is None
        pyplot.close(axes.figure)


def test_what_cannot_be_drawn_is_refused(ax):
    random = np.random.RandomState(0)
    X, y = random.normal(size=(40, 3)), random.normal(size=40)
    model = HierarchicalMixtureRegressor((2,), random_state=0).fit(X, y)
    with pytest.raises(ConfigError) as error:
        plot_experts(model, X, y, ax)
    assert str(error.value) == (
        "plot_experts draws one or two inputs and one target, got inputs of shape (40, 3) and targets of shape (40,). "
        "Fit to fewer columns to see them."
    )
    with pytest.raises(ConfigError, match=r"^feature_names needs a name for each of 3 inputs, got 1\.$"):
        plot_tree(model, X, ax, feature_names=["a"])
    with pytest.raises(NotFittedError):
        plot_tree(HierarchicalMixtureRegressor(), ax=ax)


def test_without_matplotlib_the_way_to_get_it_is_named(monkeypatch):
    X, y = kinked(30)
    model = HierarchicalMixtureRegressor((2,), random_state=0).fit(X, y)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendError) as error:
        plot_likelihood(model)
    assert str(error.value) == "Pictures need matplotlib, which is not installed. Try: pip install 'moesaic[classic]'"
