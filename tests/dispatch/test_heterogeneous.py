from dataclasses import replace

import pytest
import torch

from moesaic import ConfigError, Routing
from moesaic.dispatch import HeterogeneousCapacity


def _routing(expert_TK: torch.Tensor, num_ffn: int, num_special: int, tau: float, valid_T=None) -> Routing:
    num_experts = num_ffn + num_special
    scores_TE = torch.full((expert_TK.shape[0], num_experts), 1 / num_experts)
    routing = Routing.from_choices(expert_TK, torch.ones(expert_TK.shape), scores_TE, scores_TE, valid_T)
    return replace(routing, extras={"eta_E": torch.tensor([1.0] * num_ffn + [tau] * num_special)})


def test_the_shares_of_the_worked_example():
    """Reference 18.6, example 1: 100 rows, 8 + 4 experts, tau 0.75, gamma 1.1."""
    routing = _routing(torch.randint(12, (100, 1)), 8, 4, 0.75)
    capacity = HeterogeneousCapacity(1.1)
    share_E = capacity.share_E(routing)
    assert share_E.tolist() == pytest.approx([8.25] * 8 + [11.0] * 4)
    assert float(share_E.sum()) == pytest.approx(1.1 * 100)
    assert capacity.capacity(routing).tolist() == [9] * 8 + [11] * 4


def test_equal_experts_share_alike():
    """Reference 18.6, example 2."""
    routing = _routing(torch.randint(4, (20, 2)), 2, 2, 1.0)
    assert HeterogeneousCapacity(1.0).capacity(routing).tolist() == [10] * 4


def test_which_rows_are_dropped_is_known_row_by_row():
    """First choices before second ones, then the earliest tokens; padding takes no place and counts for none."""
    expert_TK = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 2], [0, 2]])
    valid_T = torch.tensor([True, True, True, False, True])
    routing = _routing(expert_TK, 2, 1, 0.5, valid_T)
    dispatch = HeterogeneousCapacity(1.0)
    # 8 rows; shares 2, 2, 4. Expert 0: tokens 0 and 2 by first choice. Expert 1: token 1, then token 0's second choice.
    assert dispatch.capacity(routing).tolist() == [2, 2, 4]
    plan = dispatch(routing)
    assert plan.kept_N.view(5, 2).tolist() == [
        [True, True],
        [True, False],
        [True, False],
        [False, False],
        [False, True],
    ]
    assert plan.load_E.tolist() == [2, 2, 1]


def test_padding_that_comes_first_takes_nobody_s_place():
    routing = _routing(torch.tensor([[0], [0], [1]]), 2, 1, 0.5, torch.tensor([False, True, True]))
    dispatch = HeterogeneousCapacity(1.0)
    assert dispatch.capacity(routing).tolist() == [1, 1, 1]
    assert dispatch(routing).kept_N.tolist() == [False, True, True]


def test_evaluation_drops_nothing_unless_told_to():
    routing = _routing(torch.zeros(10, 1, dtype=torch.int64), 2, 1, 0.5)
    assert int(HeterogeneousCapacity(0.5)(routing).load_E[0]) < 10
    assert HeterogeneousCapacity(0.5).eval()(routing).load_E.tolist() == [10, 0, 0]
    assert int(HeterogeneousCapacity(9.0, eval_factor=0.5).eval()(routing).load_E[0]) < 10


def test_a_minimum_keeps_small_batches_whole():
    routing = _routing(torch.zeros(3, 1, dtype=torch.int64), 2, 1, 0.5)
    assert HeterogeneousCapacity(0.1, minimum=3)(routing).kept_N.all()


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_hardly_any_token_is_no_trouble(num_tokens):
    routing = _routing(torch.zeros(num_tokens, 2, dtype=torch.int64), 2, 1, 0.5)
    assert HeterogeneousCapacity()(routing).kept_N.shape == (2 * num_tokens,)


def test_impossible_numbers_and_a_router_of_like_experts_are_refused():
    for options, message in (
        ({"factor": 0.0}, "capacity factor must be positive, got 0.0. Use dispatch.Sort() to drop nothing at all."),
        (
            {"eval_factor": -1.5},
            "capacity eval_factor must be positive, got -1.5. Use dispatch.Sort() to drop nothing at all.",
        ),
        ({"minimum": -2}, "capacity minimum must be at least 0, got -2. MoE++ names none: 0."),
    ):
        with pytest.raises(ConfigError) as error:
            HeterogeneousCapacity(**options)
        assert str(error.value) == message
    routing = replace(_routing(torch.zeros(3, 1, dtype=torch.int64), 2, 1, 0.5), extras={})
    with pytest.raises(ConfigError) as error:
        HeterogeneousCapacity()(routing)
    assert str(error.value) == (
        "HeterogeneousCapacity needs routing.extras['eta_E'], which this routing does not have. It comes from "
        "routers.ResidualRouter: use the two together, or another loss."
    )
