"""Gates: at each node of the tree a softmax over its branches, linear in the inputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moesaic.classic.data import Data
from moesaic.classic.family import MULTINOMIAL, over_last
from moesaic.classic.irls import LinearFit, slopes
from moesaic.classic.least_squares import damped_solve, weighted_grams
from moesaic.classic.tree import Floats, Tree

FitGates = Callable[[Tree, Floats, Data, Floats, float], Floats]
"""Tree, gates (A, D), data, posterior of each branch times the row's weight (T, A), penalty -> better gates."""

SMALLEST_POSTERIOR = 1e-12


def log_branches(tree: Tree, gate_AD: Floats, x_TD: Floats) -> Floats:
    """Log-probability of each branch, once its parent has been reached (T, A): ``log g_{j|i}``."""
    logits_TA = x_TD @ gate_AD.T
    if not tree.num_branches:
        return logits_TA
    logits_TA -= over_siblings(tree, np.maximum, logits_TA)[:, tree.group_A]
    logits_TA -= np.log(over_siblings(tree, np.add, np.exp(logits_TA)))[:, tree.group_A]
    return logits_TA


def over_siblings(tree: Tree, reduce: np.ufunc, values_TA: Floats) -> Floats:
    """Reduce over the branches of each gate (T, G)."""
    if len(tree.gates) == 1:
        return over_last(reduce, values_TA.reshape(len(values_TA), *tree.gates[0].shape))
    reduced: Floats = reduce.reduceat(values_TA, tree.start_G, axis=1)
    return reduced


def along_paths(tree: Tree, log_branch_TA: Floats) -> Floats:
    """Log-probability of each expert by the input alone (T, E): the product along its path."""
    return log_branch_TA @ tree.path_AE


def posterior_branches(tree: Tree, posterior_TE: Floats) -> Floats:
    """Posterior of each branch (T, A): the sum over the experts below it."""
    return posterior_TE @ tree.path_AE.T


def through_gates(tree: Tree, log_branch_TA: Floats, d_log_gate_TE: Floats) -> Floats:
    """From a derivative by ``log g`` of each expert to the derivative by the logits of its branches (T, A)."""
    d_branch_TA = posterior_branches(tree, d_log_gate_TE)
    if not tree.num_branches:
        return d_branch_TA
    total_TG = over_siblings(tree, np.add, d_branch_TA)
    d_logits_TA: Floats = d_branch_TA - total_TG[:, tree.group_A] * np.exp(log_branch_TA)
    return d_logits_TA


def by_newton(tree: Tree, gate_AD: Floats, data: Data, share_TA: Floats, penalty: float) -> Floats:
    """Algorithm 1: a multinomial regression of every gate on the posteriors of its branches, by a step of IRLS."""
    better_AD = gate_AD.copy()
    for branch_GO in tree.gates:
        target_TGO = share_TA[:, branch_GO]
        fit = LinearFit(
            data=data,
            family=MULTINOMIAL,
            target_TEO=target_TGO,
            weight_TE=target_TGO.sum(axis=-1),
            penalty_EO=np.full(branch_GO.shape, penalty),
        )
        better_AD[branch_GO] = fit.newton(gate_AD[branch_GO])
    return better_AD


def by_least_squares(tree: Tree, gate_AD: Floats, data: Data, share_TA: Floats, penalty: float) -> Floats:
    """Algorithm 2: one weighted least-squares fit of each logit to ``ln h``, since softmax(ln h) = h.

    A common constant of all logits does not matter, so that the posteriors need no further inverse. It is no maximum
    of the likelihood and may lower it.
    """
    if not tree.num_branches:
        return gate_AD
    total_TG = over_siblings(tree, np.add, share_TA)
    posterior_TA = share_TA / np.maximum(total_TG, np.finfo(float).tiny)[:, tree.group_A]
    target_TA = np.log(np.maximum(posterior_TA, SMALLEST_POSTERIOR))
    gram_ADD = weighted_grams(data.x_TD, total_TG)[tree.group_A]
    gram_ADD = gram_ADD + penalty * np.diag(np.append(np.ones(data.x_TD.shape[1] - 1), 0.0))
    residual_TA = total_TG[:, tree.group_A] * (target_TA - data.x_TD @ gate_AD.T)
    right_AD = residual_TA.T @ data.x_TD - penalty * slopes(gate_AD)
    better_AD: Floats = gate_AD + damped_solve(gram_ADD, right_AD[..., None], data.scale_D)[..., 0]
    return better_AD
