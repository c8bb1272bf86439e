"""Every picture that a trace and its runs are good for, in the order of the page."""

from __future__ import annotations

import numpy as np

from moesaic.lens import routing_figures as routing
from moesaic.lens import training_figures as training
from moesaic.lens.drawing import Picture
from moesaic.lens.information import Information
from moesaic.lens.runs import Run
from moesaic.telemetry.trace import RoutingTrace


def figures(trace: RoutingTrace, runs: list[Run], domain: list[Information], token: list[Information]) -> list[Picture]:
    """Draw what there is data for.

    Args:
        trace: must have rows.
        runs: may be empty; pictures of routers over training are of the first sparse one.
        domain: ``information.about_domain`` of the trace.
        token: ``information.about_token`` of the trace.
    Raises:
        BackendError: if matplotlib is not installed.
    """
    pictures: list[Picture] = []
    if any(np.isfinite(run.loss).any() or len(run.eval_step) for run in runs):
        pictures.append(training.loss_curves(runs))
    if any(run.last_bits_per_byte for run in runs):
        pictures.append(training.bits_by_domain(runs))
    pictures.append(routing.domain_heat_map(trace))
    pictures.append(routing.load_by_expert(trace))
    pictures += filter(None, [routing.information(trace, domain, token), routing.repetition(trace)])
    for run in [run for run in runs if run.is_sparse and len(run.step)][:1]:
        settled = [training.imbalance_over_training(run), training.load_film(run), training.drops_and_entropy(run)]
        pictures += filter(None, settled)
    return pictures
