"""Small problems to fit, and mixtures to fit to them."""

from __future__ import annotations

import numpy as np

from moesaic.classic.data import Data
from moesaic.classic.expert import LinearExperts, NetworkExperts
from moesaic.classic.family import BERNOULLI, GAUSSIAN, MULTINOMIAL, POISSON, Family
from moesaic.classic.mixture import Mixture
from moesaic.classic.tree import Tree

FAMILIES = {family.name: family for family in (GAUSSIAN, BERNOULLI, MULTINOMIAL, POISSON)}


def rows(family: Family, random: np.random.RandomState, *, num_rows: int, width: int, num_outputs: int) -> Data:
    """Targets that have nothing to do with the inputs, and weights of which some are zero."""
    x_TD = np.concatenate([random.normal(size=(num_rows, width - 1)), np.ones((num_rows, 1))], axis=1)
    if family is MULTINOMIAL:
        y_TO = np.eye(num_outputs)[random.randint(num_outputs, size=num_rows)]
    elif family is BERNOULLI:
        y_TO = random.randint(2, size=(num_rows, num_outputs)).astype(float)
    elif family is POISSON:
        y_TO = random.poisson(3.0, size=(num_rows, num_outputs)).astype(float)
    else:
        y_TO = random.normal(size=(num_rows, num_outputs))
    weight_T = random.choice([0.0, 0.5, 1.0, 3.0], size=num_rows)
    weight_T[0] = 1.0
    return Data(x_TD=x_TD, y_TO=y_TO, weight_T=weight_T)


def mixture(
    family: Family,
    tree: Tree,
    random: np.random.RandomState,
    *,
    width: int,
    num_outputs: int,
    hidden: int | None = None,
    size: float = 1.0,
) -> Mixture:
    """Gates, experts and variances at random."""
    count = tree.num_experts
    dispersion_EO = np.ones((count, num_outputs))
    if family is GAUSSIAN:
        dispersion_EO = random.uniform(0.5, 2.0, size=dispersion_EO.shape)
    experts: LinearExperts | NetworkExperts
    if hidden is None:
        experts = LinearExperts(size * random.normal(size=(count, num_outputs, width)))
    else:
        experts = NetworkExperts(
            size * random.normal(size=(count, hidden, width)),
            size * random.normal(size=(count, num_outputs, hidden + 1)),
        )
    return Mixture(
        tree=tree,
        gate_AD=size * random.normal(size=(tree.num_branches, width)),
        experts=experts,
        family=family,
        dispersion_EO=dispersion_EO,
    )
