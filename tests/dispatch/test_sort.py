import torch

from moesaic.dispatch import Sort
from tests.dispatch.test_capacity import routing_of


def test_sort_keeps_every_row_but_those_of_padding():
    valid_T = torch.tensor([True, False, True])
    plan = Sort()(routing_of([[2, 0], [0, 1], [0, 2]], num_experts=3, valid_T=valid_T))
    assert plan.kept_N.tolist() == [True, True, False, False, True, True]
    assert plan.row_N.tolist() == [1, 4, 0, 5, 2, 3]
    assert plan.token_N.tolist() == [0, 2, 0, 2, 1, 1]
    assert plan.load_E.tolist() == [2, 0, 2]
    assert plan.offset_E.tolist() == [2, 2, 4]


def test_sort_of_nothing_is_a_plan_of_nothing():
    plan = Sort()(routing_of(torch.empty(0, 2, dtype=torch.int64), num_experts=3))
    assert plan.row_N.tolist() == []
    assert plan.offset_E.tolist() == [0, 0, 0]
    assert plan.num_experts == 3


def test_the_plan_s_weights_carry_the_router_s_gradient():
    weight_TK = torch.tensor([[0.2, 0.8], [0.6, 0.4]], requires_grad=True)
    plan = Sort()(routing_of([[1, 0], [0, 1]], num_experts=2, weight_TK=weight_TK))
    (plan.weight_N * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert weight_TK.grad.tolist() == [[3.0, 1.0], [2.0, 4.0]]
