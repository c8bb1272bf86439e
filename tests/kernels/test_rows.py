"""Rows as experts work on them: filled up to round numbers where that pays, and no filler in any sum."""

import pytest
import torch

from moesaic import Plan
from moesaic.kernels.grouped_ffn.rows import Rows, _rounded


def _plan(expert, token, weight, num_experts, kept=None):
    expert_N = torch.tensor(expert)
    kept_N = torch.ones(len(expert), dtype=torch.bool) if kept is None else torch.tensor(kept)
    return Plan.from_rows(expert_N, torch.tensor(token), torch.tensor(weight), num_experts, kept_N)


def test_each_octave_has_thirty_two_sizes_and_filler_stays_below_a_thirty_second():
    for octave in range(5, 13):
        sizes = {_rounded(rows) for rows in range(2**octave + 1, 2 ** (octave + 1) + 1)}
        assert len(sizes) == 32
    assert all(0 <= _rounded(rows) - rows < max(1, rows / 32) for rows in range(1, 5000))
    assert [_rounded(rows) for rows in (0, 1, 17, 33, 101, 127, 1000)] == [0, 1, 17, 33, 102, 128, 1008]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gathering_then_adding_up_is_each_tokens_own_sum(dtype):
    generator = torch.Generator().manual_seed(0)
    num_tokens, top_k, num_experts = 151, 3, 2
    token = [t for t in range(num_tokens) for _ in range(top_k)]
    expert = torch.randint(num_experts, (len(token),), generator=generator).tolist()
    weight = torch.rand(len(token), generator=generator).tolist()
    kept = (torch.rand(len(token), generator=generator) > 0.3).tolist()
    plan = _plan(expert, token, weight, num_experts, kept)
    rows = Rows.of(plan, num_tokens, dtype)
    assert rows.num_rows > sum(kept) if dtype == torch.bfloat16 else rows.num_rows == sum(kept)
    x_TD = torch.randn(num_tokens, 4, generator=generator).to(dtype)
    x_TD[:, 1] = 1
    x_ND = rows.gather(x_TD)
    assert x_ND[rows.filler_N].abs().sum() == 0
    # What experts leave in rows of filler must not matter.
    x_ND[rows.filler_N] = float("nan")
    count_T = torch.zeros(num_tokens).index_add_(0, torch.tensor(token), torch.tensor(kept).float())
    share_T = torch.zeros(num_tokens).index_add_(0, torch.tensor(token), torch.tensor(kept) * torch.tensor(weight))
    bits = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(rows.sum(x_ND), (x_TD.float() * count_T[:, None]).to(dtype), rtol=bits, atol=0)
    weighed = rows.sum(x_ND, rows.weight_N)
    torch.testing.assert_close(weighed, (x_TD.float() * share_T[:, None]).to(dtype), rtol=bits, atol=0)


def test_weights_are_not_rounded_to_the_rows_dtype():
    # Rounded to bfloat16 the two weights would be equal, and their rows would cancel.
    rows = Rows.of(_plan([0, 1], [0, 0], [1 + 2.0**-10, 1.0], 2), 1, torch.bfloat16)
    y_ND = torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16)
    assert float(rows.sum(y_ND, rows.weight_N)) == 2.0**-10
    assert float(rows.sum(y_ND, rows.weight_N.bfloat16())) == 0


def test_rows_that_no_expert_takes_are_nowhere():
    rows = Rows.of(_plan([0, 1, 1], [0, 1, 2], [1.0, 1.0, 1.0], 3, [True, False, True]), 3, torch.float32)
    assert rows.experts == [0, 1]
    assert rows.sizes == [1, 1]
    assert rows.token_N.tolist() == [0, 2]
    assert rows.sum(torch.ones(2, 1)).flatten().tolist() == [1, 0, 1]
