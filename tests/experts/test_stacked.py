"""Gated and plain experts in stacked weights."""

import pytest
import torch

from moesaic import ConfigError, Plan, Routing, ShapeError
from moesaic.experts import GatedExperts, MLPExperts
from moesaic.kernels.activations import gelu, relu_squared
from tests.kernels.case import IN_FLOAT64
from tests.oracle import experts as oracle
from tests.oracle.router import Row, Table
from tests.tolerances import assert_close

KINDS = [GatedExperts, MLPExperts]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def plan_for(num_tokens: int, num_experts: int, top_k: int = 2) -> tuple[Plan, Table]:
    expert_TK = torch.rand(num_tokens, num_experts).argsort(dim=-1)[:, :top_k]
    scores_TE = torch.zeros(num_tokens, num_experts, dtype=torch.float64)
    weight_TK = torch.rand(num_tokens, top_k, dtype=torch.float64)
    routing = Routing.from_choices(expert_TK, weight_TK, scores_TE, scores_TE)
    columns = (routing.token_N.tolist(), routing.choice_N.tolist(), routing.expert_N.tolist(), routing.weight_N)
    table = Table(rows=[Row(*line) for line in zip(*columns, strict=True)])
    return Plan.from_kept(routing, routing.kept_N), table


@pytest.mark.parametrize("kernel", ["auto", *IN_FLOAT64], ids=lambda kernel: getattr(kernel, "name", kernel))
@pytest.mark.parametrize("act", [gelu, relu_squared], ids=lambda act: act.name)
@every_kind
def test_experts_agree_with_plain_loops(kind, act, kernel):
    experts = kind(4, 5, 3, activation=act, kernel=kernel).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    plan, table = plan_for(11, 4)
    x_TD = torch.randn(11, 5, dtype=torch.float64)
    gate = getattr(experts, "gate_EDF", None)
    expected = oracle.combine(x_TD, table, [True] * 22, gate, experts.up_EDF, experts.down_EFD, act.name)
    assert_close(experts(x_TD, plan), expected, "outputs")


@every_kind
def test_fresh_weights_are_drawn_by_the_init_with_each_weight_s_fan_in(kind):
    fan_ins = {}

    def draw(weight, fan_in):
        fan_ins[tuple(weight.shape)] = fan_in
        weight.data.fill_(1)

    experts = kind(4, 5, 3, init=draw)
    assert fan_ins == {(4, 5, 3): 5, (4, 3, 5): 3}
    assert all((parameter == 1).all() for parameter in experts.parameters())
    assert float(kind(4, 50, 60).up_EDF.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert experts.num_experts == 4


@every_kind
def test_tokens_of_another_width_are_refused(kind):
    plan, _ = plan_for(7, 4)
    with pytest.raises(ShapeError) as error:
        kind(4, 5, 3)(torch.zeros(7, 6), plan)
    assert str(error.value) == "x_TD must be (tokens, 5), got (7, 6). Build experts of the tokens' width."


@every_kind
def test_a_plan_for_another_number_of_experts_is_refused(kind):
    plan, _ = plan_for(7, 6)
    with pytest.raises(ShapeError) as error:
        kind(4, 5, 3)(torch.zeros(7, 5), plan)
    assert str(error.value) == (
        "the plan must be for 4 experts, got one for 6. Build router and experts with the same num_experts."
    )


@every_kind
def test_an_unknown_kernel_is_refused(kind):
    plan, _ = plan_for(7, 4)
    with pytest.raises(ConfigError) as error:
        kind(4, 5, 3, kernel="fast")(torch.zeros(7, 5), plan)
    assert (
        str(error.value)
        == "kernel must be auto or one of grouped_mm, triton, native, torch, reference, got 'fast'. Use auto if unsure."
    )
