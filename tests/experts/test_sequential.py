import pytest
import torch
from torch import nn

from moesaic import ConfigError, MoELayer, Plan, Routing, ShapeError
from moesaic.experts import MLPExperts, SequentialExperts
from moesaic.routers import TopKRouter
from tests.experts.test_stacked import plan_for
from tests.tolerances import assert_close


class _FeedForward(nn.Module):
    def __init__(self, up_DF, down_FD):
        super().__init__()
        self.up_DF, self.down_FD = nn.Parameter(up_DF.clone()), nn.Parameter(down_FD.clone())

    def forward(self, x_MD):
        return (x_MD @ self.up_DF).relu() @ self.down_FD


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 63])
def test_modules_one_after_the_other_give_what_stacked_experts_give(num_tokens):
    stacked = MLPExperts(5, 6, 4).double()
    for parameter in stacked.parameters():
        nn.init.normal_(parameter, std=0.5)
    one_by_one = SequentialExperts([_FeedForward(stacked.up_EDF[e].data, stacked.down_EFD[e].data) for e in range(5)])
    plan, _ = plan_for(num_tokens, 5)
    results = []
    for experts in (stacked, one_by_one):
        x_TD = torch.linspace(-1, 1, num_tokens * 6, dtype=torch.float64).view(num_tokens, 6).requires_grad_()
        y_TD = experts(x_TD, plan)
        y_TD.square().sum().backward()
        results.append((y_TD, x_TD.grad))
    assert_close(results[1][0], results[0][0], "outputs")
    assert_close(results[1][1], results[0][1], "gradient of x_TD")
    for name in ("up_EDF", "down_EFD"):
        parts = [getattr(expert, name.replace("E", "", 1)).grad for expert in one_by_one]
        assert_close(torch.stack(parts), getattr(stacked, name).grad, name)


def test_experts_may_differ_in_kind_and_have_no_parameters():
    experts = SequentialExperts([nn.Identity(), nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))])
    layer = MoELayer(TopKRouter(6, 3, top_k=2), experts)
    y_TD, _ = layer(torch.randn(9, 6))
    assert y_TD.shape == (9, 6)
    assert layer.kernel_report() == "SequentialExperts: no kernel, each expert runs as its own module"


def test_tokens_that_reach_no_expert_get_zero_gradients_and_not_none():
    x_TD = torch.randn(4, 6, requires_grad=True)
    nothing = Plan.from_kept(
        Routing.from_choices(
            torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), torch.ones(4, 2), torch.ones(4, 2)
        ),
        torch.zeros(4, dtype=torch.bool),
    )
    y_TD = SequentialExperts([nn.Identity(), nn.Identity()])(x_TD, nothing)
    y_TD.sum().backward()
    assert y_TD.abs().sum() == 0
    assert torch.equal(x_TD.grad, torch.zeros(4, 6))


def test_no_expert_at_all_is_refused():
    with pytest.raises(ConfigError) as error:
        SequentialExperts([])
    assert str(error.value) == "SequentialExperts needs at least one expert, got none. Pass a list of modules."


def test_a_plan_for_another_number_of_experts_is_refused():
    plan, _ = plan_for(3, 5)
    with pytest.raises(ShapeError) as error:
        SequentialExperts([nn.Identity(), nn.Identity()])(torch.zeros(3, 6), plan)
    assert str(error.value) == (
        "the plan must be for 2 experts, got one for 5. Build router and experts with the same num_experts."
    )


def test_an_expert_that_changes_the_width_is_refused():
    plan, _ = plan_for(4, 2)
    with pytest.raises(ShapeError) as error:
        SequentialExperts([nn.Identity(), nn.Linear(6, 9)])(torch.zeros(4, 6), plan)
    assert str(error.value) == (
        "expert 1 must return its rows in the shape it got, (4, 6), got (4, 9). Let every expert map width to width."
    )
