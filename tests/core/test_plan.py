import torch

from moesaic import Plan, Routing


def test_places_are_sorted_by_expert_in_table_order_with_rows_left_out_last():
    expert_TK = torch.tensor([[2, 0], [1, 2], [0, 2]])
    weight_TK = torch.arange(6.0).view(3, 2)
    scores_TE = torch.ones(3, 4)
    routing = Routing.from_choices(expert_TK, weight_TK, scores_TE, scores_TE)
    plan = Plan.from_kept(routing, torch.tensor([True, True, True, False, True, True]))
    assert plan.row_N.tolist() == [1, 4, 2, 0, 5, 3]
    assert plan.token_N.tolist() == [0, 2, 1, 0, 2, 1]
    assert plan.weight_N.tolist() == [1.0, 4.0, 2.0, 0.0, 5.0, 3.0]
    assert plan.load_E.tolist() == [2, 1, 2, 0]
    assert plan.offset_E.tolist() == [2, 3, 5, 5]
    assert plan.num_experts == 4


def test_a_plan_of_nothing_kept_has_no_place_before_its_end():
    scores_TE = torch.ones(2, 3)
    routing = Routing.from_choices(torch.tensor([[1], [2]]), torch.ones(2, 1), scores_TE, scores_TE)
    plan = Plan.from_kept(routing, torch.zeros(2, dtype=torch.bool))
    assert plan.offset_E.tolist() == [0, 0, 0]
    assert plan.row_N.tolist() == [0, 1]


def test_the_plan_of_some_experts_has_their_rows_alone():
    expert_TK = torch.tensor([[2, 0], [1, 2], [0, 2]])
    weight_TK = torch.arange(6.0).view(3, 2)
    scores_TE = torch.ones(3, 4)
    routing = Routing.from_choices(expert_TK, weight_TK, scores_TE, scores_TE)
    plan = Plan.from_kept(routing, torch.tensor([True, True, True, False, True, True]))
    part = plan.only(1, 3)
    assert part.row_N.tolist() == [2, 0, 5]
    assert part.token_N.tolist() == [1, 0, 2]
    assert part.weight_N.tolist() == [2.0, 0.0, 5.0]
    assert part.load_E.tolist() == [1, 2]
    assert part.offset_E.tolist() == [1, 3]
    assert part.kept_N.tolist() == [True, False, True, False, False, True]
    assert [plan.only(e, e + 1).row_N.tolist() for e in range(4)] == [[1, 4], [2], [0, 5], []]
    assert plan.only(2, 2).num_experts == 0
    assert plan.only(0, 4).row_N.tolist() == plan.row_N.tolist()[:5]
