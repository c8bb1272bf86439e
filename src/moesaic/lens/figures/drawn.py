"""Every picture that a study and its runs are good for, by the part of the page that shows it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesaic.lens.comparison import Comparison
from moesaic.lens.drawing import Picture
from moesaic.lens.figures import domains, load, relations, training
from moesaic.lens.figures.compared import comparison_figures
from moesaic.lens.runs import Run
from moesaic.lens.study import Study

_RELATIONS = (
    relations.words_or_subjects,
    relations.information,
    relations.staying,
    relations.together,
    relations.next_layer,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Pictures in the order of the page, those left out that there are no data for."""

    compared: list[Picture]
    learning: list[Picture]
    domains: list[Picture]
    load: list[Picture]
    relations: list[Picture]
    settling: list[Picture]

    def all(self) -> list[Picture]:
        """Every picture once."""
        return [*self.compared, *self.learning, *self.domains, *self.load, *self.relations, *self.settling]


def figures(study: Study, runs: list[Run], pair: Comparison | None = None) -> Figures:
    """Draw what there is data for.

    Args:
        study: of the trace.
        runs: may be empty; pictures of routers over training are of the first sparse one.
        pair: the same study beside another.
    Raises:
        BackendError: if matplotlib is not installed.
    """
    learning: list[Picture] = []
    if any(np.isfinite(run.loss).any() or len(run.eval_step) for run in runs):
        learning.append(training.loss_curves(runs))
    if any(run.last_bits_per_byte for run in runs):
        learning.append(training.bits_by_domain(runs))
    settling: list[Picture | None] = []
    for run in [run for run in runs if run.is_sparse and len(run.step)][:1]:
        settling = [training.load_film(run), training.imbalance_over_training(run), training.drops_and_entropy(run)]
    return Figures(
        compared=comparison_figures(pair) if pair else [],
        learning=learning,
        domains=_drawn([domains.domain_heat_map(study), domains.layers_by_domain(study)]),
        load=_drawn([load.load_by_expert(study), load.load_by_layer(study)]),
        relations=_drawn([draw(study) for draw in _RELATIONS]),
        settling=_drawn(settling),
    )


def _drawn(pictures: list[Picture | None]) -> list[Picture]:
    return [picture for picture in pictures if picture is not None]
