from functools import partial

import pytest
import torch

from moesaic import ConfigError, Routing
from moesaic.balance import active_share_loss, l1_loss
from moesaic.routers import AnnealedRouter, Cooling, DenseRouter, ReLURouter


def _routing(gates: list[list[float]], top_k: int, valid_T: torch.Tensor | None = None) -> Routing:
    gate_TE = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
    extras = {"top_k": torch.tensor(float(top_k))}
    return Routing.from_mask(gate_TE.detach() > 0, gate_TE, gate_TE, gate_TE, valid_T, extras=extras)


def test_a_worked_example_of_the_load_weighted_norm():
    """Reference 21.4: E / (k T^2) * sum_e G_e n_e = 3 / (1 * 4) * (3 * 2 + 5 * 1 + 0)."""
    routing = _routing([[1.0, 5.0, 0.0], [2.0, 0.0, 0.0]], top_k=1)
    assert float(l1_loss(routing).detach()) == pytest.approx(3 / 4 * (3 * 2 + 5 * 1))
    assert float(l1_loss(routing, load_weighted=False).detach()) == pytest.approx(8 / 2)
    assert float(l1_loss(_routing([[1.0, 5.0, 0.0], [2.0, 0.0, 0.0]], top_k=3)).detach()) == pytest.approx(2.75)


def test_at_the_target_load_the_norm_is_the_plain_one():
    """Reference 21.4: the special case of equal loads."""
    routing = _routing([[1.0, 5.0, 0.0], [0.0, 2.0, 7.0], [4.0, 0.0, 3.0]], top_k=2)
    plain = l1_loss(routing, load_weighted=False)
    assert float(l1_loss(routing).detach()) == pytest.approx(float(plain.detach()))
    assert float(plain.detach()) == pytest.approx(22 / 3)


def test_busy_experts_are_pushed_harder_and_inactive_ones_not_at_all():
    router = ReLURouter(3, 3, top_k=1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]]))
    router(torch.eye(3)).scores_TE.retain_grad()
    routing = router(torch.eye(3))
    routing.scores_TE.retain_grad()
    (gradient_TE,) = torch.autograd.grad(l1_loss(routing), routing.logits_TE)
    # The slope of a gate is E / (k T^2) * n_e = n_e / 3.
    assert gradient_TE.flatten().tolist() == pytest.approx([1, 1 / 3, 0, 1, 0, 0, 1, 0, 0])


def test_padding_counts_nowhere_and_no_token_gives_zero():
    gates, valid_T = [[1.0, 5.0], [2.0, 0.0], [9.0, 9.0]], torch.tensor([True, True, False])
    for loss in (l1_loss, partial(l1_loss, load_weighted=False), active_share_loss):
        padded, alone = loss(_routing(gates, 1, valid_T)), loss(_routing(gates[:2], 1))
        assert float(padded.detach()) == pytest.approx(float(alone.detach()))
        nothing = loss(_routing(gates, 1, torch.zeros(3, dtype=torch.bool)))
        nothing.backward()
        assert float(nothing.detach()) == 0


def test_a_router_without_a_target_is_refused_by_the_load_weighted_norm():
    with pytest.raises(ConfigError) as error:
        l1_loss(DenseRouter(4, 3)(torch.randn(5, 4)))
    assert str(error.value) == (
        "The load-weighted L1 loss needs routing.extras['top_k'], which this routing does not have. It comes from "
        "ReLURouter: use the two together, or another loss."
    )


def test_the_active_share_loss_is_the_number_of_experts_of_a_balanced_mixture():
    """1 for balanced top-1, E for a dense mixture."""
    one = torch.eye(4).tolist() * 2
    assert float(active_share_loss(_routing(one, 1)).detach()) == pytest.approx(1)
    assert float(active_share_loss(_routing([[0.25] * 4] * 8, 1)).detach()) == pytest.approx(4)
    assert float(active_share_loss(_routing([[0.0, 1.0, 0.0, 0.0]] * 8, 1)).detach()) == pytest.approx(4)


def test_the_active_share_loss_is_that_of_the_authors_code():
    """E^2 * mean_e(mean_t gates * mean_t active), reference 12.1."""
    router = AnnealedRouter(5, 6, threshold=0.1, cooling=Cooling(start=0.8)).double()
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(40, 5, dtype=torch.float64))
    active_TE = routing.scores_TE > 0.1
    expected = 36 * ((routing.scores_TE * active_TE).mean(dim=0) * active_TE.double().mean(dim=0)).mean()
    assert float(active_share_loss(routing).detach()) == pytest.approx(float(expected.detach()))
    active_share_loss(routing).backward()
    assert router.weight.grad.abs().max() > 1e-3
