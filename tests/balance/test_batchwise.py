import pytest
import torch

from moesaic import ConfigError, Routing
from moesaic.balance import threshold_loss
from moesaic.routers import BatchwiseRouter


def routing_of(gates: list[list[float]], chosen: list[list[bool]], thresholds: list[float], valid_T=None) -> Routing:
    gate_TE = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
    threshold_E = torch.tensor(thresholds, dtype=torch.float64, requires_grad=True)
    return Routing.from_mask(
        torch.tensor(chosen), gate_TE, gate_TE, gate_TE, valid_T, extras={"threshold_E": threshold_E}
    )


def test_choices_that_agree_cost_nothing():
    routing = routing_of([[0.7, 0.3], [0.4, 0.6]], [[True, False], [False, True]], [0.5, 0.5])
    assert float(threshold_loss(routing).detach()) == 0


def test_each_disagreement_costs_its_distance_from_the_threshold():
    """Token 0 is above expert 0's threshold by 0.2 and was not chosen; token 1 is below expert 1's by 0.1 and was."""
    routing = routing_of([[0.7, 0.3], [0.4, 0.6]], [[False, False], [False, True]], [0.5, 0.7])
    loss = threshold_loss(routing)
    assert float(loss.detach()) == pytest.approx((0.2 + 0.1) / 2)
    gate_TE, threshold_E = routing.scores_TE, routing.extras["threshold_E"]
    gate_grad_TE, threshold_grad_E = torch.autograd.grad(loss, (gate_TE, threshold_E))
    # Descending raises the first threshold and lowers the second; the gates move the other way.
    assert threshold_grad_E.tolist() == pytest.approx([-0.5, 0.5])
    assert gate_grad_TE.tolist() == [pytest.approx([0.5, 0.0]), pytest.approx([0.0, -0.5])]


def test_padding_costs_nothing():
    gates, chosen = [[0.7, 0.3], [0.9, 0.1]], [[True, False], [False, False]]
    routing = routing_of(gates, chosen, [0.5, 0.5], torch.tensor([True, False]))
    assert float(threshold_loss(routing).detach()) == 0


def test_the_loss_teaches_thresholds_that_choose_as_many_as_the_batch_did():
    torch.manual_seed(0)
    router = BatchwiseRouter(6, 4, top_k=1)
    with torch.no_grad():
        router.weight.copy_(torch.randn(4, 6))
    x_TD = torch.randn(400, 6)
    before_E = router.eval()(x_TD).load_E
    router.train()
    optimizer = torch.optim.SGD([router.threshold_E], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        threshold_loss(router(x_TD)).backward()
        optimizer.step()
    assert router(x_TD).load_E.tolist() == [100] * 4
    learnt_E = router.eval()(x_TD).load_E
    assert ((learnt_E - 100).abs() <= 20).all()
    assert ((before_E - 100).abs() > 20).any()
    # On other tokens of the same kind it is a guess, and a good one.
    assert ((router(torch.randn(4000, 6)).load_E / 4000 - 0.25).abs() < 0.06).all()


def test_a_router_without_thresholds_is_refused():
    scores_TE = torch.ones(1, 2)
    with pytest.raises(ConfigError) as error:
        threshold_loss(Routing.from_choices(torch.tensor([[0]]), torch.ones(1, 1), scores_TE, scores_TE))
    assert str(error.value) == (
        "threshold_loss needs routing.extras['threshold_E'], which this routing does not have. It comes from "
        "BatchwiseRouter: use the two together, or another loss."
    )
