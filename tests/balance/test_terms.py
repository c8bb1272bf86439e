from dataclasses import FrozenInstanceError

import pytest
import torch

from moesaic import ConfigError, MoELayer, Routing
from moesaic.balance import TERMS, AdaptiveRule, AnnealingRule, BiasController, BiasRule, LossTerm, SparsityRule, named
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


def test_a_bias_rule_gives_a_router_the_bias_that_it_steers_and_keeps_one_that_is_there():
    layer = MoELayer(TopKRouter(4, 3, top_k=2), MLPExperts(3, 4, 2)).bfloat16()
    rule = BiasRule(rate=0.125)
    rule.prepare(layer)
    assert layer.router.bias_E.dtype == torch.float32
    assert layer.state_dict()["router.bias_E"].tolist() == [0.0, 0.0, 0.0]
    (controller,) = rule.build([layer])
    controller.step(torch.tensor([6, 1, 1]))
    moved = layer.router.bias_E.clone()
    assert moved.any()
    rule.prepare(layer)
    assert torch.equal(layer.router.bias_E, moved)


def test_a_term_by_name_has_the_number_that_it_was_given():
    for name in TERMS:
        (term,) = named({name: 1.5})
        if isinstance(term, LossTerm):
            assert (term.name, term.coefficient, term.adaptive) == (name, 1.5, name.startswith("adaptive-"))
    assert named({"bias": 0.02, "drops": 0.03, "sparsity": 1.4, "annealing": 5}) == (
        BiasRule(rate=0.02),
        AdaptiveRule(alpha_max=0.03),
        SparsityRule(factor=1.4),
        AnnealingRule(),
    )


@pytest.mark.parametrize("value", [True, -0.5, float("inf"), float("nan"), "0.1", None])
def test_the_number_of_a_term_is_finite_and_at_least_0(value):
    with pytest.raises(ConfigError) as error:
        named({"switch": 0.1, "z": value})
    assert str(error.value) == (
        f"The number of balance term z must be finite and at least 0, got {value!r}. Give a loss its coefficient, a "
        "controller its rate."
    )
