from dataclasses import replace

import pytest
import torch

from moesaic import Routing
from moesaic.balance import global_batch_loss, switch_loss
from moesaic.routers import TopKRouter


def group(expert: int, probability_E: list[float], num_tokens: int = 5) -> Routing:
    scores_TE = torch.tensor([probability_E] * num_tokens, dtype=torch.float64)
    expert_TK = torch.full((num_tokens, 1), expert)
    return Routing.from_choices(expert_TK, torch.ones(num_tokens, 1), scores_TE.log(), scores_TE)


def test_two_groups_that_mirror_each_other_cost_1_8_alone_and_1_together():
    """Reference 17.4, example 1."""
    groups = [group(0, [0.9, 0.1]), group(1, [0.1, 0.9])]
    assert [float(switch_loss(routing)) for routing in groups] == pytest.approx([1.8, 1.8])
    load_E = sum(routing.load_E for routing in groups)
    together = [float(global_batch_loss(routing, load_E)) for routing in groups]
    assert sum(together) / 2 == pytest.approx(1.0)


def test_without_a_global_load_it_is_the_loss_of_the_batch():
    """Reference 17.4, example 2."""
    router = TopKRouter(4, 6, top_k=3, init=lambda weight, _: torch.nn.init.normal_(weight)).double()
    routing = router(torch.randn(20, 4, dtype=torch.float64), torch.rand(20) > 0.3)
    expected = float(switch_loss(routing).detach())
    assert float(global_batch_loss(routing).detach()) == pytest.approx(expected, rel=1e-12)
    assert float(global_batch_loss(routing, routing.load_E).detach()) == pytest.approx(expected, rel=1e-12)
    assert expected > 1.05


def _halves_and_whole() -> tuple[TopKRouter, list[Routing], Routing]:
    router = TopKRouter(4, 6, top_k=2, init=lambda weight, _: torch.nn.init.normal_(weight)).double()
    x_TD = torch.randn(24, 4, dtype=torch.float64)
    return router, [router(x_TD[:12]), router(x_TD[12:])], router(x_TD)


def test_the_mean_over_ranks_is_the_loss_of_the_concatenated_batch_in_value_and_gradient():
    """Reference 17.4, example 3."""
    router, parts, whole = _halves_and_whole()
    load_E = sum(part.load_E for part in parts)
    mean = sum(global_batch_loss(part, load_E) for part in parts) / 2
    assert float(mean.detach()) == pytest.approx(float(switch_loss(whole).detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(mean, router.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(switch_loss(whole), router.weight, retain_graph=True)
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-15)
    alone = sum(switch_loss(part) for part in parts) / 2
    assert float(alone.detach()) != pytest.approx(float(mean.detach()), rel=1e-3)


def test_the_last_micro_batch_reads_the_load_of_all_of_them_from_what_was_stamped():
    """Reference 17.4, example 4."""
    _, parts, whole = _halves_and_whole()
    buffer_E = torch.zeros(6, dtype=torch.int64)
    for part in parts:
        buffer_E = buffer_E + part.load_E
        stamped = replace(part, extras={"global_load_E": buffer_E})
    share_E = whole.load_E / whole.load_E.sum()
    expected = 6 * float((share_E * parts[1].probability_TE.mean(dim=0)).sum().detach())
    assert float(global_batch_loss(stamped).detach()) == pytest.approx(expected, rel=1e-6)


def test_the_load_has_no_gradient_and_an_empty_one_costs_nothing():
    scores_TE = torch.full((3, 4), 0.25, requires_grad=True)
    expert_TK = torch.zeros(3, 1, dtype=torch.int64)
    routing = Routing.from_choices(expert_TK, torch.ones(3, 1), scores_TE.log(), scores_TE)
    load_E = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    global_batch_loss(routing, load_E).backward()
    assert load_E.grad is None
    assert float(global_batch_loss(routing, torch.zeros(4)).detach()) == 0
