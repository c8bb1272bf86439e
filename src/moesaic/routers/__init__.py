"""Routers: tokens in, :class:`~moesaic.core.routing.Routing` out. One file per idea of selection."""

from moesaic.routers.groups import GroupLimit
from moesaic.routers.scores import Score, sigmoid, softmax
from moesaic.routers.select import select_top_k
from moesaic.routers.top_k import TopKRouter

__all__ = ["GroupLimit", "Score", "TopKRouter", "select_top_k", "sigmoid", "softmax"]
