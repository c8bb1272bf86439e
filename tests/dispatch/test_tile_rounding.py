import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic import ConfigError, Routing
from moesaic.dispatch import Sort, TileRounding
from tests.dispatch.test_capacity import routing_of


def _kept_by_loops(routing: Routing, tile: int, least_filled: float) -> list[bool]:
    """Expert by expert: its rows from the heaviest, ties by the earliest, as far as there is room."""
    valid = routing.valid_N.tolist()
    kept = [False] * routing.num_rows
    for expert in range(routing.num_experts):
        mine = [row for row in range(routing.num_rows) if valid[row] and int(routing.expert_N[row]) == expert]
        mine.sort(key=lambda row: (-float(routing.weight_N[row]), row))
        over = len(mine) % tile
        room = len(mine) - over if over < least_filled * tile else len(mine)
        for row in mine[: max(room, tile)]:
            kept[row] = True
    return kept


@pytest.mark.parametrize("least_filled", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 63])
def test_the_rows_kept_are_those_of_plain_loops(num_tokens, tile, least_filled):
    torch.manual_seed(num_tokens)
    expert_TK = torch.rand(num_tokens, 4).argsort(dim=-1)[:, :2]
    weight_TK = torch.randint(0, 4, (num_tokens, 2)) / 4  # few values: ties
    routing = routing_of(expert_TK, num_experts=4, weight_TK=weight_TK, valid_T=torch.rand(num_tokens) > 0.25)
    plan = TileRounding(tile, least_filled=least_filled)(routing)
    assert plan.kept_N.tolist() == _kept_by_loops(routing, tile, least_filled)
    assert int(plan.load_E.sum()) == int(plan.kept_N.sum())
    lost_E = routing.load_E - plan.load_E
    assert (lost_E <= least_filled * tile).all()


def test_the_lightest_rows_of_a_nearly_empty_tile_are_dropped():
    weight_TK = [[0.9], [0.1], [0.5], [0.7], [0.3]]
    routing = routing_of([[0]] * 5, num_experts=2, weight_TK=weight_TK)
    assert TileRounding(4)(routing).kept_N.tolist() == [True, False, True, True, True]
    routing = routing_of([[0]] * 6, num_experts=2, weight_TK=[*weight_TK, [0.2]])
    assert TileRounding(4)(routing).kept_N.all(), "half a tile is kept"


def test_an_expert_with_less_than_one_tile_loses_nothing():
    routing = routing_of([[0], [0], [1]], num_experts=3)
    assert TileRounding(128, least_filled=1)(routing).kept_N.all()


def test_evaluation_drops_nothing():
    routing = routing_of([[0]] * 5, num_experts=2)
    rounding = TileRounding(4)
    assert not rounding(routing).kept_N.all()
    plan, expected = rounding.eval()(routing), Sort()(routing)
    assert torch.equal(plan.kept_N, expected.kept_N)
    assert torch.equal(plan.row_N, expected.row_N)


def test_rounding_asks_the_device_for_nothing():
    with FakeTensorMode():
        scores_TE, expert_TK = torch.rand(9, 3), torch.zeros(9, 2, dtype=torch.int64)
        plan = TileRounding(4)(Routing.from_choices(expert_TK, torch.rand(9, 2), scores_TE, scores_TE))
    assert plan.kept_N.shape == (18,)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError) as error:
        TileRounding(0)
    assert str(error.value) == "tile must be at least 1 row, got 0. Most kernels work on 128."
    with pytest.raises(ConfigError) as error:
        TileRounding(64, least_filled=1.5)
    assert str(error.value) == (
        "least_filled must be from 0 to 1, got 1.5. 0.5 rounds to the nearest tile, downwards only."
    )
