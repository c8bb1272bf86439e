import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.routers import select_top_k
from tests.oracle.router import best

# Few different values, so that ties are common; signed zeros, infinities and numbers one bit apart.
VALUES = [
    -float("inf"),
    -1e38,
    -2.0,
    -1.0000001,
    -1.0,
    -1e-45,
    -0.0,
    0.0,
    1e-45,
    0.5,
    1.0,
    1.0000001,
    1e38,
    float("inf"),
]


@given(st.data())
def test_selection_agrees_with_plain_loops_on_every_tie_zero_and_infinity(data):
    num_experts = data.draw(st.integers(1, 20))
    top_k = data.draw(st.integers(1, num_experts))
    line = data.draw(st.lists(st.sampled_from(VALUES), min_size=num_experts, max_size=num_experts))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        score_TE = torch.tensor([line], dtype=dtype)
        chosen_TK = select_top_k(score_TE, top_k)
        assert chosen_TK.dtype == torch.int64
        assert chosen_TK.tolist() == [best(score_TE[0].tolist(), top_k)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_experts", [16, 64, 256, 1024])
def test_among_equal_scores_the_lowest_indices_come_first_in_order(num_experts, dtype):
    assert select_top_k(torch.full((3, num_experts), 0.25, dtype=dtype), 8).tolist() == [list(range(8))] * 3


def test_torch_topk_breaks_the_same_ties_otherwise_so_that_this_test_means_something():
    assert torch.topk(torch.full((1, 16), 0.25), 4).indices.tolist() != [[0, 1, 2, 3]]


def test_neighbouring_float32_numbers_are_told_apart_at_every_magnitude():
    low_T = torch.tensor([1e-45, 1e-30, 1.0, 12345.678, 3e38, -3e38, -1.0, -1e-30])
    high_T = torch.nextafter(low_T, torch.tensor(float("inf")))
    assert select_top_k(torch.stack([low_T, high_T], dim=1), 1).flatten().tolist() == [1] * 8
    assert select_top_k(torch.stack([high_T, low_T], dim=1), 1).flatten().tolist() == [0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_gives_no_choice(dtype):
    assert select_top_k(torch.empty(0, 5, dtype=dtype), 3).shape == (0, 3)


def test_rows_that_are_not_contiguous_are_read_right():
    score_TE = torch.randn(6, 9).t()
    assert torch.equal(select_top_k(score_TE, 2), select_top_k(score_TE.contiguous(), 2))
