import pytest
import torch

from moesaic import ConfigError, Routing
from moesaic.dispatch import Capacity, Sort
from tests.oracle import dispatch as oracle
from tests.oracle.router import Row, Table


def routing_of(expert_TK, *, num_experts, weight_TK=None, valid_T=None) -> Routing:
    expert_TK = torch.as_tensor(expert_TK)
    weight_TK = torch.ones(expert_TK.shape) if weight_TK is None else torch.as_tensor(weight_TK)
    scores_TE = torch.full((expert_TK.shape[0], num_experts), 1 / num_experts)
    return Routing.from_choices(expert_TK, weight_TK, scores_TE, scores_TE, valid_T)


def table_of(routing: Routing) -> Table:
    columns = (routing.token_N.tolist(), routing.choice_N.tolist(), routing.expert_N.tolist(), routing.weight_N)
    return Table(rows=[Row(*line) for line in zip(*columns, strict=True)])


@pytest.mark.parametrize("drop", ["position", "score"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1, 2.0])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 2), (7, 3), (63, 1), (63, 3)])
def test_the_rows_kept_are_those_of_plain_loops(num_tokens, top_k, factor, drop):
    for seed in range(5):
        torch.manual_seed(seed)
        expert_TK = torch.rand(num_tokens, 5).argsort(dim=-1)[:, :top_k]
        weight_TK = torch.randint(0, 4, (num_tokens, top_k)) / 4  # few values: ties
        valid_T = torch.rand(num_tokens) > 0.25
        routing = routing_of(expert_TK, num_experts=5, weight_TK=weight_TK, valid_T=valid_T)
        plan = Capacity(factor, minimum=1, drop=drop)(routing)
        expected = oracle.keep_by_capacity(
            table_of(routing), valid_T.tolist(), num_experts=5, factor=factor, minimum=1, drop=drop
        )
        assert plan.kept_N.tolist() == expected
        assert plan.load_E.sum() == sum(expected)


def test_the_third_token_of_a_full_expert_is_dropped():
    """Reference 5.6, example 3: six tokens, three experts, factor 1."""
    routing = routing_of([[0], [0], [0], [1], [2], [2]], num_experts=3)
    dispatch = Capacity(1.0, minimum=0)
    assert int(dispatch.capacity(routing)) == 2
    assert dispatch(routing).kept_N.tolist() == [True, True, False, True, True, True]


def test_all_first_choices_are_served_before_any_second_choice():
    routing = routing_of([[0, 1], [1, 0], [0, 1]], num_experts=2)
    assert Capacity(2 / 3, minimum=0)(routing).kept_N.tolist() == [True, True, True, False, True, False]


def test_dropping_by_score_keeps_the_heaviest_rows_then_the_earliest():
    routing = routing_of([[0], [0], [0], [0]], num_experts=2, weight_TK=[[0.5], [0.9], [0.5], [0.5]])
    assert Capacity(1.0, minimum=0, drop="score")(routing).kept_N.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "factor", "expected"),
    [
        (50, 1, 1.1, 55),  # 55.00000000000001 in floating point
        (50, 10, 1.1, 6),  # 5.5
        (64, 8, 1.25, 10),
        (63, 8, 1.25, 10),
        (65, 8, 1.25, 11),
        (1, 8, 1.0, 1),
        (0, 8, 1.0, 0),
        (4096, 8, 1.0, 512),
    ],
)
def test_capacity_is_the_ceiling_of_factor_times_rows_over_experts(num_rows, num_experts, factor, expected):
    routing = routing_of(torch.zeros(num_rows, 1, dtype=torch.int64), num_experts=num_experts)
    assert int(Capacity(factor, minimum=0).capacity(routing)) == expected
    assert oracle.capacity(num_rows, num_experts, factor, 0) == expected


def test_capacity_counts_the_rows_of_tokens_that_are_not_padding():
    valid_T = torch.tensor([True] * 6 + [False] * 10)
    routing = routing_of(torch.zeros(16, 2, dtype=torch.int64), num_experts=4, valid_T=valid_T)
    assert int(Capacity(1.0, minimum=0).capacity(routing)) == 3


def test_evaluation_has_its_own_factor_and_training_s_unless_given():
    routing = routing_of(torch.zeros(8, 1, dtype=torch.int64), num_experts=2)
    both, one = Capacity(1.0, eval_factor=2.0, minimum=0), Capacity(1.5, minimum=0)
    assert (int(both.capacity(routing)), int(both.eval().capacity(routing))) == (4, 8)
    assert (int(one.capacity(routing)), int(one.eval().capacity(routing))) == (6, 6)


def test_a_small_batch_loses_nothing_below_the_minimum():
    routing = routing_of([[0], [0], [0], [0], [0]], num_experts=8)
    assert Capacity(1.0, minimum=4)(routing).kept_N.tolist() == [True] * 4 + [False]


def test_sort_and_a_large_enough_capacity_make_the_same_plan():
    routing = routing_of(torch.rand(20, 5).argsort(dim=-1)[:, :2], num_experts=5)
    for drop in ("position", "score"):
        ours, theirs = Sort()(routing), Capacity(5.0, drop=drop)(routing)
        for name in ("row_N", "token_N", "weight_N", "load_E", "offset_E", "kept_N"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"factor": -1.5},
            "capacity factor must be positive, got -1.5. Use dispatch.Sort() to drop nothing at all.",
        ),
        (
            {"factor": 1.0, "eval_factor": 0},
            "capacity eval_factor must be positive, got 0. Use dispatch.Sort() to drop nothing at all.",
        ),
        ({"minimum": -3}, "capacity minimum must be at least 0, got -3. Mesh TensorFlow uses 4."),
        ({"drop": "random"}, "drop must be 'position' or 'score', got 'random'. Switch and GShard use 'position'."),
    ],
)
def test_a_capacity_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        Capacity(**arguments)
    assert str(error.value) == message
