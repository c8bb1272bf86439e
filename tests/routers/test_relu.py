import pytest
import torch

from moesaic import ConfigError, MoELayer
from moesaic.experts import MLPExperts
from moesaic.routers import ReLURouter


def _router(num_experts: int = 6, top_k: int = 2) -> ReLURouter:
    router = ReLURouter(5, num_experts, top_k=top_k).double()
    torch.nn.init.normal_(router.weight, std=0.8)
    return router


def test_an_expert_is_active_where_its_logit_is_positive_and_the_logit_weighs():
    router = ReLURouter(3, 3, top_k=1)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0, -2.0], [3.0, -1.0, -1.0], [-1.0, 0.0, -4.0]]))
    routing = router(torch.eye(3))
    assert list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True)) == [
        (0, 1, 3.0),
        (0, 0, 1.0),
    ]
    assert routing.scores_TE.tolist() == [[1, 3, 0], [0, 0, 0], [0, 0, 0]]
    assert float(routing.extras["top_k"]) == 1
    assert router.experts_per_token == 1


def test_about_half_of_all_experts_are_active_at_first():
    """Reference 21.4."""
    routing = ReLURouter(64, 32, top_k=1)(torch.randn(500, 64))
    assert routing.num_rows / 500 == pytest.approx(16, rel=0.1)


def test_zero_logits_give_no_row_and_a_layer_of_zeros():
    """Reference 21.4."""
    layer = MoELayer(ReLURouter(5, 4, top_k=1), MLPExperts(4, 5, 3))
    torch.nn.init.zeros_(layer.router.weight)
    x_TD = torch.randn(7, 5, requires_grad=True)
    y_TD, routing = layer(x_TD)
    assert routing.num_rows == 0
    assert y_TD.abs().max() == 0
    y_TD.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in layer.parameters())


def test_outputs_are_continuous_where_an_expert_switches_on():
    """Reference 21.4: no jump at a logit of 0, unlike top-k at a tie."""
    layer = MoELayer(_router(), MLPExperts(6, 5, 4).double())
    torch.nn.init.normal_(layer.experts.up_EDF)
    torch.nn.init.normal_(layer.experts.down_EFD)
    start_D = torch.randn(5, dtype=torch.float64)
    path_TD = start_D + torch.linspace(0, 3, 3001, dtype=torch.float64)[:, None] * torch.randn(5, dtype=torch.float64)
    y_TD, routing = layer(path_TD)
    changes = (routing.scores_TE > 0).int().diff(dim=0).abs().sum()
    assert changes > 0
    assert y_TD.diff(dim=0).abs().max() < 0.02 * y_TD.abs().max()


def test_gradients_agree_with_differences_where_no_logit_is_0():
    router = _router()
    x_TD = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    probe_TE = torch.randn(4, 6, dtype=torch.float64)

    def weighed(x_TD, weight):
        table = torch.func.functional_call(router, {"weight": weight}, (x_TD,))
        return (table.weight_N * probe_TE[table.token_N, table.expert_N]).sum()

    assert torch.autograd.gradcheck(weighed, (x_TD, router.weight.detach().clone().requires_grad_()))


def test_a_target_out_of_range_is_refused():
    with pytest.raises(ConfigError) as error:
        ReLURouter(4, 6, top_k=7)
    assert str(error.value) == "top_k must be between 1 and num_experts=6, got 7. Lower top_k, or add experts."
