"""The planner: what a model needs and how fast it can be at best, before a device is rented.

Everything is counted from a :class:`~moesaic.zoo.ModelShape`, a :class:`Device` and how often experts are chosen. Times
are bounds from stated peaks; memory is checked against real steps by :mod:`moesaic.plan.verify`.
"""

from moesaic.plan import devices
from moesaic.plan.devices import Device
from moesaic.plan.layout import Layout
from moesaic.plan.load import distinct, drops, loads, reach
from moesaic.plan.memory import Job, Memory
from moesaic.plan.models import changed, find
from moesaic.plan.offloading import HitRates, Offload, hit_rates, offload
from moesaic.plan.popularity import Recorded, Zipf, read_routing
from moesaic.plan.ranking import search, search_serving
from moesaic.plan.serving import ServeJob, ServingPlan, serve
from moesaic.plan.training import TrainingPlan, train

__all__ = [
    "Device",
    "HitRates",
    "Job",
    "Layout",
    "Memory",
    "Offload",
    "Recorded",
    "ServeJob",
    "ServingPlan",
    "TrainingPlan",
    "Zipf",
    "changed",
    "devices",
    "distinct",
    "drops",
    "find",
    "hit_rates",
    "loads",
    "offload",
    "reach",
    "read_routing",
    "search",
    "search_serving",
    "serve",
    "train",
]
