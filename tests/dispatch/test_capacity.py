from dataclasses import replace

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


def random_routing(num_tokens: int, top_k: int, seed: int) -> Routing:
    """Padding, ties in weight, sequences of unequal length with gaps in their names."""
    torch.manual_seed(seed)
    routing = routing_of(
        torch.rand(num_tokens, 5).argsort(dim=-1)[:, :top_k],
        num_experts=5,
        weight_TK=torch.randint(0, 4, (num_tokens, top_k)) / 4,
        valid_T=torch.rand(num_tokens) > 0.25,
    )
    return replace(routing, sequence_T=torch.randint(3, 7, (num_tokens,)) * 2)


@pytest.mark.parametrize("per", ["row", "token"])
@pytest.mark.parametrize("drop", ["position", "score", "random"])
@pytest.mark.parametrize("group", ["batch", "sequence", 1, 4, 1000])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 2), (7, 3), (63, 3)])
def test_the_rows_kept_within_groups_are_those_of_plain_loops(num_tokens, top_k, group, drop, per):
    for seed in range(3):
        routing = random_routing(num_tokens, top_k, seed)
        valid = routing.valid_T.tolist()
        groups = {"batch": [0] * num_tokens, "sequence": routing.sequence_T.tolist()}.get(group)
        for training in (True, False):
            dispatch = Capacity(0.7, eval_factor=1.1, minimum=1, drop=drop, group=group, per=per).train(training)
            torch.manual_seed(99)
            plan = dispatch(routing)
            torch.manual_seed(99)
            expected = oracle.keep_by_capacity(
                table_of(routing),
                valid,
                num_experts=5,
                factor=0.7 if training else 1.1,
                minimum=1,
                drop="position" if drop == "random" and not training else drop,
                groups=oracle.groups_of(valid, group) if groups is None else groups,
                per=per,
                drawn=torch.rand(num_tokens, 5).tolist(),
            )
            assert plan.kept_N.tolist() == expected


def test_tokens_compete_only_within_their_group_and_each_group_has_room_of_its_own():
    """Six tokens want expert 0; two sequences of four and two."""
    routing = replace(routing_of([[0]] * 6, num_experts=2), sequence_T=torch.tensor([9, 9, 9, 9, 4, 4]))
    batch, sequence = Capacity(1.0, minimum=0), Capacity(1.0, minimum=0, group="sequence")
    neighbours = Capacity(1.0, minimum=0, group=2)
    assert batch(routing).kept_N.tolist() == [True, True, True, False, False, False]
    assert sequence(routing).kept_N.tolist() == [True, True, False, False, True, False]
    assert neighbours(routing).kept_N.tolist() == [True, False, True, False, True, False]
    assert int(batch.capacity(routing)) == 3
    assert sequence.capacity(routing).tolist() == [1, 2]  # by the number of the sequence
    assert neighbours.capacity(routing).tolist() == [1, 1, 1]


def test_padding_between_tokens_does_not_shift_the_groups():
    valid_T = torch.tensor([True, False, True, False, True, True])
    routing = routing_of([[0]] * 6, num_experts=2, valid_T=valid_T)
    assert Capacity(1.0, minimum=0, group=2)(routing).kept_N.tolist() == [True, False, False, False, True, False]


def test_a_routing_that_names_no_sequences_is_one_group():
    routing = routing_of([[0]] * 6, num_experts=2)
    assert Capacity(1.0, minimum=0, group="sequence")(routing).kept_N.tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("factor", "capacity"), [(1.25, 5), (2.0, 8)])
def test_a_factor_per_token_leaves_out_how_many_experts_each_takes(factor, capacity):
    """Reference 0.5: with top-2, 1.25 per token has room for 1.25 S / E of up to 2 S / E rows."""
    routing = routing_of([[t % 4, (t + 1) % 4] for t in range(16)], num_experts=4)
    assert int(Capacity(factor, minimum=0, per="token").capacity(routing)) == capacity
    assert int(Capacity(factor / 2, minimum=0).capacity(routing)) == capacity
    dropped = 32 - int(Capacity(factor, minimum=0, per="token")(routing).kept_N.sum())
    assert dropped == 32 - 4 * capacity


def test_random_dropping_keeps_any_row_alike_in_training_and_the_earliest_in_evaluation():
    routing = routing_of([[0]] * 8, num_experts=2)
    dispatch = Capacity(0.5, minimum=0, drop="random")
    count_N = sum(dispatch(routing).kept_N.int() for _ in range(2000))
    # Two of eight places: each row is kept with 0.25, four deviations are 4 * sqrt(0.25 * 0.75 / 2000) = 0.039.
    assert ((count_N / 2000 - 0.25).abs() < 0.039).all()
    state = torch.get_rng_state()
    assert dispatch.eval()(routing).kept_N.tolist() == [True] * 2 + [False] * 6
    assert torch.equal(torch.get_rng_state(), state)


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
        (
            {"drop": "worst"},
            "drop must be 'position', 'score' or 'random', got 'worst'. Switch and GShard use 'position'.",
        ),
        (
            {"group": "device"},
            "group must be 'batch', 'sequence' or a number of tokens, got 'device'. "
            "Mesh TensorFlow uses groups of 1024.",
        ),
        (
            {"group": 0},
            "group must be 'batch', 'sequence' or a number of tokens, got 0. Mesh TensorFlow uses groups of 1024.",
        ),
        ({"per": "choice"}, "per must be 'row' or 'token', got 'choice'. GShard and ST-MoE count by 'token'."),
    ],
)
def test_a_capacity_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        Capacity(**arguments)
    assert str(error.value) == message
