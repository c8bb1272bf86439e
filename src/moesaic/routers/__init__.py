"""Routers: tokens in, :class:`~moesaic.core.routing.Routing` out. One file per idea of selection."""

from moesaic.routers.annealed import AnnealedRouter, Cooling
from moesaic.routers.assignment import BalancedAssignmentRouter
from moesaic.routers.attention import AttentionRouter
from moesaic.routers.batchwise import BatchwiseRouter
from moesaic.routers.cosine import CosineRouter
from moesaic.routers.dense import DenseRouter
from moesaic.routers.depth import DepthRouter
from moesaic.routers.expert_choice import ExpertChoiceRouter
from moesaic.routers.groups import GroupLimit
from moesaic.routers.hash_tables import balanced_table, clustered_table, random_table
from moesaic.routers.hierarchical import HierarchicalRouter
from moesaic.routers.linear import LinearRouter
from moesaic.routers.noisy import NoisyTopKRouter
from moesaic.routers.normalized import NormalizedRouter
from moesaic.routers.policy import PolicyRouter
from moesaic.routers.pooled import PooledRouter
from moesaic.routers.random import RandomRouter
from moesaic.routers.relu import ReLURouter
from moesaic.routers.residual import ResidualRouter
from moesaic.routers.sampled import SampledTopKRouter
from moesaic.routers.scores import Score, sigmoid, softmax
from moesaic.routers.select import select_top_k
from moesaic.routers.sinkhorn import SinkhornRouter
from moesaic.routers.table import DomainHashRouter, HashRouter
from moesaic.routers.token_choice import TokenChoiceRouter
from moesaic.routers.top_k import TopKRouter
from moesaic.routers.top_p import TopPRouter

__all__ = [
    "AnnealedRouter",
    "AttentionRouter",
    "BalancedAssignmentRouter",
    "BatchwiseRouter",
    "Cooling",
    "CosineRouter",
    "DenseRouter",
    "DepthRouter",
    "DomainHashRouter",
    "ExpertChoiceRouter",
    "GroupLimit",
    "HashRouter",
    "HierarchicalRouter",
    "LinearRouter",
    "NoisyTopKRouter",
    "NormalizedRouter",
    "PolicyRouter",
    "PooledRouter",
    "RandomRouter",
    "ReLURouter",
    "ResidualRouter",
    "SampledTopKRouter",
    "Score",
    "SinkhornRouter",
    "TokenChoiceRouter",
    "TopKRouter",
    "TopPRouter",
    "balanced_table",
    "clustered_table",
    "random_table",
    "select_top_k",
    "sigmoid",
    "softmax",
]
