from dataclasses import FrozenInstanceError

import pytest
import torch

from moesaic import MoELayer, Routing
from moesaic.balance import BiasController, BiasRule, LossTerm
from moesaic.experts import MLPExperts
from moesaic.routers import TopKRouter


def test_a_loss_term_is_its_loss_times_its_coefficient():
    scores_TE = torch.full((2, 2), 0.5)
    routing = Routing.from_choices(torch.tensor([[0], [1]]), torch.ones(2, 1), scores_TE, scores_TE)
    term = LossTerm(name="load", loss=lambda routing: routing.load_E.sum().float(), coefficient=0.25)
    assert float(term(routing)) == 0.5
    with pytest.raises(FrozenInstanceError):
        term.coefficient = 1.0


def test_a_bias_rule_builds_its_controller_with_its_numbers():
    layer = MoELayer(TopKRouter(4, 3, top_k=2, selection_bias=True), MLPExperts(3, 4, 2))
    (controller,) = BiasRule(rate=0.125, rule="proportional").build([layer])
    assert isinstance(controller, BiasController)
    assert (controller.router, controller.rate, controller.rule) == (layer.router, 0.125, "proportional")
