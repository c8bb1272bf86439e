"""Where it began: mixtures of experts of 1991 and 1994, as scikit-learn estimators on numpy.

``Adaptive…`` has one gate and experts of any kind; ``Hierarchical…`` has a tree of gates over linear models. Both are a
:class:`~moesaic.classic.mixture.Mixture`; start reading there, then ``em.py``. T counts rows here, as it counts tokens
elsewhere. Neither torch nor transformers is imported.
"""

from __future__ import annotations

from importlib.util import find_spec

from moesaic.core.errors import BackendError

if find_spec("sklearn") is None:
    raise BackendError(
        "The classic mixtures are scikit-learn estimators, and scikit-learn is not installed. "
        "Try: pip install 'moesaic[classic]'"
    )

from moesaic.classic.adaptive import AdaptiveMixtureClassifier, AdaptiveMixtureRegressor
from moesaic.classic.distribution import Prediction
from moesaic.classic.hierarchical import HierarchicalMixtureClassifier, HierarchicalMixtureRegressor
from moesaic.classic.mixture import Mixture
from moesaic.classic.pictures import plot_experts, plot_likelihood, plot_tree
from moesaic.classic.tree import Tree

__all__ = [
    "AdaptiveMixtureClassifier",
    "AdaptiveMixtureRegressor",
    "HierarchicalMixtureClassifier",
    "HierarchicalMixtureRegressor",
    "Mixture",
    "Prediction",
    "Tree",
    "plot_experts",
    "plot_likelihood",
    "plot_tree",
]
