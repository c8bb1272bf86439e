from dataclasses import replace

import pytest
import torch

from moesaic import ConfigError, Routing
from moesaic.dispatch import DeviceCapacity


def routing_of(expert_TK, weight_TK, *, device_E=(0, 0, 1, 1), valid_T=None, sequence_T=None) -> Routing:
    expert_TK, weight_TK = torch.as_tensor(expert_TK), torch.as_tensor(weight_TK)
    zeros_TE = torch.zeros(len(expert_TK), len(device_E))
    mask = None if valid_T is None else torch.tensor(valid_T)
    routing = Routing.from_choices(expert_TK, weight_TK, zeros_TE, zeros_TE, mask)
    sequence_T = None if sequence_T is None else torch.tensor(sequence_T)
    return replace(routing, extras={"device_E": torch.tensor(device_E)}, sequence_T=sequence_T)


def test_a_device_keeps_its_heaviest_rows_whichever_of_its_experts_they_go_to():
    # Four rows for two devices: two each. Device 0 was given four.
    routing = routing_of([[0], [1], [0], [1]], [[0.1], [0.4], [0.3], [0.2]])
    plan = DeviceCapacity(1.0)(routing)
    assert plan.kept_N.tolist() == [False, True, True, False]
    assert plan.load_E.tolist() == [1, 1, 0, 0]
    assert int(DeviceCapacity(1.0).capacity(routing)) == 2


def test_of_equal_rows_the_earliest_tokens_stay():
    routing = routing_of([[0], [1], [0], [1]], [[0.5]] * 4)
    assert DeviceCapacity(1.0)(routing).kept_N.tolist() == [True, True, False, False]


def test_a_token_may_lose_one_row_and_keep_another():
    routing = routing_of([[0, 1], [0, 2]], [[0.4, 0.1], [0.3, 0.2]])
    assert DeviceCapacity(1.0)(routing).kept_N.tolist() == [True, False, True, True]


@pytest.mark.parametrize(("factor", "kept"), [(0.5, 1), (1.0, 2), (1.5, 3), (1.6, 4), (4.0, 4)])
def test_the_factor_is_relative_to_the_rows_of_balanced_devices(factor, kept):
    routing = routing_of([[0], [1], [0], [1]], [[0.1], [0.4], [0.3], [0.2]])
    assert int(DeviceCapacity(factor)(routing).load_E.sum()) == kept


def test_padding_takes_no_room_and_buys_none():
    routing = routing_of([[0], [1], [0], [1], [0]], [[9.0], [0.4], [0.3], [0.2], [0.1]], valid_T=[False] + [True] * 4)
    assert DeviceCapacity(1.0)(routing).kept_N.tolist() == [False, True, True, False, False]


def test_evaluation_drops_nothing():
    routing = routing_of([[0], [1], [0], [1], [0]], [[0.1]] * 5, valid_T=[True] * 4 + [False])
    assert DeviceCapacity(1.0).eval()(routing).kept_N.tolist() == [True] * 4 + [False]


@pytest.mark.parametrize(
    ("share", "num_sequences", "spared"),
    [
        (0.1, 4, []),
        (0.1, 10, [4]),
        (0.1, 40, [4, 14, 24, 34]),
        (0.3, 10, [1, 4, 8]),
        (0.5, 6, [0, 2, 4]),
        (0.0, 10, []),
        (1.0, 3, [0, 1, 2]),
    ],
)
def test_the_nearest_whole_number_to_a_share_of_the_sequences_loses_nothing(share, num_sequences, spared):
    expert_TK = [[0]] * num_sequences
    falling = [[1.0 - t / 100] for t in range(num_sequences)]
    routing = routing_of(expert_TK, falling, sequence_T=list(range(num_sequences)))
    dispatch = DeviceCapacity(1e-9, never_dropped=share)
    kept = dispatch(routing).kept_N
    assert int(dispatch.capacity(routing)) == 0
    assert kept.nonzero().flatten().tolist() == spared
    assert len(spared) == int(share * num_sequences + 0.5)


@pytest.mark.parametrize(("num_sequences", "spared"), [(44, 31), (45, 32), (46, 32)])
def test_a_share_that_floating_point_falls_short_of_is_rounded_as_it_is_written(num_sequences, spared):
    """45 * 0.7 is 31.499999999999996 in float64, and 31.5 on paper: 32 sequences."""
    routing = routing_of([[0]] * num_sequences, [[1.0]] * num_sequences, sequence_T=list(range(num_sequences)))
    assert int(DeviceCapacity(1e-9, never_dropped=0.7)(routing).kept_N.sum()) == spared


def test_rows_that_always_stay_count_against_the_budget():
    # Five sequences of two tokens, ten rows: the fifth stays; device 0 has room for five rows.
    weight_TK = [[1.0 - t / 100] for t in range(10)]
    routing = routing_of([[0]] * 10, weight_TK, sequence_T=[t // 2 for t in range(10)])
    assert DeviceCapacity(1.0)(routing).kept_N.tolist() == [True] * 3 + [False] * 5 + [True] * 2


def test_a_routing_without_sequences_is_one_that_may_lose_rows():
    routing = routing_of([[0], [1], [0], [1]], [[0.1], [0.4], [0.3], [0.2]])
    assert int(DeviceCapacity(1.0, never_dropped=0.4)(routing).load_E.sum()) == 2
    assert int(DeviceCapacity(1.0, never_dropped=0.5)(routing).load_E.sum()) == 4


def test_no_tokens_make_an_empty_plan():
    nobody = routing_of(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    padding = routing_of([[0, 1]], [[0.5, 0.5]], valid_T=[False])
    for routing in (nobody, padding):
        assert DeviceCapacity(1.0)(routing).load_E.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"factor": 0.0},
            "capacity factor must be positive, got 0.0. Use dispatch.Sort() to drop nothing at all.",
        ),
        (
            {"never_dropped": 1.5},
            "never_dropped must be between 0 and 1, got 1.5. DeepSeek-V2 uses 0.1.",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError) as error:
        DeviceCapacity(**options)
    assert str(error.value) == message
